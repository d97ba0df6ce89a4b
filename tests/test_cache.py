"""Skipping of finished steps: no stale results, no lost adapters, no needless work."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from support.models import build_llama
from support.runs import FAST, ROWS, heavy_imports, invoke, write_colours, write_recipe

from llmtune.data.row_store import open_arrow


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Copies of a folder with rows, a model and a two-step recipe: `bare`, and `finished` with its run."""
    folder = tmp_path_factory.mktemp("cache")
    place = folder / "place"
    shutil.copytree(tiny_llama, place / "model")
    write_colours(place / "rows.jsonl")
    write_recipe(place / "tiny.yaml", "./model", "rows.jsonl", train=FAST)
    shutil.copytree(place, folder / "bare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done("run", "tiny.yaml", "--out", "run")
    shutil.copytree(place, folder / "finished")
    return folder


def restore(kept: Path, name: str) -> Path:
    """Restore everything at its original path, because paths are part of a run's identity."""
    shutil.rmtree(kept / "place", ignore_errors=True)
    return shutil.copytree(kept / name, kept / "place")


@pytest.fixture
def place(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without a run, private to the test."""
    monkeypatch.chdir(kept)
    monkeypatch.chdir(restore(kept, "bare"))
    return kept / "place"


@pytest.fixture
def finished(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished run, private to the test."""
    monkeypatch.chdir(kept)
    monkeypatch.chdir(restore(kept, "finished"))
    return kept / "place"


def change_rows(place: Path) -> str:
    """Change rows in place and return the old content."""
    text = (place / "rows.jsonl").read_text()
    (place / "rows.jsonl").write_text(text.replace("Which colour", "What colour"))
    return text


def done(*arguments: object) -> dict[str, bool]:
    """Run a command that must succeed; return the skipped steps."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return {step["name"]: step["skipped"] for step in json.loads(result.stdout)["steps"]}


@pytest.mark.parametrize("damage", ["another schema", "missing"])
def test_an_evaluation_that_cannot_read_its_examples_leaves_the_run_unchanged(finished: Path, damage: str) -> None:
    examples = finished / "run/data/examples/test.arrow"
    with open_arrow(examples) as reader:
        table = reader.read_all().drop_columns("tokens")
    examples.unlink()
    if damage == "another schema":
        with pa.ipc.new_file(str(examples), table.schema) as writer:
            writer.write_table(table)
    before = (finished / "run/recipe.yaml").read_bytes(), json.loads((finished / "run/run.json").read_text())
    result = invoke("evaluate", "run", "--set", "generation.max_new_tokens=2")
    assert result.exit_code == (3 if damage == "missing" else 4), result.stderr
    assert "test.arrow" in result.stderr
    after = (finished / "run/recipe.yaml").read_bytes(), json.loads((finished / "run/run.json").read_text())
    assert after == before


def test_a_new_or_changed_slice_is_scored_without_training(place: Path) -> None:
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]

    def write(*topics: str) -> None:
        lines = [json.dumps({**row, "topic": topics[i % len(topics)]}) for i, row in enumerate(rows)]
        (place / "rows.jsonl").write_text("\n".join(lines))

    def slices() -> set[str]:
        return {
            one["value"] for one in json.loads((place / "run/report.json").read_text())["evaluation"]["slices"]["topic"]
        }

    write("sea", "sky")
    done("run", "tiny.yaml", "--out", "run")
    unprepared = invoke("evaluate", "run", "--set", "evaluate.slices=[topic]")
    assert unprepared.exit_code == 3
    assert "Run the recipe again with it" in unprepared.stderr
    sliced = ("run", "tiny.yaml", "--out", "run", "--set", "evaluate.slices=[topic]")
    again = {"prepare": False, "encode": True, "select": True, "adapt": True, "train": True, "evaluate": False}
    assert done(*sliced) == again
    assert slices() == {"sea", "sky"}
    assert all(done(*sliced).values())
    write("sea", "wood")
    assert done(*sliced) == again
    assert slices() == {"sea", "wood"}


def test_a_slice_by_an_unknown_column_is_refused_before_reading_weights(place: Path) -> None:
    save_file({"unknown": torch.zeros(1)}, place / "model/model.safetensors")
    result = invoke("run", "tiny.yaml", "--out", "run", "--set", "evaluate.slices=[mesages]")
    assert result.exit_code == 3
    assert "no test row has a column 'mesages'" in result.stderr
    assert "Did you mean 'messages'?" in result.stderr


def test_scores_of_an_earlier_training_are_not_shown(finished: Path) -> None:
    change_rows(finished)
    done("train", "tiny.yaml", "--out", "run")
    assert json.loads((finished / "run/report.json").read_text())["evaluation"] is None


def test_a_template_changed_in_place_is_reloaded(place: Path) -> None:
    done("prepare", "tiny.yaml", "--out", "run")
    template = place / "model/chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    skipped = done("prepare", "tiny.yaml", "--out", "run")
    assert skipped == {"prepare": True, "encode": False}


def test_the_old_adapter_stays_until_the_new_one_is_complete(finished: Path) -> None:
    before = (finished / "run/adapter/adapter_model.safetensors").read_bytes()
    change_rows(finished)
    weights = finished / "model/model.safetensors"
    weights.rename(finished / "elsewhere")
    assert invoke("run", "tiny.yaml", "--out", "run").exit_code == 4
    assert (finished / "run/adapter/adapter_model.safetensors").read_bytes() == before


def test_a_run_is_evaluated_again_without_its_source_files(finished: Path) -> None:
    (finished / "rows.jsonl").unlink()
    skipped = done("evaluate", "run", "--set", "generation.max_new_tokens=2")
    assert skipped["train"]
    assert not skipped["evaluate"]
    assert "# tiny.yaml:" in (finished / "run/recipe.yaml").read_text()
    assert not done("evaluate", "run", "--set", "evaluate.metrics=[loss]")["evaluate"]
    assert not done("evaluate", "run", "--set", "evaluate.metrics=[loss, exact_match]")["evaluate"]
    assert "limit: null  # default" in (finished / "run/recipe.yaml").read_text()


def test_a_new_gate_evaluates_nothing_again_and_fails_with_exit_code_6(finished: Path) -> None:
    before = (finished / "run/evaluation/evaluation.json").stat().st_mtime_ns
    result = invoke("run", "tiny.yaml", "--out", "run", "--set", 'evaluate.gates=["accuracy >= 1.01"]')
    assert result.exit_code == 6
    assert "accuracy >= 1.01" in result.stderr
    assert (finished / "run/evaluation/evaluation.json").stat().st_mtime_ns == before
    assert 'failures="1"' in (finished / "run/junit.xml").read_text()


def test_a_run_refuses_settings_that_change_its_identity(finished: Path) -> None:
    result = invoke("evaluate", "run", "--set", "train.learning_rate=1")
    assert result.exit_code == 2
    assert "another run" in result.stderr
    assert invoke("evaluate", "run", "--out", "other").exit_code == 2


def test_a_changed_base_model_is_not_used_with_the_adapter(finished: Path) -> None:
    shutil.rmtree(finished / "model")
    build_llama(finished / "model", seed=9)
    result = invoke("generate", "run", "--prompt", "hello")
    assert result.exit_code == 4
    assert "differs from the lock" in " ".join(result.stderr.split())


def test_a_finished_run_is_skipped_by_step_and_completely(finished: Path) -> None:
    assert done("adapt", "tiny.yaml", "--out", "run")["adapt"]
    assert all(done("run", "tiny.yaml", "--out", "run", "--resume").values())


def test_a_finished_run_is_shown_again_without_heavy_imports(finished: Path) -> None:
    command = ("run", "tiny.yaml", "--out", "run")
    assert heavy_imports(command) == {" ".join(command): [*ROWS]}
    first = invoke("run", "tiny.yaml", "--out", "run", "--fresh")
    again = invoke("run", "tiny.yaml", "--out", "run")
    assert again.exit_code == first.exit_code == 0
    assert [line for line in again.stderr.splitlines() if line.endswith("unchanged, skipped")] == [
        f"{step} unchanged, skipped" for step in ("prepare", "encode", "select", "adapt", "train", "evaluate")
    ]
    shown = [line for line in first.stderr[first.stderr.index("Scores") :].splitlines() if "truncated" not in line]
    assert again.stderr[again.stderr.index("Scores") :].splitlines() == shown


@pytest.mark.parametrize(
    ("path", "step"),
    [("run/adapter/adapter_model.safetensors", "train"), ("run/data/examples", "encode"), ("run/report.html", None)],
)
def test_lost_files_of_a_finished_run_are_made_again(finished: Path, path: str, step: str | None) -> None:
    lost = finished / path
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    skipped = done("run", "tiny.yaml", "--out", "run")
    assert lost.exists()
    assert step is None or not skipped[step]


def test_a_finished_run_scored_with_other_settings_is_scored_again(finished: Path) -> None:
    done("run", "tiny.yaml", "--out", "run")
    done("evaluate", "run", "--set", "evaluate.metrics=[loss]")
    skipped = done("run", "tiny.yaml", "--out", "run")
    assert (skipped["train"], skipped["evaluate"]) == (True, False)


def test_a_lock_contains_model_and_data(finished: Path) -> None:
    done("run", "tiny.yaml", "--out", "twin", "--lock", "run/llmtune.lock")
    text = change_rows(finished)
    result = invoke("run", "tiny.yaml", "--out", "third", "--lock", "run/llmtune.lock")
    assert result.exit_code == 4
    assert "data's content differs" in " ".join(result.stderr.split())
    (finished / "rows.jsonl").write_text(text)
    shutil.rmtree(finished / "model")
    build_llama(finished / "model", seed=9)
    result = invoke("run", "tiny.yaml", "--out", "fourth", "--lock", "run/llmtune.lock")
    assert result.exit_code == 4
    assert "model's content differs" in " ".join(result.stderr.split())
    assert invoke("run", "tiny.yaml", "--lock", "missing.lock").exit_code == 2


def test_a_dry_run_lists_the_steps_and_changes_nothing(finished: Path) -> None:
    result = invoke("run", "tiny.yaml", "--out", "other", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert not (finished / "other").exists()
    before = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*")}
    result = invoke("run", "tiny.yaml", "--out", "run", "--dry-run", "--json")
    assert json.loads(result.stdout)["plan"]["would_run"] == []
    assert {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*")} == before
    result = invoke("run", "tiny.yaml", "--out", "run", "--dry-run", "--set", "generation.max_new_tokens=3", "--json")
    assert json.loads(result.stdout)["plan"]["would_run"] == ["evaluate"]
    assert invoke("run", "tiny.yaml", "--out", "run", "--dry-run", "--set", "seed=5").exit_code == 2


def test_leftovers_of_a_killed_process_are_removed(place: Path) -> None:
    (place / "run").mkdir()
    (place / "run/.run.json.123.tmp").write_text("{")
    (place / "run/.evaluation.new").mkdir()
    done("prepare", "tiny.yaml", "--out", "run")
    assert not list((place / "run").glob(".*.tmp")) + list((place / "run").glob(".*.new"))


def test_a_row_longer_than_the_context_is_refused_before_training(place: Path) -> None:
    config = json.loads((place / "model/config.json").read_text())
    (place / "model/config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    result = invoke("run", "tiny.yaml", "--out", "run")
    assert result.exit_code == 3
    assert "data.max_length: 16" in " ".join(result.stderr.split())


def test_a_remote_tracker_is_refused_offline(place: Path) -> None:
    result = invoke("run", "tiny.yaml", "--out", "run", "--offline", "--set", "train.report_to=[wandb]")
    assert result.exit_code == 4
    assert "train.report_to" in result.stderr


def test_the_lock_names_the_trained_files_even_if_the_run_was_killed_before_recording_them(finished: Path) -> None:
    lock = (finished / "run/llmtune.lock").read_text()
    manifest = json.loads((finished / "run/run.json").read_text())
    del manifest["lock"]
    (finished / "run/run.json").write_text(json.dumps(manifest))
    without = {key: value for key, value in json.loads(lock).items() if key != "trained"}
    (finished / "run/llmtune.lock").write_text(json.dumps(without))
    assert done("train", "tiny.yaml", "--out", "run")["train"]
    assert (finished / "run/llmtune.lock").read_text() == lock


def test_a_dry_run_names_no_file_that_does_not_exist(place: Path, tiny_llama: Path) -> None:
    turns = [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": [{**turns[0], "content": f"{i} {turns[0]['content']}"}, turns[1]]} for i in range(40)]
    (place / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_recipe(place / "long.yaml", tiny_llama, "long.jsonl")
    refused = invoke("run", "long.yaml", "--out", "long", "--dry-run")
    assert refused.exit_code == 3, refused.output
    assert "Raise data.max_length" in refused.stderr
    assert "All of them" not in refused.stderr
    done = invoke("run", "tiny.yaml", "--out", "new", "--dry-run")
    assert "the run folder will be new" in done.stdout, done.output
