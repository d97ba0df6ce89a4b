"""TF-IDF with logistic regression: how well words and letters alone classify texts, or predict a number.

Features are words, pairs of words, and 2 to 5 letters in a row within words, each weighted by TF-IDF. A regression with
an L2 penalty depends on the training texts only through their inner products. For few texts it is therefore fitted
exactly on their coordinates in the space that the texts span, which is much smaller than the space of features.

Shapes: N training texts, A texts to predict, K classes, F features, R directions (at most N).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.intervals import Floats

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

TargetKind = Literal["single", "multi", "regression"]
Targets: TypeAlias = NDArray[np.int64] | NDArray[np.bool_] | Floats
"""[N] numbers of classes (single), [N, K] whether a class applies (multi), or [N] numbers (regression)."""
MOST_TEXTS, MOST_CHARACTERS, LONGEST = 20_000, 20_000_000, 4_000
"""Limits of the training texts, and of each text, which keep a fit within about a minute."""
WORD = r"(?u)\b\w+\b"
MOST_FEATURES = 50_000
"""Features per kind, the most frequent first."""
EXACT = 2_500
"""Training texts up to which the fit uses their inner products."""
STRENGTHS = (1.0, 10.0, 100.0)
"""Values of scikit-learn's C to choose from."""
FOLDS = 3
ROUNDING = 1e-10
LEAST_SHARE = 1e-6
"""The probability of a class without a training row must not be zero: its logarithm is measured."""


class Fitted(NamedTuple):
    """Predictions for the texts that were asked for."""

    scores_AK: Floats  # noqa: N815
    """Probabilities of classes; [A, 1] numbers for a regression."""
    note: str


def fit_tfidf(
    kind: TargetKind, texts: Sequence[str], targets: Targets, classes: int, new_texts: Sequence[str]
) -> Fitted | str:
    """Fit on `texts`, and predict `new_texts`; return the reason instead if nothing can be fitted.

    The strength of the penalty is chosen by cross-validation on the training texts alone. More texts than the limits
    allow are thinned out evenly. The result is the same each time.
    """
    kept = thin_out(texts)
    targets = targets[kept]
    if len(np.unique(targets, axis=0)) < 2:
        return "all training rows have the same label"
    try:
        train_NF, new_AF = vectorize([texts[n][:LONGEST] for n in kept], [text[:LONGEST] for text in new_texts])
    except ValueError:  # scikit-learn's "empty vocabulary"
        return "the training rows have no words"
    few = np.arange(len(kept)) if len(kept) <= EXACT else np.arange(EXACT) * len(kept) // EXACT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows of a class, classes that all rows have, a fit cut short
        few_NR, new_AR = span(train_NF[few], new_AF)
        strength = choose_strength(kind, few_NR, targets[few])
        if len(few) == len(kept):
            scores_AK = predict_values(kind, fit(kind, strength, few_NR, targets), new_AR, classes)
        else:
            scores_AK = predict_values(kind, fit(kind, strength, train_NF, targets), new_AF, classes)
    rows = f"{len(kept):,} training rows" if len(kept) == len(texts) else f"{len(kept):,} of {len(texts):,} rows"
    name = "ridge regression" if kind == "regression" else "logistic regression"
    return Fitted(scores_AK, f"{name} on words, pairs of words and 2 to 5 letters; {rows}, C {strength:g}")


def logits_of(scores_AK: Floats, *, many: bool) -> Floats:
    """Return logits whose softmax, or sigmoids if `many` classes may apply, are these probabilities."""
    shares_AK = np.clip(scores_AK, LEAST_SHARE, 1 - LEAST_SHARE)
    return np.asarray(np.log(shares_AK) - (np.log1p(-shares_AK) if many else 0.0))


def thin_out(texts: Sequence[str]) -> NDArray[np.int64]:
    """Return the numbers of the texts to fit on, spread evenly."""
    characters = sum(min(len(text), LONGEST) for text in texts)
    share = min(1.0, MOST_TEXTS / max(len(texts), 1), MOST_CHARACTERS / max(characters, 1))
    count = max(1, int(share * len(texts)))
    return np.arange(count) * len(texts) // count


def vectorize(texts: Sequence[str], new_texts: Sequence[str]) -> tuple[csr_matrix, csr_matrix]:
    """Return features [N, F] and [A, F]; the vocabulary and its weights come from `texts`."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # late: takes a second
    from sklearn.pipeline import make_union

    options: dict[str, Any] = {"sublinear_tf": True, "max_features": MOST_FEATURES}
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=WORD, **options)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **options)
    union = make_union(words, letters)
    return union.fit_transform(texts).tocsr(), union.transform(new_texts).tocsr()


def span(train_NF: csr_matrix, new_AF: csr_matrix) -> tuple[Floats, Floats]:
    """Return coordinates [N, R] and [A, R] with the same inner products, in the space that the training texts span."""
    values_R, vectors_NR = np.linalg.eigh((train_NF @ train_NF.T).toarray())
    kept_R = values_R > ROUNDING * values_R[-1]
    roots_R, vectors_NR = np.sqrt(values_R[kept_R]), vectors_NR[:, kept_R]
    return vectors_NR * roots_R, (new_AF @ train_NF.T).toarray() @ (vectors_NR / roots_R)


def fit(kind: TargetKind, strength: float, features: Any, targets: Targets) -> Any:
    """Return a fitted regression of scikit-learn."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if kind == "regression":
        return Ridge(alpha=1 / strength, random_state=0).fit(features, targets)
    logistic = LogisticRegression(C=strength, max_iter=300, random_state=0)
    return (OneVsRestClassifier(logistic) if kind == "multi" else logistic).fit(features, targets)


def predict_values(kind: TargetKind, model: Any, features: Any, classes: int) -> Floats:
    """Return probabilities [A, K], zero for classes without a training row, or numbers [A, 1]."""
    if kind == "regression":
        return np.asarray(model.predict(features), dtype=np.float64)[:, None]
    shares = np.asarray(model.predict_proba(features), dtype=np.float64)
    if kind == "multi":
        return shares
    scores_AK = np.zeros((shares.shape[0], classes))
    scores_AK[:, model.classes_] = shares
    return scores_AK


def choose_strength(kind: TargetKind, features_NR: Floats, targets: Targets) -> float:
    """Return the C with the most right labels (regression: the least error) over folds; the first of equals."""
    from sklearn.model_selection import KFold, StratifiedKFold

    single = kind == "single"
    if len(targets) < 2 * FOLDS or (single and np.bincount(targets.astype(np.int64)).max() < FOLDS):
        return STRENGTHS[1]
    folds = (StratifiedKFold if single else KFold)(FOLDS, shuffle=True, random_state=0)
    gains = dict.fromkeys(STRENGTHS, 0.0)
    for train, held_out in folds.split(features_NR, targets if single else None):
        if len(np.unique(targets[train], axis=0)) < 2:
            continue
        for strength in STRENGTHS:
            model = fit(kind, strength, features_NR[train], targets[train])
            predicted = np.asarray(model.predict(features_NR[held_out]))
            errors = (predicted - targets[held_out]) ** 2 if kind == "regression" else predicted != targets[held_out]
            gains[strength] -= float(errors.sum())
    return max(gains, key=gains.__getitem__)
