"""Plain forms of texts for comparison, and the texts of a row that the searches for duplicates compare."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import xxhash

from llmtune.records import Row

HIDES = 4
"""From this factor on, the longer text of a pair hides the shorter one. Pairs that share a text 8 times as long as the
other have 80 % of their words in common."""
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    "\U000e0000-\U000e0fff]"
)
"""Characters without width: joiners, directions, soft hyphens, variation selectors."""
APOSTROPHE = re.compile(r"(?<=\w)['\u2019\u02bc](?=\w)")
MARKDOWN = re.compile(r"^[ \t]*(?:[-+*>][ \t]+|>+)", re.MULTILINE)
"""Signs of lists and quotes that are not punctuation elsewhere; headings, emphasis and code use punctuation."""

SIGNS = re.compile(r"[\d#+>]")
"""ASCII characters that are words, parts of words, or neither, by their neighbours."""
SPACES = str.maketrans(dict.fromkeys("!\"%&'()*,-./:;?@[\\]^_`{|}~", " "))


class NearText(NamedTuple):
    """What the search for near duplicates compares: nearly equal texts, of equal contexts, with equal answers."""

    text: str
    context: str = ""
    answer: str = ""

    @property
    def tag(self) -> str:
        """Everything that must be equal; empty if nothing must."""
        return f"{text_key(self.context)}\n{self.answer}" if self.context or self.answer else ""


class RowInput(NamedTuple):
    """What a model reads of a row, and the answer to it; only rows whose query may match compute the functions."""

    query: str
    context: Callable[[], str]
    """Returns everything before the query; must be equal."""
    answer: Callable[[], str]
    labelled: bool = False
    """Whether rows with nearly equal queries and other answers teach the difference: their answers are labels."""
    pictures: tuple[str, ...] = ()
    """Hashes of its pictures; the context has them too."""


QuestionAnswer = tuple[object, object]
"""What a row asks, and its answer."""
LEARNED = (
    *("completion", "target", "summary", "chosen", "rejected", "answer", "good", "passages", "negatives", "score"),
    *("relevances", "label", "tags"),
)
"""Columns that do not belong to the prompt."""
TEXTS = (
    *("prompt", "completion", "source", "document", "question", "context"),
    *("text", "pair", "tokens", "chosen", "rejected"),
)
"""Columns of an unanswered row that contain text."""


def map_texts(row: Row, change: Callable[[Any], Any]) -> Row:
    """Return a row with `change` applied to its columns with text."""
    return {**row, **{key: change(row[key]) for key in TEXTS if key in row}}


@cache
def _token() -> re.Pattern[str]:
    """Match a word. Punctuation is no word, except signs between numbers, and after them or after a letter (C#)."""
    kinds = ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sk")
    marks = "".join(sign for sign in map(chr, range(2**16)) if unicodedata.category(sign) in kinds)
    word = rf"[^\s{re.escape(marks)}|~]+"
    return re.compile(rf"(?<=\d)\s*[-*/.,:^]\s*(?=\d)|(?<=\d)%|(?<!\S)-(?=\d)|{word}(?:(?<=[^\W\d_])#)?")


def plain_words(text: str) -> list[str]:
    """Return the words of a text with their case, without punctuation, Markdown and characters without width."""
    text = text if text.isascii() else INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    text = APOSTROPHE.sub("", text) if not text.isascii() or "'" in text else text
    if text.isascii() and not SIGNS.search(text):  # most texts, five times as fast
        return text.translate(SPACES).split()
    return [word.strip() for word in _token().findall(MARKDOWN.sub("", text))]


def plain_form(text: str) -> str:
    """Return a text for comparison: its words in one case; a text without words is itself."""
    return " ".join(plain_words(text)).casefold() or text.strip()


def visible_form(text: str) -> str:
    """Return a text in one case and width, without characters without width. `hash_words` ignores punctuation."""
    return text if text.isascii() else INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold()


def text_key(text: str) -> str:
    """Return the form in which queries and passages are compared: Unicode composed, white space as single spaces.

    Texts with the same form are one text: in rows, corpus and metrics, as negatives, and within a step. The model reads
    a text as it is in the file.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def join_plain(texts: Iterable[str]) -> str:
    """Return texts in their plain form, joined."""
    return "|".join(map(plain_form, texts))


def with_answer(prompt: str, answer: str) -> NearText:
    """Return prompt and answer as one text; an answer that hardly counts in it must be equal."""
    if not answer.strip() or len(prompt.split()) < HIDES * len(answer.split()):
        return NearText(f"{prompt} {answer}")
    return NearText(prompt, "", plain_form(answer))


def pair_text(one: str, other: str) -> NearText:
    """Return two texts as one; if one of them is so long that the other hardly counts, the other must be equal."""
    short, long = sorted((one, other), key=lambda text: len(text.split()))
    if not short or len(long.split()) < HIDES * len(short.split()):
        return NearText(f"{one} {other}".strip())
    return NearText(long, short)


def tag_words(text: str, context: str) -> str:
    """Return a text whose words count only together with their context."""
    tag = xxhash.xxh3_64_hexdigest(text_key(context).encode())[:8]
    return " ".join(f"{word}{tag}" for word in text.split())
