"""Position encodings: a sinusoidal table, a learned table, rotations, or a bias by distance.

Shapes: L positions, D dimensions, F frequencies, H heads, N distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.config import layer_configs
from llmtune.model.towers import find_towers

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.models.t5.modeling_t5 import T5Attention

Array = npt.NDArray[np.float64]
SchemeKind = Literal["sinusoidal", "learned", "rotary", "bias", "slopes"]
SCHEME_TITLES: dict[SchemeKind, str] = {
    "sinusoidal": "Sinusoidal encoding",
    "learned": "Learned position table",
    "rotary": "Rotary frequencies (RoPE)",
    "bias": "Relative position bias",
    "slopes": "Linear biases (ALiBi)",
}
TABLES = ("position_embeddings", "position_embedding", "wpe", "embed_positions", "pos_emb", "rel_embeddings")
"""Last parts of the names of modules with a position table."""
REACH = 128
"""Distances to each side for which a bias is shown."""
SLOPED = ("bloom", "mpt")
"""Model types with linear biases; Falcon has them only if configured."""


@dataclass(frozen=True)
class Scheme:
    """One position encoding of a model, or of one of its halves."""

    kind: SchemeKind
    name: str
    """The module with the encoding."""
    values: Array
    """[L, D] a table; [F] angles that a position adds, in radians; [H, N] biases; [H] slopes."""
    distances: tuple[int, ...] = ()
    """For biases: distances of the key, negative if it is earlier."""
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The heading: kind of encoding, and half of the model."""
        half = next((half for half in ("encoder", "decoder") if f".{half}." in f".{self.name}."), "")
        return f"{SCHEME_TITLES[self.kind]}{f' of the {half}' if half else ''}"

    def equals(self, other: Scheme) -> bool:
        """Whether two models have the same encoding."""
        return self.name == other.name and np.array_equal(self.values, other.values)

    def table(self, length: int) -> Array:
        """Return the table to draw for `length` positions [L, D]; for rotations, the cosines of the angles."""
        if self.kind == "rotary":
            return np.cos(np.arange(length)[:, None] * self.values)
        return self.values[:length]

    def added(self, length: int) -> tuple[list[int], Array]:
        """Return distances, and what biases or slopes add to each head's scores there, [H, N]."""
        if self.kind == "bias":
            return list(self.distances), self.values
        distances = list(range(-min(length, REACH), 1))
        return distances, self.values[:, None] * np.array(distances)


def sinusoidal_scheme(length: int, dimension: int, base: float) -> Scheme:
    """Return the encoding of Vaswani et al. 2017, section 3.5, [length, dimension]; `base` is its 10000.

    PE(k, 2i) = sin(k / base ^ (2i / dimension)), PE(k, 2i + 1) = cos of the same.
    """
    angles_F = float(base) ** (-np.arange(0, dimension, 2) / dimension)
    table = np.empty((length, dimension))
    angles_LF = np.arange(length)[:, None] * angles_F
    table[:, 0::2], table[:, 1::2] = np.sin(angles_LF), np.cos(angles_LF)
    facts = {"positions": f"{length:,}", "dimensions": f"{dimension:,}", "base n": f"{base:,g}"}
    facts["waves"] = f"{2 * np.pi / angles_F[0]:.2f} to {2 * np.pi / angles_F[-1]:,.2f} positions"
    return Scheme("sinusoidal", "", table, facts=facts)


def similarity_by_distance(scheme: Scheme, length: int) -> Array:
    """Return the similarity of positions by distance, from 0 on, [L].

    For a table it is the mean cosine over all pairs at that distance. For rotations it is the mean cosine of the angles
    between them: the score of a query with an equal key.
    """
    if scheme.kind == "rotary":
        return np.asarray(scheme.table(length).mean(axis=1))
    table = scheme.table(length)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    unit_LD = np.divide(table, norms, out=np.zeros_like(table), where=norms > 0)  # zero rows have similarity 0
    alike_LL = unit_LD @ unit_LD.T
    return np.array([np.diagonal(alike_LL, offset).mean() for offset in range(len(alike_LL))])


def find_schemes(model: nn.Module) -> list[Scheme]:
    """Return every position encoding of the words of `model`; one shared by several layers appears once."""
    inner = unwrap(model)
    schemes: list[Scheme] = []
    towers = tuple(f"{name}." for name in find_towers(inner))
    for name, module in inner.named_modules():
        if f"{name}.".startswith(towers):
            continue
        for scheme in (*_tables(name, module), *_rotations(name, module, inner.config), *_biases(name, module)):
            if not any(old.kind == scheme.kind and np.array_equal(old.values, scheme.values) for old in schemes):
                schemes.append(scheme)
    return [*schemes, *_slopes(inner.config)]


def _tables(name: str, module: nn.Module) -> Iterator[Scheme]:
    """Find a position table: an embedding, or sines in a buffer."""
    last = name.rsplit(".", 1)[-1]
    if "Positional" not in type(module).__name__ and last not in TABLES:
        return
    weight = effective_weight(module)
    if weight is None or weight.ndim != 2:
        return
    first = first_position_row(module)
    table = weight.detach()[first:].float().cpu().numpy().astype(np.float64)
    facts = {"positions": f"{len(table):,}", "dimensions": f"{table.shape[1]:,}"}
    if first:
        facts["first row"] = f"{first} (the rows before it are for padding or unused)"
    if last == "rel_embeddings":
        facts["rows"] = "buckets of distances, not positions"
    norms = (table**2).sum(axis=1) / (table.shape[1] / 2)
    sines = bool(np.all(np.abs(norms - 1) < 1e-3))  # sin² + cos² of each pair of dimensions is 1
    yield Scheme("sinusoidal" if sines else "learned", name, table, facts=facts)


def effective_weight(module: nn.Module) -> torch.Tensor | None:
    """Return an embedding's table including its adapter; None if it has no table."""
    weight = getattr(module, "weight", getattr(module, "weights", None))  # M2M100 keeps its sines in a buffer
    if isinstance(module, LoraLayer) and isinstance(weight, torch.Tensor):
        weight = weight + sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
    return weight if isinstance(weight, torch.Tensor) else None


def first_position_row(module: nn.Module) -> int:
    """Return the row of the first position: 2 in BART, the one after the padding id in RoBERTa."""
    offset = getattr(module, "offset", None)
    if isinstance(offset, int):
        return offset
    padding = getattr(module, "padding_idx", None)
    sines = "Sinusoidal" in type(module).__name__
    return padding + 1 if padding is not None and not sines else 0


def _rotations(name: str, module: nn.Module, config: PretrainedConfig) -> Iterator[Scheme]:
    """Find rotation angles in the modules that compute them, per kind of layer if they differ."""
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    for key, buffer in module.named_buffers(recurse=False):
        if not key.endswith("inv_freq") or key.endswith("original_inv_freq"):
            continue
        layers = key.removesuffix("inv_freq").strip("_")
        kind = getattr(module, "rope_type", "default")
        kind = kind.get(layers, "default") if isinstance(kind, dict) else kind
        scaling = getattr(module, f"{layers}_attention_scaling" if layers else "attention_scaling", 1.0)
        angles = buffer.detach().float().cpu().numpy().astype(np.float64)
        configs = layer_configs(text)
        one = configs[kinds.index(layers) if layers in kinds and len(configs) > 1 else 0]
        head = getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads
        facts = {"type": str(kind), "rotated": f"{2 * len(angles)} of {head} dimensions a head"}
        stated = getattr(text, "rope_parameters", None) or {}
        stated = stated.get(layers, stated) if isinstance(stated, dict) else {}
        if stated.get("rope_theta"):
            facts["base"] = f"{stated['rope_theta']:,g}"
        if isinstance(stated.get("factor"), int | float):
            facts["stretched by"] = f"{stated['factor']:g}"
        if sections := getattr(module, "mrope_section", None):
            sizes = f" ({', '.join(map(str, sections))} pairs)" if sum(sections) == len(angles) else ""
            facts["token of a picture"] = f"rotated by time, row and column{sizes}; a word has one number for all three"
        if scaling not in (None, 1.0):
            facts["attention scaled by"] = f"{float(scaling):.4g}"
        facts["longest wave"] = f"{2 * np.pi / angles.min():,.0f} tokens" if angles.min() > 0 else "unlimited"
        yield Scheme("rotary", f"{name} ({layers})" if layers else name, angles, facts=facts)


def _biases(name: str, module: nn.Module) -> Iterator[Scheme]:
    """Find relative biases as in T5, computed by the module itself."""
    if not hasattr(module, "compute_bias") or getattr(module, "relative_attention_bias", None) is None:
        return
    attention = cast("T5Attention", module)
    ahead = 0 if attention.is_decoder else REACH
    with torch.inference_mode():
        bias_HQT = attention.compute_bias(REACH + ahead + 1, REACH + ahead + 1)[0]
    values = bias_HQT[:, REACH].float().cpu().numpy().astype(np.float64)[:, : REACH + ahead + 1]
    facts = {"heads": f"{len(values)}", "buckets": f"{attention.relative_attention_num_buckets}"}
    facts["one bucket from"] = f"{attention.relative_attention_max_distance} tokens on"
    yield Scheme("bias", name, values, tuple(range(-REACH, ahead + 1)), facts)


def _slopes(config: PretrainedConfig) -> Iterator[Scheme]:
    """Return the slopes of linear biases (Press et al. 2022), as in Bloom."""
    if config.model_type not in SLOPED and not getattr(config, "alibi", False):
        return
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    heads = int(getattr(config, "num_attention_heads", None) or config.n_heads)
    added = build_alibi_tensor(torch.ones((1, 2), dtype=torch.int64), heads, torch.float32)
    slopes = added[:, 0, 1].numpy().astype(np.float64)
    yield Scheme("slopes", "attention", slopes, facts={"heads": f"{heads}"})
