"""Arrow columns are those of `pyarrow.array`, and making them imports no pandas."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from llmtune.data.arrow_columns import number_column, text_column


@pytest.mark.parametrize("texts", [[], ["a", "", "bc"], ["é", "日本", "a"], [None, None], ["a", None, "日"]], ids=repr)
def test_a_text_column_equals_that_of_pyarrow(texts):
    assert text_column(texts).equals(pa.array(texts, pa.string()))


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64, np.float32, np.uint8])
def test_a_number_column_equals_that_of_pyarrow(kind):
    numbers = np.arange(10, dtype=kind)[::2]  # not contiguous
    assert number_column(numbers).equals(pa.array(numbers))


def test_a_check_of_small_rows_does_not_import_pandas():
    code = (
        "import sys\nfrom llmtune.cli.app import main\nsys.argv = ['llmtune', 'recipes', 'check', 'chat']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'numpy' in sys.modules, 'rows were prepared'\nassert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
