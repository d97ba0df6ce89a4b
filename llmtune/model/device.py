"""Which device computes, in which number format, and how much memory it has."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from llmtune.errors import RecipeError
from llmtune.store.machine import memory_limit as process_memory_limit


def pick_device() -> str:
    """Return the device that computes here: `cuda` (under a launcher the process's own card), `mps` or `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe_device(device: str) -> dict[str, str]:
    """Name what computes, as far as it decides the last bits of a result: the card, or the processor's vector units."""
    if device.startswith("cuda"):
        return {"device": "cuda", "card": torch.cuda.get_device_name()}
    return {"device": device, "vector_units": torch.backends.cpu.get_cpu_capability()}


def has_fast_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32: Ampere and later, AVX512-BF16, AMX."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability()[0] >= 8
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # no public name yet
    return False


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Turn `model.dtype` into a torch dtype; `auto` is bfloat16 where the device has it fast and float32 elsewhere.

    Raises RecipeError for float16 on a CPU, where torch lacks kernels for it.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name == "float16" and device == "cpu":
        raise RecipeError.of(
            "float16 does not train on a CPU", "model.dtype", "Set model.dtype to auto, bfloat16 or float32."
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def compute_context(dtype: torch.dtype, device: str) -> AbstractContextManager[object]:
    """Return the context in which losses and logits are computed: autocast to `dtype`, or nothing for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.split(":")[0], dtype=dtype)


def memory_limit(device: str) -> int | None:
    """Return the bytes that `device` has in total, free or not; None where it cannot be known.

    On a CPU: the least of RAM, the control group's limit and the address space that `ulimit -v` allows.
    """
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return process_memory_limit()
