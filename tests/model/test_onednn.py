"""Products by oneDNN are torch's own up to rounding in float32, and only where they are known to be faster."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from llmtune.model import onednn
from llmtune.model.onednn import is_faster, multiply

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN")


@pytest.fixture(params=[True, False])
def on_amd(request, monkeypatch):
    monkeypatch.setattr(onednn, "is_amd", lambda: request.param)
    onednn._is_right.cache_clear()
    yield request.param
    onednn._is_right.cache_clear()


def test_products_are_those_of_torch_whatever_lies_how_in_memory(on_amd):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((40, 24), (12, 24), (12,)))
    gradient = torch.randn((1, 12), generator=generator).expand(40, 12)
    assert is_faster(x, weight) is on_amd
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(multiply(x, weight), linear(x, weight), **close)
    torch.testing.assert_close(multiply(x, weight, bias), linear(x, weight, bias), **close)
    torch.testing.assert_close(multiply(x.T.contiguous().T, weight), linear(x, weight), **close)
    torch.testing.assert_close(multiply(gradient, weight.T), gradient @ weight, **close)


def test_other_formats_and_single_tokens_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(onednn, "_is_right", lambda: True)
    x, weight = torch.randn(40, 24), torch.randn(12, 24)
    assert is_faster(x, weight)
    assert not is_faster(x[:1], weight)
    assert not is_faster(x.bfloat16(), weight.bfloat16())
    assert not is_faster(x.double(), weight.double())


def test_a_limited_address_space_leaves_the_products_to_torch(on_amd, monkeypatch):
    x, weight = torch.ones(40, 24), torch.ones(12, 24)
    assert is_faster(x, weight) is on_amd
    monkeypatch.setattr(onednn, "address_space_limit", lambda: 2**33)
    assert not is_faster(x, weight)
