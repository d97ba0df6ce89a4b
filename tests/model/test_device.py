"""Dtypes and memory limits of this machine."""

import ctypes
import resource

import psutil
import pytest
import torch
from support.adapting import build_family, load_without_room
from support.process import run_in_child

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.device import (
    compute_context,
    device_memory,
    explain_oom,
    has_fast_bfloat16,
    is_out_of_memory,
    keep_freed_memory,
    resolve_dtype,
)


def test_auto_is_bfloat16_only_if_the_cpu_has_it():
    wanted = torch.bfloat16 if has_fast_bfloat16("cpu") else torch.float32
    assert resolve_dtype("auto", "cpu") == wanted
    with open("/proc/cpuinfo") as file:
        flags = file.read().split()
    assert has_fast_bfloat16("cpu") == bool({"avx512_bf16", "amx_tile"} & set(flags))


def test_float16_is_refused_on_a_cpu():
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(RecipeError, match=r"model\.dtype"):
        resolve_dtype("float16", "cpu")


def test_the_compute_context_uses_its_dtype():
    layer, inputs = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with compute_context(torch.bfloat16, "cpu"):
        assert layer(inputs).dtype == torch.bfloat16
    with compute_context(torch.float32, "cpu"):
        assert layer(inputs).dtype == torch.float32


def test_the_limit_is_at_most_the_total_memory():
    limit = device_memory("cpu")
    assert limit is not None
    assert 0 < limit <= psutil.virtual_memory().total


def test_the_address_space_that_ulimit_allows_is_a_limit(monkeypatch):
    allowed = device_memory("cpu") - 1
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (allowed, allowed))
    assert device_memory("cpu") == allowed


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 60), lambda: bytearray(1 << 60)])
def test_a_failed_allocation_reports_the_work_and_the_memory(allocate):
    with (
        pytest.raises(EnvironmentProblem, match=r"out of memory while loading x: cpu has [\d.]+ [GM]B"),
        explain_oom("loading x", "cpu"),
    ):
        allocate()


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), FileNotFoundError(2, "No such file"), KeyError("x")])
def test_other_errors_propagate(error):
    with pytest.raises(type(error)) as caught, explain_oom("loading x", "cpu"):
        raise error
    assert caught.value is error


def test_a_model_or_adapter_without_room_gives_no_traceback(tiny_llama, tmp_path):
    large = build_family(tmp_path / "large", "llama", hidden_size=1024, intermediate_size=2048)
    done = run_in_child(load_without_room, tmp_path / "child", str(tiny_llama), str(large))
    assert done.returncode == 0, done.stderr
    assert f"out of memory while loading {large}" in done.stdout
    assert "out of memory while putting the adapter into" in done.stdout
    assert done.stdout.count("adapter.method: qlora") == 2


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("unable to mmap 134515008 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("unable to mmap 134515008 bytes from file <x>: Permission denied (13)"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_distinguished_from_other_errors(error, is_memory):
    assert is_out_of_memory(error) is is_memory


def page_faults() -> int:
    """Page faults of writing ten blocks of 64 MB, each freed before the next."""
    torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def print_page_faults() -> None:
    """Print the page faults before, inside and after the block."""
    mapped = page_faults()
    with keep_freed_memory():
        reused = page_faults()
    print(mapped, reused, page_faults())


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="an option of glibc")
def test_freed_blocks_are_reused_only_inside_the_block(tmp_path):
    done = run_in_child(print_page_faults, tmp_path / "child")
    assert done.returncode == 0, done.stderr
    mapped, reused, after = map(int, done.stdout.split())
    assert reused < mapped / 10
    assert after > mapped / 2
