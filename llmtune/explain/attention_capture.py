"""A model's attention weights, a layer at a time while it runs: its own eager computation, nothing recomputed.

Shapes: H heads, Q queries (rows), T keys (columns).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmtune.errors import EnvironmentProblem
from llmtune.explain.target import Family
from llmtune.model.causal_lm_loss import accepted_arguments, unwrap

Kind = Literal["self", "masked-self", "cross"]
SELF: Kind = "self"
MASKED: Kind = "masked-self"
CROSS: Kind = "cross"
EAGER = "eager"


@dataclass(frozen=True)
class Attended:
    """One attention of one layer, as the model has just computed it; copy what you keep."""

    kind: Kind
    layer: int
    """Counted from 0 within its half of the model, as in the names of its modules."""
    weights: torch.Tensor
    """[H, Q, T] float32; each row sums to 1, but for models with a sink (gpt-oss), where the rest goes there."""


Look = Callable[[Attended], None]


def attend(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], family: Family, look: Look) -> None:
    """Run `model` (PEFT may have wrapped it) once on one text, and give each layer's attention to `look`, in order.

    A layer's weights are freed before the next one's are made, unless `look` keeps them. Models that do not compute
    their attention through transformers' interface (DeBERTa) give all layers at once, after the pass.

    Raises:
        EnvironmentProblem: the model does not show its attention.
    """
    inner = unwrap(model)
    body = inner.base_model
    accepted = accepted_arguments(body.__class__)
    options: dict[str, object] = {key: part.to(inner.device) for key, part in inputs.items() if key in accepted}
    if "use_cache" in accepted:
        options["use_cache"] = False
    half = inner.get_encoder() if family == "encoder-decoder" else inner
    encoder = set() if half is inner else set(half.modules())
    layers: dict[Kind, list[int]] = {}

    def attention(module: torch.nn.Module, *args: object, **given: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
        output, weights = eager(module, *args, **given)
        if weights is not None:
            kind = SELF if module in encoder else MASKED if is_causal(module, weights) else CROSS if encoder else SELF
            before = layers.setdefault(kind, [])
            own = getattr(module, "layer_idx", None)
            before.append(own if isinstance(own, int) and own not in before else len(before))  # ALBERT's are all one
            look(Attended(kind, before[-1], weights[0].float()))
        return output, weights

    with torch.inference_mode(), _as_eager(attention):
        body(**options)
        if not layers:
            _read_outputs(body, options, family, look)


def is_causal(module: torch.nn.Module, weights_1HQT: torch.Tensor) -> bool:
    """Whether no query sees a later key."""
    queries, keys = weights_1HQT.shape[2:]
    if queries == keys > 1:
        return not bool(weights_1HQT[0].triu(1).any())
    return bool(getattr(module, "is_causal", False))


@contextmanager
def _as_eager(attention: Callable[..., object]) -> Iterator[None]:
    """Stand between models and their own eager attention.

    transformers looks up the name of the attention in its interface before it falls back on the model's own function,
    which `eager` has no entry for: with one, the model still believes that it is eager, as it is.
    """
    assert EAGER not in ALL_ATTENTION_FUNCTIONS, "attention is captured already"
    ALL_ATTENTION_FUNCTIONS[EAGER] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[EAGER]


def _read_outputs(body: PreTrainedModel, options: Mapping[str, object], family: Family, look: Look) -> None:
    """Let the model return all of its attention at once."""
    returns = "output_attentions" in accepted_arguments(body.__class__)
    outputs = body(**options, output_attentions=True) if returns else None
    own: Kind = MASKED if family == "decoder" else SELF
    names: dict[str, Kind] = {"attentions": own, "encoder_attentions": SELF, "decoder_attentions": MASKED}
    seen = [
        Attended(kind, layer, weights[0].float())
        for name, kind in {**names, "cross_attentions": CROSS}.items()
        for layer, weights in enumerate(getattr(outputs, name, None) or ())
        if weights is not None and weights.dim() == 4
    ]
    if not seen:
        what = f"{type(body).__name__} does not show its attention weights"
        fix = "It computes its attention in a way of its own; models of the usual kinds do show theirs."
        raise EnvironmentProblem.of(what, getattr(body, "name_or_path", None) or None, fix)
    for attended in seen:
        look(attended)


def shape_of(config: PretrainedConfig, family: Family) -> dict[Kind, tuple[int, int]]:
    """Return how many layers and heads each kind of attention has, as the configuration says."""
    if family != "encoder-decoder":
        text = config.get_text_config()
        kind = MASKED if family == "decoder" else SELF
        return {kind: (int(text.num_hidden_layers), int(text.num_attention_heads))}

    def first(half: PretrainedConfig, *names: str) -> int:
        return next(int(value) for name in names if (value := getattr(half, name, None)) is not None)

    encoder, decoder = (
        (
            first(half, f"{name}_layers", layers, "num_hidden_layers"),
            first(half, f"{name}_attention_heads", "num_heads", "num_attention_heads"),
        )
        for name, half, layers in (
            ("encoder", getattr(config, "encoder", config), "num_layers"),
            ("decoder", getattr(config, "decoder", config), "num_decoder_layers"),
        )
    )
    return {SELF: encoder, MASKED: decoder, CROSS: decoder}
