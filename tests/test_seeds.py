"""`train.seeds`: a complete run per further seed on the same rows, skipped if valid, resumed if stopped."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.runs import llmtune, write_recipe, write_sums

from llmtune.errors import GateFailed, Problem, Stopped
from llmtune.launch.dry_run import dry_run
from llmtune.pipeline import adapt_and_train, evaluate_run, run_pipeline
from llmtune.plan import RunContext
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_folder import read_run, recipe_of_run
from llmtune.store.run_request import RunRequest
from llmtune.store.verification import verify_run

SEEDS = "train.seeds=[8, 9]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    write_sums(folder / "rows.jsonl", 60)
    short = {"num_train_epochs": None, "max_steps": 4}
    write_recipe(folder / "tiny.yaml", tiny_llama, "rows.jsonl", train=short)
    torch.set_num_threads(1)
    return folder


def run(place: Path, out: str, *sets: str, **options: Any) -> tuple[dict[str, Any], str]:
    """Run the recipe; return the report and the terminal output."""
    console = Console(file=io.StringIO(), width=200)
    report = run_pipeline(load_recipe(place / "tiny.yaml", sets), RunRequest(out=place / out, **options), console)
    assert isinstance(console.file, io.StringIO)
    return report, console.file.getvalue()


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, dict[str, Any], str]:
    report, said = run(place, "several", SEEDS)
    return place / "several", report, said


def adapter(path: Path) -> bytes:
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


def scores(path: Path) -> dict[str, Any]:
    found = json.loads((path / "evaluation" / "evaluation.json").read_text())
    return {key: found[key] for key in ("base", "tuned", "difference", "rows")}


def test_each_further_seed_equals_a_run_with_that_seed_alone(
    place: Path, finished: tuple[Path, dict[str, Any], str]
) -> None:
    path, _, _ = finished
    run(place, "alone", "seed=8")
    assert adapter(path / "seeds" / "8") == adapter(place / "alone")
    alone, further = (
        json.loads((run / "evaluation/evaluation.json").read_text()) for run in (place / "alone", path / "seeds/8")
    )
    assert (further["base"], further["tuned"], further["flips"]) == (alone["base"], alone["tuned"], alone["flips"])
    predictions = [(run / "evaluation/predictions.jsonl").read_text() for run in (place / "alone", path / "seeds/8")]
    assert predictions[0] == predictions[1], "the base was not asked again, and its answers are the same"


def test_seeds_differ_from_one_another_on_the_same_rows(finished: tuple[Path, dict[str, Any], str]) -> None:
    path, report, _ = finished
    runs = [path, path / "seeds" / "8", path / "seeds" / "9"]
    assert len({adapter(one) for one in runs}) == 3
    assert len({(one / "data/rows/rows.json").read_bytes() for one in runs}) == 1
    assert len({read_run(one).findings["micro_batch_tokens"] for one in runs}) == 1
    loss = report["evaluation"]["seeds"]["metrics"]["loss"]
    assert len(set(loss["scores"])) == 3
    assert loss["scores"] == [scores(one)["tuned"]["loss"] for one in runs]
    assert loss["base"] == scores(path / "seeds/9")["base"]["loss"]


def test_the_report_has_the_spread_and_the_base_is_evaluated_once(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    path, report, said = finished
    told = report["evaluation"]["seeds"]["told"]
    assert told in said
    assert told in (path / "report.html").read_text()
    assert "## The same recipe with 3 seeds" in (path / "report.md").read_text()
    assert json.loads((path / "report.json").read_text())["evaluation"]["seeds"]["missing"] == []
    assert said.count("from an earlier evaluation") == 2
    assert verify_run(path).failed == verify_run(path / "seeds/8").failed == []


def test_a_second_run_skips_all_seeds_and_another_seed_trains_alone(
    place: Path, finished: tuple[Path, dict[str, Any], str]
) -> None:
    shutil.copytree(finished[0], place / "grown")
    _, again = run(place, "grown", SEEDS)
    assert again.count("train unchanged, skipped") == 3
    report, said = run(place, "grown", "train.seeds=[8, 10]")
    assert said.count("train unchanged, skipped") == 2
    assert [one["seed"] for one in report["evaluation"]["seeds"]["runs"]] == [7, 8, 10]
    assert verify_run(place / "grown").failed == [], "a further seed changes no input of the run"


def test_evaluating_a_run_again_evaluates_its_seeds(place: Path, finished: tuple[Path, dict[str, Any], str]) -> None:
    shutil.copytree(finished[0], place / "judged")
    loaded = recipe_of_run(read_run(place / "judged"), ["evaluate.metrics=[loss, perplexity]"])
    report = evaluate_run(loaded, place / "judged", Console(quiet=True), offline=True)
    assert set(report["evaluation"]["seeds"]["metrics"]) == {"loss", "perplexity", "answers_cut"}
    assert report["evaluation"]["seeds"]["missing"] == []


def test_seeds_of_older_rows_or_settings_are_not_mixed_with_a_newer_run(
    place: Path, finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is trained and scored again, and killed before its seeds are."""

    def stop(context: RunContext, loaded: object, run_recipe: object) -> None:
        raise Stopped(Problem("stopped"), signal_number=15)

    monkeypatch.setattr("llmtune.pipeline.run_seeds", stop)
    shutil.copytree(finished[0], place / "changed")
    rows = (place / "rows.jsonl").read_text()
    changes = [(rows, "generation.max_new_tokens=4"), (rows.replace("What comes", "Say what comes"), "seed=7")]
    try:
        for text, change in changes:
            (place / "rows.jsonl").write_text(text)
            with pytest.raises(Stopped):
                run(place, "changed", SEEDS, change)
            seeds = json.loads((place / "changed/report.json").read_text())["evaluation"]["seeds"]
            assert (seeds["missing"], [one["seed"] for one in seeds["runs"]]) == ([8, 9], [7])
    finally:
        (place / "rows.jsonl").write_text(rows)


def test_gates_are_judged_once_after_all_seeds(place: Path, finished: tuple[Path, dict[str, Any], str]) -> None:
    shutil.copytree(finished[0], place / "gated")
    with pytest.raises(GateFailed):
        run(place, "gated", "train.seeds=[8, 10]", "evaluate.gates=['loss < 0']")
    assert json.loads((place / "gated/report.json").read_text())["evaluation"]["seeds"]["runs"][2]["seed"] == 10
    assert json.loads((place / "gated/seeds/10/report.json").read_text())["gates"] == []


def test_steps_before_training_have_no_seeds_and_fresh_restarts_all_seeds(place: Path) -> None:
    brief = "train.max_steps=1"
    console = Console(file=io.StringIO(), width=200)
    dry_run(load_recipe(place / "tiny.yaml", [SEEDS, brief]), RunRequest(out=place / "steps"), console)
    assert f"seed 9 would follow in {place / 'steps/seeds/9'}" in console.file.getvalue()
    run(place, "steps", SEEDS, brief, until="select")
    assert not (place / "steps" / "seeds").exists()
    run(place, "steps", "train.seeds=[8]", brief, until="train")
    assert "evaluate" not in read_run(place / "steps/seeds/8").manifest["steps"]
    _, said = run(place, "steps", "train.seeds=[9]", brief, fresh=True, until="train")
    assert "train unchanged" not in said
    assert not (place / "steps/seeds/8").exists()


def test_further_seeds_use_the_runs_micro_batches(place: Path, finished: tuple[Path, dict[str, Any], str]) -> None:
    shutil.copytree(finished[0], place / "budget")
    folder = read_run(place / "budget")
    assert folder.findings["micro_batch_tokens"] != 96
    folder.note(micro_batch_tokens=96)
    run(place, "budget", "train.seeds=[10]", until="train")
    assert read_run(place / "budget/seeds/10").findings["micro_batch_tokens"] == 96


def test_a_run_stopped_at_a_seed_reports_the_others_and_resumes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(context: RunContext) -> None:
        if context.plan.recipe.seed == 9:
            raise Stopped(Problem("stopped"))
        adapt_and_train(context)

    monkeypatch.setattr("llmtune.pipeline.adapt_and_train", train)
    loaded, options = load_recipe(place / "tiny.yaml", [SEEDS]), RunRequest(out=place / "stopped")
    with pytest.raises(Stopped):
        run_pipeline(loaded, options, Console(quiet=True))
    monkeypatch.undo()
    assert json.loads((place / "stopped/seeds/8/report.json").read_text())["evaluation"]["tuned"]
    assert json.loads((place / "stopped/report.json").read_text())["evaluation"]["tuned"], (
        "the run's own report is there"
    )
    report, said = run(place, "stopped", SEEDS)
    assert said.count("train unchanged, skipped") == 2
    assert report["evaluation"]["seeds"]["missing"] == []


@pytest.mark.slow
def test_several_processes_train_further_seeds_as_well(place: Path) -> None:
    done = llmtune(
        "launch", "local", "tiny.yaml", "--processes", "2", "--out", "both", "--set", "train.seeds=[8]", cwd=place
    )
    assert done.returncode == 0, done.stderr
    assert [read_run(place / "both" / part).facts("train")["processes"] for part in ("", "seeds/8")] == [2, 2]
    assert adapter(place / "both") != adapter(place / "both/seeds/8")
