"""Weekly retraining with a packaged encoder and real rows: better, equal, a class lost, labels shuffled."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support.runs import invoke

ROWS = Path(__file__).resolve().parent.parent / "recipes" / "data" / "debian-sections.jsonl"
SECTIONS = ("mail", "games", "fonts", "hamradio", "video")
MARGIN = "accuracy.low > champion - 0.1"


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def train(
    folder: Path, name: str, rows: Any, champion: str | None = None, **settings: Any
) -> tuple[int, dict[str, Any]]:
    """Return exit code and report of a run; a fifth of its rows is its test."""
    judged = {"champion": f"runs/{champion}", "when_unsure": "report", "gates": [MARGIN]} if champion else {}
    judged |= settings.pop("evaluate", {})
    recipe = {
        "recipe_version": 1,
        "name": "sections",
        "task": "classify",
        "seed": 42,
        "data": {"train": rows, "validation": 0.0, "test": 0.2, "max_length": 128},
        "model": {"name": "builtin:minilm-l6-v2"},
        "adapter": {"r": 8, "lora_alpha": 16},
        "train": {"learning_rate": 2e-3, "num_train_epochs": 3, "batch_size": 32, **settings},
        "evaluate": {"metrics": ["accuracy", "f1_macro"], **judged},
    }
    with (folder / f"{name}.yaml").open("w") as file:
        YAML(typ="safe").dump(recipe, file)
    done = invoke("run", folder / f"{name}.yaml", "--out", folder / "runs" / name, "--offline")
    return done.exit_code, json.loads((folder / "runs" / name / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_week_later_a_better_and_an_equal_model_pass_and_one_that_lost_a_class_fails(tmp_path: Path) -> None:
    turns = [json.loads(line)["messages"] for line in ROWS.read_text().splitlines()]
    rows = [{"text": one[-2]["content"], "label": one[-1]["content"]} for one in turns]
    rows = [row for row in rows if row["label"] in SECTIONS]
    random.Random(1).shuffle(rows)
    before, after = write(tmp_path / "before.jsonl", rows[:400]), write(tmp_path / "after.jsonl", rows[:440])
    fonts = [row["text"] for row in rows if row["label"] == "fonts"][:40]
    faulty = write(
        tmp_path / "faulty.jsonl", [{"text": f"{text} ({i})", "label": "games"} for i, text in enumerate(fonts)]
    )
    code, champion = train(tmp_path, "champion", before)
    assert (code, champion["verdict"]["word"]) == (0, "better")
    code, weak = train(tmp_path, "weak", before, learning_rate=3e-4, num_train_epochs=1)
    assert code == 0

    held_out = weak["evaluation"]["rows"]
    code, better = train(tmp_path, "better", after, "weak")
    assert (code, better["verdict"]["word"]) == (0, "better")
    compared = better["evaluation"]["champion"]
    assert compared["rows"] > held_out
    assert compared["rows"] == held_out + compared["asked"] == compared["difference"]["accuracy"]["n"]
    code, equal = train(tmp_path, "equal", after, "champion")
    assert (code, equal["verdict"]["word"]) in {(0, "within margin"), (7, "inconclusive")}
    code, lost = train(tmp_path, "lost", [before, {"path": faulty, "weight": 12.0}], "champion")
    assert (code, lost["verdict"]["word"], lost["error"]["exit_code"]) == (6, "worse", 6)
    (found,) = [one for one in lost["evaluation"]["details"]["tuned"]["classes"] if one["label"] == "fonts"]
    assert found["recall"] < 0.5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_week_with_shuffled_labels_fails_with_the_default_weekly_gates_and_names_its_file(tmp_path: Path) -> None:
    turns = [json.loads(line)["messages"] for line in ROWS.read_text().splitlines()]
    rows = [{"text": one[-2]["content"], "label": one[-1]["content"]} for one in turns]
    rows = [row for row in rows if row["label"] in SECTIONS]
    random.Random(1).shuffle(rows)
    before, week = write(tmp_path / "before.jsonl", rows[:300]), [dict(row) for row in rows[300:441]]
    shuffled = random.Random(2).sample(range(141), 129)
    labels = [week[at]["label"] for at in shuffled]
    random.Random(3).shuffle(labels)
    for at, label in zip(shuffled, labels, strict=True):
        week[at]["label"] = label
    code, _ = train(tmp_path, "champion", before)
    assert code == 0
    bad = write(tmp_path / "week4.jsonl", week)
    gates = {"gates": ["accuracy.low > champion - 0.05", "accuracy[new] >= 0.6"], "suspects": True}
    code, report = train(tmp_path, "bad", [before, bad], "champion", evaluate=gates)
    verdict, new = report["verdict"], report["evaluation"]["champion"]["new"]
    assert (code, verdict["word"]) == (6, "worse"), verdict
    assert "Not passed on new rows: accuracy[new] >= 0.6." in verdict["reason"]
    assert "suspects are in week4.jsonl" in verdict["reason"]
    assert "week4.jsonl: " in verdict["reason"]
    assert new["from_old"]["accuracy"]["interval"][1] < 0
