"""Runs with a teacher: what it predicted is recorded, learned, and part of the run's inputs."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import families
from support.adapting import quiet
from support.models import CHATML, build_llama
from support.pairs import DOCUMENTS, PAIRS, recipe_of
from support.runs import invoke
from support.task_cases import CHATS, MULTI, NO_TEXT, SINGLE, TAGS
from support.training import trained_bytes

from llmtune import run_models
from llmtune.data.examples import ExampleReader
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate import teacher as recording
from llmtune.model.causal_lm_loss import move_to
from llmtune.model.teacher_loss import BinRecorder, Distribution
from llmtune.pipeline import run_pipeline
from llmtune.plan import open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from llmtune.train import teacher_objective
from llmtune.train.teacher_objective import Distilled, TeacherReader

SPLIT = {"validation": 0.2, "test": 0.1}
CASES: dict[str, tuple[Any, list[dict[str, Any]], str, dict[str, Any]]] = {
    "chat": (build_llama, CHATS, "chat", {}),
    "completion": (build_llama, CHATS, "completion", {"data": {"packing": False}}),
    "translate": (families.build_t5, PAIRS, "translate", {}),
    "summarize": (build_llama, DOCUMENTS, "summarize", {}),
    "classify": (families.build_bert, SINGLE, "classify", NO_TEXT),
    "classify-multi": (families.build_bert, MULTI, "classify", NO_TEXT),
    "token-classify": (families.build_bert, TAGS, "token-classify", NO_TEXT),
}


def write(folder: Path, case: str, teacher: Path | None, **sections: Any) -> Path:
    build, rows, task, own = CASES[case]
    model = folder / "model"
    if not model.exists():
        build(model)
    if teacher is not None:
        sections["distil"] = {"teacher": str(teacher), "control": False, **sections.get("distil", {})}
    data = {**SPLIT, **own.get("data", {}), **sections.pop("data", {})}
    return recipe_of(folder, model, rows, task, **{**own, **sections, "data": data})


def train(recipe: Path, run: str = "run", console: Any = None, **request: Any) -> Path:
    out = recipe.parent / run
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=out, until="train", **request), console or quiet())
    return out


def make_teacher(folder: Path, case: str) -> Path:
    """Train a teacher whose predictions differ from the student's."""
    train_settings = {"max_steps": 4, "learning_rate": 1e-2, "num_train_epochs": None}
    return train(write(folder / "teacher", case, None, train=train_settings))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] if case in ("summarize", "token-classify") else []) for case in CASES],
)
def test_recorded_predictions_give_the_loss_and_gradient_of_the_live_teacher(tmp_path, case):
    teacher = make_teacher(tmp_path, case)
    weight = 1.0 if case == "completion" else 0.4
    top_k = {} if case.startswith(("classify", "token")) else {"top_k": 7}
    section = {"weight": weight, "temperature": 2.0, **top_k}
    run = train(write(tmp_path, case, teacher, distil=section, train={"max_steps": 2, "num_train_epochs": None}))

    context = replace(open_finished(run, quiet(), True))
    plan, examples, task = context.plan, context.examples, context.plan.task
    loaded = run_models.Models(context)
    with run_models.open_teacher(context) as (model, _), loaded.tuned() as student:
        for split in ("train", "validation"):
            reader = ExampleReader(examples, split, task.example_type)
            rows = np.array([1, 0])
            collate = task.collator(plan.processor, plan.recipe, loaded.packs)
            batch = move_to("cpu", collate([reader[int(row)] for row in rows], 0))
            recorder = BinRecorder(7 if top_k else 1000, 2.0, 10**6)
            with torch.no_grad():
                task.loss(model, {**batch, "teacher": recorder})
            live = Distribution(torch.cat(recorder.ids), torch.cat(recorder.logs), weight, 2.0)
            assert plan.recipe.distil is not None
            stored = TeacherReader(run / "data" / "teacher", split, reader)
            objective = Distilled(task.loss, plan.recipe.distil, {split: stored})
            objective.split = split
            parameters = [one for one in student.parameters() if one.is_floating_point()]
            for parameter in parameters:
                parameter.requires_grad_()
            results = []
            for loss in (objective.loss(student, batch, rows), task.loss(student, {**batch, "teacher": live})):
                assert loss.count == reader.supervised[rows].sum()
                gradients = torch.autograd.grad(loss.sum, parameters, allow_unused=True)
                results.append([loss.sum.detach(), *(one for one in gradients if one is not None)])
            for cached, fresh in zip(*results, strict=True):
                torch.testing.assert_close(cached, fresh, rtol=5e-3, atol=5e-3)
            plain = task.loss(student, batch).sum
            assert abs(results[0][0] - plain) > 1e-2  # the teacher has an effect


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and with a trained student of it in `run`."""
    folder = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patched:
        cut_small(patched)
        train(write_chat(folder, make_teacher(folder, "chat")))
    return folder


def write_chat(folder: Path, teacher: Path, **sections: Any) -> Path:
    """Write a recipe with two steps of training, and blocks of few rows."""
    train_settings = {"max_steps": 2, "num_train_epochs": None}
    return write(folder, "chat", teacher, train=train_settings, **sections)


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recording, teacher_objective):
        monkeypatch.setattr(module, "BLOCK", 3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


def recorded(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "data" / "teacher").iterdir())}


def interrupt_after(blocks: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writing fail once this many blocks are on the disk."""
    save = np.save

    def fail_later(file: Any, *arguments: Any) -> None:
        if f"train-{blocks:05}" in str(getattr(file, "name", "")):
            raise error
        save(file, *arguments)

    monkeypatch.setattr(np, "save", fail_later)


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of examples of each batch that a teacher reads."""
    sizes: list[int] = []
    original = recording.to_records

    def convert(ids: torch.Tensor, logs: torch.Tensor) -> Any:
        sizes.append(len(ids))
        return original(ids, logs)

    monkeypatch.setattr(recording, "to_records", convert)
    return sizes


def test_a_killed_recording_continues_and_ends_with_the_same_bytes(taught, tmp_path, monkeypatch):
    recipe = write_chat(taught, taught / "teacher" / "run")
    with monkeypatch.context() as patched:
        interrupt_after(2, KeyboardInterrupt(), patched)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, "killed")
    assert [name for name in recorded(taught / "killed") if name.endswith(".npy")] == [
        "train-00000.npy",
        "train-00001.npy",
    ]
    (taught / "killed" / "data" / "teacher" / ".train-00002.npy.1.tmp").write_bytes(b"half")
    train(recipe, "killed")
    assert recorded(taught / "killed") == recorded(taught / "run")
    assert trained_bytes(taught / "killed") == trained_bytes(taught / "run")


def test_a_half_recorded_block_that_ends_in_zeros_is_recorded_again(taught, monkeypatch):
    recipe = write_chat(taught, taught / "teacher" / "run")
    with monkeypatch.context() as patched:
        interrupt_after(2, KeyboardInterrupt(), patched)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, "halved")
    block = taught / "halved" / "data" / "teacher" / "train-00001.npy"
    block.write_bytes(block.read_bytes()[:-400] + bytes(400))
    train(recipe, "halved")
    assert recorded(taught / "halved") == recorded(taught / "run")


def test_a_block_that_changed_is_not_trained_on(taught, tmp_path):
    block = tmp_path / "train-00000.npy"
    whole = (taught / "run" / "data" / "teacher" / block.name).read_bytes()
    reader = SimpleNamespace(supervised=np.ones(1))
    for damaged in (whole[:-400] + bytes(400), whole[:150] + b"!" + whole[151:], whole[:-32], whole[:20], b""):
        block.write_bytes(damaged)
        with pytest.raises(EnvironmentProblem, match="the teacher's predictions are missing or damaged"):
            TeacherReader(tmp_path, "train", reader).read(np.array([0]))


def test_a_full_disk_gives_one_message_and_keeps_what_was_recorded(taught, monkeypatch):
    recipe = write_chat(taught, taught / "teacher" / "run")
    with monkeypatch.context() as patched:
        interrupt_after(2, OSError(28, "No space left on device"), patched)
        with pytest.raises(EnvironmentProblem, match="the disk is full") as caught:
            train(recipe, "full")
    assert caught.value.exit_code == 4
    assert len(recorded(taught / "full")) == 3
    train(recipe, "full")
    assert recorded(taught / "full") == recorded(taught / "run")


def test_a_disk_with_too_little_space_is_refused_before_the_teacher_runs(taught, monkeypatch):
    recipe = write_chat(taught, taught / "teacher" / "run")
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(EnvironmentProblem, match="MB more, but the disk has 0 MB free"):
        train(recipe, "small")


@pytest.mark.parametrize(
    ("sections", "recorded_again"),
    [
        ({}, False),
        ({"distil": {"weight": 0.9}}, False),
        ({"distil": {"top_k": 5}}, True),
        ({"distil": {"temperature": 3.0}}, True),
        ({"data": {"max_length": 40}}, True),
        ({"model": {"dtype": "bfloat16"}}, True),
        ({"model": {"chat_template": "other.jinja"}}, True),
    ],
)
def test_only_what_changes_the_predictions_records_them_again(taught, monkeypatch, sections, recorded_again):
    """The folder belongs to one recipe, so a copy of the run stands for one whose recipe was edited."""
    sizes = count_batches(monkeypatch)
    teacher = taught / "teacher" / "run"
    run = taught / "edited"
    (taught / "other.jinja").write_text(CHATML.replace("<|im_start|>", "<|im_start|>to "))
    if not run.exists():
        train(write_chat(taught, teacher), "edited")
        sizes.clear()
    manifest = run / "run.json"
    recipe = write_chat(taught, teacher, **sections)
    changed = json.loads(manifest.read_text()) | {"fingerprint": load_recipe(str(recipe)).fingerprint}
    manifest.write_text(json.dumps(changed))
    train(recipe, "edited")
    assert bool(sizes) == recorded_again


def test_a_changed_row_makes_the_predictions_stale(tmp_path, monkeypatch):
    teacher = make_teacher(tmp_path, "chat")
    recipe = write_chat(tmp_path, teacher)
    train(recipe)
    sizes = count_batches(monkeypatch)
    rows = next(tmp_path.glob("*.jsonl"))
    first, rest = rows.read_text(encoding="utf-8").split("\n", 1)
    rows.write_text(first.replace("Which", "What", 1) + "\n" + rest, encoding="utf-8")
    train(recipe)
    assert sizes


def test_a_teacher_that_was_trained_further_makes_its_predictions_stale(taught, tmp_path, monkeypatch):
    sizes = count_batches(monkeypatch)
    teacher = make_teacher(tmp_path, "chat")
    recipe = write_chat(tmp_path, teacher)
    train(recipe)
    before = recorded(tmp_path / "run")
    sizes.clear()
    train(recipe)
    assert not sizes
    again = write(tmp_path / "teacher", "chat", None, train={"max_steps": 8, "num_train_epochs": None})
    run_pipeline(load_recipe(str(again)), RunRequest(out=teacher, until="train", fresh=True), quiet())
    train(recipe)
    assert sizes
    assert recorded(tmp_path / "run") != before


def test_a_damaged_recording_is_made_again(taught):
    recipe = write_chat(taught, taught / "teacher" / "run")
    run = train(recipe, "damaged")
    block = run / "data" / "teacher" / "train-00001.npy"
    block.write_bytes(block.read_bytes()[:-40])
    for name in ("adapter", "checkpoints"):
        for path in sorted((run / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    train(recipe, "damaged")
    assert recorded(run) == recorded(taught / "run")


def test_a_teacher_with_other_classes_or_for_another_task_is_refused(taught, tmp_path):
    colours = make_teacher(tmp_path, "classify")
    again = [{**row, "label": "blue" if row["label"] == "red" else row["label"]} for row in SINGLE]
    student = recipe_of(
        tmp_path / "student",
        tmp_path / "teacher" / "model",
        again,
        "classify",
        **NO_TEXT,
        data=SPLIT,
        distil={"teacher": str(colours), "control": False},
    )
    other_task = write_chat(taught, colours)
    with pytest.raises(RecipeError, match="has other classes than the student"):
        train(student)
    with pytest.raises(RecipeError, match="is a model for task classify"):
        train(other_task, "other-task")
    for recipe, words in ((student, "other classes than the student"), (other_task, "a model for task classify")):
        checked = invoke("recipes", "check", recipe)
        assert (checked.exit_code, words in " ".join(checked.stderr.split())) == (2, True), (recipe, checked.output)


def test_a_teacher_with_another_tokenizer_is_refused_with_the_first_id_that_differs(taught, tmp_path):
    other = build_llama(tmp_path / "other")
    file = other / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=lambda text: vocabulary[text])[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RecipeError, match="has another tokenizer: id 40 is ") as caught:
        train(write_chat(taught, other), "other-tokenizer")
    assert caught.value.exit_code == 2
