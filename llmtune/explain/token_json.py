"""Tokens, and the steps of an answer, as JSON values with their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from llmtune.explain.generation_trace import Reading, Step, Trace
from llmtune.explain.token_text import Token, label, name_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "␣"


def shown(token: Mapping[str, Any], longest: int = 14) -> str:
    """Return a token as a word by itself: on one line, with a sign for a space at its front, cut where it is long."""
    text = str(token["text"])
    if text.startswith(" ") and text.strip():
        text = SPACE + text[1:]
    return label(Token(int(token["id"]), text, bool(token["special"]), False), longest) or "∅"


class Words:
    """Tokens with their text, as JSON values."""

    def __init__(self, processor: PreTrainedTokenizerBase) -> None:
        self.processor = processor
        self.one = cache(lambda token: self.several([token])[0])

    def several(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the tokens of a text."""
        named = name_tokens(self.processor, ids)
        return [{"id": token.id, "text": token.text, "special": token.special} for token in named]

    def trace(self, trace: Trace) -> dict[str, Any]:
        """Return an answer, step by step."""
        tokens = self.several(trace.ids)
        return {
            "text": trace.text,
            "ended": trace.ended,
            "lens": all(step.layers is not None for step in trace.steps),
            "steps": [self.step(step, token) for step, token in zip(trace.steps, tokens, strict=True)],
        }

    def step(self, step: Step, token: dict[str, Any]) -> dict[str, Any]:
        """Return one step; `token` is its token as a part of the whole answer."""
        could = step.could
        columns = zip(could.ids, could.probabilities, could.kept, strict=True)
        return {
            "token": token,
            "probability": step.probability,
            "entropy_bits": could.entropy_bits,
            "kept_tokens": could.kept_tokens,
            "candidates": [{**self.one(one), "probability": share, "kept": kept} for one, share, kept in columns],
            "partitions": could.partitions,
            "layers": step.layers
            and [
                {
                    "says": [
                        {**self.one(one), "probability": share}
                        for one, share in zip(layer.ids, layer.probabilities, strict=True)
                    ],
                    "chosen": layer.chosen,
                }
                for layer in step.layers
            ],
        }

    def compared(self, token: int, base: Reading, tuned: Reading) -> dict[str, Any]:
        """Return how likely a token of the tuned model's answer is to both, and what the base would have said."""
        return {
            **self.one(token),
            "base": base.probability,
            "tuned": tuned.probability,
            "base_rank": base.rank,
            "base_says": {**self.one(base.likeliest), "probability": base.likeliest_probability},
        }
