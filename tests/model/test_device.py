"""Number formats and memory limits of this machine."""

import resource

import psutil
import pytest
import torch

from llmtune.errors import RecipeError
from llmtune.model.device import compute_context, has_fast_bfloat16, memory_limit, resolve_dtype


def test_auto_is_bfloat16_only_where_the_processor_has_it():
    wanted = torch.bfloat16 if has_fast_bfloat16("cpu") else torch.float32
    assert resolve_dtype("auto", "cpu") == wanted
    with open("/proc/cpuinfo") as file:
        flags = file.read().split()
    assert has_fast_bfloat16("cpu") == bool({"avx512_bf16", "amx_tile"} & set(flags))


def test_float16_is_refused_on_a_cpu():
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(RecipeError, match=r"model\.dtype"):
        resolve_dtype("float16", "cpu")


def test_the_compute_context_computes_in_its_format():
    layer, inputs = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with compute_context(torch.bfloat16, "cpu"):
        assert layer(inputs).dtype == torch.bfloat16
    with compute_context(torch.float32, "cpu"):
        assert layer(inputs).dtype == torch.float32


def test_the_limit_is_total_memory_or_less():
    limit = memory_limit("cpu")
    assert limit is not None
    assert 0 < limit <= psutil.virtual_memory().total


def test_the_address_space_that_ulimit_allows_is_a_limit(monkeypatch):
    allowed = memory_limit("cpu") - 1
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (allowed, allowed))
    assert memory_limit("cpu") == allowed
