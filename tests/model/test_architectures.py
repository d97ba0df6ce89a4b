"""Every architecture of the installed transformers trains as in plain transformers, or is refused by name."""

import pytest
import transformers
from support.architecture_checks import PAGE, check, write_row
from support.architectures import KINDS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_lists_the_outcome_of_every_type(kind, tmp_path_factory):
    written = PAGE.read_text("utf-8")
    assert f"transformers {transformers.__version__} " in written, "make architectures"
    _, _, table = written.partition(f"\n## {kind}\n")
    for model_type in KINDS[kind].types:
        found = check(kind, model_type, tmp_path_factory.mktemp(model_type))
        assert not any(what.startswith(("traceback", "differs")) for what in found.values()), (model_type, found)
        assert f"\n{write_row(kind, model_type, found)}\n" in table, (model_type, found)
