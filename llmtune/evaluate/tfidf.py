"""TF-IDF with logistic regression: how well words and letters alone classify texts, or predict a number.

Features are words, pairs of words, and 2 to 5 letters in a row within words, each weighted by TF-IDF. A regression with
an L2 penalty depends on the training texts only through their inner products. For few texts it is therefore fitted
exactly on their coordinates in the space that the texts span, which is much smaller than the space of features.

Shapes: N training texts, A texts to predict, K classes, F features, R directions (at most N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.regression import (
    MOST_TEXTS,
    Fitted,
    TargetKind,
    Targets,
    choose_strength,
    fit,
    name_fit,
    predict_values,
    quiet_fits,
)

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

MOST_CHARACTERS, LONGEST = 20_000_000, 4_000
"""Limits of all training texts, and of each, which keep a fit within about a minute."""
WORD = r"(?u)\b\w+\b"
MOST_FEATURES = 50_000
"""Features per kind, the most frequent first."""
EXACT = 2_500
"""Training texts up to which the fit uses their inner products."""
ROUNDING = 1e-10


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
        strength = choose_strength(kind, few_NR, targets[few])
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
