"""What llama.cpp calls the parts of a model: its architecture, the numbers of its shape, the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGUFWriter,
    RopeScalingType,
    get_tensor_name_map,
)
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmtune.errors import EnvironmentProblem, Problem, nearest

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that are written; others would be read without their scaling."""
LARGEST_GEMMA = (46, 62)
"""Layers of the 27B models of Gemma 2 and 3, where llama.cpp scales queries by another size than that of a head."""


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers is written for llama.cpp."""

    arch: MODEL_ARCH
    permuted: bool = False
    """Whether rows of q and k stand in pairs: llama.cpp turns neighbours where transformers turns halves."""
    norm_offset: float = 0.0
    """What a norm adds to its weight when it computes; llama.cpp wants the sum."""

    @property
    def name(self) -> str:
        """The architecture as it is named in files."""
        return MODEL_ARCH_NAMES[self.arch]


FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, permuted=True),
    "smollm3": Family(MODEL_ARCH.SMOLLM3, permuted=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma2": Family(MODEL_ARCH.GEMMA2, norm_offset=1.0),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, norm_offset=1.0),
}


def find_family(config: Any) -> Family:
    """Return how a model of this configuration is written.

    Raises:
        EnvironmentProblem: its kind is not known, or it has something that llama.cpp does not read from the file.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        meant = nearest(config.model_type, list(FAMILIES))
        what = f"a model of type {config.model_type!r} cannot be written as GGUF.{meant}"
        raise EnvironmentProblem.of(what, "model.name", f"Types that can: {known}. Any type: llmtune deploy merge RUN.")
    problems = [Problem(what, "model.name", "Use: llmtune deploy merge RUN.") for what in _unread(config, family)]
    EnvironmentProblem.collect(problems)
    return family


def _unread(config: Any, family: Family) -> Iterator[str]:
    """Yield what this configuration has and a reader would take for something else."""
    kind = rope_of(config).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        yield f"GGUF files of this model type have no place for rotary embeddings of type {kind!r}"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        largest = config.num_hidden_layers in LARGEST_GEMMA
        read = config.hidden_size // config.num_attention_heads if largest else head_size(config)
        if scalar != read:
            yield f"query_pre_attn_scalar is {scalar}, and llama.cpp computes with {read}"
    no_rope = getattr(config, "no_rope_layers", None)
    if no_rope and list(no_rope) != [int((i + 1) % 4 != 0) for i in range(len(no_rope))]:
        yield "layers without positions are others than each fourth, which is what llama.cpp computes with"
    layers = getattr(config, "layer_types", None) or []
    period = {MODEL_ARCH.GEMMA2: 2, MODEL_ARCH.GEMMA3: 6}.get(family.arch)
    sliding = [i for i, layer in enumerate(layers) if layer == "sliding_attention"]
    wanted = [i for i in range(len(layers)) if period and (i + 1) % period]
    if sliding != wanted:
        yield "layers with a sliding window are others than those that llama.cpp takes for them"


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary parameters of layers that see everything."""
    parameters = dict(config.rope_parameters or {})
    return cast(dict[str, Any], parameters.get("full_attention", parameters))


def head_size(config: Any) -> int:
    """Return the width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def write_shape(writer: GGUFWriter, config: Any, family: Family, vocabulary_size: int) -> None:
    """Write the numbers that a reader builds the model from."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary_size)
    if family.permuted:
        writer.add_rope_dimension_count(head_size(config))
    _write_rope(writer, config)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, name, None)) is not None:
            getattr(writer, f"add_{name}")(cap)
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        writer.add_sliding_window(config.sliding_window)


def _write_rope(writer: GGUFWriter, config: Any) -> None:
    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    local = dict(config.rope_parameters or {}).get("sliding_attention")
    if local is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


def list_tensors(model: PreTrainedModel, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight by llama.cpp's name, in its layout, in float32 on the CPU; one at a time.

    Raises:
        EnvironmentProblem: a weight has no name there.
    """
    config: Any = model.config
    names = get_tensor_name_map(family.arch, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and _is_tied(model):
            continue
        yield name_tensor(name, names), arrange(weight, name, config, family)
    if rope_of(config).get("rope_type") == "llama3":
        yield f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight", _rope_factors(config)


def name_tensor(name: str, names: Any) -> str:
    """Return llama.cpp's name of a weight or a bias."""
    module, _, suffix = name.rpartition(".")
    found = names.get_name(module)
    if found is None:
        what = f"GGUF files of this model type have no place for the weight {name}"
        raise EnvironmentProblem.of(what, None, "Use: llmtune deploy merge RUN.")
    return f"{found}.{suffix}"


def arrange(weight: torch.Tensor, name: str, config: Any, family: Family) -> torch.Tensor:
    """Return a weight as llama.cpp wants it, in float32 on the CPU."""
    weight = weight.detach().float().cpu()
    heads = _heads_of(name, config)
    if family.permuted and heads:
        return pair_rows(weight, heads)
    if family.norm_offset and name.endswith("norm.weight"):
        return weight + family.norm_offset
    return weight


def _heads_of(name: str, config: Any) -> int | None:
    """Return the number of heads in rows that positions turn, None for other weights."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module)


def pair_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of each head so that those stand side by side which positions turn together."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _is_tied(model: PreTrainedModel) -> bool:
    out, into = model.get_output_embeddings(), model.get_input_embeddings()
    return out is not None and bool(out.weight is into.weight)


def _rope_factors(config: Any) -> torch.Tensor:
    """Return by how much each frequency is slowed down; llama.cpp reads Llama 3's scaling from a tensor."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = rope_of(config)["rope_theta"] ** (-torch.arange(0, head_size(config), 2).float() / head_size(config))
    return cast(torch.Tensor, plain / scaled)
