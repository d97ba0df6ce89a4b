"""The notebook runs from its first cell to its last."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "python.ipynb"


@pytest.mark.slow
def test_the_notebook_tunes_a_model_and_both_models_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed, names = io.StringIO(), {}
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    with contextlib.redirect_stdout(printed):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    assert names["run"].scores["tuned"]["loss"] < names["run"].scores["base"]["loss"]
    said = printed.getvalue()
    assert "base: " in said
    assert "tuned: " in said
    assert "PeftModel" in said
