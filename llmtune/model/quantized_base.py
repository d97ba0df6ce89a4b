"""Bases with already quantised files: which packages read them, their bits in memory, and what can train on them.

Some stay quantised while an adapter trains, since PEFT supports their layers. Others are dequantized on loading and
are plain models from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch

from llmtune.errors import Problem, RecipeError
from llmtune.recipe.adapter_section import MUTATING, AdapterSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


READERS: Mapping[str, tuple[str, ...]] = {
    "awq": ("gptqmodel",),
    "bitsandbytes": (),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": (),
    "gptq": ("gptqmodel", "optimum"),
    "mxfp4": (),
    "torchao": ("torchao",),
}
"""Packages needed per `quant_method` of transformers, besides llmtune's own requirements."""
UNPACKED = ("compressed-tensors", "fp8", "mxfp4")
"""Methods whose weights are dequantized on loading."""
_READING: Mapping[str, dict[str, Any]] = {
    **{method: {"dequantize": True} for method in UNPACKED},
    "gptq": {"backend": "gptq_torch"},
    "awq": {"backend": "torch_awq"},
}
"""How they are loaded. Of gptqmodel's CPU kernels only those in plain torch have the right gradient."""
_REFUSED = {"hqq": "transformers 5 does not read it yet"}
_ORIGINAL = "name the original model, and set adapter.method: qlora, which quantises it on loading."


@dataclass(frozen=True)
class BaseQuantization:
    """How a model's weights stay quantised in memory."""

    method: str
    """transformers' `quant_method`."""
    bits: int
    """Bits per weight, without its share of the scales."""
    group_size: int
    """Number of weights that share a scale; 0 for a row or more."""
    skipped: tuple[str, ...]
    """Substrings in the names of modules that are not quantised."""

    @property
    def bytes_per_weight(self) -> float:
        """Bytes per weight, with its share of a 16-bit scale and of a zero point."""
        return self.bits / 8 + ((2 + self.bits / 8) / self.group_size if self.group_size else 0)


def find_unreadable(stated: object, path: str) -> Iterator[Problem]:
    """Yield why the quantised weights declared in config.json cannot be read."""
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    other = f"N{_ORIGINAL[1:]}"
    if not isinstance(stated, dict) or not isinstance(method, str):
        yield Problem(f"quantization_config is {stated!r}, but must name a quant_method", path, other)
        return
    what = f"the weights are already quantised ({method})"
    if method not in READERS:
        reason = _REFUSED.get(method, f"llmtune supports {', '.join(READERS)}")
        yield Problem(f"{what}: {reason}", path, other)
    elif [name for name in READERS[method] if find_spec(name) is None]:
        extra = "gptq" if "gptqmodel" in READERS[method] else "quantized"
        fix = f"pip install 'llmtune-cli[{extra}]', or {_ORIGINAL}"
        yield Problem(f"{what}, but reading them needs {' and '.join(READERS[method])}", path, fix)
    elif method not in UNPACKED and _bits(stated) not in (2, 3, 4, 8):
        yield Problem(f"{what}, but quantization_config does not state the bits", path, other)
    elif method == "torchao" and _bits(stated) != 8:
        yield Problem(f"{what} in less than 8 bits, on which PEFT cannot train an adapter", path, other)


def _bits(stated: Mapping[str, Any]) -> int:
    if stated.get("quant_method") == "bitsandbytes":
        return 4 if stated.get("load_in_4bit") else 8 if stated.get("load_in_8bit") else 0
    if stated.get("quant_method") == "torchao":  # as transformers decides what can be trained: by the scheme's name
        kind = stated.get("quant_type")
        scheme = kind.get("default") if isinstance(kind, dict) else None
        return 8 if isinstance(scheme, dict) and "8" in str(scheme.get("_type")) else 4
    bits = stated.get("bits")
    return bits if type(bits) is int else 0


def prepare_reading(config: Any) -> None:
    """Set how the quantised weights are loaded in a model's configuration, in place."""
    stated = getattr(config, "quantization_config", None)
    if isinstance(stated, dict):
        stated |= _READING.get(str(stated.get("quant_method")), {})


def kept_quantization(config: Any) -> BaseQuantization | None:
    """Return how a model's weights stay quantised, from its configuration; None if they are plain in memory."""
    stated: Any = getattr(config, "quantization_config", None)
    stated = stated.to_dict() if hasattr(stated, "to_dict") else stated
    if not isinstance(stated, dict) or stated.get("quant_method") in UNPACKED:
        return None
    group = 64 if stated.get("load_in_4bit") else stated.get("group_size")
    skipped = stated.get("modules_to_not_convert") or stated.get("llm_int8_skip_modules") or ()
    method = str(getattr(stated["quant_method"], "value", stated["quant_method"]))
    return BaseQuantization(method, _bits({**stated, "quant_method": method}), max(0, int(group or 0)), tuple(skipped))


def check_training(config: Any, adapter: AdapterSection, trains_head: bool, name: str) -> None:
    """Raise RecipeError if a recipe needs something that quantised weights cannot do, before they are loaded."""
    if getattr(config, "quantization_config", None) is None:
        return
    kept = kept_quantization(config)
    original, problems = f"N{_ORIGINAL[1:]}", []
    if adapter.method == "qlora":
        what = f"the weights of {name} are already quantised, but qlora needs a plain model"
        problems.append(Problem(what, "adapter.method", f"Set it to lora, or {_ORIGINAL}"))
    elif kept and adapter.method == "full":
        what = f"the weights of {name} are {kept.bits}-bit integers ({kept.method}), which have no gradient"
        problems.append(Problem(what, "adapter.method", "Use lora, or name the original model."))
    if kept and str(adapter.init_lora_weights).startswith(MUTATING):
        what = f"{adapter.init_lora_weights} moves some base weight into the adapter, but the base is quantised"
        problems.append(Problem(what, "adapter.init_lora_weights", "Omit it."))
    if kept and trains_head:
        what = f"{name} is fully quantised ({kept.method}), but this task adds a new head"
        problems.append(Problem(what, "model.name", original))
    RecipeError.collect(problems)


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a linear module stores its weights in fewer bits than it computes with."""
    if "qweight" in module._buffers:  # GPTQ and AWQ
        return True
    weight = getattr(module, "weight", None) if isinstance(module, torch.nn.Linear) else None
    return isinstance(weight, torch.nn.Parameter) and type(weight) is not torch.nn.Parameter


def keep_quantized_format(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking weights for inference at the first forward pass in eval mode on AVX512-BF16.

    The repacking cannot be undone and its kernel has no gradient: training after a validation would silently fail. It
    also rounds differently from the kernel used in training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def unpack(model: PreTrainedModel) -> None:
    """Replace quantised linear modules by plain ones with the weights that they compute with; in place."""
    dtype = model.get_input_embeddings().weight.dtype
    for name, module in [(name, module) for name, module in model.named_modules() if is_quantized(module)]:
        quantized = cast(torch.nn.Linear, module)
        plain = torch.nn.Linear(
            quantized.in_features, quantized.out_features, quantized.bias is not None, model.device, dtype
        )
        given = quantized(torch.eye(quantized.in_features, device=model.device, dtype=dtype))
        if quantized.bias is not None:
            plain.bias.copy_(quantized.bias)
            given = given - plain.bias
        plain.weight.copy_(given.T)
        model.set_submodule(name, plain.requires_grad_(False))
    model.hf_quantizer.remove_quantization_config(model)
    vars(model).pop("hf_device_map", None)  # gptqmodel sets it, and saving mistakes a CPU in it for offloading
