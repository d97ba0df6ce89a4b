"""Bases whose files are quantised already: what reads them, in how many bits they stay, and what can train on them.

Some stay as they are while an adapter trains, since PEFT knows their layers. Others are unpacked when they are read,
and are plain models from then on.
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
"""By transformers' `quant_method`, the packages that read it, besides llmtune's own requirements."""
UNPACKED = ("compressed-tensors", "fp8", "mxfp4")
"""Methods whose weights are unpacked when they are read."""
_READING: Mapping[str, dict[str, Any]] = {
    **{method: {"dequantize": True} for method in UNPACKED},
    "gptq": {"backend": "gptq_torch"},
    "awq": {"backend": "torch_awq"},
}
"""How they are read. Of gptqmodel's kernels for a CPU only those in plain torch have the right gradient."""
_REFUSED = {"hqq": "transformers 5 does not read it yet"}
_ORIGINAL = "name the model that it was made from, and set adapter.method: qlora, which quantises it on the way."


@dataclass(frozen=True)
class BaseQuantization:
    """How weights of a model stay quantised in memory."""

    method: str
    """transformers' `quant_method`."""
    bits: int
    """Bits of a weight, without its share of the scales."""
    group_size: int
    """How many weights have a scale in common; 0 for a row or more of them."""
    skipped: tuple[str, ...]
    """Parts of the names of modules that are not quantised."""

    @property
    def bytes_per_weight(self) -> float:
        """What a weight takes, with its share of a scale in 16 bits and of a zero point."""
        return self.bits / 8 + ((2 + self.bits / 8) / self.group_size if self.group_size else 0)


def find_unreadable(stated: object, path: str) -> Iterator[Problem]:
    """Yield why the quantised weights that config.json states cannot be read."""
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    other = f"N{_ORIGINAL[1:]}"
    if not isinstance(stated, dict) or not isinstance(method, str):
        yield Problem(f"quantization_config is {stated!r}, and must name a quant_method", path, other)
        return
    what = f"the weights are quantised already ({method})"
    if method not in READERS:
        reason = _REFUSED.get(method, f"llmtune trains beside {', '.join(READERS)}")
        yield Problem(f"{what}: {reason}", path, other)
    elif [name for name in READERS[method] if find_spec(name) is None]:
        extra = "gptq" if "gptqmodel" in READERS[method] else "quantized"
        fix = f"pip install 'llmtune-cli[{extra}]'; or {_ORIGINAL}"
        yield Problem(f"{what}, and {' and '.join(READERS[method])} read that, which are not installed here", path, fix)
    elif method not in UNPACKED and _bits(stated) not in (2, 3, 4, 8):
        yield Problem(f"{what}, and quantization_config does not say in how many bits", path, other)
    elif method == "torchao" and _bits(stated) != 8:
        yield Problem(f"{what} in less than 8 bits, beside which PEFT trains no adapter", path, other)


def _bits(stated: Mapping[str, Any]) -> int:
    if stated.get("quant_method") == "bitsandbytes":
        return 4 if stated.get("load_in_4bit") else 8 if stated.get("load_in_8bit") else 0
    if stated.get("quant_method") == "torchao":  # as transformers tells what can be trained: by the name of the scheme
        kind = stated.get("quant_type")
        scheme = kind.get("default") if isinstance(kind, dict) else None
        return 8 if isinstance(scheme, dict) and "8" in str(scheme.get("_type")) else 4
    bits = stated.get("bits")
    return bits if type(bits) is int else 0


def prepare_reading(config: Any) -> None:
    """Say in a model's configuration how its quantised weights are read, in place."""
    stated = getattr(config, "quantization_config", None)
    if isinstance(stated, dict):
        stated |= _READING.get(str(stated.get("quant_method")), {})


def kept_quantization(config: Any) -> BaseQuantization | None:
    """Return how the weights of a model stay quantised, by its configuration; None where they are plain in memory."""
    stated: Any = getattr(config, "quantization_config", None)
    stated = stated.to_dict() if hasattr(stated, "to_dict") else stated
    if not isinstance(stated, dict) or stated.get("quant_method") in UNPACKED:
        return None
    group = 64 if stated.get("load_in_4bit") else stated.get("group_size")
    skipped = stated.get("modules_to_not_convert") or stated.get("llm_int8_skip_modules") or ()
    method = str(getattr(stated["quant_method"], "value", stated["quant_method"]))
    return BaseQuantization(method, _bits({**stated, "quant_method": method}), max(0, int(group or 0)), tuple(skipped))


def check_training(config: Any, adapter: AdapterSection, trains_head: bool, name: str) -> None:
    """Raise RecipeError where a recipe asks of quantised weights what they cannot do; before they are read."""
    if getattr(config, "quantization_config", None) is None:
        return
    kept = kept_quantization(config)
    original, problems = f"N{_ORIGINAL[1:]}", []
    if adapter.method == "qlora":
        what = f"the weights of {name} are quantised already, and qlora quantises those of a plain model"
        problems.append(Problem(what, "adapter.method", f"Set it to lora; or {_ORIGINAL}"))
    elif kept and adapter.method == "full":
        what = f"the weights of {name} are whole numbers of {kept.bits} bits ({kept.method}), which have no gradient"
        problems.append(Problem(what, "adapter.method", "Use lora, or name the model that it was made from."))
    if kept and str(adapter.init_lora_weights).startswith(MUTATING):
        what = f"{adapter.init_lora_weights} moves a part of the base weights into the adapter, and these are quantised"
        problems.append(Problem(what, "adapter.init_lora_weights", "Omit it."))
    if kept and trains_head:
        what = f"{name} is quantised whole ({kept.method}), and this task puts a new head on a model"
        problems.append(Problem(what, "model.name", original))
    RecipeError.collect(problems)


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a linear module keeps its weights in fewer bits than it computes with."""
    if "qweight" in module._buffers:  # of GPTQ and AWQ
        return True
    weight = getattr(module, "weight", None) if isinstance(module, torch.nn.Linear) else None
    return isinstance(weight, torch.nn.Parameter) and type(weight) is not torch.nn.Parameter


def keep_quantized_format(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking weights for inference at the first forward pass in eval mode on AVX512-BF16.

    It cannot be undone, its kernel has no gradient (training after a validation would go wrong in silence), and it
    rounds otherwise than the one trained with.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def unpack(model: PreTrainedModel) -> None:
    """Put plain linear modules in the place of quantised ones, with the weights that these compute with; in place."""
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
    vars(model).pop("hf_device_map", None)  # gptqmodel sets it, and saving takes a CPU in it for a place to offload to
