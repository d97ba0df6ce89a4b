"""Frozen, typed records that steps pass to each other.

This module does not import torch or transformers. Records that outlive a process contain paths and numbers; only
`SelectedModel` and `AdaptedModel` contain a live model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Json = dict[str, Any]
"""A JSON object as stored in a file."""
Row = dict[str, Any]
"""A row in canonical form, with the keys of its task's TypedDict (`llmtune.tasks`)."""
Until = Literal["prepare", "select", "adapt", "train", "evaluate", "run"]
"""The last step to run; `run` means all steps and deployment."""
UNTIL: tuple[Until, ...] = get_args(Until)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Rows after reading, checking, deduplicating and splitting: one Arrow file per split, with statistics.

    Each file has the columns `id` (hex content hash), `origin` (`file:line`), `row` (the canonical row as JSON) and
    `columns` (the source row's values of the columns named in `evaluate`, as JSON; null if it names none).
    """

    folder: Path
    files: dict[str, Path]
    counts: dict[str, int]
    rows_in: int
    dropped: dict[str, int]
    """Dropped rows by reason: `bad: ...`, `exact duplicate`, `near duplicate`, `near a test row` and so on."""
    content_hash: str
    """Hash over the kept rows of all splits, in order."""
    columns: tuple[str, ...] = ()
    """Names of the columns stored with the rows."""
    columns_hash: str = ""
    """Hash of `columns` and of the groups of `data.split_by`; empty without both."""
    filled: int = 0
    """Number of null keys that Arrow added inside columns, and that were dropped (`llmtune.data.arrow_rows`)."""
    corpus_hash: str = ""
    """Hash over the passages of `data.corpus` (`llmtune.data.corpus`); empty without a corpus."""
    class_changes: tuple[Json, ...] = ()
    """Class names that were normalised or renamed (`class_spelling.list_changes`)."""

    def as_facts(self) -> Json:
        """Return the numbers of rows, and the changes of class names, for the manifest."""
        facts = {"rows_in": self.rows_in, "kept": self.counts, "dropped": self.dropped}
        return facts | {"class_changes": [*self.class_changes]}


@dataclass(frozen=True)
class Examples:
    """Encoded rows on disk: one Arrow file per split, in the order of `Rows`, with the columns of `Example`.

    The additional column `row` is an index into the split's rows.
    """

    folder: Path
    files: dict[str, Path]
    counts: dict[str, int]
    tokens: dict[str, int]
    supervised: dict[str, int]
    longest: dict[str, int]
    """By split, the highest cost of an example in tokens."""
    dropped: dict[str, int]
    content_hash: str
    reach: dict[str, int] = field(default_factory=dict)
    """By split, the longest sequence that the model reads or writes, in tokens."""
    lost: dict[str, int] = field(default_factory=dict)
    """Losses by truncation: `rows`, `answers`, `tokens` and `supervised` tokens."""


@dataclass(frozen=True)
class ModelRef:
    """The location of a model's files, resolved once, before any heavy work."""

    name: str
    """The name in the recipe."""
    path: Path
    """A local folder: the model's own, a snapshot in the hub's cache, or the cache of a packaged model."""
    revision: str | None
    """The hub's commit; None for a local folder."""
    content_hash: str
    """sha256 over the sorted names and hashes of config, tokenizer and weight files."""


def read_model_ref(described: Json) -> ModelRef:
    """Return the ModelRef stored as JSON."""
    return ModelRef(**{**described, "path": Path(described["path"])})


@dataclass(frozen=True)
class Layout:
    """The training processes, as far as they affect memory."""

    processes: int = 1
    """Processes on all machines."""
    machines: int = 1
    sharded: bool = False
    """Whether each process has a shard of the model (fsdp) or all of it (ddp)."""
    offload_params: bool = False
    """Whether shards are in main memory while they do not compute (FSDP2's CPUOffloadPolicy)."""

    @property
    def of_machine(self) -> int:
        """Return the number of processes that share the memory of one machine."""
        return self.processes // self.machines


ALONE = Layout()


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training will need, by part, and the memory of the device."""

    parts: dict[str, int]
    """weights, adapter, gradients, optimizer, activations, logits; reference, if the original weights are kept;
    samples, if training samples answers.

    A sharded model also has gathered (weights gathered temporarily) and evaluation (needs beyond training)."""
    lower_bound: int
    """Minimum: all parts except activations, logits and samples, plus the logits of one token row."""
    limit: int | None
    """Total bytes of the device (or control group); None if unknown."""
    device: str
    tokens: int = 0
    """The token budget of the first micro-batch that fits the plan."""
    processes: int = 1
    """Number of processes; the plan is for one of them."""
    base_quantization: str | None = None
    """Quantisation of the base, as in `SelectedModel`."""
    evaluated: int = 0
    """Bytes that evaluation and generation need."""
    host: int = 0
    """Bytes of main memory for shards that are offloaded from a card."""

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class SelectedModel:
    """A selected, checked and loaded model, with its tokenizer."""

    model_ref: ModelRef
    model: PreTrainedModel
    processor: PreTrainedTokenizerBase
    plan: MemoryPlan
    quantized: bool
    trains_head: bool = False
    """Whether the task's head, which may be missing from the model's files, is fully trained."""
    peft_task_type: str | None = None
    """PEFT's name of the task; None if `AutoPeftModel` loads the adapter."""
    base_quantization: str | None = None
    """transformers' name of the files' quantisation, if the weights stay quantised in memory."""
    needs_reference_model: bool = False
    """Whether training compares with the original model."""
    new_weights: tuple[str, ...] = ()
    """Parameters missing from the model's files: a new head, initialised randomly from the recipe's seed."""
    packs: bool = False
    """Whether rows are packed: the task and recipe allow it, and a check proved it exact for the model."""


@dataclass(frozen=True)
class AdaptedModel:
    """A model with its adapter (or the model alone with `method: full`), whose wiring was checked."""

    selected: SelectedModel
    model: torch.nn.Module
    method: str
    trainable: int
    total: int
    matched_modules: tuple[str, ...]
    adapter_bytes: int


@dataclass(frozen=True)
class Loss:
    """A loss as sum and count, to be divided once over all micro-batches and processes."""

    sum: torch.Tensor
    """Scalar, float32, in nats (for a regression: squared errors)."""
    count: int
    """Number of summed predictions: tokens, rows, windows or pairs."""
    correct: torch.Tensor | None = None
    """Scalar: number of predictions whose first choice was right."""
    row_sums: torch.Tensor | None = None
    """[rows] sum per row, without gradient unless requested; None if the loss is not a sum over rows."""
    row_correct: torch.Tensor | None = None
    """[rows] right first choices per row, only if requested."""


@dataclass(frozen=True)
class Prompt:
    """What a model continues or answers."""

    ids: Sequence[int]
    """Its tokens, with those of pictures and sound."""
    media: Callable[[], Mapping[str, torch.Tensor]] | None = None
    """Makes further inputs of the model by name, such as `pixel_values`, when they are needed: they are large."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


Batch = dict[str, Any]
"""Tensors, numbers and settings of one micro-batch, by name."""
Advance = Callable[[int], None]


FEWEST_ROWS = 10
"""Rows from which a difference of scores is judged."""


@dataclass(frozen=True)
class Difference:
    """Tuned minus base on the same rows: value, 95 % interval, two-sided p, number of rows."""

    value: float
    low: float
    high: float
    p: float
    n: int
    test: str = ""
    """The method of interval and p, such as `Bayesian bootstrap`; empty without an interval."""
    groups: int = 0
    """Number of row groups that were resampled and permuted as units; 0 if rows are independent."""
    effective: float = 0.0
    """Number of groups of equal size that tell as much (`intervals.effective_number`); 0 if rows are independent."""
    other: tuple[float, float] = (math.nan, math.nan)
    """The 95 % interval of the score that was subtracted."""

    @property
    def units(self) -> float:
        """Return the effective number of resampled units: groups, or rows."""
        return self.effective or self.groups or self.n

    @property
    def is_uneven(self) -> bool:
        """Whether groups differ so much in size that equal ones would tell more."""
        return 0 < self.effective < 0.9 * self.groups

    def to_json(self) -> dict[str, object]:
        """Return the form in report.json: `groups` and their effective number only if rows are grouped."""
        groups = {"groups": self.groups, "effective_groups": round(self.units, 1)} if self.groups else {}
        interval = {"value": self.value, "interval": [self.low, self.high]}
        return {**interval, "p": self.p, "n": self.n, **groups, "test": self.test}

    @property
    def sign(self) -> int:
        """Return 1 if the interval is above zero, -1 if it is below, 0 if it includes zero or is missing."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True)
class StepTiming:
    """Seconds and peak bytes of a step, and whether it was skipped as unchanged."""

    name: str
    seconds: float
    peak_bytes: int
    skipped: bool
