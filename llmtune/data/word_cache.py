"""Words of a text as byte-level tokenizers cut it: each one's ids are asked of the model once and then looked up.

A byte-level BPE model turns a word into ids by that word alone, and its pre-tokenizer says by a regular expression what
a word is. The expression is written anew for Python over the characters whose kind no Unicode version disputes, and
held against the pre-tokenizer itself on some thousand texts before it is used. What it cannot say is left to the
tokenizer: other characters, other kinds of tokenizers.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from array import array
from collections.abc import Iterable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

MOST_WORDS = 2**17
"""Words that are kept; then all are forgotten: some 30 MB."""
LONGEST_WORD = 48
"""Characters above which a word is not worth keeping."""
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` with its own expression takes for words: that of GPT-2's encoder.py."""
GPT2_WORDS_BESIDE_NUMBERS = GPT2_WORDS.replace(r"\s+(?!\S)", r"\s+(?![^\s\p{N}])").replace(r"| ?\p{N}+", "")
"""The same where numbers were cut out before: white space before one stands at the end of its part."""

_RANGES = ((0x20, 0x7E), (0xA0, 0x17E), (0x180, 0x24F), (0x2010, 0x2027), (0x2030, 0x205E))
STABLE = "\t\n\r" + "".join(chr(code) for first, last in _RANGES for code in range(first, last + 1)) + "€™"
"""Characters of one kind in every version of Unicode, and their own composition: Latin, signs, quotes and dashes."""
_FOREIGN = re.compile(f"[^{re.escape(STABLE)}]")
_PROPERTY = re.compile(r"\\p\{([A-Z][a-z]?)\}")
_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_PROBED = (
    *("a", "B", "é", "ß", "'s", "'RE", "'ll", "'", "1", "20", "½", "²", " ", "  ", "\n", "\r\n", "\t", "\xa0"),
    *(".", "!?", "_", "-", "(", "“", "’", "–", "…", "€", "$", "Word", " the", " x", "ª", "×"),
)
_PROBES = 1000


class WordIds:
    """Ids of texts that hold no added token, word by word; as int32 in bytes, which join and compare fast."""

    def __init__(self, words: re.Pattern[str], model: Any) -> None:
        self._find = words.findall
        self._known = _Known(model)

    def read(self, text: str) -> bytes | None:
        """Return the ids of a text; None where a character is not among `STABLE` or a part is no word."""
        if _FOREIGN.search(text):
            return None
        words = self._find(text)
        if "".join(words) != text:
            return None
        return b"".join(map(self._known.__getitem__, words))


class _Known(dict[str, bytes]):
    """Ids by word; a word that is missing is asked of the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> bytes:
        ((level, _),) = _LEVEL.pre_tokenize_str(word)
        ids = array("i", [token.id for token in self._model.tokenize(level)]).tobytes()
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


def open_words(tokenizer: Tokenizer) -> WordIds | None:
    """Return what reads texts word by word with this tokenizer's ids; None where it is of another kind."""
    model = tokenizer.model
    plain = type(model).__name__ == "BPE" and not (
        model.dropout
        or model.unk_token
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
        or model.byte_fallback
    )
    if not plain or tokenizer.pre_tokenizer is None or state_of(tokenizer.normalizer) not in (None, {"type": "NFC"}):
        return None
    words = _prove(tokenizer.pre_tokenizer)
    return WordIds(words, model) if words is not None else None


def state_of(part: Any) -> Any:
    """Return a part of a tokenizer as it stands in `tokenizer.json`; None for none."""
    return None if part is None else json.loads(part.__getstate__())


_proven: dict[str, re.Pattern[str] | None] = {}


def _prove(original: Any) -> re.Pattern[str] | None:
    """Return the expression of a pre-tokenizer's words, once it has found on all probes what that does; or None."""
    state = state_of(original)
    key = json.dumps(state)
    if key not in _proven:
        words = _written(_expression(state))
        _proven[key] = words if words is not None and agree(words, original, probes()) else None
    return _proven[key]


def _written(expression: str | None) -> re.Pattern[str] | None:
    translated = translate(expression) if expression else None
    try:
        return None if translated is None else re.compile(translated)
    except re.error:
        return None


def _expression(state: dict[str, Any]) -> str | None:
    """Return the expression by which a pre-tokenizer cuts, in its own syntax; None where it does something else."""
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return GPT2_WORDS if last["use_regex"] else None
    if len(steps) > 2:
        return None
    (first, _) = steps
    if first["type"] == "Digits" and last["use_regex"]:
        number = r"\p{N}" if first["individual_digits"] else r"\p{N}+"
        return f"{number}|{GPT2_WORDS_BESIDE_NUMBERS}"
    if first["type"] == "Split" and not last["use_regex"] and not first["invert"] and first["behavior"] == "Isolated":
        expression: str | None = first["pattern"].get("Regex")
        return expression
    return None


def translate(expression: str) -> str | None:
    """Write an expression of Oniguruma for Python: its classes of characters (`\\p{L}`) as the members in `STABLE`.

    None where it has an escape that the two read differently.
    """
    written, place, inside = [], 0, False
    while place < len(expression):
        found = _PROPERTY.match(expression, place)
        if found:
            members = re.escape(_members(found[1]))
            written.append(members if inside else f"[{members}]" if members else "(?!)")
            place = found.end()
            continue
        size = 2 if expression[place] == "\\" else 1
        part = expression[place : place + size]
        if size == 2 and part[1:].isalnum() and part[1:] not in "rntsSd":
            return None
        inside = part == "[" or (inside and part != "]")
        written.append(part)
        place += size
    return "".join(written)


@cache
def _members(category: str) -> str:
    return "".join(char for char in STABLE if unicodedata.category(char).startswith(category))


@cache
def probes() -> tuple[str, ...]:
    """Return texts to try an expression on: each character beside others, and chance rows of what expressions tell."""
    draw = random.Random(0)  # noqa: S311 - not for secrets
    mixed = ("".join(draw.choices(_PROBED, k=draw.randint(1, 12))) for _ in range(_PROBES))
    return (*(f"a{char}{char}1 {char}B'{char}\n{char}  " for char in STABLE), *mixed)


def agree(words: re.Pattern[str], original: Any, texts: Iterable[str]) -> bool:
    """Whether an expression finds the very words that a pre-tokenizer does."""
    return all(
        words.findall(text) == [text[start:end] for _, (start, end) in original.pre_tokenize_str(text)]
        for text in texts
    )
