"""The base without training: a new head starts at a regression on its features, and `frozen` answers the test rows."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from model.test_mean_layer import sentence_base
from peft import AutoPeftModelForSequenceClassification
from rich.console import Console
from sklearn.linear_model import LogisticRegression, Ridge
from support.classifying import colour_rows, predictions, recipe_for, run
from support.runs import invoke
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from llmtune.data.row_store import iterate_rows, load_rows
from llmtune.evaluate import regression
from llmtune.evaluate.regression import compare_with_words, fit_features, fit_head

STILL = {"max_steps": 1, "num_train_epochs": None, "learning_rate": 1e-9}


# The head as a regression


@pytest.fixture
def drawn():
    """Features of 80 texts, a direction for each of four classes, and the classes that the directions give."""
    random = np.random.default_rng(0)
    features, directions = random.normal(size=(80, 6)), random.normal(size=(6, 4))
    return features, (features @ directions).argmax(1)


@pytest.fixture(params=[1.0, 100.0])
def strength(request, monkeypatch):
    """The C that folds choose; the first of the list gives the size of the logits."""
    monkeypatch.setattr(regression, "choose_strength", lambda *_: (request.param, None))
    return request.param


def same_lengths(found, wanted):
    """Scale logits to the length of others: labels stay the same."""
    return found * np.linalg.norm(wanted) / np.linalg.norm(found)


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2]])
def test_a_layer_labels_as_the_regression_with_logits_of_the_strongest_penalty(drawn, kept, strength):
    features, classes = drawn
    rows = np.isin(classes, kept)
    features, classes = features[rows], classes[rows]
    weights, biases, found = fit_head("single", features, classes, 5)
    size = np.sqrt((features**2).sum(1).mean())
    known, calm = (LogisticRegression(C=c, max_iter=300).fit(features / size, classes) for c in (strength, 1.0))
    logits = features @ weights.T + biases
    gaps = logits[:, kept[0]] - logits[:, kept[-1]]
    expected = known.predict_log_proba(features / size)
    assert gaps == pytest.approx(same_lengths(expected[:, 0] - expected[:, -1], gaps), abs=1e-3)
    assert (logits[:, kept].argmax(1) == expected.argmax(1)).all()
    spread = np.linalg.norm(calm.coef_) / (2 if len(kept) == 2 else 1)
    assert np.linalg.norm(weights * size) * (2**0.5 / 2 if len(kept) == 2 else 1) == pytest.approx(spread, rel=1e-3)
    assert (np.delete(logits, kept, axis=1).max(1) < logits[:, kept].max(1) - 5).all(), "classes without a row"
    assert found == strength


def test_several_classes_of_a_text_have_a_regression_each(drawn, strength):
    features, classes = drawn
    applies = np.stack([classes == 0, classes != 1, np.ones(80, bool), np.zeros(80, bool)], axis=1)
    weights, biases, _ = fit_head("multi", features, applies, 4)
    size = np.sqrt((features**2).sum(1).mean())
    known = LogisticRegression(C=strength).fit(features / size, applies[:, 0]).decision_function(features / size)
    logits = features @ weights.T + biases
    assert logits[:, 0] == pytest.approx(same_lengths(known, logits[:, 0]), abs=1e-3)
    assert (logits[:, 2] > 5).all()
    assert (logits[:, 3] < -5).all()


def test_numbers_have_a_ridge_regression(drawn):
    features, classes = drawn
    weights, biases, _ = fit_head("regression", features, classes / 2, 1)
    size = np.sqrt((features**2).sum(1).mean())
    known = Ridge(alpha=1.0).fit(features / size, classes / 2).predict(features / size)
    assert (features @ weights.T + biases)[:, 0] == pytest.approx(known, abs=1e-6)


def test_nothing_is_fitted_to_one_class(drawn):
    features, _ = drawn
    assert fit_features("single", features, np.zeros(80, int), 2, features, "it") == (
        "all training rows have the same label"
    )


def test_words_that_label_better_than_features_are_clearly_better(drawn):
    features, classes = drawn
    named = [f"the colour is {('red', 'green', 'blue', 'grey')[one]}" for one in classes]
    blind = np.random.default_rng(1).normal(size=features.shape)
    told, warning = compare_with_words("single", blind, named, classes)
    assert told.endswith("by words alone 1.00")
    assert "model.name" in warning
    told, warning = compare_with_words("single", features, ["the same"] * 80, classes)
    assert told.startswith("; labels right over 3 folds: 0.")
    assert not warning
    applies = np.stack([classes == 0, classes != 1], axis=1)
    assert compare_with_words("multi", blind, named, applies)[1]


@pytest.mark.parametrize("texts", [["red", "green"], ["?", "!"]])
def test_too_few_rows_or_no_words_are_not_compared(drawn, texts):
    assert compare_with_words("single", drawn[0][:2], texts, np.array([0, 1])) == ("", "")


# In a run


@pytest.fixture(scope="module")
def kept(built, tmp_path_factory):
    """A run on a sentence encoder whose training changes nothing: its model is the start."""
    folder = tmp_path_factory.mktemp("frozen")
    base, console = sentence_base(built("bert"), folder / "base"), Console(file=io.StringIO(), width=200)
    recipe = recipe_for(folder / "r.yaml", base, colour_rows(120), train=STILL)
    report, out = run(recipe, console=console)
    return base, report, out, console.file.getvalue()


def rows_of(out, split):
    return [row for _, row in iterate_rows(load_rows(out / "data" / "rows"), split)]


def mean_vectors(base, rows):
    """Return what sentence-transformers' mean pooling gives, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    with torch.no_grad():
        states = [model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0] for row in rows]
    return np.stack([one.mean(0).double().numpy() for one in states])


def test_the_frozen_baseline_is_scikit_learns_regression_on_mean_pooled_features(kept):
    base, report, out, _ = kept
    simple = report["evaluation"]["simple_baselines"]["frozen"]
    train, test = (mean_vectors(base, rows_of(out, split)) for split in ("train", "test"))
    size, strength = np.sqrt((train**2).sum(1).mean()), float(simple["note"].rpartition(" ")[2])
    model = LogisticRegression(C=strength, max_iter=300).fit(
        train / size, [row["label"] for row in rows_of(out, "train")]
    )
    right = np.mean(model.predict(test / size) == [row["label"] for row in rows_of(out, "test")])
    assert simple["scores"]["accuracy"] == pytest.approx(right)
    assert simple["title"] == "the frozen base with logistic regression"
    assert json.loads((out / "evaluation" / "frozen.json").read_text())["note"] == simple["note"]


def test_training_does_not_change_the_frozen_baseline(kept, tmp_path):
    base, before, out, _ = kept
    report, trained = run(recipe_for(tmp_path / "r.yaml", base, colour_rows(120)))
    assert report["evaluation"]["tuned"]["loss"] < before["evaluation"]["tuned"]["loss"] / 2
    scores = [
        [one["scores"] for _, one in json.loads((folder / "evaluation" / "frozen.json").read_text())["predictions"]]
        for folder in (out, trained)
    ]
    assert scores[0] == pytest.approx(np.array(scores[1]), abs=1e-4)


def test_training_begins_at_the_regression_and_says_so(kept):
    _, report, _, said = kept
    assert "head: starts at logistic regression on the base's features" in said
    assert report["evaluation"]["tuned"]["accuracy"] > report["evaluation"]["base"]["accuracy"]
    assert report["train"]["first_loss"] < np.log(3)


def test_before_training_a_run_says_whether_the_base_knows_more_than_words(kept, tmp_path):
    base, _, _, said = kept
    assert "labels right over 3 folds: " in said
    assert "Words alone label" not in said
    illiterate = AutoModel.from_pretrained(base)
    torch.nn.init.zeros_(illiterate.embeddings.word_embeddings.weight)
    shutil.copytree(base, tmp_path / "base")
    illiterate.save_pretrained(tmp_path / "base")
    console = Console(file=io.StringIO(), width=200)
    run(recipe_for(tmp_path / "r.yaml", tmp_path / "base", colour_rows(120), train=STILL), console=console)
    assert "Words alone label the training rows better than this base's features" in console.file.getvalue()


def test_a_start_that_training_does_not_improve_is_kept_and_named(kept, tmp_path):
    base, before, *_ = kept
    console = Console(file=io.StringIO(), width=200)
    ruined = {**STILL, "learning_rate": 3.0}
    report, out = run(recipe_for(tmp_path / "r.yaml", base, colour_rows(120), train=ruined), console=console)
    assert report["train"]["best_step"] == 0
    assert report["evaluation"]["tuned"] == pytest.approx(before["evaluation"]["tuned"], rel=1e-3)
    said = "Training did not improve on its start by the validation rows"
    assert said in console.file.getvalue()
    assert said in report["verdict"]["reason"]
    assert said in (out / "report.md").read_text()


def test_plain_peft_loads_the_adapter_with_one_layer_more(kept):
    base, _, out, _ = kept
    named = json.loads((out / "adapter" / "config.json").read_text())
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        out / "adapter", num_labels=3, num_hidden_layers=named["num_hidden_layers"]
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row in predictions(out)[:8]:
        with torch.no_grad():
            logits = model(**tokenizer(row["prompt"], return_tensors="pt")).logits[0]
        assert named["id2label"][str(int(logits.argmax()))] == row["tuned"]


def test_the_merged_model_is_a_plain_one_with_the_same_answers(kept, tmp_path):
    _, _, out, _ = kept
    assert invoke("deploy", "merge", str(out), "--out", str(tmp_path / "merged")).exit_code == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for row in predictions(out)[:8]:
        with torch.no_grad():
            logits = model(**tokenizer(row["prompt"], return_tensors="pt")).logits[0]
        assert model.config.id2label[int(logits.argmax())] == row["tuned"]
