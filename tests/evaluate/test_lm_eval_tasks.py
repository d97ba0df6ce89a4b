"""Task files of lm-eval, read without it."""

import re
from pathlib import Path

import pytest
from support.benchmark_tasks import CHOOSE, recipe_with

from llmtune.errors import DataError, EnvironmentProblem
from llmtune.evaluate.cache_keys import evaluation_files
from llmtune.evaluate.lm_eval import check_task_names
from llmtune.evaluate.lm_eval_tasks import list_task_files
from llmtune.launch.python_api import names_remote


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: [a\n x: {", "changed.yaml:2: the task file is not valid YAML"),
        ("hello: 1", "neither `task` nor `group`"),
        ("- 1", "neither `task` nor `group`"),
        (None, "changed.yaml: task file not found"),
    ],
)
def test_a_bad_task_file_is_told_at_once_by_its_name(tasks: Path, text: str | None, told: str) -> None:
    if text is not None:
        (tasks / "changed.yaml").write_text(text)
    with pytest.raises(DataError, match=re.escape(told)):
        check_task_names(recipe_with(tasks / "changed.yaml"))


def test_lm_eval_missing_is_told_by_the_extra_that_brings_it(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune.evaluate.lm_eval.PACKAGE", "lm_eval_that_is_not_there")
    with pytest.raises(EnvironmentProblem, match=r"pip install 'llmtune-cli\[benchmarks\]'"):
        check_task_names(recipe_with(tasks / "choose.yaml"))
    check_task_names(recipe_with())


def test_names_need_the_network_and_files_do_not_unless_the_recipe_says_otherwise(tasks: Path) -> None:
    choose = str(tasks / "choose.yaml")
    assert names_remote(recipe_with("hellaswag"))
    assert not names_remote(recipe_with(choose))
    assert names_remote(recipe_with({"task": choose, "network": True}))
    assert not names_remote(recipe_with({"task": "hellaswag", "network": False}))


def test_all_that_a_task_file_rests_on_counts(tasks: Path) -> None:
    (tasks / "more").mkdir()
    (tasks / "own.py").write_text("def target(row):\n    return row['answer']\n")
    text = CHOOSE.replace("doc_to_target: answer", "doc_to_target: !function own.target").replace(
        "test: quest", "test: ../quest"
    )
    (tasks / "more" / "own.py").write_text("def target(row):\n    return row['answer']\n")
    (tasks / "more" / "inner.yaml").write_text(text)
    (tasks / "more" / "outer.yaml").write_text("include: inner.yaml\ntask: outer\n")
    found = list_task_files(tasks / "more" / "outer.yaml")
    names = {path.relative_to(tasks.resolve()).as_posix() for path in found}
    assert names == {"more/outer.yaml", "more/inner.yaml", "more/own.py", "questions.jsonl"}
    (tasks / "group.yaml").write_text("group: g\ntask: [chosen_colours]\n")
    (tasks / "broken.yaml").write_text("task: [a\n x: {")
    names = {path.name for path in list_task_files(tasks / "group.yaml")}
    assert {"group.yaml", "choose.yaml", "questions.jsonl"} < names
    assert evaluation_files(recipe_with("hellaswag", tasks / "lost.yaml")) == []
