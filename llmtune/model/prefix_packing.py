"""Store a prefix that documents of a packed row share, such as a system prompt, only once.

A token's hidden state depends only on earlier tokens. The states of a shared prefix are therefore equal in all
documents, and their gradient is the sum over them. Generation uses a cache for this (`llmtune.evaluate.shared_prefix`).

Shapes: T positions of the original row, P of a shared prefix, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from llmtune.model.chunked_cross_entropy import takes_head_loss
from llmtune.model.packed_attention import LENGTHS, PACKED, PREFIXES
from llmtune.records import Batch

_SHORTEST = 8
"""Minimum length of a prefix, in tokens, that is worth sharing."""
_MARK = "_llmtune_shares_prefixes"
_NONE = (0, 0)
_whole: ContextVar[bool] = ContextVar("whole_documents", default=False)


class _Group(NamedTuple):
    """Consecutive documents `first` .. `end` that share `length` tokens."""

    first: int
    end: int
    length: int


def allow_shared_prefixes(model: PreTrainedModel, allowed: bool) -> None:
    """Record on `model` whether its documents may share a prefix."""
    setattr(model, _MARK, allowed)


@contextmanager
def whole_documents() -> Iterator[None]:
    """Share nothing inside the block: a memory rehearsal assumes rows without common prefixes."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def takes_shared_prefixes(model: PreTrainedModel) -> bool:
    """Whether rows may share prefixes now: on a CPU, with packed attention, and without random dropping of tokens.

    Dropout is random per document, but a shared prefix would have the same dropout in all of them.
    """
    on_cpu = model.device.type == "cpu" and model.config._attn_implementation == PACKED
    if _whole.get() or not getattr(model, _MARK, False) or not on_cpu:
        return False
    return takes_head_loss(model) and not (model.training and any(map(_drops, model.modules())))


def _drops(module: torch.nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return bool(getattr(module, "attention_dropout", 0))


def share_prefixes(batch: Batch) -> Batch:
    """Return `batch` with each shared prefix once, and `PREFIXES`; a batch without shared prefixes is unchanged.

    Documents move within the row; predicted tokens, targets and rows keep their order.
    """
    if "cu_seq_lens_q" not in batch:
        return batch
    ids_T, positions_T = batch["input_ids"][0].numpy(), batch["position_ids"][0].numpy()
    borders = batch["cu_seq_lens_q"].tolist()
    documents = [ids_T[start:end].tolist() for start, end in pairwise(borders)]
    order = sorted(range(len(documents)), key=documents.__getitem__)
    groups = _find_groups(documents, order)
    if not any(group.length for group in groups):
        return batch
    kept: list[range] = []
    prefixes: list[tuple[int, int]] = []
    place_T, length = np.empty(len(ids_T), dtype=np.int64), 0
    for group in groups:
        shared, start = group.length, length
        if shared:
            first = borders[order[group.first]]
            kept.append(range(first, first + shared))
            prefixes.append(_NONE)
            length += shared
        for document in order[group.first : group.end]:
            begin, end = borders[document], borders[document + 1]
            place_T[begin : begin + shared] = np.arange(start, start + shared)
            place_T[begin + shared : end] = np.arange(length, length + end - begin - shared)
            kept.append(range(begin + shared, end))
            prefixes.append((start, start + shared) if shared else _NONE)
            length += end - begin - shared
    chosen = np.concatenate([np.arange(part.start, part.stop) for part in kept])
    starts = torch.tensor([0, *accumulate(map(len, kept))], dtype=torch.int32)
    return {
        **batch,
        "input_ids": torch.from_numpy(ids_T[chosen])[None],
        "position_ids": torch.from_numpy(positions_T[chosen])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        LENGTHS: [*map(len, kept)],
        "predict_S": torch.from_numpy(place_T)[batch["predict_S"]],
        PREFIXES: prefixes,
    }


def _find_groups(documents: Sequence[Sequence[int]], order: Sequence[int]) -> list[_Group]:
    """Split sorted documents into the groups that save the most tokens, with one shared prefix per group."""
    alike = [_common(documents[one], documents[other]) for one, other in pairwise(order)]

    def cut(first: int, end: int) -> tuple[int, list[_Group]]:
        """Return the maximum number of tokens that documents `first` .. `end` can save, and their groups."""
        if end - first == 1:
            return 0, [_Group(first, end, 0)]
        least = min(alike[first : end - 1])
        borders = [first, *(at + 1 for at in range(first, end - 1) if alike[at] == least), end]
        parts = [cut(*part) for part in pairwise(borders)]
        apart = sum(saved for saved, _ in parts)
        together = least * (end - first - 1) if least >= _SHORTEST else 0
        if together and together >= apart:
            return together, [_Group(first, end, least)]
        return apart, [group for _, groups in parts for group in groups]

    return cut(0, len(order))[1]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix; each keeps at least one token of its own."""
    most = min(len(one), len(other)) - 1
    differing: Iterator[int] = (at for at in range(most) if one[at] != other[at])
    return next(differing, most)
