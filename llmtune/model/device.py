"""The device: dtype, memory, and handling of out-of-memory errors."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from llmtune.display.number_format import size as format_bytes
from llmtune.errors import EnvironmentProblem, RecipeError, nearest
from llmtune.recipe.schema import Recipe
from llmtune.store.machine import process_memory_limit

CARDS: Mapping[str, tuple[float, float]] = {
    "b200": (180e9, 2250e12),
    "h200": (141e9, 989e12),
    "h100": (80e9, 989e12),
    "a100-80": (80e9, 312e12),
    "a100-40": (40e9, 312e12),
    "l40s": (48e9, 362e12),
    "a10": (24e9, 125e12),
    "l4": (24e9, 121e12),
    "4090": (24e9, 165e12),
    "3090": (24e9, 71e12),
    "t4": (16e9, 65e12),
}
"""Cards by name: bytes of memory, and dense 16-bit operations per second, from the makers' data sheets."""
EFFICIENCY = 0.35
"""Fraction of peak operations that training reaches; 0.3 to 0.45 is usual on one card."""
DRIVER_BYTES = 600_000_000
"""Bytes that CUDA and its libraries reserve on a card."""
_WITHOUT_BFLOAT16 = ("t4",)


def pick_device() -> str:
    """Return the device to compute on: `cuda` (under a launcher the process's own card), `mps` or `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe_device(device: str) -> dict[str, str]:
    """Name the hardware that decides the last bits of a result: the card, or the CPU's vector units."""
    if device.startswith("cuda"):
        return {"device": "cuda", "card": torch.cuda.get_device_name()}
    return {"device": device, "vector_units": torch.backends.cpu.get_cpu_capability()}


def has_fast_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32: Ampere and later, AVX512-BF16, AMX."""
    if device in CARDS:
        return device not in _WITHOUT_BFLOAT16
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability()[0] >= 8
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # no public name yet
    return False


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Turn `model.dtype` into a torch dtype; `auto` is bfloat16 if the device computes it fast, else float32.

    Raises RecipeError for float16 on a CPU, where torch lacks kernels for it.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name == "float16" and device == "cpu":
        raise RecipeError.of(
            "float16 does not train on a CPU", "model.dtype", "Set model.dtype to auto, bfloat16 or float32."
        )
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def loading_device(recipe: Recipe, device: str) -> tuple[str, Recipe]:
    """Return the device to load a sharded model on, and the recipe with the dtype of `device`.

    This is main memory, unless a kernel or dtype is unavailable on CPU.
    """
    dtype = str(resolve_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    named = recipe.model.model_copy(update={"dtype": dtype})
    cards_alone = recipe.train.use_liger_kernel or dtype == "float16" or recipe.model.attn_implementation != "auto"
    return (device if cards_alone else "cpu"), recipe.model_copy(update={"model": named})


def compute_context(dtype: torch.dtype, device: str) -> AbstractContextManager[object]:
    """Return the context for computing losses and logits: autocast to `dtype`, or a null context for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.split(":")[0], dtype=dtype)


def in_own_dtype(model: torch.nn.Module, device: str) -> AbstractContextManager[object]:
    """Return the context in which float32 weights are multiplied in float32; other weights as around it."""
    if next(model.parameters()).dtype == torch.float32:
        return torch.autocast(device.split(":")[0], enabled=False)
    return nullcontext()


def computing_dtype(model: torch.nn.Module, device: str) -> torch.dtype:
    """Return the dtype of the forward pass: autocast's if enabled, else that of the weights."""
    kind = device.split(":")[0]
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(model.parameters()).dtype


def device_memory(device: str) -> int | None:
    """Return the total bytes of `device`, free or not; None if unknown.

    For a card by name, which may be absent, this is what its driver leaves. On a CPU: the minimum of RAM, the control
    group's limit and the address space that `ulimit -v` allows.
    """
    if device in CARDS:
        return int(CARDS[device][0]) - DRIVER_BYTES
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return process_memory_limit()


def check_card(name: str, option: str = "--device", devices: Sequence[str] = (*CARDS, "cpu")) -> None:
    """Raise RecipeError unless `name` is one of `devices`."""
    if name not in devices:
        fix = f"{nearest(name, devices)} Use one of {', '.join(devices)}.".strip()
        raise RecipeError.of(f"unknown card {name!r}", option, fix)


# Out of memory


MEMORY_ERRORS = (MemoryError, RuntimeError, OSError)
"""Errors that an allocation can raise (torch.OutOfMemoryError is a RuntimeError); see `is_out_of_memory`."""
_ALLOCATOR_WORDS = (
    "can't allocate memory",  # torch's CPU allocator
    "cannot allocate memory",  # the system's text for ENOMEM
    "not enough memory",
    "out of memory",  # CUDA errors that are not torch.OutOfMemoryError, e.g. from cuBLAS
    "bad allocation",
    "bad_alloc",
    "could not create a memory object",  # oneDNN
    "could not create a primitive",
    "failed to allocate",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, one of `MEMORY_ERRORS`, means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in text for words in _ALLOCATOR_WORDS)


def fits_in_memory(work: Callable[[], object]) -> bool:
    """Run `work`; return False if memory ran out. `release_memory` then frees the remains."""
    try:
        work()
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""Errors that models raise for unsupported inputs."""


class SuppressRefusal(AbstractContextManager[None]):
    """End the block early if a model refuses trial inputs; out-of-memory errors propagate."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """Return whether the error is suppressed."""
        return isinstance(error, REFUSALS) and not is_out_of_memory(error)


def release_memory() -> None:
    """Return unused memory to the system and the GPU, for a smaller attempt or another model."""
    gc.collect()  # a model's modules refer to one another
    torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc keeps a free list per thread, so memory freed by gradients cannot be reused for weights


_MADV_PAGEOUT = 21
"""Number of that advice on Linux; Python's mmap has no name for it."""


def page_out(tensor: torch.Tensor) -> None:
    """Drop the memory of weights that are mapped from a file (`madvise(2)`, MADV_PAGEOUT); other memory stays."""
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    size = tensor.data_ptr() + tensor.nbytes - start
    if sys.platform == "linux" and size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_PAGEOUT)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Options of mallopt(3)."""


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Inside this context, let glibc's malloc reuse large freed blocks; by default it unmaps them.

    The kernel clears every newly mapped page, and full tuning on a CPU frees and allocates gradients as large as the
    weights at each step. Afterwards unused memory returns to the system. Without glibc there is no effect.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the largest value, in bytes
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, 65_536)  # the default
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # largest value of glibc's dynamic threshold, which mallopt turned off
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)  # twice that, as glibc sets it
        release_memory()


@contextmanager
def explain_oom(doing: str, device: str) -> Iterator[None]:
    """Run a block that allocates on `device`; `doing` names the work, such as "loading NAME".

    Raises EnvironmentProblem if memory runs out; other errors propagate.
    """
    try:
        yield
    except MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        if device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info()
            memory = f"{format_bytes(total)}, of which {format_bytes(free)} are free"
        else:
            memory = format_bytes(limit) if (limit := device_memory(device)) else "too little"
        raise EnvironmentProblem.of(
            f"out of memory while {doing}: {device} has {memory}",
            "model.name",
            "Close other programs that use this memory, choose a smaller model, or set adapter.method: qlora.",
        ) from error
