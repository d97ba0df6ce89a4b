"""Test rows that earlier runs learned: through `adapter.start_from`, or through the base model that a run made."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.rows import chat, write_jsonl
from support.runs import write_recipe

from llmtune.data.inherited_rows import Inheritance, find_inheritance, find_learned
from llmtune.data.row_store import load_rows
from llmtune.errors import DataError
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import Until
from llmtune.report.row_sections import inherited_sentences
from llmtune.store.run_request import RunRequest
from llmtune.store.score_records import Contamination

Rows = Sequence[dict[str, Any]]
CONTINUED = {"r": None, "lora_alpha": None}
FULL = {**CONTINUED, "method": "full"}
TRAIN = {"max_steps": 1, "num_train_epochs": None, "learning_rate": 1.0e-6}
COMPARED = {"metrics": ["loss"], "gates": ["loss.high < champion + 10"]}


def questions(first: int, count: int = 12) -> list[str]:
    return [f"Which number has the house of family {name * 7919}?" for name in range(first, first + count)]


def answered(texts: list[str], answer: str = "number") -> Rows:
    return [chat(text, f"{answer} {text.split()[-1]}") for text in texts]


X, Y, Z = questions(100), questions(300), questions(500)


def run(
    folder: Path, model: Path, train: Rows, test: Rows | None, until: Until = "run", **sections: Any
) -> tuple[Path, dict[str, Any], str]:
    """Train on some rows for a step, test on others; return the run folder, the report, and the console's text."""
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", train)
    data: dict[str, Any] = {"test": 0, "validation": 0.25}
    sections = {"train": TRAIN, "data": data, "evaluate": {"metrics": None if test is None else ["loss"]}, **sections}
    sections["generation"] = {"max_new_tokens": None}
    if test is not None:
        data["test"] = str(write_jsonl(folder / "test.jsonl", test))
    recipe = write_recipe(folder / "recipe.yaml", model, folder / "train.jsonl", **sections)
    torch.set_num_threads(1)
    text = Console(file=io.StringIO(), width=400)
    report = run_pipeline(load_recipe(recipe), RunRequest(out=folder / "run", until=until), text)
    assert isinstance(text.file, io.StringIO)
    return folder / "run", report, text.file.getvalue()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run that learned the rows X, with its merged model."""
    return run(tmp_path_factory.mktemp("learned") / "x", tiny_llama, answered(X), None, deploy=["merged"])[0]


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, learned: Path) -> Path:
    """A run that continues the first one on the rows Y."""
    adapter = {**CONTINUED, "start_from": str(learned)}
    return run(tmp_path_factory.mktemp("continued") / "y", tiny_llama, answered(Y), None, adapter=adapter)[0]


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run that was trained on other rows and tested on X and Z."""
    return run(tmp_path_factory.mktemp("champion") / "c", tiny_llama, answered(questions(700)), answered(X + Z))[0]


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory, learned: Path) -> Path:
    """A run on the merged model of the first one."""
    return run(tmp_path_factory.mktemp("stacked") / "s", learned / "merged", answered(Y), None)[0]


def count_learned(recipe: Recipe, run: Path) -> int:
    return len(find_learned(load_rows(run / "data" / "rows"), find_inheritance(recipe).runs))


def starting(recipe: Recipe, adapter: Path | None = None, base: Path | None = None) -> Recipe:
    parts: dict[str, Any] = {}
    if adapter is not None:
        parts["adapter"] = recipe.adapter.model_copy(update={"start_from": str(adapter)})
    if base is not None:
        parts["model"] = recipe.model.model_copy(update={"name": str(base)})
    return recipe.model_copy(update=parts)


@pytest.mark.parametrize("start", ["run", "adapter", "link", "chain of two", "merged", "adapter on merged"])
def test_rows_are_followed_through_every_start_and_through_several_runs(
    start: str, champion: Path, learned: Path, continued: Path, stacked: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(learned)
    recipe = load_recipe(champion.parent / "recipe.yaml").recipe
    assert count_learned(recipe, champion) == 0
    starts = {
        "run": starting(recipe, learned),
        "adapter": starting(recipe, learned / "adapter"),
        "link": starting(recipe, tmp_path / "link"),
        "chain of two": starting(recipe, continued),
        "merged": starting(recipe, None, learned / "merged"),
        "adapter on merged": starting(recipe, stacked),
    }
    assert count_learned(starts[start], champion) == 12
    first = {"chain of two": continued, "adapter on merged": stacked}.get(start, learned)
    assert find_inheritance(starts[start]).runs == tuple(dict.fromkeys([first, learned]))


def test_a_base_whose_weights_a_run_trained_brings_its_rows(champion: Path, tiny_llama: Path, tmp_path: Path) -> None:
    before = run(tmp_path / "before", tiny_llama, answered(X[:5] + Y), None, adapter=FULL)[0]
    recipe = load_recipe(champion.parent / "recipe.yaml").recipe
    assert count_learned(starting(recipe, None, before / "weights"), champion) == 5


def test_the_report_the_console_and_the_ci_file_count_rows_of_an_earlier_run(
    learned: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = {**CONTINUED, "start_from": str(learned)}
    folder, report, text = run(tmp_path / "new", tiny_llama, answered(Y), answered(X[:4] + Z, "other"), adapter=adapter)
    found = report["evaluation"]["contamination"]
    assert (found["inherited"], found["overlapping"], found["unknown"]) == (4, 4, [])
    assert {part["value"]: part["rows"] for part in found["scores"]} == {"clean rows": 12, "overlapping rows": 4}
    sentence = "4 of 16 test rows were training rows of the run that this one starts from."
    assert sentence in text
    assert sentence in " ".join((folder / "report.md").read_text().split())
    assert 'name="overlapping_test_rows" value="4 of 16"' in (folder / "junit.xml").read_text()


@pytest.mark.parametrize("task", ["preference", "completion"])
def test_prompts_that_a_chat_run_learned_count_in_other_tasks(
    task: str, learned: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    def rows(texts: list[str]) -> Rows:
        answer = {"preference": {"chosen": "yes", "rejected": "no"}, "completion": {"completion": " yes"}}[task]
        return [{"prompt": text, **answer} for text in texts]

    sections: dict[str, Any] = {"task": task, "adapter": {**CONTINUED, "start_from": str(learned)}}
    sections |= {"preference": {"loss": "dpo"}} if task == "preference" else {}
    folder = run(tmp_path / "new", tiny_llama, rows(Y), rows(X[:5] + Z), "prepare", **sections)[0]
    assert count_learned(load_recipe(tmp_path / "new" / "recipe.yaml").recipe, folder) == 5


@pytest.mark.slow
def test_dpo_after_chat_reports_the_prompts_that_chat_learned(learned: Path, tiny_llama: Path, tmp_path: Path) -> None:
    def rows(texts: list[str]) -> Rows:
        return [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in texts]

    sections = {"task": "preference", "preference": {"loss": "dpo"}}
    adapter = {**CONTINUED, "start_from": str(learned)}
    _, report, _ = run(tmp_path / "new", tiny_llama, rows(Y), rows(X[:5] + Z), adapter=adapter, **sections)
    assert report["evaluation"]["contamination"]["inherited"] == 5


def test_an_adapter_and_a_trained_base_without_a_run_have_unknown_rows(
    champion: Path, learned: Path, tmp_path: Path
) -> None:
    for name in ("adapter", "merged"):
        shutil.copytree(learned / name, tmp_path / name)
    recipe = load_recipe(champion.parent / "recipe.yaml").recipe
    found = find_inheritance(starting(recipe, tmp_path / "adapter", tmp_path / "merged"))
    assert found == Inheritance((), (str(tmp_path / "adapter"), str(tmp_path / "merged")))
    assert find_inheritance(recipe) == Inheritance()


def test_the_report_says_once_that_the_rows_of_an_adapter_are_unknown(
    learned: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = {**CONTINUED, "start_from": str(shutil.copytree(learned / "adapter", tmp_path / "foreign"))}
    _, report, text = run(tmp_path / "new", tiny_llama, answered(Y), answered(Z), adapter=adapter)
    assert report["evaluation"]["contamination"]["unknown"] == [str(tmp_path / "foreign")]
    assert text.count("It is unknown which rows") == 1


def test_an_earlier_run_whose_rows_or_start_are_gone_has_unknown_rows(
    continued: Path, learned: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(continued, tmp_path / "moved"))
    lock = (moved / "llmtune.lock").read_text()
    (moved / "llmtune.lock").write_text(lock.replace(str(learned), str(tmp_path / "gone")))
    recipe = load_recipe(continued.parent / "recipe.yaml", [f"adapter.start_from={moved}"]).recipe
    assert find_inheritance(recipe) == Inheritance((moved,), (str(tmp_path / "gone" / "adapter"),))
    (moved / "llmtune.lock").write_text(lock[:100])
    assert find_inheritance(recipe) == Inheritance((), (str(moved),))
    (moved / "llmtune.lock").write_text(lock)
    shutil.rmtree(moved / "data" / "rows")
    assert find_inheritance(recipe) == Inheritance((), (str(moved),))


@pytest.mark.parametrize("side", ["this run", pytest.param("champion", marks=pytest.mark.slow)])
def test_rows_that_an_earlier_run_learned_are_left_out_on_both_sides_of_a_champion(
    side: str, champion: Path, learned: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"evaluate": {**COMPARED, "champion": str(champion)}}
    after = {"adapter": {**CONTINUED, "start_from": str(learned)}}
    if side == "champion":
        other = run(tmp_path / "other", tiny_llama, answered(Y), answered(X + Z), **after)[0]
        sections["evaluate"]["champion"] = str(other)
    else:
        sections |= after
    _, report, text = run(tmp_path / "new", tiny_llama, answered(Y), answered(X + Z), **sections)
    found = report["evaluation"]["champion"]
    assert (found["rows"], found["asked"], found["difference"]["loss"]["n"]) == (12, 0, 12)
    assert "champion: 12 of 24 test rows were training rows of a run" in text


@pytest.mark.slow
def test_a_champion_does_not_answer_new_rows_that_an_earlier_run_learned(
    learned: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    after = {"adapter": {**CONTINUED, "start_from": str(learned)}}
    champion = run(tmp_path / "champion", tiny_llama, answered(Y), answered(Z[:6]), **after)[0]
    evaluate = {**COMPARED, "champion": str(champion)}
    _, report, _ = run(tmp_path / "new", tiny_llama, answered(questions(900)), answered(X + Z), evaluate=evaluate)
    found = report["evaluation"]["champion"]
    assert (found["rows"], found["asked"]) == (12, 6)


def test_a_comparison_is_refused_if_earlier_runs_learned_all_test_rows(
    champion: Path, learned: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    evaluate, adapter = {**COMPARED, "champion": str(champion)}, {**CONTINUED, "start_from": str(learned)}
    with pytest.raises(DataError, match=r"none of the 12 test rows can be compared: .*starts from was trained on them"):
        run(tmp_path / "new", tiny_llama, answered(Y), answered(X), evaluate=evaluate, adapter=adapter)
    assert not (tmp_path / "new" / "run" / "adapter").exists()


def test_the_report_names_one_row_and_every_unknown_folder() -> None:
    one = Contamination(3, 9, 0, 0, 0, 0, 0, 1, 0, {}, (), (), inherited=1, unknown=("/a", "/b"))
    first, second = inherited_sentences(one)
    assert first.startswith("1 of 3 test rows was a training row of the run that this one starts from.")
    assert second.startswith("It is unknown which rows `/a`, `/b` learned")
