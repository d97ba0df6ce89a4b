"""Guesses the language of rows: by the script of their letters, else by the most frequent words of each language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import islice

SCRIPTS = {
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CJK": "zh",
    "CYRILLIC": "ru",
    "ARABIC": "ar",
    "HEBREW": "he",
    "GREEK": "el",
    "THAI": "th",
    "DEVANAGARI": "hi",
}
"""The language of each script, by the first word of its letters' names in Unicode."""
COMMON_WORDS = {
    "cs": "že je se na to do jsem jak ale není pro které jsme",
    "da": "og det er ikke jeg en at på til med har af der",
    "de": "der die das und ist nicht ich ein eine mit für den auf zu sie",
    "en": "the and is to of in that it for you not with this are was",
    "es": "el los que de en un por con para no una las está del",
    "fi": "ja on ei se että en mutta oli kun hän ovat tai",
    "fr": "le les et est des une que pas pour dans je vous du sur au",
    "hu": "az és hogy nem egy van meg ez csak volt vagy már",
    "it": "il di che per non sono con del una gli della è le",
    "nl": "de het een en van is niet dat ik op met voor zijn",
    "no": "og det er ikke jeg en på til med har av som",
    "pl": "nie się na jest że do jak co ale dla czy z od",
    "pt": "o que do da em um para não com uma os as está",
    "ro": "și nu este să pe la cu mai din pentru sunt în",
    "sv": "och det är inte jag en att på för med har av som",
    "tr": "ve bir bu için çok ne ben mi var değil daha gibi",
    "vi": "là không và của có cho tôi được một các này",
}
DECIMAL_POINTS = (None, "ar", "en", "he", "hi", "ja", "ko", "th", "zh")
"""Languages whose spreadsheets separate columns by commas; the others write decimal commas, and semicolons."""
READ_CHARACTERS = 20_000
LEAST_SHARE, LEAST_LEAD = 0.08, 1.25
"""Least share of a language's most frequent words, and how many times those of the next language."""


def guess_language(texts: Iterable[str]) -> str | None:
    """Return the code of the language that most of the texts are in; None if that is not clear."""
    read = " ".join(islice((text[:1000] for text in texts), 500))[:READ_CHARACTERS].lower()
    letters = Counter(unicodedata.name(sign, "").split(" ")[0].split("-")[0] for sign in read if sign.isalpha())
    if letters and (script := letters.most_common(1)[0][0]) != "LATIN":
        kana = letters["HIRAGANA"] + letters["KATAKANA"]
        is_ukrainian = script == "CYRILLIC" and "ї" in read and "ы" not in read
        return "uk" if is_ukrainian else "ja" if kana > 0.05 * letters.total() else SCRIPTS.get(script)
    words = Counter(re.findall(r"[^\W\d_]{2,}", read))
    counts = Counter({code: sum(words[word] for word in {*common.split()}) for code, common in COMMON_WORDS.items()})
    (best, most), (_, second) = counts.most_common(2)
    is_clear = most >= max(3, LEAST_SHARE * words.total()) and most >= LEAST_LEAD * second
    return best if is_clear else None
