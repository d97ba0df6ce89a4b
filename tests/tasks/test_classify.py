"""Task classify end to end: every family and method, every kind of label, bad rows, and the files on disk."""

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support import families
from support.classifying import COLOURS, STILL, colour_rows, predictions, prepared, recipe_for, run
from support.rows import write_jsonl
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from llmtune.data.examples import ExampleReader
from llmtune.deploy.export import export
from llmtune.deploy.merged_model import merged_format
from llmtune.errors import DataError, RecipeError
from llmtune.pipeline import run_pipeline
from llmtune.plan import open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.serve.finished_run import FinishedRun
from llmtune.store.run_request import RunRequest
from llmtune.tasks import classify
from llmtune.tasks.class_labels import infer_kind

ONE_STEP = {"max_steps": 1, "num_train_epochs": None}


@pytest.fixture(scope="module")
def models(built) -> Callable[[str], Path]:
    return lambda family: built(family, **STILL.get(family, {}))


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """The report and folder of a run by its method, made on first use."""
    folder = tmp_path_factory.mktemp("runs")

    def find(method: str) -> tuple[dict[str, Any], Path]:
        return run(recipe_for(folder / f"{method}.yaml", models("bert"), colour_rows(), adapter={"method": method}))

    return cache(find)


@pytest.mark.parametrize(("method", "result"), [("lora", "adapter"), ("full", "weights")])
def test_the_saved_configuration_names_the_classes_and_nothing_specific_to_llmtune(finished, method, result):
    content = json.loads((finished(method)[1] / result / "config.json").read_text())
    assert content["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert content["label2id"] == {"blue": 0, "green": 1, "red": 2}
    assert content["problem_type"] == "single_label_classification"
    assert not [key for key in content if "llmtune" in key or "quantization" in key]


# The report


def test_the_rows_of_each_class_are_shown(models, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    rows = [row for row in colour_rows(120) if row["label"] != "blue" or int(row["text"].split()[-1]) % 4 == 0]
    path = recipe_for(tmp_path / "r.yaml", models("bert"), rows)
    options = RunRequest(out=tmp_path / "run", offline=True, until="prepare")
    report = run_pipeline(load_recipe(str(path)), options, console)
    classes = report["data"]["classes"]
    assert {name: sum(sides.values()) for name, sides in classes.items()} == {"blue": 10, "green": 40, "red": 40}
    shown = console.file.getvalue()
    assert all(name in shown for name in COLOURS)


# A base with its own head


@pytest.mark.parametrize("stated", [None, ["red", "green", "blue"]])
def test_a_base_that_already_knows_the_classes_serves_as_the_base(finished, tmp_path, stated):
    section = {} if stated is None else {"labels": stated}
    base = finished("full")[1] / "weights"
    report, folder = run(recipe_for(tmp_path / "r.yaml", base, colour_rows(), classify=section, train=ONE_STEP))
    first = finished("full")[0]["evaluation"]["tuned"]
    assert report["evaluation"]["baseline"] is None
    assert report["evaluation"]["base"] == pytest.approx(first, rel=1e-4)
    named = json.loads((folder / "adapter" / "config.json").read_text())["id2label"]
    assert list(named.values()) == (stated or ["blue", "green", "red"])


def test_a_base_that_knows_other_classes_gets_a_new_head(finished, tmp_path):
    rows = [{**row, "label": f"{row['label']}ish"} for row in colour_rows()]
    base = finished("full")[1] / "weights"
    report, folder = run(recipe_for(tmp_path / "r.yaml", base, rows, adapter={"method": "full"}, train=ONE_STEP))
    assert report["evaluation"]["baseline"] == "the most frequent class"
    config = json.loads((folder / "weights" / "config.json").read_text())
    assert config["id2label"] == {"0": "blueish", "1": "greenish", "2": "redish"}
    assert not [key for key in config if "llmtune" in key]


def test_training_starts_from_an_adapter_only_if_its_classes_match(finished, models, tmp_path):
    _, before = finished("lora")
    adapter = {"start_from": str(before), "r": None, "lora_alpha": None}
    still = {**ONE_STEP, "learning_rate": 1e-9}
    same = recipe_for(tmp_path / "same.yaml", models("bert"), colour_rows(), adapter=dict(adapter), train=still)
    report, _ = run(same)
    assert report["evaluation"]["tuned"] == pytest.approx(finished("lora")[0]["evaluation"]["tuned"], rel=1e-3)
    rows = [{**row, "label": f"{row['label']}ish"} for row in colour_rows()]
    other = recipe_for(tmp_path / "other.yaml", models("bert"), rows, adapter=dict(adapter))
    with pytest.raises(RecipeError, match="its head was trained for blue, green, red, in this order"):
        run(other)


# Kinds of labels


def test_several_labels_per_row(models, tmp_path):
    rows = colour_rows()
    for i, row in enumerate(rows):
        row["label"] = [row["label"], *(["even"] if i % 2 == 0 else [])] if i % 7 else []
    report, folder = run(recipe_for(tmp_path / "r.yaml", models("modernbert"), rows, train=ONE_STEP))
    names = ["blue", "even", "green", "red"]
    config = json.loads((folder / "adapter" / "config.json").read_text())
    assert (config["problem_type"], list(config["label2id"])) == ("multi_label_classification", names)
    for prediction in (line["tuned_prediction"] for line in predictions(folder)):
        wanted = [name for name, share in zip(names, prediction["scores"], strict=True) if share > 0.5]
        assert prediction["label"] == wanted
    assert report["evaluation"]["tuned"].keys() == {"loss", "accuracy", "f1_macro", "f1_micro", "auroc"}
    assert [row["label"] for row in report["evaluation"]["details"]["tuned"]["classes"]] == names


def test_a_number_is_predicted_and_compared_with_the_mean(models, tmp_path):
    rows = [{**row, "label": float(COLOURS.index(row["label"]))} for row in colour_rows()]
    rows[3]["label"] = 0  # files omit the decimal point
    report, folder = run(recipe_for(tmp_path / "r.yaml", models("modernbert"), rows))
    evaluation, lines = report["evaluation"], predictions(folder)
    errors = [float(line["reference"]) - line["tuned_prediction"]["label"] for line in lines]
    assert evaluation["tuned"].keys() == {"loss", "mse", "mae", "pearson", "spearman"}
    assert evaluation["tuned"]["mse"] == pytest.approx(np.mean(np.square(errors)))
    assert evaluation["tuned"]["loss"] == pytest.approx(evaluation["tuned"]["mse"], rel=1e-4)
    assert evaluation["base"]["mse"] > evaluation["tuned"]["mse"]
    assert json.loads((folder / "adapter" / "config.json").read_text())["problem_type"] == "regression"
    model = AutoModelForSequenceClassification.from_pretrained(
        models("modernbert"), config=AutoConfig.from_pretrained(folder / "adapter")
    )
    assert model.config.num_labels == 1


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["a", "b"], "single"),
        (["1", "2"], "single"),
        ([1.0, 2.5], "regression"),
        (["1", 2.5], "regression"),
        (["1.5", "2"], "regression"),
        (["-1e-3", ".5"], "regression"),
        (["1.5", "two"], "single"),
        ([0.0, 1.0, 1.0], "single"),
        (["0", 1.0], "single"),
        (["0.0", "1.0"], "single"),
        (["0", "0.0", "1.0"], "regression"),
        ([1.0, 1.0], "regression"),
        ([0.0, 1.0, 2.0], "regression"),
        ([["a"], []], "multi"),
        ([], "single"),
    ],
)
def test_the_kind_of_labels_is_inferred_from_all_of_them(labels, kind):
    assert infer_kind(labels) == kind


@pytest.mark.parametrize("labels", [["a", 2.5], ["a", ["b"]], [2.5, ["b"]], ["1", ["b"]]])
def test_labels_of_several_kinds_are_reported(labels):
    with pytest.raises(DataError, match="several kinds"):
        infer_kind(labels)


def test_classes_are_in_the_models_order_if_it_has_the_same_else_sorted():
    named = type("Config", (), {"id2label": {0: "b", 1: "c", 2: "a"}})()
    assert classify.sort_names({"a", "b", "c"}, named) == ["b", "c", "a"]
    assert classify.sort_names({"a", "b"}, named) == ["a", "b"]
    assert classify.sort_names({"10", "9", "-1"}, None) == ["-1", "9", "10"]
    assert classify.sort_names({"10", "9", "x"}, None) == ["10", "9", "x"]


# Invalid combinations


def test_bad_rows_that_are_allowed_are_left_out_and_do_not_disturb_the_baseline(models, tmp_path):
    rows = [*colour_rows(), {"text": "a pink cat", "label": "pink"}, {"text": "a grey dog", "label": ["red", "blue"]}]
    section = {"kind": "single", "labels": list(COLOURS)}
    data = {"max_dropped": 0.1, "train": str(write_jsonl(tmp_path / "train.jsonl", rows)), "test": None}
    data["test"] = [str(write_jsonl(tmp_path / "test.jsonl", [{**row, "text": "one " + row["text"]} for row in rows]))]
    recipe = recipe_for(
        tmp_path / "r.yaml", models("bert"), tmp_path / "train.jsonl", classify=section, data=data, train=ONE_STEP
    )
    report, folder = run(recipe)
    assert sum(n for reason, n in report["data"]["dropped"].items() if "label" in reason) == 4
    assert len(predictions(folder)) == 60
    left_out = [json.loads(line)["where"] for line in (folder / "data" / "left_out.jsonl").read_text().splitlines()]
    assert sorted(Path(origin).name for origin in left_out) == [
        f"{side}.jsonl:{n}" for side in ("test", "train") for n in (61, 62)
    ]


@pytest.mark.parametrize("build", [families.build_t5, families.build_bart])
def test_an_encoder_decoder_is_refused(tmp_path, build):
    path = recipe_for(tmp_path / "r.yaml", build(tmp_path / "model"), colour_rows(20))
    with pytest.raises(RecipeError, match="cannot be used for the task classify") as caught:
        run(path)
    assert "Name an encoder" in str(caught.value)


def test_rows_of_one_class_are_refused(models, tmp_path):
    rows = [{**row, "label": "red"} for row in colour_rows(20)]
    with pytest.raises(DataError, match="all rows have the label red"):
        run(recipe_for(tmp_path / "r.yaml", models("bert"), rows))


@pytest.mark.parametrize(
    ("section", "label", "evaluate", "said"),
    [
        (
            {},
            1.5,
            {"metrics": ["accuracy"]},
            "the labels are of the kind 'regression', which does not support accuracy",
        ),
        ({}, None, {"metrics": ["loss", "mse"]}, "the labels are of the kind 'single', which does not support mse"),
        ({"labels": ["a", "b"]}, 1.5, {}, "has no effect: the labels are of the kind 'regression'"),
        ({"class_weights": "balanced"}, 1.5, {}, "has no effect: the labels are of the kind 'regression'"),
        ({"class_weights": "balanced"}, ["red"], {}, "has no effect: the labels are of the kind 'multi'"),
        ({"class_weights": {"pink": 2.0}}, None, {}, "has a weight for 'pink', which no row has"),
    ],
)
def test_settings_unsupported_by_the_kind_of_label_are_refused(models, tmp_path, section, label, evaluate, said):
    rows = [row if label is None else {**row, "label": label} for row in colour_rows(20)]
    path = recipe_for(tmp_path / "r.yaml", models("bert"), rows, classify=section, evaluate=evaluate)
    with pytest.raises(RecipeError) as caught:
        run(path)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


# Class weights


def test_balanced_weights_match_scikit_learn(models, tmp_path):
    from sklearn.utils.class_weight import compute_class_weight

    rows = [row for i, row in enumerate(colour_rows(90)) if row["label"] != "blue" or i % 4 == 0]
    path = recipe_for(tmp_path / "r.yaml", models("bert"), rows, classify={"class_weights": "balanced"})
    recipe, examples = prepared(path)
    reader = ExampleReader(examples, "train", classify.ClassExample)
    labels = [recipe.classify.labels[reader[i].class_ids[0]] for i in range(len(reader))]
    wanted = compute_class_weight("balanced", classes=np.array(recipe.classify.labels), y=labels)
    assert recipe.classify.class_weights == pytest.approx(dict(zip(recipe.classify.labels, wanted, strict=True)))
    stored = [reader[i].weights[0] for i in range(len(reader))]
    assert stored == pytest.approx([recipe.classify.class_weights[label] for label in labels])
    assert sum(stored) == pytest.approx(len(stored), rel=1e-5)


NUMBERS = [{"text": row["text"], "label": 1200 + 0.5 * COLOURS.index(row["label"])} for row in colour_rows()]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("bert", "auto"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("roberta", "auto"), ("bert", "bfloat16"))),
        *(pytest.param("llama", dtype, marks=pytest.mark.slow) for dtype in ("auto", "bfloat16")),
    ],
)
def test_large_numbers_are_not_rounded_to_bfloat16(models, family, dtype, tmp_path, monkeypatch):
    """Numbers in bfloat16 have 8 bits: from 1,024 to 2,048 they are 8 apart."""
    monkeypatch.setattr("llmtune.model.device.has_fast_bfloat16", lambda device: True)
    path = recipe_for(tmp_path / "r.yaml", models(family), NUMBERS, train=ONE_STEP)
    request = RunRequest(out=tmp_path / "run", offline=True)
    run_pipeline(load_recipe(str(path), [f"model.dtype={dtype}"]), request, Console(quiet=True))
    numbers = [line["tuned_prediction"]["label"] for line in predictions(tmp_path / "run")]
    assert all(np.float32(number).view(np.int32) & 0xFFFF for number in numbers), "bfloat16 lacks these bits"
    answer = FinishedRun(tmp_path / "run", offline=True).answer({"prompt": NUMBERS[0]["text"]})
    assert np.float32(answer["prediction"]["label"]).view(np.int32) & 0xFFFF
    assert np.float32(answer["text"]) == np.float32(answer["prediction"]["label"])
    if (family, dtype) == ("bert", "auto"):
        export(open_finished(tmp_path / "run", Console(quiet=True), True), merged_format())
        folder = tmp_path / "run" / "merged"
        merged = AutoModelForSequenceClassification.from_pretrained(folder)
        assert merged.dtype == torch.float32
        text = AutoTokenizer.from_pretrained(folder)(NUMBERS[0]["text"], return_tensors="pt")
        assert merged(**text).logits.item() == pytest.approx(answer["prediction"]["label"], rel=1e-6)
