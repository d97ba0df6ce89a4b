"""Task files of lm-eval, read without it."""

import re
from pathlib import Path

import pytest
from support.benchmark_tasks import CHOOSE, recipe_with

from llmtune.errors import DataError, EnvironmentProblem
from llmtune.evaluate.lm_eval_tasks import check_task_files, list_task_files, read_task_file
from llmtune.launch.python_api import names_remote


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: [a\n x: {", "changed.yaml:2: the task file is not valid YAML"),
        ("hello: 1", "neither `task` nor `group`"),
        ("- 1", "no mapping"),
        ("task: a\ninclude: changed.yaml", "includes itself"),
        ("task: a\ninclude: lost.yaml", "lost.yaml: there is no such task file"),
        (None, "changed.yaml: there is no such task file"),
    ],
)
def test_a_bad_task_file_is_told_at_once_by_its_name(tasks: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tasks / "changed.yaml").write_text(text)
    with pytest.raises(DataError, match=re.escape(told)):
        check_task_files(recipe_with(tasks / "changed.yaml"))


def test_lm_eval_missing_is_told_by_the_extra_that_brings_it(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune.evaluate.lm_eval_tasks.PACKAGE", "lm_eval_that_is_not_there")
    with pytest.raises(EnvironmentProblem, match=r"pip install 'llmtune-cli\[benchmarks\]'"):
        check_task_files(recipe_with(tasks / "choose.yaml"))
    check_task_files(recipe_with())


def test_tasks_of_a_hub_ask_for_the_network_and_files_do_not(tasks: Path) -> None:
    assert names_remote(recipe_with("hellaswag"))
    assert not names_remote(recipe_with(tasks / "choose.yaml"))
    hub = CHOOSE.replace("dataset_path: json", "dataset_path: someone/questions")
    (tasks / "hub.yaml").write_text(hub.replace("dataset_kwargs", "metadata"))
    assert names_remote(recipe_with(tasks / "hub.yaml"))
    (tasks / "far.yaml").write_text(CHOOSE.replace("questions.jsonl", "'https://example.org/q.jsonl'"))
    assert names_remote(recipe_with(tasks / "far.yaml"))
    (tasks / "group.yaml").write_text("group: g\ntask: [chosen_colours, hellaswag]\n")
    assert names_remote(recipe_with(tasks / "group.yaml"))
    assert read_task_file(tasks / "group.yaml").members == {"hellaswag"}


def test_all_that_a_task_file_rests_on_counts(tasks: Path) -> None:
    (tasks / "more").mkdir()
    (tasks / "own.py").write_text("def target(row):\n    return row['answer']\n")
    text = CHOOSE.replace("doc_to_target: answer", "doc_to_target: !function own.target").replace(
        "test: quest", "test: ../quest"
    )
    (tasks / "more" / "own.py").write_text("def target(row):\n    return row['answer']\n")
    (tasks / "more" / "inner.yaml").write_text(text)
    (tasks / "more" / "outer.yaml").write_text("include: inner.yaml\ntask: outer\n")
    names = {
        path.resolve().relative_to(tasks.resolve()).as_posix()
        for path in list_task_files(str(tasks / "more" / "outer.yaml"))
    }
    assert names == {"more/outer.yaml", "more/inner.yaml", "more/own.py", "questions.jsonl"}
    (tasks / "group.yaml").write_text("group: g\ntask: [chosen_colours]\n")
    names = {path.name for path in list_task_files(str(tasks / "group.yaml"))}
    assert names == {"group.yaml", "choose.yaml", "questions.jsonl"}
    assert list_task_files("hellaswag") == list_task_files(str(tasks / "lost.yaml")) == []
