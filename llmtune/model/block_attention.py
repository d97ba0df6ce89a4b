"""Attention within each document of a packed row, by plain matrix products, without a mask over the row.

Torch's own attention on a CPU is slow backward in bfloat16: on documents of a hundred tokens these products take less
than half the time. Shapes: H heads, K key/value heads, G = H / K, T positions, D and E head widths of keys and
values, Q queries of one block, N keys that they attend to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch.autograd.function import once_differentiable

_BLOCK = 256
"""Queries per block, which keeps the scores of a long document from being in memory at once."""

_KEPT = 192
"""Blocks with at most this many keys keep their weights for the backward pass; others recompute them."""


class _Block(NamedTuple):
    """Queries `start` .. `end` of a row, which attend to keys `first` .. `last`."""

    start: int
    end: int
    first: int
    last: int
    prefix: slice
    """Keys of a shared prefix, elsewhere in the row."""

    @property
    def before(self) -> int:
        """Keys of the prefix."""
        return int(self.prefix.stop - self.prefix.start)

    @property
    def keys(self) -> int:
        """All keys that the block attends to."""
        return self.before + self.last - self.first

    @property
    def is_short(self) -> bool:
        """Whether the weights are kept for the backward pass: they are no larger than other activations."""
        return self.keys <= _KEPT

    def take(self, row_KTD: torch.Tensor) -> torch.Tensor:
        """Return the keys or values that the block attends to: [K, N, D]."""
        own_KND = row_KTD[:, self.first : self.last]
        return own_KND if self.before == 0 else torch.cat([row_KTD[:, self.prefix], own_KND], dim=1)

    def add(self, row_KTD: torch.Tensor, part_KND: torch.Tensor) -> None:
        """Add to the positions that the block attends to, in place."""
        if self.before:
            row_KTD[:, self.prefix] += part_KND[:, : self.before]
        row_KTD[:, self.first : self.last] += part_KND[:, self.before :]


def attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scaling: float | None = None,
    window: int | None = None,
    causal: bool = True,
    prefixes: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Attend within each document: [1, H, T, D], [1, K, T, D], [1, K, T, E] -> [1, T, H, E].

    `lengths` adds up to T. With `prefixes` (causal attention only), each document continues from the row's positions
    between two numbers. A query attends to `window` keys up to its own when causal, else to those less than `window`
    positions away on either side. Scores have the dtype of the inputs, sums within products float32, as in eager
    attention. Short documents keep their weights for the backward pass; others recompute them.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    blocks, kind = tuple(_blocks(lengths, window, causal, prefixes)), query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = _Attention.apply(query, key, value, blocks, scale, window, causal)  # type: ignore[no-untyped-call]
    return cast(torch.Tensor, out)


def _blocks(
    lengths: Sequence[int], window: int | None, causal: bool, prefixes: Sequence[tuple[int, int]] | None
) -> Iterator[_Block]:
    begin = 0
    for length, prefix in zip(lengths, prefixes or [(0, 0)] * len(lengths), strict=True):
        shared = slice(*prefix)
        stop, step = begin + length, _BLOCK if length > 2 * _BLOCK else length
        for start in range(begin, stop, max(1, step)):
            end = min(start + step, stop)
            first = begin if window is None or prefix[1] else max(begin, start - window + 1)
            last = end if causal else stop if window is None else min(stop, end + window - 1)
            yield _Block(start, end, first, last, shared)
        begin = stop


class _Attention(torch.autograd.Function):
    """Softmax attention, one block at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: tuple[_Block, ...],
        scale: float,
        window: int | None,
        causal: bool,
    ) -> torch.Tensor:
        """Return [1, T, H, E]."""
        ctx.blocks, ctx.scale, ctx.options = blocks, scale, (window, causal)
        short = []
        kept = key.shape[1]
        out_1THE = value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        with torch.autocast(query.device.type, enabled=False):
            scaled_HTD = query[0] * scale
            for block in blocks:
                weights_KQN = _attention_weights(scaled_HTD, key[0], block, window, causal)
                if block.is_short:
                    short.append(weights_KQN)
                found_KQE = torch.bmm(weights_KQN, block.take(value[0]))
                out_1THE[0, block.start : block.end] = _heads_last(found_KQE, query.shape[1] // kept)
        ctx.save_for_backward(query, key, value, *short)
        return out_1THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of the output [1, T, H, E] -> of query, key and value."""
        query, key, value, *short = ctx.saved_tensors
        saved = iter(short)
        (gradient_1THE,), groups = outputs, query.shape[1] // key.shape[1]
        apart = all(block.last <= after.first and not after.before for block, after in pairwise(ctx.blocks))
        summed = query.dtype if apart else torch.promote_types(query.dtype, torch.float32)  # sums over blocks
        dq_THD = query.new_zeros(query.shape[2], query.shape[1], query.shape[3])
        dk_KTD = torch.zeros(key.shape[1:], dtype=summed, device=key.device)
        dv_KTE = torch.zeros(value.shape[1:], dtype=summed, device=key.device)
        scaled_HTD = query[0] * ctx.scale
        for block in ctx.blocks:
            weights_KQN = next(saved) if block.is_short else _attention_weights(scaled_HTD, key[0], block, *ctx.options)
            out_HQE = gradient_1THE[0, block.start : block.end].transpose(0, 1)
            out_KQE = out_HQE.reshape(key.shape[1], -1, value.shape[3])
            block.add(dv_KTE, torch.bmm(weights_KQN.transpose(1, 2), out_KQE))
            raised_KQN = torch.bmm(out_KQE, block.take(value[0]).transpose(1, 2))
            raised_KQN = torch._softmax_backward_data(raised_KQN, weights_KQN, -1, weights_KQN.dtype)
            dq_THD[block.start : block.end] = _heads_last(torch.bmm(raised_KQN, block.take(key[0])), groups)
            queries_KQD = scaled_HTD[:, block.start : block.end].reshape(key.shape[1], -1, key.shape[3])
            block.add(dk_KTD, torch.bmm(raised_KQN.transpose(1, 2), queries_KQD))
        dq_HTD = dq_THD.mul_(ctx.scale).transpose(0, 1)
        return dq_HTD[None], dk_KTD.to(key.dtype)[None], dv_KTE.to(value.dtype)[None], None, None, None, None


def _attention_weights(
    scaled_HTD: torch.Tensor, key_KTD: torch.Tensor, block: _Block, window: int | None, causal: bool
) -> torch.Tensor:
    """Return the weights of a block's queries on its keys: [K, G * Q, N]; each row sums to one."""
    kept, size = key_KTD.shape[0], block.end - block.start
    queries_KQD = scaled_HTD[:, block.start : block.end].reshape(kept, -1, key_KTD.shape[2])
    scores_KQN = torch.bmm(queries_KQD, block.take(key_KTD).transpose(1, 2))
    if causal or window is not None:
        shape = (size, block.keys, block.before + block.start - block.first, window, causal)
        unseen = _unseen(*shape, scores_KQN.dtype, scores_KQN.device)
        if unseen is not None:
            scores_KQN.view(-1, size, shape[1]).add_(unseen)
    return torch.softmax(scores_KQN, dim=-1)


@lru_cache(maxsize=256)
def _unseen(
    queries: int, keys: int, ahead: int, window: int | None, causal: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Return [queries, keys]: minus infinity for masked keys, else 0; None if nothing is masked.

    There are `ahead` keys before the first query's own.
    """
    seen_QN = band(queries, keys, window, causal, device, ahead)
    if seen_QN.all():
        return None
    return torch.zeros(seen_QN.shape, dtype=dtype, device=device).masked_fill_(~seen_QN, -torch.inf)


def band(
    queries: int, keys: int, window: int | None, causal: bool, device: torch.device, ahead: int = 0
) -> torch.Tensor:
    """Return the mask [queries, keys] of visible keys: none outside the window, and no later ones if causal.

    Without causality the window extends in both directions. There are `ahead` keys before the first query's own.
    """
    distance_QN = torch.arange(queries, device=device)[:, None] + ahead - torch.arange(keys, device=device)[None, :]
    seen_QN = distance_QN >= 0 if causal else torch.ones_like(distance_QN, dtype=torch.bool)
    return seen_QN if window is None else seen_QN & (distance_QN.abs() < window)


def _heads_last(found_KQE: torch.Tensor, groups: int) -> torch.Tensor:
    """[K, G * Q, E] -> [Q, H, E]."""
    kept, both, width = found_KQE.shape
    return found_KQE.view(kept * groups, both // groups, width).transpose(0, 1)
