"""`import llmtune`: the same runs as from the command line, as objects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import invoke, write_recipe, write_sums

import llmtune
from llmtune.errors import GateFailed, RecipeError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("python")
    write_sums(folder / "rows.jsonl")
    gates = {"gates": ["loss <= 100"]}
    return write_recipe(folder / "tiny.yaml", tiny_llama, "rows.jsonl", evaluate=gates)


def test_a_run_from_python_equals_one_from_the_command_line(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    run = llmtune.run(recipe, out=recipe.parent / "run", set={"train.num_train_epochs": 1}, quiet=True)
    report = json.loads((recipe.parent / "run" / "report.json").read_text())
    assert run.report == report
    assert run.scores == {model: report["evaluation"][model] for model in ("base", "tuned")}
    assert [(gate.name, gate.passed) for gate in run.gates] == [("loss <= 100", True)]
    assert run.recipe.train.num_train_epochs == 1

    again = llmtune.load_run(recipe.parent / "run")
    question = "What comes after 3 and before 5?"
    done = invoke("generate", "run", "--prompt", question)
    assert again.generate(question) + "\n" == done.stdout
    assert len(again.tokenizer(again.generate(question, max_new_tokens=2))["input_ids"]) <= 4
    assert again.answer(question)["text"] == again.answer({"prompt": question})["text"] == again.generate(question)
    for wrong in (5, ["text"], {"prompt": 5}):
        with pytest.raises(RecipeError, match=r"run.answer\(inputs=...\)"):
            again.answer(wrong)  # type: ignore[arg-type]
    assert again.model() is again.model()
    assert again.model().peft_config["default"].r == 4
    with pytest.raises(RecipeError, match="does not use it"):
        again.generate(question, context="a text")
    with pytest.raises(RecipeError, match=r"run.generate\(prompt=...\)") as refused:
        again.generate([question], max_new_tokens=0)  # type: ignore[arg-type]
    assert "run.generate(max_new_tokens=...): 0 (int)" in str(refused.value)


WRONG = [
    *[("out", 5), ("set", [("a", 1)]), ("set", "a=1"), ("set", {1: 2}), ("until", None), ("until", ["run"])],
    *[("processes", "2"), ("processes", None), ("processes", True), ("strategy", 5), ("resume", "no")],
    *[("fresh", None), ("lock", {}), ("threads", "4"), ("threads", 0), ("threads", 1.5), ("offline", 1)],
    *[("quiet", "yes"), ("recipe", None), ("recipe", b"tiny.yaml"), ("recipe", {"task": "chat"})],
]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *[(name, value, rf"llmtune.run\({name}=...\)") for name, value in WRONG],
        ("until", "evalute", r"(?s)llmtune.run\(until=...\): 'evalute'.*Did you mean 'evaluate'"),
        ("processes", 0, "--processes: 0 is less than 1"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(recipe: Path, name: str, value: object, said: str) -> None:
    given = {"recipe": recipe, "out": recipe.parent / "none", name: value}
    with pytest.raises(RecipeError, match=said):
        llmtune.run(**given)  # type: ignore[arg-type]
    assert not (recipe.parent / "none").exists()


def test_all_wrong_arguments_are_named_at_once(recipe: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        llmtune.run(recipe, until="all", threads=-1, quiet=None)  # type: ignore[arg-type]
    assert len(refused.value.problems) == 3
    for folder in (None, 5, b"run"):
        with pytest.raises(RecipeError, match=r"llmtune.load_run\(folder=...\)"):
            llmtune.load_run(folder)  # type: ignore[arg-type]


def test_a_failed_gate_is_an_error_and_the_run_is_kept(recipe: Path) -> None:
    out = recipe.parent / "run"
    sets = {"train.num_train_epochs": 1, "train.eval_steps": None, "evaluate.gates": ["loss <= 0"]}
    with pytest.raises(GateFailed):
        llmtune.run(recipe, out=out, set=sets, quiet=True)
    assert not llmtune.load_run(out).gates[0].passed


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        llmtune.load_run(tmp_path)


def test_importing_llmtune_loads_no_heavy_libraries() -> None:
    code = "import llmtune, sys; llmtune.run; print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    with pytest.raises(AttributeError, match="no attribute 'fine_tune'"):
        llmtune.fine_tune  # noqa: B018
