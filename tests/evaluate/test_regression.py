"""TF-IDF with logistic regression equals scikit-learn's own pipeline, is the same each time, and knows its limits."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline, make_union

from llmtune.evaluate import regression
from llmtune.evaluate.regression import fit_tfidf, logits_of, thin_out

WORDS = ("river", "stone", "house", "cloud", "bread", "music", "light", "green")
TOPICS = (("goal", "match", "referee"), ("vote", "senate", "law"), ("cell", "gene", "protein"))


def texts_of(count: int, seed: int = 0, right: float = 0.75) -> tuple[list[str], np.ndarray]:
    """Texts of three topics, each with a word of its topic, or sometimes of the first one."""
    random = np.random.default_rng(seed)
    topics = random.integers(0, 3, count)
    said = [random.choice(TOPICS[topic if random.random() < right else 0]) for topic in topics]
    return [" ".join([*random.choice(WORDS, 6), word]) for word in said], topics


def library(last):
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    return make_pipeline(
        make_union(words, TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)), last
    )


@pytest.mark.parametrize("exact", [True, False])
def test_probabilities_equal_those_of_scikit_learn_on_few_and_on_many_texts(exact, monkeypatch):
    monkeypatch.setattr(regression, "STRENGTHS", (10.0,))
    if not exact:
        monkeypatch.setattr(regression, "EXACT", 50)
    texts, topics = texts_of(150)
    asked, _ = texts_of(40, seed=1)
    fitted = fit_tfidf("single", texts, topics, 4, asked)
    known = library(LogisticRegression(C=10.0, tol=1e-6, max_iter=1000)).fit(texts, topics).predict_proba(asked)
    assert fitted.scores_AK[:, :3] == pytest.approx(known, abs=0.02)
    assert not fitted.scores_AK[:, 3].any(), "no text has the fourth class"
    assert "150 training rows, C 10" in fitted.note


def test_numbers_equal_those_of_ridge_regression(monkeypatch):
    monkeypatch.setattr(regression, "STRENGTHS", (10.0,))
    texts, topics = texts_of(120)
    asked, _ = texts_of(30, seed=1)
    fitted = fit_tfidf("regression", texts, topics / 2, 0, asked)
    known = library(Ridge(alpha=0.1)).fit(texts, topics / 2).predict(asked)
    assert fitted.scores_AK[:, 0] == pytest.approx(known, abs=1e-3)
    assert fitted.note.startswith("ridge regression")


def test_several_classes_of_a_text_are_predicted_apart():
    texts, topics = texts_of(150, right=1)
    applies = np.stack([topics == 0, topics != 1, np.ones(150, bool), np.zeros(150, bool)], axis=1)
    asked, wanted = texts_of(60, seed=1, right=1)
    scores = fit_tfidf("multi", texts, applies, 4, asked).scores_AK
    assert ((scores[:, 0] > 0.5) == (wanted == 0)).mean() > 0.9
    assert scores[:, 2].min() > 0.99
    assert scores[:, 3].max() < 0.01


def test_a_fit_is_the_same_each_time():
    texts, topics = texts_of(90)
    first, again = (fit_tfidf("single", texts, topics, 3, texts) for _ in range(2))
    assert first.note == again.note
    assert np.array_equal(first.scores_AK, again.scores_AK)


def test_the_penalty_fits_the_texts():
    texts, topics = texts_of(200)
    noise = np.random.default_rng(5).integers(0, 3, 200)
    clean, random = (fit_tfidf("single", texts, labels, 3, texts[:1]).note for labels in (topics, noise))
    assert clean.startswith("logistic regression")
    assert "C 1" in random


@pytest.mark.parametrize(
    ("texts", "targets", "why"),
    [
        (["a cat", "a dog"], np.array([1, 1]), "all training rows have the same label"),
        (["!", "?"], np.array([0, 1]), "the training rows have no words"),
    ],
)
def test_rows_that_nothing_can_be_learned_from_give_the_reason(texts, targets, why):
    assert fit_tfidf("single", texts, targets, 2, ["a cat"]) == why


def test_one_row_of_each_class_is_enough():
    scores = fit_tfidf("single", ["red cat", "green dog", "blue fish"], np.arange(3), 3, ["a green one"]).scores_AK
    assert scores.argmax(1).tolist() == [1]


def test_too_many_or_too_long_texts_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(regression, "MOST_TEXTS", 40)
    assert thin_out(["word"] * 100).tolist() == [i * 100 // 40 for i in range(40)]
    monkeypatch.setattr(regression, "MOST_CHARACTERS", 100)
    assert len(thin_out(["word" * 5] * 10)) == 5
    texts, topics = texts_of(100)
    monkeypatch.setattr(regression, "MOST_CHARACTERS", 10**6)
    assert "40 of 100 rows" in fit_tfidf("single", texts, topics, 3, texts[:1]).note


@pytest.mark.parametrize("many", [True, False])
def test_logits_give_the_probabilities_back(many):
    shares = np.array([[0.1, 0.9, 0.0]])
    logits = logits_of(shares, many=many)
    back = 1 / (1 + np.exp(-logits)) if many else np.exp(logits) / np.exp(logits).sum()
    assert back == pytest.approx(shares, abs=1e-5)
    assert np.isfinite(logits).all()
