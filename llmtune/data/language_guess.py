"""Guesses the language of rows: by the script of their letters, else by the most frequent words of each language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from itertools import islice

from ruamel.yaml import YAML

DECIMAL_POINTS = (None, "ar", "en", "he", "hi", "ja", "ko", "th", "zh")
"""Languages whose spreadsheets separate columns by commas; the others write decimal commas, and semicolons."""
READ_CHARACTERS = 20_000
LEAST_WORDS, LEAST_SHARE, LEAST_LEAD = 3, 0.08, 1.25
"""Fewest different words among a language's most frequent ones, their least share of all words, and how many times
those of the next language."""


def guess_language(texts: Iterable[str]) -> str | None:
    """Return the code of the language that most of the texts are in; None if that is not clear."""
    listed = YAML(typ="safe").load((resources.files("llmtune.data") / "common_words.yaml").read_text("utf-8"))
    read = " ".join(islice((text[:1000] for text in texts), 500))[:READ_CHARACTERS].lower()
    letters = Counter(unicodedata.name(sign, "").split(" ")[0].split("-")[0] for sign in read if sign.isalpha())
    if letters and (script := letters.most_common(1)[0][0]) != "LATIN":
        kana = letters["HIRAGANA"] + letters["KATAKANA"]
        is_ukrainian = script == "CYRILLIC" and "ї" in read and "ы" not in read
        return "uk" if is_ukrainian else "ja" if kana > 0.05 * letters.total() else listed["scripts"].get(script)
    words = Counter(re.findall(r"[^\W\d_]{2,}", read))
    counts = Counter({code: sum(words[word] for word in common) for code, common in listed["words"].items()})
    (best, most), (_, second) = counts.most_common(2)
    found = sum(word in words for word in listed["words"][best])
    is_clear = found >= LEAST_WORDS and most >= LEAST_SHARE * words.total() and most >= LEAST_LEAD * second
    return best if is_clear else None
