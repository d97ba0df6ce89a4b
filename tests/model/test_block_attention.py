"""Attention within documents equals attention over the entire row with a mask that separates them."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llmtune.model import block_attention as documents
from llmtune.model.block_attention import attend_documents


def inputs(heads: int, kept: int, tokens: int, width: int = 8, value_width: int = 6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, tokens, width), (1, kept, tokens, width), (1, kept, tokens, value_width))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def dense(query, key, value, lengths, scaling, window, causal):
    """The same with one mask [T, T]."""
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    places_T = torch.arange(len(document_T))
    distance_TT = places_T[:, None] - places_T[None, :]
    seen_TT = document_T[:, None] == document_T[None, :]
    if causal:
        seen_TT &= distance_TT >= 0
    if window is not None:
        seen_TT &= (distance_TT if causal else distance_TT.abs()) < window
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen_TT, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


def compare(got, wanted, parts):
    """Compare outputs and gradients."""
    raised = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    gradients = [torch.autograd.grad(out, parts, raised) for out in (got, wanted)]
    torch.testing.assert_close([got, *gradients[0]], [wanted, *gradients[1]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("block", "kept"), [(256, 192), (256, 6), (4, 0)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1), (4, 4)])
def test_outputs_and_gradients_equal_those_of_a_dense_mask(monkeypatch, block, kept, causal, window, heads, groups):
    monkeypatch.setattr(documents, "_BLOCK", block)
    monkeypatch.setattr(documents, "_KEPT", kept)
    lengths = [5, 1, 30, 9]
    parts = inputs(heads, heads // groups, sum(lengths))
    got = attend_documents(*parts, lengths, 0.3, window, causal)
    wanted = dense(*parts, lengths, 0.3, window, causal)
    compare(got, wanted, parts)


@pytest.mark.parametrize(("block", "kept"), [(256, 192), (4, 0)])
@pytest.mark.parametrize("window", [None, 1, 8])
def test_after_a_shared_prefix_it_is_the_attention_of_complete_documents(monkeypatch, block, kept, window):
    monkeypatch.setattr(documents, "_BLOCK", block)
    monkeypatch.setattr(documents, "_KEPT", kept)
    shared, own = 6, [5, 1, 30]
    parts = inputs(4, 2, shared + sum(own))
    rows = [[*range(shared), *range(end - length, end)] for length, end in zip(own, (11, 12, 42), strict=True)]
    got = attend_documents(*parts, [shared, *own], 0.3, window, True, [(0, 0), *[(0, shared)] * 3])
    whole = [part[:, :, [at for row in rows for at in row]] for part in parts]
    wanted = dense(*whole, [len(row) for row in rows], 0.3, window, True)
    last = [at for at, place in enumerate(place for row in rows for place in row) if place >= shared]
    wanted = torch.cat([wanted[:, :shared], wanted[:, last]], dim=1)
    compare(got, wanted, parts)


def test_the_default_scale_is_the_root_of_the_width():
    parts = inputs(2, 2, 12)
    torch.testing.assert_close(attend_documents(*parts, [12]), dense(*parts, [12], None, None, True))


def test_in_16_bits_the_error_is_no_larger_than_torchs_own():
    parts = [part.detach().bfloat16().requires_grad_() for part in inputs(9, 3, 300, 64, 64, torch.float32)]
    exact = [part.detach().float().requires_grad_() for part in parts]
    lengths = [110, 150, 40]
    raised = torch.randn(1, 300, 9, 64, generator=torch.Generator().manual_seed(1))

    def errors(out):
        true = dense(*exact, lengths, None, None, True)
        wanted = [true, *torch.autograd.grad(true, exact, raised)]
        found = [out, *torch.autograd.grad(out, parts, raised.bfloat16())]
        return [float(((a.float() - b).norm() / b.norm()).detach()) for a, b in zip(found, wanted, strict=True)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = errors(attend_documents(*parts, lengths))
        split = zip(*(torch.split(part, lengths, 2) for part in parts), strict=True)
        torchs = torch.cat([scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in split], 2)
        theirs = errors(torchs.transpose(1, 2))
    assert all(one < max(2 * other, 0.005) for one, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_under_autocast_inputs_of_two_dtypes_are_converted_to_one():
    query, key, value = inputs(2, 1, 12, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_documents(query, key, value.bfloat16(), [5, 7])
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert query.grad.dtype == torch.float32


def test_memory_of_a_long_document_is_that_of_a_block(monkeypatch):
    largest = 0
    softmax = torch.softmax

    def watched(scores, dim):
        nonlocal largest
        largest = max(largest, scores.shape[1])
        return softmax(scores, dim=dim)

    monkeypatch.setattr(torch, "softmax", watched)
    attend_documents(*inputs(2, 1, 1500, dtype=torch.float32), [1500])
    assert largest == 2 * documents._BLOCK
