"""Results sent to trackers at the end of a run."""

import json
from pathlib import Path

import pytest
from support.runs import invoke, write_colours, write_recipe


def test_trackers_receive_scores_verdict_and_run_folder(here: Path, tiny_llama: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train = {"max_steps": 2, "num_train_epochs": None, "report_to": "tensorboard"}
    write_recipe(here / "tiny.yaml", tiny_llama, write_colours(here / "rows.jsonl"), train=train)
    done = invoke("run", "tiny.yaml", "--out", "run", "--offline")
    assert done.exit_code == 0, done.stderr
    report = json.loads((here / "run/report.json").read_text())
    events = EventAccumulator(str(here / "run" / "trackers" / "tiny"))
    events.Reload()
    for model in ("base", "tuned"):
        (logged,) = events.Scalars(f"evaluation/{model}/loss")
        assert (logged.step, logged.value) == (2, pytest.approx(report["evaluation"][model]["loss"]))
    texts = {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    assert texts["run_folder"] == "run"
    assert texts["verdict"].startswith(report["verdict"]["word"])
