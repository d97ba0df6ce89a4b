"""Text that a tokenizer does not know, in what a model is to write: a model that learns `<unk>` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from llmtune.recipe.schema import Recipe
from llmtune.records import Example

UNKNOWN = "text that the tokenizer does not know (<unk>) in what is learned"
"""How the reason begins for a row with such a target."""
SHOWN, LONGEST_SHOWN = 5, 24


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


def _holds(example: Example, token: int) -> bool:
    for ids, spans in ((example.input_ids, example.spans), (example.target_ids, example.target_spans)):
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
