"""A control run inside a run: trained first, on the same rows, compared row by row, resumed if it was stopped."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.runs import invoke, llmtune, write_recipe, write_sums

from llmtune.deploy.releases import make_release
from llmtune.errors import GateFailed, Problem, RecipeError, Stopped, TrainingError
from llmtune.launch.dry_run import dry_run
from llmtune.pipeline import adapt_and_train, evaluate_run, run_pipeline
from llmtune.plan import RunContext
from llmtune.recipe.control_run import ControlRun
from llmtune.recipe.distil_section import DistilSection
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.train_section import TrainSection
from llmtune.reproduce import reproduce
from llmtune.store.cleaning import clean_run
from llmtune.store.run_folder import read_run, recipe_of_run
from llmtune.store.run_request import RunRequest
from llmtune.store.verification import verify_run

STEPS = 6
OFF = "distil.control=false"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    write_sums(folder / "rows.jsonl", 60)
    torch.set_num_threads(1)
    sections: dict[str, Any] = {
        "train": {"num_train_epochs": None, "max_steps": STEPS, "save_steps": 2},
        "distil": {"teacher": str(tiny_llama)},
        "evaluate": {"metrics": ["loss"], "samples": 0},
    }
    write_recipe(folder / "tiny.yaml", tiny_llama, "rows.jsonl", **sections)
    plain = {**sections, "distil": None}
    write_recipe(folder / "plain.yaml", tiny_llama, "rows.jsonl", **plain)
    return folder


def run(place: Path, out: str, *sets: str, recipe: str = "tiny.yaml", **options: Any) -> tuple[dict[str, Any], str]:
    """Run the recipe; return the report and the terminal output."""
    console = Console(file=io.StringIO(), width=250)
    report = run_pipeline(load_recipe(place / recipe, sets), RunRequest(out=place / out, **options), console)
    assert isinstance(console.file, io.StringIO)
    return report, console.file.getvalue()


def with_steps(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Give the control run another number of steps, so that one of both models is clearly better."""

    def as_control(section: DistilSection) -> ControlRun:
        schedule = TrainSection(max_steps=steps, learning_rate=0.01)
        changes = {"distil": None, "train": schedule}
        return ControlRun("sft", "distilling beat SFT", "distil.control", changes, section.control)

    monkeypatch.setattr(DistilSection, "as_control", as_control)


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, dict[str, Any], str]:
    """A run whose control run is trained for one step, and therefore beaten."""
    with pytest.MonkeyPatch.context() as patch:
        with_steps(patch, 1)
        report, said = run(place, "whole", "evaluate.gates=['loss.high < sft']")
    return place / "whole", report, said


def adapter(path: Path) -> bytes:
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


def control_of(path: Path) -> dict[str, Any]:
    record = json.loads((path / "evaluation/evaluation.json").read_text())["control_run"]
    assert isinstance(record, dict)
    return record


def test_the_control_run_equals_a_run_of_the_recipe_without_the_section(place: Path) -> None:
    run(place, "both")
    run(place, "alone", recipe="plain.yaml")
    inner = place / "both/controls/sft"
    assert adapter(inner) == adapter(place / "alone")
    assert recipe_of_run(read_run(inner)).recipe.distil is None
    scores = [json.loads((one / "evaluation/evaluation.json").read_text())["tuned"] for one in (inner, place / "alone")]
    assert scores[0] == scores[1] == control_of(place / "both")["scores"]


def test_a_beaten_control_run_passes_its_gate_and_every_report_says_so(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    path, report, said = finished
    sentence = "Distilling beat SFT: yes, better in loss"
    assert sentence in said
    assert sentence in report["verdict"]["reason"]
    assert report["evaluation"]["control_run"]["beaten"] == "yes"
    assert [gate["passed"] for gate in report["gates"]] == [True]
    assert all(sentence in (path / name).read_text() for name in ("report.html", "report.md"))
    assert 'name="control_run.loss"' in (path / "junit.xml").read_text()
    inner = json.loads((path / "controls/sft/report.json").read_text())
    assert (inner["gates"], inner["evaluation"]["control_run"]) == ([], None)
    assert inner["evaluation"]["tuned"]["loss"] == report["evaluation"]["control_run"]["scores"]["loss"]


def test_rows_and_answers_of_the_base_are_shared(finished: tuple[Path, dict[str, Any], str]) -> None:
    path, _, said = finished
    rows = [(one / "data/rows/rows.json").stat().st_ino for one in (path, path / "controls/sft")]
    assert rows[0] == rows[1]
    assert said.count("base: reusing its answers to these rows from an earlier evaluation") == 1
    assert said.index("control sft") < said.index("tuned − sft"), "the control run comes before the scores"


def test_a_control_run_that_is_better_fails_the_gate(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_steps(monkeypatch, 4 * STEPS)
    with pytest.raises(GateFailed, match="difference from sft") as caught:
        run(place, "worse", "evaluate.gates=['loss.high < sft']", "train.max_steps=1")
    report = caught.value.report or {}
    assert report["evaluation"]["control_run"]["beaten"] == "no"
    assert "Distilling beat SFT: no, worse in loss" in report["verdict"]["reason"]


def test_without_a_control_run_the_verdict_says_what_it_does_not_know(
    place: Path, finished: tuple[Path, dict[str, Any], str]
) -> None:
    report, _ = run(place, "off", OFF)
    assert not (place / "off/controls").exists()
    assert "Distilling beat SFT: unknown, because distil.control is false." in report["verdict"]["reason"]
    assert report["evaluation"]["control_run"]["beaten"] == "unknown"
    assert load_recipe(place / "tiny.yaml", [OFF]).fingerprint == load_recipe(place / "tiny.yaml").fingerprint
    shutil.copytree(finished[0], place / "turned-off")
    report, said = run(place, "turned-off", OFF)
    assert "train unchanged, skipped" in said
    assert report["evaluation"]["control_run"]["why_none"] == "distil.control is false"


@pytest.mark.parametrize(
    ("recipe", "sets", "said"),
    [
        ("tiny.yaml", ["evaluate.gates=['loss.high < sft']", OFF], "but distil.control is false"),
        ("tiny.yaml", ["evaluate.gates=['loss.high < filter']"], "which this recipe does not have"),
        ("plain.yaml", ["evaluate.gates=['loss.high < sft']"], "which this recipe does not have"),
        ("tiny.yaml", ["evaluate.gates=['loss.low > sft']"], "passes a worse model"),
        ("tiny.yaml", ["data.test=0", "distil.control=true"], "'distil.control' has no effect without test rows"),
    ],
)
def test_gates_and_keys_without_a_control_run_are_refused(place: Path, recipe: str, sets: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(place / recipe, sets)
    assert said in str(caught.value)


def test_a_run_stopped_in_its_control_run_resumes_to_the_same_bytes(
    place: Path, finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(context: RunContext) -> None:
        if context.folder.path.parent.name == "controls":
            raise Stopped(Problem("stopped"))
        adapt_and_train(context)

    with_steps(monkeypatch, 1)
    with monkeypatch.context() as patch:
        patch.setattr("llmtune.pipeline.adapt_and_train", train)
        with pytest.raises(Stopped):
            run(place, "stopped", "evaluate.gates=['loss.high < sft']")
    assert not read_run(place / "stopped").is_done("evaluate")
    _, said = run(place, "stopped", "evaluate.gates=['loss.high < sft']")
    assert said.count("train unchanged, skipped") == 1
    assert adapter(place / "stopped/controls/sft") == adapter(finished[0] / "controls/sft")
    assert control_of(place / "stopped") == control_of(finished[0])


def test_a_control_run_that_cannot_be_trained_does_not_end_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(context: RunContext) -> None:
        if context.folder.path.parent.name == "controls":
            raise TrainingError.of("no answer is accepted")
        adapt_and_train(context)

    monkeypatch.setattr("llmtune.pipeline.adapt_and_train", train)
    report, _ = run(place, "failing")
    expected = "Distilling beat SFT: unknown, because the control run failed: no answer is accepted."
    assert expected in report["verdict"]["reason"]
    monkeypatch.undo()
    report, _ = run(place, "failing")
    assert report["evaluation"]["control_run"]["why_none"] == ""


def test_a_second_run_trains_and_scores_nothing(
    place: Path, finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_steps(monkeypatch, 1)
    shutil.copytree(finished[0], place / "again")
    report, said = run(place, "again", "evaluate.gates=['loss.high < sft']")
    assert said.count("train unchanged, skipped") == said.count("evaluate unchanged, skipped") == 2
    assert report["evaluation"]["control_run"] == finished[1]["evaluation"]["control_run"]


def test_evaluating_a_run_again_scores_its_control_run_too(
    place: Path, finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_steps(monkeypatch, 1)
    shutil.copytree(finished[0], place / "judged")
    console = Console(file=io.StringIO(), width=250)
    loaded = recipe_of_run(read_run(place / "judged"), ["evaluate.metrics=[loss, perplexity]"])
    report = evaluate_run(loaded, place / "judged", console, offline=True)
    assert set(report["evaluation"]["control_run"]["scores"]) == {"loss", "perplexity"}
    assert report["evaluation"]["control_run"]["beaten"] == "yes"
    assert console.file.getvalue().count("base: reusing its answers") == 1  # type: ignore[attr-defined]
    assert verify_run(place / "judged").failed == verify_run(place / "judged/controls/sft").failed == []


def test_a_changed_control_run_changes_the_scores_of_the_run(
    place: Path, finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], place / "changed")
    shutil.rmtree(place / "changed/controls")
    with_steps(monkeypatch, 4)
    report, said = run(place, "changed")
    assert said.count("train unchanged, skipped") == 1
    assert report["evaluation"]["control_run"]["scores"] != finished[1]["evaluation"]["control_run"]["scores"]


def test_a_run_with_a_control_run_is_verified_cleaned_released_and_reproduced(
    place: Path, finished: tuple[Path, dict[str, Any], str]
) -> None:
    path = place / "kept"
    shutil.copytree(finished[0], path)
    assert verify_run(path).failed == verify_run(path / "controls/sft").failed == []
    removed = {str(one.path.relative_to(path)) for one in clean_run(path, dry_run=True).removable}
    assert any(name.startswith("checkpoints/") for name in removed)
    assert any(name.startswith("controls/sft/checkpoints/") for name in removed)
    file = make_release(path, place / "release.json")
    assert json.loads(file.read_text())["control_run"]["scores"] == control_of(path)["scores"]
    shown = invoke("release", "show", file)
    assert "What the gain comes from" in shown.stdout, shown.stderr
    result = reproduce(path, Console(quiet=True), out=place / "reproduced")
    assert result["equal"]
    assert not (place / "reproduced/controls").exists()


def test_a_dry_run_names_the_control_run(place: Path) -> None:
    console = Console(file=io.StringIO(), width=250)
    dry_run(load_recipe(place / "tiny.yaml"), RunRequest(out=place / "dry"), console)
    assert f"control run sft would be trained and scored in {place / 'dry/controls/sft'}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_of_another_recipe_inside_is_refused_and_fresh_removes_the_control_run(place: Path) -> None:
    run(place, "fresh", until="train")
    assert not read_run(place / "fresh/controls/sft").is_done("evaluate")
    run(place, "fresh", OFF, until="train", fresh=True)
    assert not (place / "fresh/controls").exists()


def test_each_further_seed_has_a_control_run_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_steps(monkeypatch, 1)
    report, _ = run(place, "seeds", "train.seeds=[8]")
    told = report["evaluation"]["seeds"]["told"]
    assert "Over 2 seeds, each with its own control run, distilling beat SFT: yes 2, no 0, inconclusive 0." in told
    inner = [place / "seeds" / part / "controls/sft" for part in ("", "seeds/8")]
    assert adapter(inner[0]) != adapter(inner[1])
    assert recipe_of_run(read_run(inner[1])).recipe.seed == 8
    assert not (inner[0] / "seeds").exists()


def test_damaged_scores_of_the_control_run_are_named(place: Path, finished: tuple[Path, dict[str, Any], str]) -> None:
    shutil.copytree(finished[0], place / "damaged")
    file = place / "damaged/controls/sft/evaluation/measures.npz"
    file.write_bytes(file.read_bytes()[:100])
    loaded = recipe_of_run(read_run(place / "damaged"))
    report = evaluate_run(loaded, place / "damaged", Console(quiet=True), offline=True)
    assert report["evaluation"]["control_run"]["beaten"] == "yes", "evaluate scores the control run again"


def test_the_report_has_the_teacher_and_the_share_of_the_gap_that_was_closed(place: Path) -> None:
    run(place, "teacher", "train.max_steps=20", recipe="plain.yaml")
    report, said = run(place, "taught", f"distil.teacher={place / 'teacher'}", OFF)
    teacher, scores = report["evaluation"]["teacher"], report["evaluation"]
    own = json.loads((place / "teacher/evaluation/evaluation.json").read_text())["tuned"]
    assert teacher["scores"]["loss"] == pytest.approx(own["loss"], abs=1e-6)
    gap, gain = (scores["base"]["loss"] - one["loss"] for one in (teacher["scores"], scores["tuned"]))
    share = teacher["shares"]["loss"]
    assert share["value"] == pytest.approx(gain / gap)
    assert share["interval"][0] < share["value"] < share["interval"][1]
    assert f"It closed {share['value']:.0%}" in report["verdict"]["reason"]
    assert list(teacher["costs"]) == ["tuned", "teacher"]
    assert all("share of the gap" in text for text in (said, (place / "taught/report.md").read_text()))
    shutil.rmtree(place / "teacher")
    console = Console(file=io.StringIO(), width=250)
    again = evaluate_run(recipe_of_run(read_run(place / "taught")), place / "taught", console, offline=True)
    assert again["evaluation"]["teacher"] is not None, "nothing changed, so nothing was scored"
    loaded = recipe_of_run(read_run(place / "taught"), ["evaluate.metrics=[loss, perplexity]"])
    again = evaluate_run(loaded, place / "taught", console, offline=True)
    assert again["evaluation"]["teacher"] is None
    assert "teacher: not scored, because" in console.file.getvalue()  # type: ignore[attr-defined]


def test_grpo_is_compared_with_the_filter_on_as_many_samples(place: Path, tiny_llama: Path) -> None:
    (place / "reward.py").write_text("def score(row, answer):\n    return len(answer) * 7 % 5 / 4\n")
    reinforce = {"rewards": {"reward.py:score": 1.0}, "samples": 4, "max_new_tokens": 8, "accept": 0.25}
    train = {"num_train_epochs": None, "max_steps": 2}
    sections: dict[str, Any] = {"task": "reinforce", "reinforce": reinforce | {"mask_truncated": False}, "train": train}
    evaluate = {"metrics": ["chrf"], "samples": 0, "gates": ["chrf >= 0"]}
    write_recipe(place / "grpo.yaml", tiny_llama, "rows.jsonl", evaluate=evaluate, **sections)
    report, said = run(place, "grpo", recipe="grpo.yaml")
    inner = recipe_of_run(read_run(place / "grpo/controls/filter")).recipe
    assert inner.reinforce is not None
    assert (inner.reinforce.method, inner.reinforce.samples, inner.control_run) == ("filter", 4, None)
    assert report["evaluation"]["control_run"]["name"] == "filter"
    assert "GRPO beat filter: " in report["verdict"]["reason"]
    assert said.count("base: reusing its answers") == 1
    assert verify_run(place / "grpo").failed == verify_run(place / "grpo/controls/filter").failed == []
    loaded = recipe_of_run(read_run(place / "grpo"), ["evaluate.metrics=[chrf, exact_match]"])
    again = evaluate_run(loaded, place / "grpo", Console(quiet=True), offline=True)
    assert set(again["evaluation"]["control_run"]["scores"]) == {"chrf", "exact_match"}


@pytest.mark.slow
def test_two_processes_train_and_score_the_control_run(place: Path) -> None:
    done = llmtune("launch", "local", "tiny.yaml", "--processes", "2", "--threads", "1", "--out", "two", cwd=place)
    assert done.returncode == 0, done.stderr
    parts = [read_run(place / "two" / part) for part in ("", "controls/sft")]
    assert [one.facts("train")["processes"] for one in parts] == [2, 2]
    run(place, "one")
    one, two = (control_of(place / name)["scores"]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5)
