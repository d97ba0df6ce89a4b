"""A calibrated run: its record, its scores, and equal probabilities wherever its model answers."""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from scipy.special import expit, softmax  # type: ignore[import-untyped]
from sklearn.metrics import log_loss
from support import families, pairs
from support.classifying import colour_rows
from support.rows import write_jsonl
from support.runs import invoke
from support.serving import load_served, serving
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from llmtune.errors import GateFailed, RecipeError
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.per_row_scores import load_measures
from llmtune.recipe.loader import load_recipe
from llmtune.serve.answer_file import answer_file
from llmtune.serve.finished_run import FinishedRun
from llmtune.store.atomic_files import hash_folder

COLOURS = colour_rows(120)
MANY = [{**row, "label": [row["label"]] if i % 4 else ["red", "blue"]} for i, row in enumerate(COLOURS)]
TAGS = [
    {"tokens": row["text"].split(), "tags": ["O", f"B-{row['label'].upper()}", "B-THING", "O", "O"]} for row in COLOURS
]
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
LATER = [pytest.param(case, marks=pytest.mark.slow) for case in ("many", "tags")]
"""Cases that take an export each."""
SILENT = {"generation": {"max_new_tokens": None}}
SPLITS = {"data": {"validation": 0.3, "test": 0.3}}


def train(folder: Path, tiny_llama: Path, case: str, **sections: Any) -> Path:
    task, rows = CASES[case]
    model = tiny_llama if case == "chat" else families.build_bert(folder / "bert")
    silent = {} if case == "chat" else SILENT
    pairs.run_recipe(folder, model, rows, task, **{**SPLITS, **silent, **sections})
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Path]:
    """The run folder of a case, trained and exported once for all tests."""

    def make(case: str) -> Path:
        exports = {"deploy": ["merged"] if case == "chat" else ["merged", "onnx"]}
        return train(tmp_path_factory.mktemp(case), tiny_llama, case, **exports)

    return functools.cache(make)


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "calibration.json").read_text())
    return record


def ask_merged(folder: Path, case: str) -> np.ndarray:
    """Return the probabilities [choices, labels] that plain transformers computes with the folder's temperature."""
    auto_class = AutoModelForTokenClassification if case == "tags" else AutoModelForSequenceClassification
    model, tokenizer = auto_class.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits[0].double().numpy() / record_of(folder)["temperature"]
    if case == "tags":
        words = given.word_ids(0)
        return np.asarray(softmax(logits[[words.index(i) for i in range(5)]], -1))
    return np.asarray([expit(logits) if case == "many" else softmax(logits)])


def ask_script(folder: Path, case: str) -> np.ndarray:
    """Return the probabilities that the script of an ONNX folder prints; of tags, only the highest of each word."""
    command = [sys.executable, "-W", "ignore", str(folder / "run_model.py"), TEXT]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    numbers = [float(line.split()[-1]) for line in (lines if case == "tags" else lines[1:])]
    return np.array(numbers)[:, None] if case == "tags" else np.array([numbers])


def ask_server(run: Path, case: str) -> np.ndarray:
    with serving(*load_served(mine=run).values()) as url:
        path = "token-classify" if case == "tags" else "classify"
        answer = httpx.post(f"{url}/v1/{path}", json={"text": TEXT}).json()
    words = answer["scores"] if case == "tags" else [dict(enumerate(answer["prediction"]["scores"]))]
    return np.array([[*word.values()] for word in words])


@pytest.mark.parametrize("case", ["single", *LATER])
def test_generate_serve_onnx_and_the_merged_model_give_equal_probabilities(
    case: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    run = trained(case)
    temperature = record_of(run / "evaluation")["temperature"]
    assert abs(temperature - 1) > 0.01
    said = json.loads(invoke("generate", run, TEXT, "--json", "--offline").stdout)
    named = said["scores"] if case == "tags" else [said["prediction"]["scores"]]
    generated = np.array([[*word.values()] for word in named])
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}])
    answer_file(FinishedRun(run), file, tmp_path / "out.jsonl", base=False, max_new_tokens=None)
    scores = json.loads((tmp_path / "out.jsonl").read_text())["scores"]
    assert (scores if case == "tags" else [scores]) == [pytest.approx(word, abs=1e-6) for word in named]
    assert ask_server(run, case) == pytest.approx(generated, abs=1e-5)
    assert ask_merged(run / "merged", case) == pytest.approx(generated, abs=1e-5)
    printed = ask_script(run / "onnx/float32", case)
    assert printed == pytest.approx(generated.max(1, keepdims=True) if case == "tags" else generated, abs=1e-5)


def test_generate_gives_the_probabilities_of_the_choices_of_a_chat(trained: Callable[[str], Path]) -> None:
    run = trained("chat")
    said = FinishedRun(run).answer({"prompt": TEXT})
    scores = said["scores"]
    assert isinstance(scores, dict)
    assert set(scores) == {"red", "green", "blue"}
    assert sum(scores.values()) == pytest.approx(1)
    assert "scores" not in FinishedRun(run).answer({"prompt": TEXT}, base=True)
    predictions = [json.loads(line) for line in (run / "evaluation/predictions.jsonl").read_text().splitlines()]
    for line in predictions[:5]:
        chosen = FinishedRun(run).answer({"prompt": line["prompt"]})["scores"]
        assert isinstance(chosen, dict)
        assert max(chosen, key=chosen.__getitem__) == line["tuned_choice"]


@pytest.mark.parametrize("case", ["single", "chat", *LATER])
def test_the_record_belongs_to_the_trained_weights_and_ships_with_exports(
    case: str, trained: Callable[[str], Path]
) -> None:
    run = trained(case)
    record = record_of(run / "evaluation")
    assert record["trained_sha256"] == hash_folder(run / "adapter")
    assert record["after"]["nll"] < record["before"]["nll"]
    assert record_of(run / "merged") == record
    if case != "chat":
        assert record_of(run / "onnx/float32") == record


def test_likelihoods_of_the_test_rows_are_those_of_generate(trained: Callable[[str], Path]) -> None:
    run = trained("single")
    evaluation = load_evaluation(run / "evaluation")
    assert evaluation is not None
    assert evaluation.reliability is not None
    lines = [json.loads(line) for line in (run / "evaluation/predictions.jsonl").read_text().splitlines()]
    labels = list(record_of(run / "evaluation")["labels"])
    served = FinishedRun(run).load({"prompt": TEXT}, base=False, max_new_tokens=None)
    rows = [served.task.make_row({"prompt": line["prompt"]}) for line in lines]
    p = np.array([[*predicted.probabilities[0].values()] for predicted in served.predict(rows)])
    right = [labels.index(line["reference"]) for line in lines]
    assert evaluation.reliability.after["nll"] == pytest.approx(log_loss(right, p, labels=range(3)), rel=1e-5)
    assert evaluation.reliability.before["nll"] == pytest.approx(evaluation.tuned["loss"], rel=1e-5)
    assert evaluation.reliability.difference["nll"].n == len(lines)


def test_calibration_changes_no_other_score(trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = shutil.copytree(trained("single"), tmp_path / "run")
    before = load_evaluation(run / "evaluation")
    measured = load_measures(run / "evaluation")
    done = invoke("evaluate", run, "--offline", "--set", "evaluate.calibrate=false")
    assert done.exit_code == 0, done.output
    after = load_evaluation(run / "evaluation")
    assert before is not None
    assert after is not None
    assert (after.tuned, after.difference, after.samples) == (before.tuned, before.difference, before.samples)
    assert after.reliability is None
    assert not (run / "evaluation/calibration.json").exists()
    again = load_measures(run / "evaluation")
    assert all(np.array_equal(one.sums_NK, again.tuned[name].sums_NK) for name, one in measured.tuned.items())
    raw = FinishedRun(run).answer({"prompt": TEXT})["prediction"]
    calibrated = FinishedRun(trained("single")).answer({"prompt": TEXT})["prediction"]
    assert isinstance(raw, dict)
    assert isinstance(calibrated, dict)
    assert raw["label"] == calibrated["label"]
    assert raw["scores"] != calibrated["scores"]


def test_metrics_and_gates_use_the_calibrated_probabilities(trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = shutil.copytree(trained("single"), tmp_path / "run")
    asked = ("evaluate.metrics=[accuracy, ece, brier, nll]", "--set", "evaluate.gates=[nll < 0]")
    done = invoke("evaluate", run, "--offline", "--set", *asked)
    assert done.exit_code == GateFailed.exit_code, done.output
    evaluation = load_evaluation(run / "evaluation")
    assert evaluation is not None
    assert evaluation.reliability is not None
    assert {name: evaluation.tuned[name] for name in ("ece", "brier", "nll")} == evaluation.reliability.after


@pytest.mark.parametrize("rows", [0.0, 0.05])
def test_a_run_with_too_few_validation_rows_says_that_it_is_not_calibrated(
    rows: float, tmp_path: Path, tiny_llama: Path
) -> None:
    sections = {"data": {"validation": rows, "test": 0.3}, "train": {"max_steps": 1, "num_train_epochs": None}}
    run = train(tmp_path, tiny_llama, "single", **sections)
    assert not (run / "evaluation/calibration.json").exists()
    evaluation = load_evaluation(run / "evaluation")
    assert evaluation is not None
    assert evaluation.reliability is not None
    assert evaluation.reliability.before.keys() == {"ece", "brier", "nll"}
    assert evaluation.reliability.after == {}
    assert "Not calibrated: a temperature needs 20 validation rows" in (run / "report.md").read_text()


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "validation": ({"data": {"validation": 0}}, "classify", "without validation rows"),
    "task": ({}, "translate", "in task translate: its model does not choose"),
    "metric": ({"evaluate": {"metrics": ["loss"], "calibrate": True}}, "chat", "without the metric choice_accuracy"),
    "numbers": ({"classify": {"kind": "regression"}}, "classify", "with classify.kind: regression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_key_is_refused_where_it_has_no_effect(case: str, tmp_path: Path, tiny_llama: Path) -> None:
    sections, task, why = REFUSED[case]
    evaluate = {"metrics": None, "calibrate": True}
    recipe = pairs.recipe_of(tmp_path, tiny_llama, COLOURS, task, **{"evaluate": evaluate, **SILENT, **sections})
    with pytest.raises(RecipeError, match=f"'evaluate.calibrate' has no effect {why}"):
        load_recipe(str(recipe))
