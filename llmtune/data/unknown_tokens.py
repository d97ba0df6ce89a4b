"""Text that a tokenizer does not know: a model that learns `<unk>` writes it, and without `<unk>` characters vanish."""

from __future__ import annotations

import json
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from llmtune.data.example import Example
from llmtune.recipe.schema import Recipe

UNKNOWN = "text that the tokenizer does not know (<unk>) in what is learned"
"""How the reason begins for a row with such a target."""
SHOWN, LONGEST_SHOWN = 5, 24
PRINTABLE = frozenset(string.ascii_letters + string.digits + string.punctuation + " ")


def refused_token(processor: PreTrainedTokenizerBase, recipe: Recipe) -> int | None:
    """Return the id that no target may hold; None where the recipe allows it, or the tokenizer knows every character.

    Some tokenizers that know every byte name their end token as the unknown one.
    """
    if recipe.data.unknown_tokens == "allow" or not recipe.variant.generates or recipe.variant.facts.takes_audio:
        return None
    unknown = getattr(processor, "unk_token_id", None)
    return None if unknown in (processor.eos_token_id, processor.bos_token_id) else unknown


def find_unknown(examples: Sequence[Example], token: int, row: str, processor: PreTrainedTokenizerBase) -> str | None:
    """Return why the examples of a row (given as JSON) cannot be learned; None where their targets are all known."""
    if not any(_holds(example, token) for example in examples):
        return None
    words = dict.fromkeys(word for text in _texts(json.loads(row)) for word in text.split())
    unknown = [word for word in words if token in processor(word, add_special_tokens=False)["input_ids"]]
    listed = ", ".join(repr(word[:LONGEST_SHOWN]) for word in unknown[:SHOWN]) or processor.unk_token
    return f"{UNKNOWN}: {listed}" + (" and others" if len(unknown) > SHOWN else "")


def find_vanishing(texts: Iterable[str], processor: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the characters that make no token, each with the number of rows (given as JSON) that hold it.

    Tokenizers without `<unk>` drop what they do not know, and some drop control characters whatever they know.
    """
    vanishes: dict[str, bool] = {}
    counts: Counter[str] = Counter()
    for text in texts:
        spelled = "".join(_texts(json.loads(text))) if "\\" in text else text
        letters = {*spelled} - PRINTABLE
        for letter in letters - vanishes.keys():
            with_it, without = processor([f"a{letter}b", "ab"], add_special_tokens=False)["input_ids"]
            vanishes[letter] = list(with_it) == list(without) and unicodedata.category(letter) != "Mn"
        counts.update(letter for letter in letters if vanishes[letter])
    return dict(sorted(counts.items()))


def _holds(example: Example, token: int) -> bool:
    written = (example.target_ids, example.target_spans), (example.other_ids, example.other_spans)
    for ids, spans in ((example.input_ids, example.spans), *written):
        if token in ids and any(token in ids[a:b] for a, b in zip(spans[::2], spans[1::2], strict=True)):
            return True
    return False


def _texts(value: object) -> Iterator[str]:
    """Yield all texts of a row."""
    if isinstance(value, str):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _texts(part)
