"""The notebook runs from its first cell to its last, and is saved with what it prints."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "python.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def saved(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"])


def test_the_notebook_is_saved_after_all_its_cells_ran_in_order() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    for cell in CELLS:
        assert {output.get("name") for output in cell["outputs"]} <= {"stdout"}, "no warnings, no errors"
        assert bool(saved(cell)) == ("print(" in "".join(cell["source"]))
        assert not re.search(r"(^|\s)/\w+/", saved(cell)), "no paths of a machine"


@pytest.mark.slow
def test_the_notebook_tunes_a_model_and_prints_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the first word of each line: another machine has other digits and answers."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in CELLS:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec("".join(cell["source"]), names)
        now, before = ([line.split()[:1] for line in text.splitlines()] for text in (printed.getvalue(), saved(cell)))
        assert now == before
    assert names["run"].scores["tuned"]["loss"] < names["run"].scores["base"]["loss"]
