"""Tensors and shape of a model as llama.cpp names them; the names are those of `gguf.get_tensor_name_map`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmtune.errors import EnvironmentProblem, Problem, nearest

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that are written; others would be read without their scaling."""
LARGEST_GEMMA = (46, 62)
"""Layers of the 27B models of Gemma 2 and 3, where llama.cpp scales queries by another size than that of a head."""
MERGE_INSTEAD = "Use: llmtune deploy merge RUN."


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` of transformers is written for llama.cpp."""

    arch: MODEL_ARCH
    permuted: bool = False
    """Whether rows of q and k stand in pairs: llama.cpp turns neighbours where transformers turns halves."""
    norm_offset: float = 0.0
    """What a norm adds to its weight when it computes; llama.cpp expects the sum."""
    full_attention_period: int | None = None
    """Every n-th layer sees everything; llama.cpp gives the others a sliding window."""

    @property
    def name(self) -> str:
        """The architecture's name in files."""
        return MODEL_ARCH_NAMES[self.arch]


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, permuted=True),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, permuted=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, norm_offset=1.0, full_attention_period=2),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, norm_offset=1.0, full_attention_period=6),
}
"""By `model_type`."""


def find_architecture(config: PretrainedConfig) -> Architecture:
    """Return how a model of this configuration is written.

    Raises:
        EnvironmentProblem: its type is not known, or it has something that llama.cpp does not read from the file.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        meant = nearest(config.model_type, list(ARCHITECTURES))
        what = f"a model of type {config.model_type!r} cannot be written as GGUF.{meant}"
        fix = f"Types that can: {', '.join(ARCHITECTURES)}. Any type: llmtune deploy merge RUN."
        raise EnvironmentProblem.of(what, "model.name", fix)
    problems = [Problem(what, "model.name", MERGE_INSTEAD) for what in _find_unreadable(config, architecture)]
    EnvironmentProblem.collect(problems)
    return architecture


def _find_unreadable(config: PretrainedConfig, architecture: Architecture) -> Iterator[str]:
    """Yield what this configuration has and a reader would take for something else."""
    kind = _rope(config).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        yield f"GGUF files of this model type cannot hold rotary embeddings of type {kind!r}"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        largest = config.num_hidden_layers in LARGEST_GEMMA
        read = config.hidden_size // config.num_attention_heads if largest else head_size(config)
        if scalar != read:
            yield f"query_pre_attn_scalar is {scalar}, and llama.cpp computes with {read}"
    no_rope = getattr(config, "no_rope_layers", None)
    if no_rope and list(no_rope) != [int((i + 1) % 4 != 0) for i in range(len(no_rope))]:
        yield "layers without positions are others than each fourth, which is what llama.cpp computes with"
    layers, period = getattr(config, "layer_types", None) or [], architecture.full_attention_period
    sliding = [layer == "sliding_attention" for layer in layers]
    if sliding != [bool(period and (i + 1) % period) for i in range(len(layers))]:
        yield "layers with a sliding window are others than those that llama.cpp takes for them"


def _rope(config: PretrainedConfig) -> dict[str, float | str]:
    """Return the rotary parameters of layers that see everything."""
    parameters = dict(config.rope_parameters or {})
    return dict(parameters.get("full_attention", parameters))


def head_size(config: PretrainedConfig) -> int:
    """Return the width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


class GgufLayout:
    """How the weights of a model are called and laid out for llama.cpp.

    Raises EnvironmentProblem where a file could not hold the model; see `find_architecture`.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config, self.architecture = config, find_architecture(config)
        self.names = get_tensor_name_map(self.architecture.arch, config.num_hidden_layers)

    def name(self, weight: str) -> str:
        """Return llama.cpp's name of a weight or a bias; raises EnvironmentProblem where it has none."""
        module, _, suffix = weight.rpartition(".")
        mapped = self.names.get_name(module)
        if mapped is None:
            what = f"GGUF files of this model type cannot hold the weight {weight}"
            raise EnvironmentProblem.of(what, None, MERGE_INSTEAD)
        return f"{mapped}.{suffix}"

    def convert(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """Return a weight as llama.cpp expects it, in float32 on the CPU."""
        weight, architecture = weight.detach().float().cpu(), self.architecture
        module = name.rpartition(".")[0].rpartition(".")[2]
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}.get(module)
        if architecture.permuted and heads:
            return pair_rows(weight, heads)
        if architecture.norm_offset and name.endswith("norm.weight"):
            return weight + architecture.norm_offset
        return weight


def write_shape(writer: GGUFWriter, layout: GgufLayout, vocabulary_size: int) -> None:
    """Write the numbers that a reader builds the model from."""
    config = layout.config
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
    if layout.architecture.permuted:
        writer.add_rope_dimension_count(head_size(config))
    _write_rope(writer, config)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(config, name, None)) is not None:
            getattr(writer, f"add_{name}")(cap)
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        writer.add_sliding_window(config.sliding_window)


def _write_rope(writer: GGUFWriter, config: PretrainedConfig) -> None:
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    local = dict(config.rope_parameters or {}).get("sliding_attention")
    if local is not None:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))


def list_tensors(model: PreTrainedModel, layout: GgufLayout) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight by llama.cpp's name, in its layout; one at a time.

    Raises:
        EnvironmentProblem: a weight has no name there.
    """
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight" or not _is_tied(model):
            yield layout.name(name), layout.convert(weight, name)
    if _rope(model.config).get("rope_type") == "llama3":
        yield f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight", _rope_factors(model.config)


def pair_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of each head so that those which positions turn together stand next to each other."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _is_tied(model: PreTrainedModel) -> bool:
    out, into = model.get_output_embeddings(), model.get_input_embeddings()
    return out is not None and bool(out.weight is into.weight)


def _rope_factors(config: PretrainedConfig) -> torch.Tensor:
    """Return by how much each frequency is slowed down; llama.cpp reads Llama 3's scaling from a tensor."""
    scaled: torch.Tensor
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    exponents = torch.arange(0, head_size(config), 2).float() / head_size(config)
    plain = torch.pow(float(_rope(config)["rope_theta"]), -exponents)
    return plain / scaled
