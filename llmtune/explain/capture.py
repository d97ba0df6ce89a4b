"""A model's attention weights, seen a layer at a time while it runs: its own eager computation, nothing done again.

Shapes: H heads, K key/value heads, Q queries, T keys, D width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
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
    """One attention of one layer, as the model has just computed it; who wants to keep it, copies it."""

    kind: Kind
    layer: int
    """Counted from 0 within its half of the model, as in the names of its modules."""
    weights: torch.Tensor
    """[H, Q, T] float32; each row sums to 1, but for models with a sink (gpt-oss), where the rest goes there."""
    query: torch.Tensor | None = None
    """[H, Q, D] as it is multiplied: rotated, where the model does that. None where it does not tell."""
    key: torch.Tensor | None = None
    """[K, T, D]"""
    scaling: float | None = None
    """What products of queries and keys are multiplied with; 1 where the queries are scaled already (Whisper)."""
    mask: torch.Tensor | None = None
    """[Q, T] added to the scores: 0, or so low that nothing is left."""
    bias: torch.Tensor | None = None
    """[H, Q, T] added to the scores: T5's relative positions."""


Look = Callable[[Attended], None]


def attend(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], family: Family, look: Look) -> None:
    """Run `model` (PEFT may have wrapped it) once on one text, and hand each layer's attention to `look`, in order.

    A layer's weights are let go of before the next one's are made, unless `look` keeps them. Models that do not compute
    their attention through transformers' interface (DeBERTa) give all layers at once, after the pass.

    Raises:
        EnvironmentProblem: the model does not show its attention.
    """
    inner = unwrap(model)
    body = inner.base_model
    accepted = accepted_arguments(type(body))  # type: ignore[arg-type]
    given: dict[str, Any] = {key: part.to(inner.device) for key, part in inputs.items() if key in accepted}
    if "use_cache" in accepted:
        given["use_cache"] = False
    seen = _Watch(inner, family, look)
    with torch.inference_mode(), _watching(seen):
        body(**given)
        if not seen.any:
            _look_afterwards(body, given, family, look)


@dataclass
class _Watch:
    """Which modules are looked at, and what was seen so far."""

    model: Any
    family: Family
    look: Look
    layers: dict[Kind, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ours = {id(module) for module in self.model.modules()}
        encoder = self.model.get_encoder() if self.family == "encoder-decoder" else None
        self.encoder = set() if encoder in (None, self.model) else {id(module) for module in encoder.modules()}

    @property
    def any(self) -> bool:
        return bool(self.layers)

    def see(self, module: Any, weights_HQT: torch.Tensor, **how: Any) -> None:
        kind = self.kind_of(module, weights_HQT)
        before = self.layers.setdefault(kind, [])
        own = getattr(module, "layer_idx", None)
        layer = own if isinstance(own, int) and own not in before else len(before)  # ALBERT's layers are all the same
        before.append(layer)
        self.look(Attended(kind, layer, weights_HQT, **how))

    def kind_of(self, module: Any, weights_HQT: torch.Tensor) -> Kind:
        """Tell the three apart: by the half of the model, and by whether any query sees a later key."""
        queries, keys = weights_HQT.shape[1:]
        if id(module) in self.encoder:
            return SELF
        causal = bool(getattr(module, "is_causal", False))
        if queries == keys > 1:
            causal = not bool(weights_HQT.triu(1).any())
        return MASKED if causal else CROSS if self.encoder else SELF


@contextmanager
def _watching(watch: _Watch) -> Iterator[None]:
    """Stand between the model and its own eager attention.

    transformers asks its interface for the name of the attention before it falls back on the model's own function,
    which `eager` has no entry for: with one, the model goes on to believe that it is eager, as it is.
    """

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **rest: Any
    ) -> Any:
        own = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
        output, weights = own(module, query, key, value, mask, **rest)
        if id(module) in watch.ours and weights is not None:
            watch.see(
                module,
                weights[0].float(),
                query=query[0],
                key=key[0],
                scaling=rest.get("scaling"),
                mask=None if mask is None else mask[0, 0],
                bias=None if rest.get("position_bias") is None else rest["position_bias"][0],
            )
        return output, weights

    assert EAGER not in ALL_ATTENTION_FUNCTIONS, "somebody is watching already"
    ALL_ATTENTION_FUNCTIONS[EAGER] = attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[EAGER]


def _look_afterwards(body: Any, given: Mapping[str, Any], family: Family, look: Look) -> None:
    """Ask the model for all of its attention at once."""
    if "output_attentions" not in accepted_arguments(type(body)):  # type: ignore[arg-type]
        raise _unseen(body)
    output = body(**given, output_attentions=True)
    own: Kind = MASKED if family == "decoder" else SELF
    names: dict[str, Kind] = {"attentions": own, "encoder_attentions": SELF, "decoder_attentions": MASKED}
    found = False
    for name, kind in {**names, "cross_attentions": CROSS}.items():
        for layer, weights in enumerate(getattr(output, name, None) or ()):
            if weights is None or weights.dim() != 4:
                raise _unseen(body)
            found = True
            look(Attended(kind, layer, weights[0].float()))
    if not found:
        raise _unseen(body)


def _unseen(body: Any) -> Exception:
    what = f"{type(body).__name__} does not show its attention weights"
    fix = "It computes its attention in a way of its own; models of the usual kinds do show theirs."
    return EnvironmentProblem.of(what, getattr(body, "name_or_path", None) or None, fix)


def shape_of(config: Any, family: Family) -> dict[Kind, tuple[int, int]]:
    """Return how many layers and heads each kind of attention has, as the configuration says."""
    if family != "encoder-decoder":
        text = config.get_text_config()
        kind = MASKED if family == "decoder" else SELF
        return {kind: (int(text.num_hidden_layers), int(text.num_attention_heads))}
    reads, writes = (getattr(config, name, config) for name in ("encoder", "decoder"))
    encoder = _first(reads, "encoder_layers", "num_layers", "num_hidden_layers"), _heads(reads, "encoder")
    decoder = (
        _first(writes, "decoder_layers", "num_decoder_layers", "num_hidden_layers"),
        _heads(writes, "decoder"),
    )
    return {SELF: encoder, MASKED: decoder, CROSS: decoder}


def _heads(config: Any, half: str) -> int:
    return _first(config, f"{half}_attention_heads", "num_heads", "num_attention_heads")


def _first(config: Any, *names: str) -> int:
    return next(int(value) for name in names if (value := getattr(config, name, None)) is not None)
