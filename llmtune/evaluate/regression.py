"""Logistic and ridge regression of labels on features of texts: TF-IDF, or those of a model; folds choose the penalty.

TF-IDF weighs words, pairs of words, and 2 to 5 letters in a row within words. A regression with an L2 penalty depends
on the training texts only through their inner products. For few texts it is therefore fitted exactly on their
coordinates in the space that the texts span, which is much smaller than the space of features.

Shapes: N training texts, A texts to predict, K classes, F features, R directions (at most N).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.intervals import Floats

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

TargetKind = Literal["single", "multi", "regression"]
Targets: TypeAlias = NDArray[np.int64] | NDArray[np.bool_] | Floats
"""[N] numbers of classes (single), [N, K] whether a class applies (multi), or [N] numbers (regression)."""
MOST_TEXTS = 20_000
ENOUGH = 2_500
"""Training texts that choose the strength; of more, as many are spread evenly."""
STRENGTHS = (1.0, 10.0, 100.0)
"""Values of scikit-learn's C to choose from."""
SAMPLE = 1_000
"""Training texts on which features and words are compared before training."""
FOLDS = 3
WORDS_ARE_BETTER = (
    "Words alone label the training rows better than this base's features: it may not know their language or subject. "
    "Another base may be better: model.name."
)
UNSEEN = 10.0
"""Logits by which a class without a training row is below the others."""
LEAST_SHARE = 1e-6
"""The probability of a class without a training row must not be zero: its logarithm is measured."""
MOST_CHARACTERS, LONGEST = 20_000_000, 4_000
"""Limits of all training texts, and of each, which keep a fit within about a minute."""
WORD = r"(?u)\b\w+\b"
MOST_FEATURES = 50_000
"""Features per kind, the most frequent first."""
EXACT = 2_500
"""Training texts up to which the fit uses their inner products."""
ROUNDING = 1e-10


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
    with quiet_fits():
        few_NR, new_AR = span(train_NF[few], new_AF)
        strength, _ = choose_strength(kind, few_NR, targets[few])
        if len(few) == len(kept):
            scores_AK = predict_values(kind, fit(kind, strength, few_NR, targets), new_AR, classes)
        else:
            scores_AK = predict_values(kind, fit(kind, strength, train_NF, targets), new_AF, classes)
    return Fitted(
        scores_AK, name_fit(kind, "words, pairs of words and 2 to 5 letters", len(kept), len(texts), strength)
    )


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


def fit_features(
    kind: TargetKind, features_NF: Floats, targets: Targets, classes: int, new_AF: Floats, what: str
) -> Fitted | str:
    """Fit on dense features, and predict `new_AF`; return the reason instead if nothing can be fitted.

    `what` names the features for the note.
    """
    if len(np.unique(targets, axis=0)) < 2:
        return "all training rows have the same label"
    size = root_mean_square(features_NF)
    with quiet_fits():
        strength, _ = choose_strength(kind, features_NF / size, targets)
        model = fit(kind, strength, features_NF / size, targets)
        scores_AK = predict_values(kind, model, new_AF / size, classes)
    return Fitted(scores_AK, name_fit(kind, what, len(targets), len(targets), strength))


def fit_head(
    kind: TargetKind, features_NF: Floats, targets: Targets, classes: int, weights_N: Floats | None = None
) -> tuple[Floats, Floats, float]:
    """Return weights [K, F] and biases [K] of a linear layer that labels as a regression does, and the C of that.

    The logits are as small as those of the strongest penalty: training goes on from them, and a layer that is sure of
    every training row would give it no gradient. A class without a training row gets a bias below all others. For
    numbers, K is 1, and the penalty is the strongest: a layer with large weights would diverge.
    """
    size = root_mean_square(features_NF)
    with quiet_fits():
        strength = STRENGTHS[0] if kind == "regression" else choose_strength(kind, features_NF / size, targets)[0]
        model = fit(kind, strength, features_NF / size, targets, weights_N)
        calm = fit(kind, STRENGTHS[0], features_NF / size, targets, weights_N)
    weights_KF, biases_K = np.zeros((classes, features_NF.shape[1])), np.zeros(classes)
    if kind == "regression":
        weights_KF[0], biases_K[0] = model.coef_, model.intercept_
        return weights_KF / size, biases_K, strength
    if kind == "multi":
        for number, one in enumerate(model.estimators_):
            if hasattr(one, "coef_"):
                ratio = np.linalg.norm(calm.estimators_[number].coef_) / np.linalg.norm(one.coef_)
                weights_KF[number], biases_K[number] = ratio * one.coef_[0], ratio * one.intercept_[0]
            else:  # all rows or none have the class
                biases_K[number] = UNSEEN if targets[:, number].any() else -UNSEEN
        return weights_KF / size, biases_K, strength
    halves_K = np.array([[-0.5], [0.5]]) if len(model.classes_) == 2 else np.ones((len(model.classes_), 1))
    halves_K = halves_K * np.linalg.norm(calm.coef_) / np.linalg.norm(model.coef_)
    weights_KF[model.classes_] = halves_K * model.coef_
    biases_K[model.classes_] = halves_K[:, 0] * model.intercept_
    biases_K[np.setdiff1d(np.arange(classes), model.classes_)] = biases_K.min() - UNSEEN
    return weights_KF / size, biases_K, strength


def root_mean_square(features_NF: Floats) -> float:
    """Return the typical length of a row: the penalty's strength is relative to it."""
    return float(np.sqrt((features_NF**2).sum(1).mean())) or 1.0


@contextmanager
def quiet_fits() -> Iterator[None]:
    """Silence scikit-learn on few rows of a class, classes that all rows have, and fits that were cut short."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def name_fit(kind: TargetKind, what: str, rows: int, given: int, strength: float) -> str:
    """Describe a fit on `rows` of the `given` training rows."""
    of = f"{rows:,} training rows" if rows == given else f"{rows:,} of {given:,} rows"
    return f"{'ridge' if kind == 'regression' else 'logistic'} regression on {what}; {of}, C {strength:g}"


def logits_of(scores_AK: Floats, *, many: bool) -> Floats:
    """Return logits whose softmax, or sigmoids if `many` classes may apply, are these probabilities."""
    shares_AK = np.clip(scores_AK, LEAST_SHARE, 1 - LEAST_SHARE)
    return np.asarray(np.log(shares_AK) - (np.log1p(-shares_AK) if many else 0.0))


def fit(kind: TargetKind, strength: float, features: Any, targets: Targets, weights_N: Floats | None = None) -> Any:
    """Return a fitted regression of scikit-learn; `weights_N` are those of rows with one class each."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if kind == "regression":
        return Ridge(alpha=1 / strength, random_state=0).fit(features, targets)
    logistic = LogisticRegression(C=strength, max_iter=300, random_state=0)
    if kind == "multi":
        return OneVsRestClassifier(logistic).fit(features, targets)
    return logistic.fit(features, targets, weights_N)


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


def choose_strength(kind: TargetKind, features_NF: Any, targets: Targets) -> tuple[float, Floats | None]:
    """Return the C with the least error over folds, the first of equals, and its errors [N]; None without folds.

    The error of a text is its share of wrong labels, or its squared error.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    if len(targets) > ENOUGH:
        few = np.arange(ENOUGH) * len(targets) // ENOUGH
        features_NF, targets = features_NF[few], targets[few]
    single = kind == "single"
    if len(targets) < 2 * FOLDS or (single and np.bincount(targets.astype(np.int64)).max() < FOLDS):
        return STRENGTHS[1], None
    folds = (StratifiedKFold if single else KFold)(FOLDS, shuffle=True, random_state=0)
    errors = {strength: np.zeros(len(targets)) for strength in STRENGTHS}
    for train, held_out in folds.split(features_NF, targets if single else None):
        if len(np.unique(targets[train], axis=0)) < 2:
            continue
        for strength in STRENGTHS:
            predicted = np.asarray(
                fit(kind, strength, features_NF[train], targets[train]).predict(features_NF[held_out])
            )
            wrong = (predicted - targets[held_out]) ** 2 if kind == "regression" else predicted != targets[held_out]
            errors[strength][held_out] = wrong.reshape(len(held_out), -1).mean(1)
    chosen = min(errors, key=lambda strength: errors[strength].sum())
    return chosen, errors[chosen]


def compare_with_words(
    kind: TargetKind, features_NF: Floats, texts: Sequence[str], targets: Targets
) -> tuple[str, str]:
    """Tell what shares of labels features and words get right over folds, and warn if words are clearly better.

    "Clearly" is by the paired 95 % interval of the texts' errors. Many texts are thinned out evenly. Both are empty if
    there are too few for folds.
    """
    few = np.arange(min(len(texts), SAMPLE)) * len(texts) // min(len(texts), SAMPLE)
    try:
        words_NF, none_AF = vectorize([texts[int(n)][:LONGEST] for n in few], [""])
    except ValueError:  # scikit-learn's "empty vocabulary"
        return "", ""
    with quiet_fits():
        _, errors_N = choose_strength(kind, features_NF[few] / root_mean_square(features_NF), targets[few])
        _, others_N = choose_strength(kind, span(words_NF, none_AF)[0], targets[few])
    if errors_N is None or others_N is None:
        return "", ""
    gain_N = errors_N - others_N
    clear = gain_N.mean() > 1.96 * gain_N.std(ddof=1) / np.sqrt(len(gain_N))
    told = f"; labels right over {FOLDS} folds: {1 - errors_N.mean():.2f}, by words alone {1 - others_N.mean():.2f}"
    return told, WORDS_ARE_BETTER if clear else ""
