"""BM25: rank passages by the words that they share with a query, without a model.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.

Shapes: Q queries, P passages, W different words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from llmtune.evaluate.intervals import Floats

UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\uaa60-\uaa7f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+)"  # kana, Han
)
"""Characters of scripts that are written without spaces."""
SATURATION, LENGTH_SHARE = 1.2, 0.75
"""BM25's k1 and b, by Lucene's defaults."""
BM25_NOTE = f"shared words, k1 {SATURATION}, b {LENGTH_SHARE}; nothing is fitted"


def words(text: str) -> list[str]:
    """Return the words of a text, without case; in scripts without spaces, each two neighbouring characters."""
    terms: list[str] = []
    for word in word_pattern().findall(unicodedata.normalize("NFKC", text).casefold()):
        for run in UNSPACED.split(word):
            pairs = [run[i : i + 2] for i in range(len(run) - 1)] if UNSPACED.fullmatch(run) else []
            terms += pairs or ([run] if run else [])
    return terms


@cache
def word_pattern() -> re.Pattern[str]:
    """Return the pattern of a word; `\\w` has no vowel signs, which would split the words of Hindi or Thai."""
    marks = (chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(rf"[\w{''.join(marks)}]+")


def index_words(passages: Sequence[str]) -> Callable[[Sequence[str]], Floats]:
    """Return a function that scores all passages for some queries, [Q, P]; 0 without a shared word."""
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]  # late: most evaluations need none

    counts, numbers = [Counter(words(passage)) for passage in passages], dict[str, int]()
    entries = [
        (p, numbers.setdefault(word, len(numbers)), n) for p, one in enumerate(counts) for word, n in one.items()
    ]
    at_P, at_W, times = (
        np.array(part, dtype=np.int64) for part in (zip(*entries, strict=True) if entries else ([],) * 3)
    )
    holders_W = np.bincount(at_W, minlength=len(numbers))
    rarity_W = np.log1p((len(passages) - holders_W + 0.5) / (holders_W + 0.5))
    lengths_P = np.bincount(at_P, weights=times, minlength=len(passages))
    norm_P = SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * lengths_P / (lengths_P.mean() or 1.0))
    weights = rarity_W[at_W] * times * (SATURATION + 1) / (times + norm_P[at_P])
    weights_WP = csr_matrix((weights, (at_W, at_P)), shape=(len(numbers), len(passages)))

    def score(queries: Sequence[str]) -> Floats:
        hits = [(q, numbers[word]) for q, query in enumerate(queries) for word in words(query) if word in numbers]
        rows, columns = zip(*hits, strict=True) if hits else ((), ())
        queries_QW = csr_matrix((np.ones(len(hits)), (rows, columns)), shape=(len(queries), len(numbers)))
        return np.asarray((queries_QW @ weights_WP).toarray(), dtype=np.float64)

    return score
