"""Runs with decisions: their rules, their scores and gates, and equal decisions wherever the model answers."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support import families, pairs
from support.classifying import colour_rows
from support.rows import write_jsonl
from support.runs import invoke
from support.serving import load_served, serving

from llmtune.errors import GateFailed, RecipeError
from llmtune.evaluate.calibration import read_rules
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.recipe.loader import load_recipe
from llmtune.serve.answer_file import answer_file
from llmtune.serve.finished_run import FinishedRun
from llmtune.store.atomic_files import hash_folder
from llmtune.store.score_records import Decision, Evaluation

COLOURS = [
    {"text": f"{row['text']} and {i % 7}", "label": "green" if i % 9 == 0 else row["label"]}
    for i, row in enumerate(colour_rows(180))
]
"""One row in nine has a label that its text does not show."""
MANY = [{**row, "label": [row["label"]] if i % 4 else ["red", "blue"]} for i, row in enumerate(COLOURS)]
TAGS = [{"tokens": row["text"].split(), "tags": ["O", f"B-{row['label'].upper()}", *["O"] * 5]} for row in COLOURS]
TALK = [
    {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}
    for row in COLOURS
]
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "single": ("classify", COLOURS),
    "many": ("classify", MANY),
    "tags": ("token-classify", TAGS),
    "chat": ("chat", TALK),
}
TEXT = "the green fox number 3"
DECIDE = {"decide": {"risk": 0.3}}
RULES = {**DECIDE, "sets": 0.8, "out_of_scope": 0.1}


def train(folder: Path, tiny_llama: Path, case: str, evaluate: dict[str, Any], **sections: Any) -> Path:
    task, rows = CASES[case]
    model = tiny_llama if case == "chat" else families.build_bert(folder / "bert")
    silent: dict[str, Any] = {} if case == "chat" else {"generation": {"max_new_tokens": None}}
    learnt = {"single": {"train": {"learning_rate": 3e-3, "num_train_epochs": 8}}}.get(case, {})
    splits = {"data": {"validation": 0.4, "test": 0.3}, **silent, **learnt, **sections}
    pairs.run_recipe(folder, model, rows, task, evaluate={"metrics": None, **evaluate}, **splits)
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Path]:
    """The run folder of a case, trained once for all tests."""

    def make(case: str) -> Path:
        rules = DECIDE if case == "tags" else RULES
        return train(tmp_path_factory.mktemp(case), tiny_llama, case, rules, deploy=["merged"] * (case == "single"))

    return functools.cache(make)


def read(run: Path) -> tuple[Decision, Evaluation]:
    record, evaluation = read_rules(run / "evaluation/decision.json", Decision), load_evaluation(run / "evaluation")
    assert record is not None
    assert evaluation is not None
    return record, evaluation


@pytest.mark.parametrize("case", CASES)
def test_the_rules_belong_to_the_trained_weights_and_ship_with_exports(
    case: str, trained: Callable[[str], Path]
) -> None:
    run = trained(case)
    record, evaluation = read(run)
    assert record.trained_sha256 == hash_folder(run / "adapter")
    assert case != "single" or read_rules(run / "merged/decision.json", Decision) == record
    assert evaluation.decided is not None
    assert evaluation.decided.record is not None
    wanted = {"decided"} if case == "tags" else {"decided", "set_coverage", "set_size", "false_alarms"}
    assert wanted <= evaluation.tuned.keys() & evaluation.intervals.keys()
    assert "decided" not in evaluation.base
    assert "Decisions" in (run / "report.md").read_text()


@pytest.mark.parametrize("case", ["single", "many", "tags"])
def test_generate_serve_and_files_decide_the_same(case: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = trained(case)
    said = json.loads(invoke("generate", run, TEXT, "--json", "--offline").stdout)
    keys = ("decision", "confidence") if case == "tags" else ("decision", "confidence", "set", "out_of_scope")
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}])
    answer_file(FinishedRun(run), file, tmp_path / "out.jsonl", base=False, max_new_tokens=None)
    written = json.loads((tmp_path / "out.jsonl").read_text())
    with serving(*load_served(mine=run).values()) as url:
        path = "token-classify" if case == "tags" else "classify"
        served = httpx.post(f"{url}/v1/{path}", json={"text": TEXT}).json()
    for key in keys:
        assert written[key] == served[key] == (pytest.approx(said[key]) if key == "confidence" else said[key])
    shown = invoke("generate", run, TEXT, "--offline").stdout
    assert f"decision: {said['decision']}" in shown


def test_generate_decides_about_the_likeliest_choice_of_a_chat(trained: Callable[[str], Path]) -> None:
    run = trained("chat")
    record, _ = read(run)
    said = FinishedRun(run).answer({"prompt": TEXT})
    assert said["choice"] in record.labels
    assert said["decision"] in ("decide", "ask")
    assert "decision" not in FinishedRun(run).answer({"prompt": TEXT}, base=True)
    assert f"likeliest choice: {said['choice']}" in "".join(FinishedRun(run).stream({"prompt": TEXT}))


@pytest.mark.promise("metric", "referee", equal="answers of the served model, counted", place="decided")
@pytest.mark.promise("metric", "referee", equal="answers of the served model, counted", place="decided_error")
@pytest.mark.promise("metric", "referee", equal="answers of the served model, counted", place="set_coverage")
@pytest.mark.promise("metric", "referee", equal="answers of the served model, counted", place="set_size")
@pytest.mark.promise("metric", "referee", equal="answers of the served model, counted", place="false_alarms")
def test_scores_of_decisions_are_those_of_the_answers_to_the_test_rows(trained: Callable[[str], Path]) -> None:
    run = trained("single")
    record, evaluation = read(run)
    assert record.threshold is not None
    lines = [json.loads(line) for line in (run / "evaluation/predictions.jsonl").read_text().splitlines()]
    served = FinishedRun(run).load({"prompt": TEXT}, base=False, max_new_tokens=None)
    rows = [served.task.make_row({"prompt": line["prompt"]}) for line in lines]
    found = [one.decision for one in served.predict(rows)]
    decided = np.array([one["decision"] == "decide" for one in found])
    wrong = np.array([line["tuned"] != line["reference"] for line in lines])
    covered = np.array([line["reference"] in one["set"] for one, line in zip(found, lines, strict=True)])
    assert decided.sum() > 0
    assert evaluation.tuned["decided"] == pytest.approx(decided.mean())
    assert evaluation.tuned["decided_error"] == pytest.approx(wrong[decided].mean())
    assert evaluation.intervals["decided_error"].n == decided.sum()
    assert evaluation.tuned["set_coverage"] == pytest.approx(covered.mean())
    assert evaluation.tuned["set_size"] == pytest.approx(np.mean([len(one["set"]) for one in found]))
    assert evaluation.tuned["false_alarms"] == pytest.approx(np.mean([one["out_of_scope"] for one in found]))


def test_gates_use_decisions_and_the_ends_of_their_intervals(trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = shutil.copytree(trained("single"), tmp_path / "run")
    _, evaluation = read(run)
    high = evaluation.intervals["decided_error"].high
    gates = f"[decided >= 0.01, decided_error.high <= {high + 0.01:.4f}, decided_error.high <= {high - 0.01:.4f}]"
    done = invoke("evaluate", run, "--offline", "--set", f"evaluate.gates={gates}")
    assert done.exit_code == GateFailed.exit_code
    report = json.loads((run / "report.json").read_text())
    assert [gate["passed"] for gate in report["gates"]] == [True, True, False]
    assert "inconclusive" in report["gates"][2]["note"]


def test_exports_get_the_rules_of_a_later_evaluation(trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = shutil.copytree(trained("single"), tmp_path / "run")
    other = shutil.copytree(run / "merged", run / "onnx/float32")
    certificate = json.loads((other / "certificate.json").read_text())
    (other / "certificate.json").write_text(json.dumps({**certificate, "trained_sha256": "other weights"}))
    before = read_rules(run / "merged/decision.json", Decision)
    done = invoke("evaluate", run, "--offline", "--set", "evaluate.decide.risk=0.4")
    assert "merged now has this evaluation's temperature and decisions" in done.output
    record, _ = read(run)
    assert read_rules(run / "merged/decision.json", Decision) == record != before
    assert read_rules(other / "decision.json", Decision) == before
    without = [f"evaluate.{key}=null" for key in RULES]
    invoke("evaluate", run, "--offline", *(word for one in without for word in ("--set", one)))
    assert read_rules(run / "merged/decision.json", Decision) is None


def test_a_run_with_too_few_validation_rows_says_so_before_training_and_asks_about_everything(
    tmp_path: Path,
) -> None:
    recipe = pairs.recipe_of(
        tmp_path,
        families.build_bert(tmp_path / "bert"),
        COLOURS,
        "classify",
        data={"validation": 0.1, "test": 0.3},
        generation={"max_new_tokens": None},
        evaluate={"metrics": None, "decide": {"risk": 0.05}},
    )
    done = invoke("run", recipe, "--out", tmp_path / "run", "--offline")
    assert done.exit_code == 0, done.output
    before, _, _ = done.output.partition("step ")
    assert "too few, so every answer will be `ask`" in " ".join(before.split())
    record, evaluation = read(tmp_path / "run")
    assert record.threshold is not None
    assert record.threshold.value is None
    assert evaluation.tuned["decided"] == 0
    assert "decided_error" not in evaluation.tuned
    assert FinishedRun(tmp_path / "run").answer({"prompt": TEXT})["decision"] == "ask"


REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {
    "validation": (
        {"data": {"validation": 0}},
        "classify",
        RULES,
        "'evaluate.decide' has no effect without validation",
    ),
    "task": ({}, "translate", RULES, "'evaluate.sets' has no effect without choices"),
    "numbers": ({"classify": {"kind": "regression"}}, "classify", RULES, "'evaluate.out_of_scope' has no effect with"),
    "tags": ({}, "token-classify", RULES, "'evaluate.sets' has no effect in task token-classify"),
    "choices": (
        {},
        "chat",
        {"metrics": ["loss", "exact_match"], "choices": None, **DECIDE},
        "'evaluate.decide' has no effect without choices",
    ),
    "export": ({"deploy": ["onnx"]}, "classify", {**RULES, "gates": ["deploy.onnx.decided > 0"]}, "is not computed"),
    "gate": ({}, "classify", {"gates": ["decided >= 0.6"]}, "uses a metric that is not computed"),
    "base": ({}, "classify", {**RULES, "gates": ["decided.low > base"]}, "the base, which decides nothing"),
    "risk": ({}, "classify", {"decide": {"risk": 5}}, "evaluate.decide.risk"),
    "coverage": ({}, "classify", {"sets": 1.5}, "evaluate.sets"),
    "end": ({}, "classify", {"gates": ["forgetting.loss.low >= 0.6"]}, "only test rows and a judge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_rule_is_refused_where_it_has_no_effect(case: str, tmp_path: Path, tiny_llama: Path) -> None:
    sections, task, evaluate, why = REFUSED[case]
    silent = {} if task == "translate" else {"generation": {"max_new_tokens": None}}
    given = {"evaluate": {"metrics": None, **evaluate}, **silent, **sections}
    recipe = pairs.recipe_of(tmp_path, tiny_llama, COLOURS, task, **given)
    with pytest.raises(RecipeError, match=why):
        load_recipe(str(recipe))


def test_numbers_that_the_rows_turn_out_to_have_refuse_decisions(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": i / 7} for i, row in enumerate(COLOURS)]
    model, silent = families.build_bert(tmp_path / "bert"), {"generation": {"max_new_tokens": None}}
    with pytest.raises(RecipeError, match="the labels are of the kind 'regression'"):
        pairs.run_recipe(tmp_path, model, rows, "classify", evaluate={"metrics": None, **DECIDE}, **silent)
