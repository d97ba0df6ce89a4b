"""The notebook runs from its first cell to its last, and is saved with what it prints; the sweep runs."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.runs import write_recipe, write_sums

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


@pytest.mark.slow
def test_the_sweep_compares_its_winner_with_the_recipe(here: Path, tiny_llama: Path) -> None:
    pytest.importorskip("optuna")
    write_recipe(
        here / "tiny.yaml",
        tiny_llama,
        write_sums(here / "sums.jsonl"),
        train={"max_steps": 2, "num_train_epochs": None},
    )
    words = [sys.executable, NOTEBOOK.parent / "sweep.py", "tiny.yaml", "2"]
    for _ in range(2):  # the second time, the study is complete
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "lowest validation loss: " in done.stdout
        assert "winner" in done.stdout
    assert {path.name for path in (here / "runs" / "tiny-sweep").iterdir()} >= {"0", "1", "recipe", "winner"}
