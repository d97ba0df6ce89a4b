"""The rows of each optimiser step: a pure function of seed, data and step number, for any number of processes."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from llmtune.errors import RecipeError

Indexes = npt.NDArray[np.int64]
PASS_TOKENS = 192
"""Cost of one more forward and backward pass on a CPU, in tokens. Measured with six layers of width 384 and an adapter
on each; 128 to 256 were fastest."""
_SURVEYED = 100
"""Steps over which the share of padding is measured."""


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The training examples of each optimiser step; steps are counted from 1.

    A step has `batch_size` rows, except that the last step of an epoch may have fewer. With `batch_tokens`, steps are
    filled by best fit over the epoch.
    """

    lengths: npt.NDArray[np.int32]
    """Tokens of each training example."""
    seed: int
    batch_size: int
    batch_tokens: int | None
    num_train_epochs: float
    max_steps: int | None

    def __post_init__(self) -> None:
        """Raise RecipeError if an example has more tokens than a step may hold."""
        assert len(self.lengths), "a plan needs at least one training example"
        longest = int(self.lengths.max())
        if self.batch_tokens is not None and longest > self.batch_tokens:
            raise RecipeError.of(
                f"{self.batch_tokens} tokens a step, but the longest training example has {longest}",
                "train.batch_tokens",
                f"Set train.batch_tokens to {longest} or more, or data.max_length to {self.batch_tokens} or less.",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the same in every epoch."""
        return len(self._epoch(0))

    @property
    def total_steps(self) -> int:
        """Number of steps in training; `max_steps` may span any number of epochs."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.num_train_epochs * self.steps_per_epoch - 1e-9))

    def rows(self, step: int) -> Indexes:
        """Return the indexes of the training examples of `step`."""
        assert step >= 1, "steps are counted from 1"
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        return self._epoch(epoch)[position]

    def ends_epoch(self, step: int) -> bool:
        """Return whether `step` is the last one of its epoch."""
        return step % self.steps_per_epoch == 0

    def _epoch(self, epoch: int) -> list[Indexes]:
        return _arrange(self, epoch)


@lru_cache(maxsize=4)
def _arrange(plan: StepPlan, epoch: int) -> list[Indexes]:
    """Return the rows of each step of `epoch`, in order."""
    generator = np.random.Generator(np.random.Philox(key=[plan.seed % 2**64, epoch]))
    order = generator.permutation(len(plan.lengths))
    if plan.batch_tokens is None:
        return [order[start : start + plan.batch_size] for start in range(0, len(order), plan.batch_size)]
    bins = best_fit(plan.lengths[order], plan.batch_tokens)
    return [order[bins[i]] for i in generator.permutation(len(bins))]


def best_fit(lengths: Sequence[int] | npt.NDArray[np.int32], capacity: int) -> list[Indexes]:
    """Pack `lengths` into bins of `capacity` by best fit decreasing; return the indexes of each bin.

    Equal lengths are taken in the order given, so the number of bins does not depend on that order. A length above
    `capacity` gets a bin of its own. Johnson 1973: at most 11/9 of the fewest possible bins, plus one.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        position = bisect_left(open_bins, (size, -1))
        if position < len(open_bins):
            room, bin_number = open_bins.pop(position)
            bins[bin_number].append(index)
        else:
            room, bin_number = capacity, len(bins)
            bins.append([index])
        if room > size:
            insort(open_bins, (room - size, bin_number))
    return [np.asarray(members, dtype=np.int64) for members in bins]


def divide(rows: Indexes, lengths: npt.NDArray[np.int32], processes: int) -> list[Indexes]:
    """Divide the rows of a step over processes, about the same number of tokens each; some may get none."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for position in np.argsort(-lengths[rows].astype(np.int64), kind="stable").tolist():
        lightest = loads.index(min(loads))
        shares[lightest].append(int(rows[position]))
        loads[lightest] += int(lengths[rows[position]])
    return [np.asarray(share, dtype=np.int64) for share in shares]


def micro_batches(
    rows: Indexes, lengths: npt.NDArray[np.int32], budget: int, packed: bool, pass_tokens: int | None = None
) -> list[Indexes]:
    """Cut one process's share into micro-batches of at most `budget` tokens, the heaviest first.

    A micro-batch costs the sum of its lengths when packed, else rows x longest. A row longer than the budget gets its
    own. Padded rows are sorted by length. With `pass_tokens` (cost of one more pass, in tokens) the cuts minimise
    passes plus padding; without it there are as few cuts as the budget allows.
    """
    if packed:
        groups = [rows[members] for members in best_fit(lengths[rows], budget)]
        return sorted(groups, key=lambda group: -occupied_tokens(group, lengths, packed))
    ordered = rows[np.argsort(-lengths[rows].astype(np.int64), kind="stable")]
    ends = _cuts(lengths[ordered], budget, budget * len(rows) if pass_tokens is None else pass_tokens)
    groups = np.split(ordered, ends[:-1]) if ends else []
    return sorted(groups, key=lambda group: -occupied_tokens(group, lengths, packed))


def _cuts(falling: npt.NDArray[np.int32], budget: int, pass_tokens: int) -> list[int]:
    """Return where micro-batches of padded rows end; `falling` has their lengths in descending order.

    The cuts minimise the positions computed, plus `pass_tokens` for each micro-batch.
    """
    sizes = np.maximum(falling.astype(np.int64), 1)
    least = np.zeros(len(sizes) + 1, dtype=np.int64)
    begins = np.zeros(len(sizes) + 1, dtype=np.int64)
    start = 0
    for end in range(1, len(sizes) + 1):
        while start < end - 1 and sizes[start] * (end - start) > budget:
            start += 1
        sums = least[start:end] + sizes[start:end] * np.arange(end - start, 0, -1) + pass_tokens
        position = int(sums.argmin())
        least[end], begins[end] = sums[position], start + position
    ends: list[int] = []
    end = len(sizes)
    while end:
        ends.append(end)
        end = int(begins[end])
    return ends[::-1]


def occupied_tokens(rows: Indexes, lengths: npt.NDArray[np.int32], packed: bool) -> int:
    """Return the tokens that a micro-batch of `rows` occupies, padding included."""
    sizes = lengths[rows].astype(np.int64)
    return int(sizes.sum()) if packed else int(sizes.max()) * len(sizes)


def heaviest(
    lengths: npt.NDArray[np.int32],
    weights: Sequence[npt.NDArray[np.int32]],
    budget: int,
    packed: bool,
    most_rows: int,
) -> list[Indexes]:
    """Return upper bounds of the real micro-batches: one of the longest rows, and one of the heaviest by each weight.

    The first needs the most attention and activations; that of the most supervised rows the most logits, and that of
    the most pictures the most pixels. None has more than `most_rows`.
    """
    batches: dict[frozenset[int], Indexes] = {}
    for weight in (lengths, *weights):
        taken: list[int] = []
        widest = total = 0
        for index in np.argsort(-weight.astype(np.int64), kind="stable").tolist():
            size = int(lengths[index])
            fits = total + size <= budget if packed else max(widest, size) * (len(taken) + 1) <= budget
            if fits or not taken:
                taken.append(index)
                widest, total = max(widest, size), total + size
            if len(taken) == most_rows or total >= budget:
                break
        batches.setdefault(frozenset(taken), np.asarray(taken, dtype=np.int64))
    return [*batches.values()]


def padding_share(
    plan: StepPlan, steps: int, budget: int, packed: bool, processes: int = 1, pass_tokens: int | None = None
) -> float:
    """Return the share of computed positions that are padding, over the first `steps`, at most 100."""
    real = computed = 0
    for step in range(1, min(steps, _SURVEYED) + 1):
        rows = plan.rows(step)
        real += int(plan.lengths[rows].sum())
        for share in divide(rows, plan.lengths, processes):
            for group in micro_batches(share, plan.lengths, budget, packed, pass_tokens):
                computed += occupied_tokens(group, plan.lengths, packed)
    return 1 - real / computed if computed else 0.0
