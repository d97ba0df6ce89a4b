"""What flows between the steps, frozen; and the Task record, which says what differs from task to task.

Nothing here imports torch or transformers: records that outlive a process are paths and numbers, and a live model
stands only in `SelectedModel` and `AdaptedModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
"""A row in canonical form. Chat: `messages` (and `tools`); completion: `prompt` (may be empty) and `completion`."""

SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Rows after reading, checking, deduplicating and splitting: one Arrow file a side, and how they came about.

    Each file has the columns `id` (hex content hash), `origin` (`file:line`) and `row` (the canonical row as JSON).
    """

    folder: Path
    files: dict[str, Path]
    counts: dict[str, int]
    rows_in: int
    dropped: dict[str, int]
    """Rows left out, by reason: `bad: ...`, `exact duplicate`, `near duplicate`, `near a test row` and so on."""
    content_hash: str
    """Hash over the kept rows of all sides, in order."""


@dataclass(frozen=True)
class Example:
    """One encoded row: what the model sees and which positions are predicted."""

    input_ids: Sequence[int]
    spans: Sequence[int]
    """Supervised half-open token ranges, flat: start, end, start, end. Token `start` is predicted from `start - 1`."""
    target_bytes: int
    """UTF-8 bytes of the supervised text, end-of-turn markers not counted: the denominator of bits per byte."""

    @property
    def supervised(self) -> int:
        """How many tokens are predicted."""
        return sum(self.spans[1::2]) - sum(self.spans[::2])


@dataclass(frozen=True)
class Examples:
    """Encoded rows on disk, one Arrow file a side, in the order of `Rows`.

    Columns: `input_ids`, `spans` (list<int32>), `target_bytes` (int32), `row` (int32, index into the side's rows).
    """

    folder: Path
    files: dict[str, Path]
    counts: dict[str, int]
    tokens: dict[str, int]
    supervised: dict[str, int]
    longest: dict[str, int]
    dropped: dict[str, int]
    content_hash: str


@dataclass(frozen=True)
class ModelPlace:
    """Where a model's files are: resolved once, before anything heavy."""

    name: str
    """As the recipe names it."""
    path: Path
    """A local folder, whatever the name was (the hub's snapshot, the cache of a packaged model)."""
    revision: str | None
    """The hub's commit, or None for a folder."""
    content_hash: str
    """sha256 over the sorted names and sha256 of config, tokenizer and weight files."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training will need, part by part, and what the device has."""

    parts: dict[str, int]
    """weights, adapter, gradients, optimizer, activations, logits."""
    lower_bound: int
    """weights + adapter + gradients + optimizer + logits of one token row: cannot be less."""
    limit: int | None
    """Bytes the device (or the control group) has in total; None where it cannot be known."""
    device: str
    tokens: int = 0
    """The token budget of the first micro-batch that the plan allows."""

    @property
    def total(self) -> int:
        """All parts added up."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class SelectedModel:
    """A model chosen, checked and loaded, with its tokenizer."""

    place: ModelPlace
    model: PreTrainedModel
    processor: PreTrainedTokenizerBase
    plan: MemoryPlan
    quantized: bool


@dataclass(frozen=True)
class AdaptedModel:
    """A model with its adapter in place (or, with `method: full`, itself), proven to be wired."""

    selected: SelectedModel
    model: torch.nn.Module
    method: str
    trainable: int
    total: int
    matched_modules: tuple[str, ...]
    adapter_bytes: int


@dataclass(frozen=True)
class TrainedRun:
    """What training left behind: the final adapter (or weights) and its numbers."""

    adapter: Path
    """A plain PEFT folder; with `method: full` a plain model folder."""
    steps: int
    epochs: float
    train_loss: float
    """Mean over the last logged steps, nats per supervised token."""
    first_loss: float
    validation_loss: float | None
    best_step: int | None
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    wall_seconds: float
    peak_bytes: int
    micro_batch_tokens: int
    stopped_early: str | None = None
    resumed_from: int | None = None

    def as_facts(self) -> dict[str, Any]:
        """Return what the manifest keeps: JSON values, the adapter by the name of its folder in the run."""
        return {**asdict(self), "adapter": self.adapter.name}


@dataclass(frozen=True)
class Loss:
    """A loss as a sum and a count, so that it can be divided once over all micro-batches and processes."""

    sum: torch.Tensor
    """Scalar, float32, nats."""
    count: int
    correct: torch.Tensor | None = None
    """Scalar: how many supervised tokens were the model's first choice."""
    row_sums: torch.Tensor | None = None
    """[rows] nats a row, only when asked for."""
    row_correct: torch.Tensor | None = None
    """[rows] first choices that were right a row, only when asked for."""


@dataclass(frozen=True)
class Task:
    """What differs from task to task, as plain functions; put together in `llmtune.tasks`.

    encode(rows, processor, recipe) -> one `Example` list or one reason (str) a row
    collate(examples, packed, pad_id) -> the tensors of one micro-batch
    loss(model, batch, by_row) -> `Loss`
    prompt(row) -> the row without its answer, and the answer as text
    """

    name: str
    auto_class: str
    """Name of the transformers class that loads the model."""
    peft_task_type: str
    encode: Callable[..., list[list[Example] | str]]
    collate: Callable[..., dict[str, Any]]
    loss: Callable[..., Loss]
    prompt: Callable[[Row], tuple[Row, str]]
    render: Callable[..., list[int]]
    """render(prompt row, processor, recipe) -> token ids to generate from; the same ids in train, evaluate and chat."""


@dataclass(frozen=True)
class Difference:
    """Tuned minus base on the same rows: value, 95 % interval, two-sided p, number of rows."""

    value: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class GateResult:
    """One gate: the expression, what was wanted, what was got."""

    name: str
    wanted: str
    got: str
    passed: bool


@dataclass(frozen=True)
class Evaluation:
    """Base and tuned model on the same held-out rows."""

    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    gates: tuple[GateResult, ...]
    samples: tuple[dict[str, str], ...]
    """A few rows side by side: prompt, reference, base, tuned."""
    rows: int
    signatures: dict[str, str] = field(default_factory=dict)
    """How a metric was computed, e.g. sacrebleu's signature."""


@dataclass(frozen=True)
class StepTiming:
    """How a step went: seconds, peak resident bytes, and whether it was skipped because nothing had changed."""

    name: str
    seconds: float
    peak_bytes: int
    skipped: bool
