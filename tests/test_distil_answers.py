"""Runs whose rows are answered by the teacher."""

import json
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import families
from support.adapting import quiet
from support.encoding import learned
from support.models import build_llama, train_tokenizer
from support.pairs import DOCUMENTS, PAIRS, recipe_of
from support.runs import invoke
from support.task_cases import CHATS, NO_TEXT, SINGLE
from support.training import trained_bytes

from llmtune.data.chat_template import CUT_THOUGHTS
from llmtune.data.examples import ExampleReader, load_examples
from llmtune.data.row_store import iterate_rows, load_rows, rows_folder
from llmtune.errors import DataError, RecipeError
from llmtune.evaluate import teacher as answering
from llmtune.evaluate.sampled_decoding import SampledAnswer
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.records import Row
from llmtune.store.atomic_files import hash_value, write_json
from llmtune.store.run_request import RunRequest
from llmtune.store.verification import verify_run
from llmtune.train import teacher_objective

COMPLETIONS = [{"prompt": row["prompt"], "completion": row["completion"]} for row in CHATS]
CASES: dict[str, tuple[Any, str, list[dict[str, Any]]]] = {
    "chat": (build_llama, "completion", CHATS),
    "completion": (build_llama, "completion", COMPLETIONS),
    "translate": (families.build_t5, "target", PAIRS),
    "summarize": (build_llama, "summary", DOCUMENTS),
}


def write(
    folder: Path,
    task: str = "chat",
    rows: list[dict[str, Any]] | None = None,
    max_dropped: float = 0.05,
    **section: Any,
) -> Path:
    """Write a recipe whose teacher answers, and build student and teacher."""
    build, _, given = CASES[task]
    for name, seed in (("model", 0), ("teacher", 3)):
        if not (folder / name).exists():
            build(folder / name, **({"seed": seed} if build is build_llama else {}))
    train = {"max_steps": 2, "num_train_epochs": None}
    section = {"teacher": str(folder / "teacher"), "top_k": 7, "answers": True, "control": False, **section}
    data, generation = {"validation": 0.2, "test": 0.1, "max_dropped": max_dropped}, {"max_new_tokens": 6}
    rows = given if rows is None else rows
    return recipe_of(
        folder, folder / "model", rows, task, train=train, data=data, generation=generation, distil=section
    )


def train(recipe: Path, run: str = "run") -> Path:
    out = recipe.parent / run
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=out, until="train"), quiet())
    return out


def splits(folder: Path) -> dict[str, list[Row]]:
    rows = load_rows(folder)
    return {split: [row for _, row in iterate_rows(rows, split)] for split in rows.files}


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (answering, teacher_objective):
        monkeypatch.setattr(module, "BLOCK", 8)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        cut_small(patched)
        return train(write(tmp_path_factory.mktemp("answered")))


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=[pytest.mark.slow] if task in ("completion", "summarize") else []) for task in CASES],
)
def test_the_teacher_answers_train_and_validation_and_leaves_test(tmp_path, task):
    run = train(write(tmp_path, task))
    before, after = splits(run / "data" / "rows"), splits(rows_folder(run))
    assert rows_folder(run).name == "answered"
    assert after["test"] == before["test"]
    for split in ("train", "validation"):
        assert len(after[split]) == len(before[split])
        changed = [one != other for one, other in zip(before[split], after[split], strict=True)]
        assert sum(changed) > len(changed) / 2
        key = {"chat": "messages", "completion": "prompt", "translate": "source", "summarize": "document"}[task]
        questions = [[row[key][:-1] if task == "chat" else row[key] for row in one[split]] for one in (before, after)]
        assert questions[0] == questions[1]
    assert not (run / "data" / "answers").exists()


def test_answers_are_the_samples_of_the_teacher_and_not_of_the_student(answered, tmp_path):
    recipe = write(tmp_path, teacher=str(tmp_path / "model"))
    assert splits(rows_folder(train(recipe)))["train"] != splits(rows_folder(answered))["train"]


def test_only_the_last_answer_of_a_conversation_is_written_and_learned(tmp_path):
    turns = [
        {"role": "user", "content": "Which colour is the sky?"},
        {"role": "assistant", "content": "Blue."},
    ]
    rows = [{"messages": [*turns, {"role": "user", "content": f"And of {i}?"}, turns[1]]} for i in range(24)]
    for row in splits(rows_folder(train(write(tmp_path, rows=rows))))["train"]:
        first, last = (one for one in row["messages"] if one["role"] == "assistant")
        assert (first["content"], first["train"]) == ("Blue.", False)
        assert last.get("train", True)
        assert last["content"] != "Blue."


def test_a_run_killed_while_the_teacher_answers_ends_with_the_same_bytes(answered, monkeypatch):
    write_json = answering.write_json

    def write_and_die(path: Path, value: object) -> None:
        write_json(path, value)
        if path.name == "train-00001.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(answering, "write_json", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(answered.parent / "recipe.yaml", "killed")
    folder = answered.parent / "killed" / "data" / "answers"
    assert sorted(path.name for path in folder.iterdir()) == ["teacher.json", "train-00000.json", "train-00001.json"]
    (folder / ".train-00002.json.1.tmp").write_bytes(b"half")
    written: list[str] = []

    def note(path: Path, value: object) -> None:
        written.append(path.name)
        write_json(path, value)

    monkeypatch.setattr(answering, "write_json", note)
    run = train(answered.parent / "recipe.yaml", "killed")
    assert {"train-00000.json", "train-00001.json"}.isdisjoint(written)
    for name in ("train.rows.arrow", "validation.rows.arrow"):
        one, two = (path / "data" / "answered" / name for path in (run, answered))
        assert one.read_bytes() == two.read_bytes()
    assert trained_bytes(run) == trained_bytes(answered)


def test_reproducing_an_answered_run_gives_the_same_bytes(answered, tmp_path):
    done = invoke("reproduce", answered, "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert trained_bytes(tmp_path / "again") == trained_bytes(answered)


def test_verify_names_answers_that_changed(tmp_path):
    run = train(write(tmp_path))
    assert verify_run(run).failed == []
    file = run / "data" / "answered" / "train.rows.arrow"
    file.write_bytes(file.read_bytes().replace(b"colour", b"colors"))
    assert [str(file) in str(one) for one in verify_run(run).failed] == [True]


def test_changed_rows_are_answered_again_and_unchanged_ones_are_not(tmp_path, monkeypatch):
    recipe = write(tmp_path)
    train(recipe)
    calls: list[int] = []
    sample = answering.sample_answers
    monkeypatch.setattr(answering, "sample_answers", lambda *arguments: calls.append(1) or sample(*arguments))
    train(recipe)
    assert not calls
    write(tmp_path, rows=[*CHATS, {"prompt": "Which colour has the new one?", "completion": "It is new"}])
    run = train(recipe)
    assert calls
    before, after = splits(run / "data" / "rows"), splits(rows_folder(run))
    assert {split: len(rows) for split, rows in after.items()} == {split: len(rows) for split, rows in before.items()}


def test_weight_zero_learns_the_answers_without_recording_predictions(tmp_path):
    run = train(write(tmp_path, weight=0))
    assert rows_folder(run).name == "answered"
    assert not (run / "data" / "teacher").exists()


def test_the_control_run_learns_the_same_answers(tmp_path):
    recipe = write(tmp_path, control=True)
    run = tmp_path / "run"
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=run, until="train"), quiet())
    control = run / "controls" / "sft"
    assert splits(rows_folder(control)) == splits(rows_folder(run))
    assert json.loads((control / "run.json").read_text())["steps"]["train"]["state"] == "done"
    assert trained_bytes(control) != trained_bytes(run)


def test_answers_of_classes_and_weight_zero_without_answers_are_refused(tmp_path):
    model = families.build_bert(tmp_path / "model")
    section = {"teacher": str(model), "answers": True}
    recipe = recipe_of(tmp_path, model, SINGLE, "classify", **NO_TEXT, distil=section)
    with pytest.raises(RecipeError, match=r"'distil\.answers' does not work with task: classify"):
        load_recipe(str(recipe))
    recipe = write(tmp_path / "other", answers=False, weight=0)
    with pytest.raises(RecipeError, match=r"'distil\.weight' is 0, so nothing is learned from the teacher"):
        load_recipe(str(recipe))


def script(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the teacher write these texts in turn; those without an end token are truncated."""
    turn, tokenizer = cycle(texts), train_tokenizer()

    def write_next(model: Any, prompts: list[list[int]], *arguments: Any) -> list[SampledAnswer]:
        written = [next(turn) for _ in prompts]
        return [SampledAnswer(tokenizer(one)["input_ids"], [], not one.endswith("<|im_end|>")) for one in written]

    monkeypatch.setattr(answering, "sample_answers", write_next)


def test_thoughts_of_a_teacher_are_learned_and_answers_that_end_in_them_are_counted(tmp_path, monkeypatch):
    texts = ["<think>\nhm\n</think>\n\nblue<|im_end|>", "<think>\nso", "<think>\nso\n</think>\n\nred"]
    script(texts, monkeypatch)
    recipe, console = write(tmp_path, max_dropped=0.5), Console(file=StringIO(), width=300)
    run = tmp_path / "run"
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=run, until="train"), console)
    rows = splits(rows_folder(run))
    answers = [row["messages"][-1] for split in ("train", "validation") for row in rows[split]]
    assert {(one["reasoning"], one["content"]) for one in answers} == {("hm", "blue"), ("so", ""), ("so", "red")}
    cut = sum(not one["content"] for one in answers)
    steps = json.loads((run / "run.json").read_text())["steps"]
    assert steps["answer"]["facts"] == {"answered": len(answers), "truncated": 2 * cut, "unreadable_calls": 0}
    assert steps["encode"]["facts"]["dropped"] == {CUT_THOUGHTS: cut}
    assert ": those that end in their thoughts are left out" in console.file.getvalue()
    tokenizer = train_tokenizer()
    examples = ExampleReader(load_examples(run / "data" / "examples"), "train")
    assert {learned(one, tokenizer)[0] for one in examples} == {texts[0], f"{texts[2]}<|im_end|>"}


def test_thoughts_that_a_task_cannot_learn_are_refused_with_the_key(tmp_path, monkeypatch):
    script(["<think>\nhm\n</think>\n\nblue<|im_end|>"], monkeypatch)
    with pytest.raises(RecipeError, match="task summarize cannot learn them") as caught:
        train(write(tmp_path, "summarize"))
    assert (caught.value.problems[0].where, "data.reasoning: drop" in str(caught.value)) == ("distil.answers", True)


def test_a_damaged_block_of_answers_is_not_read(tmp_path):
    file, answered = tmp_path / "train-00000.json", [{"row": {"prompt": "a", "completion": "b"}}]
    write_json(file, {"hash": hash_value(answered), "rows": answered})
    assert answering.read_answers(file) == answered
    for damaged in (file.read_bytes()[:-9] + bytes(9), file.read_bytes().replace(b'"b"', b'"c"'), b"[]", b""):
        file.write_bytes(damaged)
        assert answering.read_answers(file) is None


def test_a_text_without_a_prompt_is_refused_before_the_teacher_is_loaded(tmp_path):
    recipe = write(tmp_path, "completion", [{"text": f"A text of {i} words."} for i in range(24)])
    with pytest.raises(DataError, match="the row has no prompt that the teacher could answer") as caught:
        train(recipe)
    assert caught.value.exit_code == 3
    assert "rows.jsonl" in str(caught.value.problems[0].where)
