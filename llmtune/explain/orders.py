"""How a model knows the order of words, in a few words, from its modules and its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llmtune.explain.position_encodings import SLOPED

BIASES = ("relative_attention_bias", "rel_embeddings", "relative_attention_bias_embedding")


def find_orders(model: Any, config: Any, owner: str, pieces: Sequence[str]) -> tuple[str, ...]:
    """Return what tells the stack under the module `owner` where a word stands.

    Args:
        model: without weights, or with them.
        config: that of the stack.
        owner: name of the module that holds the blocks.
        pieces: names of the parts that stand before the blocks.
    """
    return tuple(dict.fromkeys(_find(model, config, owner, pieces)))


def _find(model: Any, config: Any, owner: str, pieces: Sequence[str]) -> Iterator[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in pieces:
        last, kind = name.rpartition(".")[2].lower(), type(modules[name]).__name__
        if "pos_conv" in name:
            yield "a convolution over neighbours"
        elif "sinus" in kind.lower():
            yield "sines, fixed"
        elif isinstance(modules[name], torch.nn.Embedding) and ("pos" in last or last == "wpe"):
            learned = modules[name].weight.requires_grad
            yield "a learned table" if learned else "sines, fixed"
    inside = [name for name in modules if name.startswith(f"{owner}.")] if owner else list(modules)
    if any("rotary" in type(modules[name]).__name__.lower() for name in inside) or getattr(config, "rotary_dim", None):
        yield "rotary: queries and keys are turned by their position"
    if any(name.rpartition(".")[2] in BIASES for name in inside):
        yield "relative: a learned bias by distance"
    if config.model_type in SLOPED or getattr(config, "alibi", False):
        yield "linear biases by distance (ALiBi)"
