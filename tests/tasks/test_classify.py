"""Task classify from end to end: every family and method, every kind of label, bad rows, and what is left on disk."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn import metrics as sklearn_metrics
from support.classifying import BUILDERS, COLOURS, STILL, colour_rows, predictions, prepared, recipe_for, run
from support.runs import llmtune
from support.training import adapt, read_metrics
from transformers import AutoTokenizer

from llmtune.data.labelled_rows import classified
from llmtune.errors import RecipeError
from llmtune.evaluate.task_predictions import predict_classes
from llmtune.pipeline import evaluate_run, run_pipeline
from llmtune.recipe import load_recipe
from llmtune.session import Options
from llmtune.store.run_folder import read_run, recipe_of_run
from llmtune.tasks import classify, get_task
from llmtune.train.accumulation import step_gradients
from llmtune.train.setup import set_up

RUNS = (
    *((family, "lora") for family in BUILDERS),
    *((family, method) for family in ("bert", "llama") for method in ("qlora", "full")),
)
UNQUANTIZED = ("classifier", "bert.pooler", "score")
"""Modules that stay out of 4 bits, as one would state them without llmtune."""
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
texts, folders = json.load(open(sys.argv[1])), sys.argv[3:]
found = {}
for folder in folders:
    options = {}
    if "qlora" in folder:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=SKIPPED)
    if folder.endswith("weights"):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        config = AutoConfig.from_pretrained(folder)
        named = {"num_labels": config.num_labels, "id2label": config.id2label, "label2id": config.label2id}
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, **named, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # another kernel, which rounds otherwise
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = model.config.id2label
    scores = []
    with torch.no_grad():
        for text in texts:
            read = tokenizer(text, return_tensors="pt")
            read.pop("token_type_ids", None)
            scores.append(model.eval()(**read).logits[0].softmax(-1).tolist())
    found[folder] = {"scores": scores, "names": [names[i] for i in range(len(names))]}
assert not any(name.startswith("llmtune") for name in sys.modules)
json.dump(found, open(sys.argv[2], "w"))
""".replace("SKIPPED", repr(list(UNQUANTIZED)))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = BUILDERS[family](tmp_path_factory.mktemp("models") / family, **STILL.get(family, {}))
        return made[family]

    return build


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> Callable[[str, str], tuple[dict[str, Any], Path]]:
    """Runs by family and method, each made once."""
    folder = tmp_path_factory.mktemp("runs")
    made: dict[tuple[str, str], tuple[dict[str, Any], Path]] = {}

    def find(family: str, method: str) -> tuple[dict[str, Any], Path]:
        if (family, method) not in made:
            path = folder / f"{family}-{method}.yaml"
            made[family, method] = run(recipe_for(path, models(family), colour_rows(), adapter={"method": method}))
        return made[family, method]

    return find


# Every family and method


@pytest.mark.parametrize(("family", "method"), RUNS)
def test_a_model_learns_and_is_held_against_the_most_frequent_class(finished, family, method):
    report, folder = finished(family, method)
    assert report["train"]["train_loss"] < report["train"]["first_loss"]
    evaluation = report["evaluation"]
    assert evaluation["baseline"] == "the most frequent class"
    assert "loss" not in evaluation["base"]
    assert evaluation["difference"].keys() == evaluation["base"].keys() == evaluation["tuned"].keys() - {"loss"}
    assert set(evaluation["base"]) == {"accuracy", "f1_macro", "f1_micro", "matthews", "auroc"}
    for metric, difference in evaluation["difference"].items():
        assert difference["value"] == pytest.approx(evaluation["tuned"][metric] - evaluation["base"][metric])
        assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]
    assert (folder / ("weights" if method == "full" else "adapter") / "config.json").is_file()


@pytest.fixture(scope="module")
def reloaded(finished, tmp_path_factory) -> dict[str, Any]:
    """What a script without llmtune gets from the folders of all runs."""
    place = tmp_path_factory.mktemp("reloaded")
    folders = {key: trained(finished(*key)[1]) for key in RUNS}
    texts = [line["prompt"] for line in predictions(finished(*RUNS[0])[1])]
    (place / "texts.json").write_text(json.dumps(texts))
    words = [sys.executable, "-c", SCRIPT, place / "texts.json", place / "found.json", *folders.values()]
    said = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300, check=False, cwd=place)
    assert said.returncode == 0, said.stderr
    found = json.loads((place / "found.json").read_text())
    return {"-".join(key): found[str(folder)] for key, folder in folders.items()}


def trained(folder: Path) -> Path:
    return folder / ("adapter" if (folder / "adapter").is_dir() else "weights")


@pytest.mark.parametrize(("family", "method"), RUNS)
def test_a_script_that_does_not_know_llmtune_gives_the_same_classes(finished, reloaded, family, method):
    found = reloaded[f"{family}-{method}"]
    own = [line["tuned_prediction"]["scores"] for line in predictions(finished(family, method)[1])]
    np.testing.assert_allclose(found["scores"], own, atol=2e-5)
    assert found["names"] == ["blue", "green", "red"]


@pytest.mark.parametrize(("family", "method"), [("bert", "lora"), ("bert", "qlora"), ("bert", "full")])
def test_the_saved_configuration_names_the_classes_and_nothing_of_ours(finished, family, method):
    content = json.loads((trained(finished(family, method)[1]) / "config.json").read_text())
    assert content["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert content["label2id"] == {"blue": 0, "green": 1, "red": 2}
    assert content["problem_type"] == "single_label_classification"
    assert not [key for key in content if "llmtune" in key or "quantization" in key]


# What the report says


def test_metrics_of_one_label_are_those_of_scikit_learn(finished):
    report, folder = finished("modernbert", "lora")
    lines = predictions(folder)
    names = ["blue", "green", "red"]
    true = [line["reference"] for line in lines]
    for side in ("base", "tuned"):
        scores = np.array([line[f"{side}_prediction"]["scores"] for line in lines])
        said = [line[side] for line in lines]
        assert said == [names[k] for k in scores.argmax(1)]
        mean = {"labels": sorted({*true, *said}), "zero_division": 0}
        one_to_rest = {"multi_class": "ovr", "average": "macro", "labels": names}
        wanted = {
            "accuracy": sklearn_metrics.accuracy_score(true, said),
            "f1_macro": sklearn_metrics.f1_score(true, said, average="macro", **mean),
            "f1_micro": sklearn_metrics.f1_score(true, said, average="micro", **mean),
            "matthews": sklearn_metrics.matthews_corrcoef(true, said),
            "auroc": sklearn_metrics.roc_auc_score(true, scores / scores.sum(1, keepdims=True), **one_to_rest),
        }
        assert {k: v for k, v in report["evaluation"][side].items() if k != "loss"} == pytest.approx(wanted)
    scores = np.array([line["tuned_prediction"]["scores"] for line in lines])
    wanted = sklearn_metrics.log_loss(true, scores / scores.sum(1, keepdims=True), labels=names)
    assert report["evaluation"]["tuned"]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_the_class_table_and_the_confusion_matrix_stand_in_the_evaluation(finished):
    _, folder = finished("modernbert", "lora")
    lines = predictions(folder)
    details = json.loads((folder / "evaluation" / "evaluation.json").read_text())["details"]
    names, true = ["blue", "green", "red"], [line["reference"] for line in lines]
    for side in ("base", "tuned"):
        said = [line[side] for line in lines]
        counts = sklearn_metrics.confusion_matrix(true, said, labels=names).tolist()
        assert details[side]["confusion"] == {"labels": names, "counts": counts}
        columns = sklearn_metrics.precision_recall_fscore_support(true, said, labels=names, zero_division=0)
        for number, row in enumerate(details[side]["classes"]):
            assert row["label"] == names[number]
            found = [row[name] for name in ("precision", "recall", "f1", "support")]
            assert found == pytest.approx([column[number] for column in columns])


def test_the_rows_of_each_class_are_shown(models, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    rows = [row for row in colour_rows(120) if row["label"] != "blue" or int(row["text"].split()[-1]) % 4 == 0]
    path = recipe_for(tmp_path / "r.yaml", models("bert"), rows)
    options = Options(out=tmp_path / "run", offline=True, until="prepare")
    report = run_pipeline(load_recipe(str(path)), options, console)
    classes = report["data"]["classes"]
    assert {name: sum(sides.values()) for name, sides in classes.items()} == {"blue": 10, "green": 40, "red": 40}
    shown = console.file.getvalue()
    assert all(name in shown for name in COLOURS)


# Settled once, read again


def test_a_second_run_is_skipped_and_an_evaluation_of_the_run_gives_the_same_scores(finished):
    report, folder = finished("bert", "lora")
    before = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    again, _ = run(folder.with_suffix(".yaml"), folder)
    assert [step["name"] for step in again["steps"] if not step["skipped"]] == []
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == before
    loaded = recipe_of_run(read_run(folder), ["evaluate.samples=2"])
    later = evaluate_run(loaded, folder, Console(file=io.StringIO(), width=200), offline=True)
    assert later["evaluation"]["tuned"] == pytest.approx(report["evaluation"]["tuned"])
    assert later["evaluation"]["base"] == report["evaluation"]["base"]


def test_the_ids_of_training_are_those_of_prediction(models, tmp_path):
    rows = [*colour_rows(6), *({**row, "pair": "a quick fox"} for row in colour_rows(12)[6:])]
    path = recipe_for(tmp_path / "r.yaml", models("bert"), rows)
    recipe, _ = prepared(path)
    tokenizer = AutoTokenizer.from_pretrained(models("bert"))
    canonical = [classified(row) for row in rows]
    encoded = [example for (example,) in get_task("classify").encode(canonical, tokenizer, recipe)]
    model = adapt(recipe).model
    seen: list[tuple[list[int], list[int]]] = []

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        kinds = kwargs.get("token_type_ids", torch.zeros_like(kwargs["input_ids"]))
        for ids, kind, mask in zip(kwargs["input_ids"], kinds, kwargs["attention_mask"].bool(), strict=True):
            seen.append((ids[mask].tolist(), kind[mask].tolist()))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        predict_classes(
            model.eval(),
            [classify.VARIANTS[0].split_answer(row)[0] for row in canonical],
            tokenizer,
            recipe,
            device="cpu",
        )
    handle.remove()
    wanted = [(e.input_ids, list(e.third_ids) or [0] * len(e.input_ids)) for e in encoded]
    assert sorted(seen) == sorted(wanted)
    assert any(any(kinds) for _, kinds in wanted)
    assert not all(any(kinds) for _, kinds in wanted)


# Gradients


@pytest.mark.parametrize("family", ["bert", "deberta", "llama"])
@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_micro_batches_of_one_row_give_the_gradient_of_one_large_batch(models, tmp_path, family, kind):
    rows = colour_rows(24)
    for i, row in enumerate(rows):
        row["text"] += " and one two three four five" * (i % 4)
        row["label"] = {"single": row["label"], "multi": [row["label"], "x"][: 1 + i % 2], "regression": i / 7}[kind]
    section = {"class_weights": "balanced"} if kind == "single" else {}
    path = recipe_for(tmp_path / "r.yaml", models(family), rows, classify=section, train={"batch_size": 8})
    (recipe, examples), console = prepared(path), Console(file=io.StringIO(), width=200)
    adapted = adapt(recipe)
    training = set_up(adapted, examples, get_task("classify"), recipe, tmp_path / "t", console, "inputs")
    training.model.train()
    found = []
    for budget in (1, 10_000):
        training.optimizer.zero_grad(set_to_none=True)
        loss = step_gradients(training, 1, budget, 1.0)
        found.append((loss.mean, loss.count, loss.grad_norm, [p.grad.clone() for p in training.parameters]))
    (one, count, norm, small), (eight, same, large_norm, large) = found
    assert count == same == 8
    assert one == pytest.approx(eight, rel=1e-5)
    assert norm == pytest.approx(large_norm, rel=1e-4)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


# A base with a head of its own


@pytest.mark.parametrize("stated", [None, ["red", "green", "blue"]])
def test_a_base_that_knows_the_classes_already_is_the_base(finished, tmp_path, stated):
    section = {} if stated is None else {"labels": stated}
    base = finished("bert", "full")[1] / "weights"
    report, folder = run(
        recipe_for(
            tmp_path / "r.yaml", base, colour_rows(), classify=section, train={"max_steps": 1, "num_train_epochs": None}
        )
    )
    first = finished("bert", "full")[0]["evaluation"]["tuned"]
    assert report["evaluation"]["baseline"] is None
    assert report["evaluation"]["base"] == pytest.approx(first, rel=1e-4)
    named = json.loads((folder / "adapter" / "config.json").read_text())["id2label"]
    assert list(named.values()) == (stated or ["blue", "green", "red"])


def test_a_base_that_knows_other_classes_gets_a_new_head(finished, tmp_path):
    rows = [{**row, "label": f"{row['label']}ish"} for row in colour_rows()]
    base = finished("bert", "full")[1] / "weights"
    report, folder = run(recipe_for(tmp_path / "r.yaml", base, rows, adapter={"method": "full"}))
    assert report["evaluation"]["baseline"] == "the most frequent class"
    config = json.loads((folder / "weights" / "config.json").read_text())
    assert config["id2label"] == {"0": "blueish", "1": "greenish", "2": "redish"}
    assert not [key for key in config if "llmtune" in key]


def test_training_goes_on_from_an_adapter_for_these_classes_and_not_for_others(finished, models, tmp_path):
    _, before = finished("bert", "lora")
    adapter = {"start_from": str(before), "r": None, "lora_alpha": None}
    same = recipe_for(tmp_path / "same.yaml", models("bert"), colour_rows(), adapter=dict(adapter))
    report, _ = run(same)
    assert report["train"]["first_loss"] < finished("bert", "lora")[0]["train"]["first_loss"]
    rows = [{**row, "label": f"{row['label']}ish"} for row in colour_rows()]
    other = recipe_for(tmp_path / "other.yaml", models("bert"), rows, adapter=dict(adapter))
    with pytest.raises(RecipeError, match="its head was trained for blue, green, red, in this order"):
        run(other)


# Processes


@pytest.mark.slow
def test_two_processes_train_a_classifier_as_one_does(models, tmp_path):
    rows = colour_rows(50)
    recipe_for(tmp_path / "r.yaml", models("bert"), rows, train={"num_train_epochs": 1, "batch_size": 6})
    two = llmtune("launch", "local", "r.yaml", "--processes", 2, "--threads", 2, "--out", "two", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    _, one = run(tmp_path / "r.yaml", tmp_path / "one")
    pairs = list(zip(read_metrics(one), read_metrics(tmp_path / "two"), strict=True))
    assert len(pairs) >= 5
    for alone, together in pairs:
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
