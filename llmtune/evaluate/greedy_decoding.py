"""Greedy answers to many prompts: what all begin with is read once, and a row leaves the batch when its answer ends.

Shapes: B rows of a batch, T columns, V vocabulary, K key/value heads, D head width, N rows at work. Rows stand aligned
at their right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from transformers import Cache

from llmtune.evaluate.shared_prefix import computing_dtype
from llmtune.evaluate.token_batches import TOKEN_BUDGET, batch_size, budget_for
from llmtune.model.causal_lm_loss import accepted_arguments, unwrap
from llmtune.model.device import is_out_of_memory


@dataclass
class _Layer:
    """What one layer keeps."""

    keys: torch.Tensor
    """[B, K, T, D]"""
    values: torch.Tensor
    """[B, K, T, D], whose D may be another."""


class KVCache(Cache):  # type: ignore[misc]
    """A cache whose rows end in the same column, so that each step writes one column of all of them.

    `DynamicCache` copies all that it holds for every token, and keeps rows that have ended. Windows are left to the
    mask, which the model makes from the columns: within a row they stand as far apart as its tokens.
    """

    def __init__(self, rows: int, width: int) -> None:
        """Make room for `rows` rows of `width` columns; memory is taken as layers write for the first time."""
        super().__init__(layers=[])
        self.rows, self.width = rows, width
        self.kept: dict[int, _Layer] = {}
        self.at_work = slice(0, rows)
        """The rows that the next forward pass is about."""
        self.first = 0
        """The first column that it sees."""
        self.end = 0
        """The column that it writes first; those before it are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [N, K, t, D] of the rows at work; return all that they see [N, K, t + before, D]."""
        layer = self.kept.get(layer_idx)
        if layer is None:
            layer = self.kept[layer_idx] = _Layer(self._reserve(key_states), self._reserve(value_states))
        stop = self.end + key_states.shape[2]
        layer.keys[self.at_work, :, self.end : stop] = key_states
        layer.values[self.at_work, :, self.end : stop] = value_states
        seen = (self.at_work, slice(None), slice(self.first, stop))
        return layer.keys[seen], layer.values[seen]

    def _reserve(self, states: torch.Tensor) -> torch.Tensor:
        """Return room for all rows; zeros, because what is masked is multiplied all the same."""
        return states.new_zeros(self.rows, states.shape[1], self.width, states.shape[3])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns the next forward pass finds there."""
        return self.end - self.first

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys `query_length` queries see at most, and the number of the first."""
        return self.get_seq_length() + query_length, 0

    def copy_beginning(self, source: KVCache, rows: slice, start: int, count: int) -> None:
        """Give `rows`, from column `start` on, the first `count` columns of `source`, which has one row."""
        for number, there in source.kept.items():
            if number not in self.kept:
                parts = (there.keys, there.values)
                self.kept[number] = _Layer(*(self._reserve(part) for part in parts))
            here, columns = self.kept[number], slice(start, start + count)
            here.keys[rows, :, columns] = there.keys[:, :, :count]
            here.values[rows, :, columns] = there.values[:, :, :count]

    def move(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Put other rows in the slots of rows that are not needed any more; columns that are seen alone are moved."""
        if not slots:
            return
        columns = slice(self.first, self.end)
        for layer in self.kept.values():
            for part in (layer.keys, layer.values):
                part[list(slots), :, columns] = part[list(rows), :, columns]

    @property
    def column_bytes(self) -> int:
        """Bytes that one column of one row takes up, over all layers."""
        parts = [part for layer in self.kept.values() for part in (layer.keys, layer.values)]
        return sum(part.element_size() * part.shape[1] * part.shape[3] for part in parts)


TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far logits may lie from those of a plain forward pass, of their standard deviation (root mean square)."""
WORTH_SHARING = 64
"""Tokens that have to be saved by reading a common beginning once: it takes a forward pass of its own."""


class DecodeBatch:
    """Prompts that are being answered: their keys and values, and which of them are still there.

    Rows are named by their index in `prompts`; `order` says which stands where.
    """

    def __init__(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, device: str) -> None:
        """Make room for `prompts` and answers of up to `new_tokens` tokens."""
        self.model, self.prompts, self.device = model, prompts, device
        self.order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.width = len(prompts[self.order[0]])
        self.columns = KVCache(len(prompts), self.width + max(0, new_tokens - 1))
        self.mask_BT = torch.ones((len(prompts), self.columns.width), dtype=torch.int64)
        for slot, i in enumerate(self.order):
            self.mask_BT[slot, : self.width - len(prompts[i])] = 0
        self.mask_BT = self.mask_BT.to(device)

    def read(self, shared: int, budget: int) -> torch.Tensor:
        """Read the prompts, at most `budget` tokens at a time; return the logits [B, V] of what follows them.

        All prompts begin with the same `shared` tokens, each is longer than that, and those are read once.
        """
        beginning = KVCache(1, shared)
        if shared:
            ids_1T = torch.tensor([self.prompts[self.order[0]][:shared]], device=self.device)
            next_logits(self.model, beginning, ids_1T, torch.arange(shared, device=self.device)[None], None)
        found = [self._read_rows(rows, shared, beginning) for rows in self._cut(shared, budget)]
        columns = self.columns
        columns.at_work, columns.first, columns.end = slice(0, len(self.order)), 0, self.width
        return torch.cat(found)

    def _cut(self, shared: int, budget: int) -> Iterator[slice]:
        """Cut the rows, the longest of which come first, into groups that are read at once."""
        start = 0
        while start < len(self.order):
            longest = len(self.prompts[self.order[start]]) - shared
            stop = min(start + batch_size(longest, budget), len(self.order))
            yield slice(start, stop)
            start = stop

    def _read_rows(self, rows: slice, shared: int, beginning: KVCache) -> torch.Tensor:
        """Read some rows behind what they begin with; return the logits [rows, V] of what follows them.

        In the columns that the longest of them has for its beginning, the others have nothing, or a part of theirs:
        what is left of it is read again, so that no row has padding in it.
        """
        columns, chosen = self.columns, self.order[rows]
        columns.at_work = rows
        columns.first = self.width - len(self.prompts[chosen[0]])
        columns.end = columns.first + shared
        slot = rows.start
        for length, same in groupby(chosen, key=lambda i: len(self.prompts[i])):
            stop, start = slot + len([*same]), self.width - length
            if start < columns.end:
                columns.copy_beginning(beginning, slice(slot, stop), start, columns.end - start)
            slot = stop
        read = self.width - columns.end
        ids_BT = torch.zeros((len(chosen), read), dtype=torch.int64)
        for row, i in enumerate(chosen):
            part = torch.tensor(self.prompts[i][-read:])
            ids_BT[row, read - len(part) :] = part
        positions_BT = torch.arange(-read, 0)[None] + torch.tensor([len(self.prompts[i]) for i in chosen])[:, None]
        mask_BT = self.mask_BT[rows, columns.first : self.width]
        return next_logits(self.model, columns, ids_BT.to(self.device), positions_BT.clamp_(0).to(self.device), mask_BT)

    def step(self, tokens_B: torch.Tensor, written: int) -> torch.Tensor:
        """Write a token to each row, behind `written` others; return the logits [B, V] of what follows."""
        columns = self.columns
        mask_BT = self.mask_BT[columns.at_work, columns.first : columns.end + 1]
        positions = torch.tensor([len(self.prompts[i]) + written for i in self.order], device=self.device)
        logits_BV = next_logits(self.model, columns, tokens_B[:, None], positions[:, None], mask_BT)
        columns.end += 1
        return logits_BV

    def leave(self, ended: Sequence[int]) -> list[int]:
        """Let rows go, by their slots; return the slots from which the rows that stay come, in their new order."""
        stays = len(self.order) - len(ended)
        holes = [slot for slot in ended if slot < stays]
        last = [slot for slot in range(stays, len(self.order)) if slot not in set(ended)]
        self.columns.move(holes, last)
        moved = dict(zip(holes, last, strict=True))
        taken = [moved.get(slot, slot) for slot in range(stays)]
        self.order = [self.order[slot] for slot in taken]
        self.mask_BT = self.mask_BT[taken]
        self.columns.at_work = slice(0, stays)
        self.columns.first = self.width - max((len(self.prompts[i]) for i in self.order), default=0)
        return taken


def next_logits(
    model: torch.nn.Module,
    columns: KVCache,
    ids_BT: torch.Tensor,
    positions_BT: torch.Tensor,
    mask_BT: torch.Tensor | None,
) -> torch.Tensor:
    """Run `model` on tokens behind what `columns` hold; return the logits [B, V] of what follows the last of each row.

    `mask_BT` says which of the columns seen are no padding; none is.
    """
    accepted = accepted_arguments(type(unwrap(model)))  # type: ignore[arg-type]
    inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": True}
    inputs["cache" if "cache" in accepted else "past_key_values"] = columns
    if mask_BT is not None:
        inputs["attention_mask"] = mask_BT
    if "position_ids" in accepted:
        inputs["position_ids"] = positions_BT
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    return cast(torch.Tensor, model(**inputs).logits[:, -1])


def decode_greedily(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, stops: set[int], device: str
) -> list[list[int]]:
    """Return the likeliest tokens, one after the other, that follow each prompt: up to `new_tokens`, or a stop."""
    writing = DecodeBatch(model, prompts, new_tokens, device)
    shared = common_beginning(prompts)
    if shared * (len(prompts) - 1) < WORTH_SHARING:
        shared = 0
    answers: list[list[int]] = [[] for _ in prompts]
    tokens_B = writing.read(shared, budget_for(device, TOKEN_BUDGET)).argmax(-1)
    for written in range(new_tokens):
        tokens = tokens_B.tolist()
        for i, token in zip(writing.order, tokens, strict=True):
            answers[i].append(token)
        ended = [slot for slot, token in enumerate(tokens) if token in stops]
        if len(ended) == len(tokens) or written == new_tokens - 1:
            break
        if ended:
            tokens_B = tokens_B[writing.leave(ended)]
        tokens_B = writing.step(tokens_B, written).argmax(-1)
    return answers


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with; a prompt keeps one at least for itself."""
    first, last = (list(prompt) for prompt in (min(prompts, key=list), max(prompts, key=list)))
    same = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return min(same, min(map(len, prompts)) - 1)


def column_bytes_of(model: torch.nn.Module, device: str) -> int | None:
    """Return the bytes that a token of a row takes up while answers are written; None where `model` cannot be used so.

    That is tried, not asked, on a dozen tokens: rows of different length with a common beginning are read, one
    leaves, and what follows is held against plain forward passes. It differs in models that keep a state from token
    to token, or keys and values of their own kind.
    """
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and (adapter.is_prompt_learning or getattr(adapter, "alora_invocation_tokens", None)):
        return None  # what PEFT puts before a text, or begins in it, it knows in its own `generate` alone
    size = unwrap(model).get_input_embeddings().weight.shape[0]
    ids = [size * (7 * (i % 6 + 1) + i % 5) // 50 for i in range(13)]
    prompts = [ids[:4] + ids[4:5], ids[:4] + ids[5:8], ids[:4] + ids[8:10]]
    added = ids[10:]
    try:
        writing = DecodeBatch(model, prompts, 2, device)
        first_BV = writing.read(4, 8)
        order = writing.order
        taken = writing.leave([0])
        second_BV = writing.step(torch.tensor([added[order[slot]] for slot in taken], device=device), 0)
        alone = [plain_logits(model, [*prompts[i], added[i]], device) for i in range(3)]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        return None
    expected = torch.stack([*(alone[i][0] for i in order), *(alone[i][1] for i in writing.order)])
    found = torch.cat([first_BV, second_BV]).float()
    apart = (found - expected).square().mean().sqrt()
    close = apart <= TOLERANCE.get(computing_dtype(model, device), 0.1) * expected.std()
    return writing.columns.column_bytes if bool(close) else None


def plain_logits(model: torch.nn.Module, ids: Sequence[int], device: str) -> torch.Tensor:
    """Return the logits [2, V] at the last two tokens of a row by itself, without a cache."""
    logits_1TV = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits
    return cast(torch.Tensor, logits_1TV[0, -2:].float())
