"""Test the first difference of two runs, stage by stage."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llmtune.store.diff_runs import FirstDifference, far_apart, find_differences

WEIGHTS = {
    "b.lora_A.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.lora_B.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
}
LINES = [{"step": 1, "loss": 2.0, "tokens_per_second": 1.0}, {"step": 10, "loss": 1.5, "tokens_per_second": 2.0}]


def make_run(folder: Path, weights: dict[str, torch.Tensor] = WEIGHTS, place: str = "/here", **changes: Any) -> Path:
    """Write the compared files of a run."""
    for name in ("adapter", "evaluation", "data/rows"):
        (folder / name).mkdir(parents=True)
    save_file(weights, str(folder / "adapter/adapter_model.safetensors"))
    config = {"r": 4, "base_model_name_or_path": place}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    (folder / "data/rows/rows.json").write_text(json.dumps({"content_hash": changes.get("rows", "aa")}))
    lines = changes.get("lines", LINES)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"origin": f"{place}/rows.jsonl:3", "tuned": changes.get("answer", "red")}
    (folder / "evaluation/predictions.jsonl").write_text(json.dumps(row) + "\n")
    scores = {"base": {"loss": 2.0}, "tuned": {"loss": changes.get("score", 1.0)}}
    (folder / "evaluation/evaluation.json").write_text(json.dumps(scores))
    return folder


def differences(tmp_path: Path, **changes: Any) -> list[FirstDifference]:
    return find_differences(make_run(tmp_path / "was"), make_run(tmp_path / "now", **changes), "adapter")


def test_equal_runs_in_different_folders_and_at_different_speeds_do_not_differ(tmp_path: Path) -> None:
    slower = [line | {"tokens_per_second": 0.5} for line in LINES]
    assert differences(tmp_path, place="/there", lines=slower) == []


def test_the_first_weight_that_differs_is_named_whatever_its_format(tmp_path: Path) -> None:
    make_run(tmp_path / "was")
    for name, row, column, was, now in [("b.lora_A.weight", 1, 2, 5.0, 7.5), ("a.lora_B.weight", 0, 1, 1.0, -0.5)]:
        changed = {key: tensor.clone() for key, tensor in WEIGHTS.items()}
        changed[name][row, column] = now
        (found,) = find_differences(tmp_path / "was", make_run(tmp_path / name, weights=changed), "adapter")
        assert (found.where, found.was, found.now) == (f"{name}[{row}, {column}]", was, now)


def test_a_weight_that_is_missing_or_has_another_shape_is_named(tmp_path: Path) -> None:
    (found,) = differences(tmp_path, weights=WEIGHTS | {"b.lora_A.weight": torch.zeros(3, 3)})
    assert (found.where, found.was, found.now) == ("b.lora_A.weight", "F32 [2, 3]", "F32 [3, 3]")
    fewer = make_run(tmp_path / "fewer", weights={"empty": WEIGHTS["empty"]})
    (found,) = find_differences(tmp_path / "was", fewer, "adapter")
    assert (found.where, found.now) == ("a.lora_B.weight", None)


def test_damaged_weights_differ_as_a_file(tmp_path: Path) -> None:
    was = make_run(tmp_path / "was")
    (was / "adapter/adapter_model.safetensors").write_bytes(b"[]")
    (found,) = find_differences(was, make_run(tmp_path / "now"), "adapter")
    assert found.where == "adapter_model.safetensors"


def test_the_first_different_loss_is_named_with_its_steps(tmp_path: Path) -> None:
    (found,) = differences(tmp_path, lines=[LINES[0], LINES[1] | {"loss": 1.25}])
    assert str(found) == "training: loss of steps 2 to 10: was 1.5, is 1.25"
    (found,) = find_differences(tmp_path / "was", make_run(tmp_path / "short", lines=LINES[:1]), "adapter")
    assert "missing" in str(found)


def test_stages_are_in_the_order_of_the_run(tmp_path: Path) -> None:
    found = differences(tmp_path, rows="bb", lines=[LINES[0] | {"loss": 3.0}], answer="blue", score=0.5)
    assert [one.stage for one in found] == ["rows", "training", "prediction", "score"]
    assert found[2].where == "tuned of row 1 (/here/rows.jsonl:3)"


NEAR = [(0.5, 0.51), (30.0, 30.5), (None, None), (math.nan, math.nan), (math.inf, math.inf)]
FAR = [(0.5, 0.53), (30.0, 30.7), (None, 1.0), (math.nan, 1.0)]


def test_a_tolerance_is_absolute_below_1_and_relative_above() -> None:
    assert [far_apart(was, now, 0.02) for was, now in NEAR] == [False] * len(NEAR)
    assert [far_apart(was, now, 0.02) for was, now in FAR] == [True] * len(FAR)
