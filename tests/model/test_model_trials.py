"""Short trials: half of the candidates continue with twice the steps, and the run uses the last one."""

import json
from pathlib import Path

import pytest
from support.adapting import build_family, quiet
from support.runs import invoke, write_colours, write_recipe

from llmtune.errors import EnvironmentProblem, TrainingError
from llmtune.model.model_selection import ModelRanking, RankedModel
from llmtune.model.model_trials import successive_halving
from llmtune.records import ModelRef


def ranking(*names: str) -> ModelRanking:
    refs = {name: ModelRef(name, Path(name), None, name) for name in names}
    candidates = tuple(RankedModel(name, float(number)) for number, name in enumerate(names))
    return ModelRanking(
        refs[names[0]], (*candidates, RankedModel("gone", None, "it is not there")), 8, "validation", refs
    )


def test_the_better_half_continues_with_twice_the_steps_until_one_remains():
    calls: list[tuple[str, int]] = []

    def tune(candidate: RankedModel, steps: int) -> float:
        calls.append((candidate.name, steps))
        return {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0, "e": 5.0}[candidate.name] / steps

    found = successive_halving(ranking("a", "b", "c", "d", "e"), 10, tune, quiet())
    assert calls == [*((name, 10) for name in "abcde"), *((name, 20) for name in "dcb"), ("d", 40), ("c", 40)]
    assert found.chosen.name == "d"
    assert [(one.name, one.steps) for one in found.candidates] == [
        *(("d", 40), ("c", 40), ("b", 20), ("a", 10), ("e", 10), ("gone", None))
    ]
    assert [one.score for one in found.candidates[:3]] == [3.0, 2.0, 1.0]


def test_a_failed_trial_drops_its_candidate_and_the_run_ends_if_all_fail():
    def tune(candidate: RankedModel, steps: int) -> float:
        if candidate.name != "b":
            raise TrainingError.of("the loss is nan")
        return 1.0

    found = successive_halving(ranking("a", "b"), 5, tune, quiet())
    assert found.chosen.name == "b"
    assert found.candidates[-1].reason == "its trial failed: the loss is nan"
    with pytest.raises(EnvironmentProblem, match="no candidate remains"):
        successive_halving(ranking("a", "c"), 5, tune, quiet())


@pytest.mark.usefixtures("here")
def test_a_run_uses_the_winner_of_the_trials_and_reports_both_orders(tiny_llama: Path):
    other = build_family(Path("other"), "llama", max_position_embeddings=100)  # data.max_length is 128
    model = {"name": None, "candidates": [str(tiny_llama), str(other)], "trials": 2}
    data = {"on_overlong": "drop"}
    recipe = write_recipe(Path("r.yaml"), "none", write_colours(Path("rows.jsonl")), model=model, data=data)
    done = invoke("select", recipe, "--out", "out")
    assert done.exit_code == 0, done.stderr
    told = json.loads(Path("out/report.json").read_text())["model"]
    candidates = told["ranking"]["candidates"]
    assert told["name"] == candidates[0]["name"] == told["ranking"]["chosen"]
    assert candidates[0]["tuned"] < candidates[1]["tuned"]
    assert {one["steps"] for one in candidates} == {2}
    assert not Path("out/model/trials").exists()
    assert "Candidates" in Path("out/report.html").read_text()
    again = invoke("select", recipe, "--out", "out")
    assert "trial of" not in again.stderr
    done = invoke("select", recipe, "--out", "other-run", "--set", "data.validation=0")
    assert (done.exit_code, "'model.trials' needs validation rows" in done.stderr) == (2, True)
