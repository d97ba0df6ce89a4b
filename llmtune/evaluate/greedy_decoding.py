"""Decoding of many prompts: equal prompts and a shared prefix are read once; a row leaves when its answer ends.

Shapes: B rows of a batch, T columns, V vocabulary, K key/value heads, D head width, N active rows. Rows are
right-aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any, cast

import torch
from transformers import Cache

from llmtune.evaluate.token_batches import TOKEN_BUDGET, batch_size, budget_for
from llmtune.model.causal_lm_loss import accepted_arguments, unwrap, virtual_tokens
from llmtune.model.device import SuppressRefusal, computing_dtype
from llmtune.model.self_checks import logits_agree


class KVCache(Cache):  # type: ignore[misc]
    """A KV cache whose rows end in the same column, so each step writes one column for all rows.

    `DynamicCache` copies its full contents for every token, and keeps finished rows. Sliding windows need no handling:
    the model builds its mask from the columns, which have the same distances within a row as its tokens.
    """

    def __init__(self, rows: int, width: int) -> None:
        """Reserve `rows` rows of `width` columns; layers allocate memory on their first write."""
        super().__init__(layers=[])
        self.rows, self.width = rows, width
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Per layer, its keys [B, K, T, D] and values [B, K, T, D]; their D may differ."""
        self.active = slice(0, rows)
        """The rows of the next forward pass."""
        self.first = 0
        """The first column that it attends to."""
        self.end = 0
        """The first column that it writes; earlier ones are filled."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [N, K, t, D] of the active rows; return all they attend to [N, K, t + before, D]."""
        keys, values = self._layer(layer_idx, (key_states, value_states))
        stop = self.end + key_states.shape[2]
        keys[self.active, :, self.end : stop] = key_states
        values[self.active, :, self.end : stop] = value_states
        seen = (self.active, slice(None), slice(self.first, stop))
        return keys[seen], values[seen]

    def _layer(self, number: int, like: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's states, allocated on first use; zeros, because masked columns are multiplied too."""
        if number not in self.states:
            keys, values = (part.new_zeros(self.rows, part.shape[1], self.width, part.shape[3]) for part in like)
            self.states[number] = keys, values
        return self.states[number]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns before the next forward pass."""
        return self.end - self.first

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the maximum number of keys that `query_length` queries attend to, and the number of the first."""
        return self.get_seq_length() + query_length, 0

    def read_virtual_tokens(self, model: torch.nn.Module) -> None:
        """Fill the first columns of an empty one-row cache with a model's virtual tokens."""
        filled = read_virtual_tokens(model, self)
        if filled is not self:
            for number, layer in enumerate(filled.layers):
                self.update(layer.keys, layer.values, number)
        self.end = virtual_tokens(model)

    def copy_prefix(self, source: KVCache, rows: slice, start: int, count: int) -> None:
        """Copy the first `count` columns of the one-row cache `source` to `rows`, starting at column `start`."""
        for number, prefix in source.states.items():
            for target, part in zip(self._layer(number, prefix), prefix, strict=True):
                target[rows, :, start : start + count] = part[:, :, :count]

    def move(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Overwrite the slots of finished rows with other rows, in the columns still attended to."""
        if slots:
            columns = slice(self.first, self.end)
            for part in chain.from_iterable(self.states.values()):
                part[list(slots), :, columns] = part[list(rows), :, columns]

    @property
    def column_bytes(self) -> int:
        """Bytes of one column of one row, over all layers."""
        parts = chain.from_iterable(self.states.values())
        return sum(part.element_size() * part.shape[1] * part.shape[3] for part in parts)


WORTH_SHARING = 64
"""Minimum number of tokens a shared prefix must save, since it takes a forward pass of its own."""


class DecodeBatch:
    """Prompts being answered, with their cache; a row leaves when its answer ends.

    Rows are identified by their index in `prompts`; `order` lists them by slot. The model's virtual tokens count as
    the beginning of every row.
    """

    def __init__(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, device: str) -> None:
        """Reserve space for `prompts` and answers of up to `new_tokens` tokens."""
        self.model, self.prompts, self.device = model, prompts, device
        self.virtual = virtual_tokens(model)
        self.lengths = [self.virtual + len(prompt) for prompt in prompts]
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt), []).append(i)
        groups = sorted(rows_of.values(), key=lambda rows: -len(prompts[rows[0]]))
        self.distinct = [rows[0] for rows in groups]
        """One row of each different prompt, the longest first; they have the first slots."""
        self.order = [*self.distinct, *(i for rows in groups for i in rows[1:])]
        self.sources = [slot for slot, rows in enumerate(groups) for _ in rows[1:]]
        """For each further slot, the one with the same prompt."""
        self.width = max(self.lengths)
        self.cache = KVCache(len(prompts), self.width + max(0, new_tokens - 1))
        self.mask_BT = torch.ones((len(prompts), self.cache.width), dtype=torch.int64)
        for slot, i in enumerate(self.order):
            self.mask_BT[slot, : self.width - self.lengths[i]] = 0
        self.mask_BT = self.mask_BT.to(device)

    def read(self, shared: int, budget: int) -> torch.Tensor:
        """Read the prompts, at most `budget` tokens at a time; return the next-token logits [B, V].

        All prompts begin with the same `shared` tokens, which are read once, and each has at least one more. Of equal
        prompts one is read; the others get copies of its cache.
        """
        start = self.virtual + shared
        prefix = KVCache(1, start)
        if self.virtual:
            prefix.read_virtual_tokens(self.model)
        if shared:
            ids_1T = torch.tensor([self.prompts[self.order[0]][:shared]], device=self.device)
            next_logits(self.model, prefix, ids_1T, torch.arange(self.virtual, start, device=self.device)[None], None)
        logits = [self._read_rows(rows, start, prefix) for rows in self._cut(start, budget)]
        count = len(self.distinct)
        self.cache.active, self.cache.first, self.cache.end = slice(0, len(self.order)), 0, self.width
        self.cache.move(range(count, len(self.order)), self.sources)
        return torch.cat(logits)[[*range(count), *self.sources]]

    def _cut(self, shared: int, budget: int) -> Iterator[slice]:
        """Yield groups of different rows to read together; the longest rows come first.

        With virtual tokens, which cannot be read again, the rows of a group have the same length.
        """
        start = 0
        while start < len(self.distinct):
            longest = self.lengths[self.distinct[start]]
            stop = min(start + batch_size(longest - shared, budget), len(self.distinct))
            if self.virtual:
                stop = start + sum(self.lengths[i] == longest for i in self.distinct[start:stop])
            yield slice(start, stop)
            start = stop

    def _read_rows(self, rows: slice, shared: int, prefix: KVCache) -> torch.Tensor:
        """Read some rows after their shared prefix; return the next-token logits [rows, V].

        The prefix ends in the same column for all of them, as in the longest row. A shorter row has space for only a
        part of its prefix, or none; it reads the rest again, which avoids padding within the row.
        """
        cache, chosen = self.cache, self.order[rows]
        cache.active = rows
        cache.first = self.width - self.lengths[chosen[0]]
        cache.end = cache.first + shared
        slot = rows.start
        for length, same in groupby(chosen, key=lambda i: self.lengths[i]):
            stop, start = slot + len([*same]), self.width - length
            if start < cache.end:
                cache.copy_prefix(prefix, slice(slot, stop), start, cache.end - start)
            slot = stop
        read = self.width - cache.end
        ids_BT = torch.zeros((len(chosen), read), dtype=torch.int64)
        for row, i in enumerate(chosen):
            part = torch.tensor(self.prompts[i][-read:])
            ids_BT[row, read - len(part) :] = part
        positions_BT = torch.arange(-read, 0)[None] + torch.tensor([self.lengths[i] for i in chosen])[:, None]
        mask_BT = self.mask_BT[rows, cache.first : self.width]
        return next_logits(self.model, cache, ids_BT.to(self.device), positions_BT.clamp_(0).to(self.device), mask_BT)

    def step(self, tokens_B: torch.Tensor, written: int) -> torch.Tensor:
        """Append a token to each row, after `written` others; return the next-token logits [B, V]."""
        cache = self.cache
        mask_BT = self.mask_BT[cache.active, cache.first : cache.end + 1]
        positions = torch.tensor([self.lengths[i] + written for i in self.order], device=self.device)
        logits_BV = next_logits(self.model, cache, tokens_B[:, None], positions[:, None], mask_BT)
        cache.end += 1
        return logits_BV

    def leave(self, ended: Sequence[int]) -> list[int]:
        """Remove rows by their slots; return the former slots of the remaining rows, in their new order."""
        stays = len(self.order) - len(ended)
        holes = [slot for slot in ended if slot < stays]
        last = [slot for slot in range(stays, len(self.order)) if slot not in set(ended)]
        self.cache.move(holes, last)
        moved = dict(zip(holes, last, strict=True))
        taken = [moved.get(slot, slot) for slot in range(stays)]
        self.order = [self.order[slot] for slot in taken]
        self.mask_BT = self.mask_BT[taken]
        self.cache.active = slice(0, stays)
        self.cache.first = self.width - max((self.lengths[i] for i in self.order), default=0)
        return taken


def next_logits(
    model: torch.nn.Module,
    cache: KVCache,
    ids_BT: torch.Tensor,
    positions_BT: torch.Tensor,
    mask_BT: torch.Tensor | None,
) -> torch.Tensor:
    """Run `model` on tokens after those in `cache`; return the next-token logits [B, V].

    `mask_BT` is 0 at attended columns that hold padding; None without padding. Virtual tokens are in the cache: PEFT's
    forward would put them before these tokens again.
    """
    inner = unwrap(model)
    accepted = accepted_arguments(type(inner))  # type: ignore[arg-type]
    inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": True, cache_argument(type(inner)): cache}
    if mask_BT is not None:
        inputs["attention_mask"] = mask_BT
    if "position_ids" in accepted:
        inputs["position_ids"] = positions_BT
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    return cast(torch.Tensor, (inner if virtual_tokens(model) else model)(**inputs).logits[:, -1])


def cache_argument(kind: type[torch.nn.Module]) -> str:
    """Return the name of the KV cache among the arguments of a model's forward; transformers 5.2x renamed it."""
    return "cache" if "cache" in accepted_arguments(kind) else "past_key_values"  # type: ignore[arg-type]


def read_virtual_tokens(model: torch.nn.Module, cache: Cache, rows: int = 1) -> Cache:
    """Return a cache with the keys and values of a PEFT model's virtual tokens, once per row.

    Those of prefix tuning come in a cache, which is returned; others are written to the empty `cache`.
    """
    peft_model, inner = cast(Any, model), unwrap(model)
    vectors = peft_model.get_prompt(batch_size=rows)
    if isinstance(vectors, Cache):
        return vectors
    vectors_BTD = vectors.to(peft_model.word_embeddings.weight.dtype)
    inner(inputs_embeds=vectors_BTD, use_cache=True, **{cache_argument(type(inner)): cache})
    return cache


Pick = Callable[[torch.Tensor, Sequence[int], int], torch.Tensor]
"""Returns the next tokens [B] from their logits [B, V], the numbers of the rows, and how many tokens they have."""


def decode_greedily(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, stops: set[int], device: str
) -> list[list[int]]:
    """Return the greedy continuation of each prompt: up to `new_tokens` tokens, or a stop token."""
    return decode_tokens(
        model, prompts, new_tokens, stops, device, lambda logits_BV, rows, written: logits_BV.argmax(-1)
    )


def decode_tokens(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stops: set[int],
    device: str,
    pick: Pick,
) -> list[list[int]]:
    """Return the continuation of each prompt by the tokens that `pick` chooses: up to `new_tokens`, or a stop token."""
    batch = DecodeBatch(model, prompts, new_tokens, device)
    shared = common_beginning(prompts)
    if shared * (len(batch.distinct) - 1) < WORTH_SHARING:
        shared = 0
    answers: list[list[int]] = [[] for _ in prompts]
    tokens_B = pick(batch.read(shared, budget_for(device, TOKEN_BUDGET)), batch.order, 0)
    for written in range(new_tokens):
        tokens = tokens_B.tolist()
        for i, token in zip(batch.order, tokens, strict=True):
            answers[i].append(token)
        ended = [slot for slot, token in enumerate(tokens) if token in stops]
        if len(ended) == len(tokens) or written == new_tokens - 1:
            break
        if ended:
            tokens_B = tokens_B[batch.leave(ended)]
        tokens_B = pick(batch.step(tokens_B, written), batch.order, written + 1)
    return answers


def common_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the prefix that all prompts share; each keeps at least one token of its own."""
    first, last = (list(prompt) for prompt in (min(prompts, key=list), max(prompts, key=list)))
    same = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return min(same, min(map(len, prompts)) - 1)


def column_bytes_of(model: torch.nn.Module, device: str) -> int | None:
    """Return the cache bytes per token; None if `model` cannot use this cache.

    A test on a dozen tokens decides: rows of different lengths with a shared prefix are read, one leaves, and the
    logits are compared with plain forward passes. Models with a recurrent state or their own cache format fail.
    """
    if getattr(getattr(model, "active_peft_config", None), "alora_invocation_tokens", None):
        return None  # only PEFT's own `generate` handles activation
    size = unwrap(model).get_input_embeddings().weight.shape[0]
    ids = [size * (7 * (i % 6 + 1) + i % 5) // 50 for i in range(13)]
    prompts = [ids[:4] + ids[4:5], ids[:4] + ids[5:8], ids[:4] + ids[8:10]]
    added = ids[10:]
    with SuppressRefusal():
        batch = DecodeBatch(model, prompts, 2, device)
        first_BV = batch.read(4, 8)
        order = batch.order
        taken = batch.leave([0])
        second_BV = batch.step(torch.tensor([added[order[slot]] for slot in taken], device=device), 0)
        rows = [torch.tensor([[*prompts[i], added[i]]], device=device) for i in range(3)]
        alone = [model(input_ids=row, use_cache=False).logits[0, -2:].float() for row in rows]
        expected = torch.stack([*(alone[i][0] for i in order), *(alone[i][1] for i in batch.order)])
        logits = torch.cat([first_BV, second_BV]).float()
        return batch.cache.column_bytes if logits_agree(logits, expected, computing_dtype(model, device)) else None
    return None
