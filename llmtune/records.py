"""What flows between the steps, frozen and typed.

Nothing here imports torch or transformers: records that outlive a process are paths and numbers, and a live model
stands only in `SelectedModel` and `AdaptedModel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Json = dict[str, Any]
"""A JSON object, as it stands in a file."""
Row = dict[str, Any]
"""A row in canonical form; its keys are those of the TypedDict of its task (`llmtune.tasks`)."""

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Rows after reading, checking, deduplicating and splitting: one Arrow file a split, and how they came about.

    Each file has the columns `id` (hex content hash), `origin` (`file:line`), `row` (the canonical row as JSON) and
    `columns` (what the row's source says in the columns that `evaluate` names, as JSON; null where it names none).
    """

    folder: Path
    files: dict[str, Path]
    counts: dict[str, int]
    rows_in: int
    dropped: dict[str, int]
    """Rows left out, by reason: `bad: ...`, `exact duplicate`, `near duplicate`, `near a test row` and so on."""
    content_hash: str
    """Hash over the kept rows of all splits, in order."""
    columns: tuple[str, ...] = ()
    """Names of the columns that were kept beside the rows."""
    columns_hash: str = ""
    """Hash over `columns` of the test split, in order; empty where nothing is asked for."""
    filled: int = 0
    """Null keys inside columns that Arrow filled in, and that were dropped (`llmtune.data.arrow_rows`)."""


@dataclass(frozen=True)
class Examples:
    """Encoded rows on disk, one Arrow file a split, in the order of `Rows`; with the columns of `Example`.

    `row` beside them is an index into the split's rows.
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
    """What rows lost that were cut: `rows`, `answers`, `tokens` and `supervised` tokens."""


@dataclass(frozen=True)
class ModelRef:
    """Where a model's files are: resolved once, before anything heavy."""

    name: str
    """As the recipe names it."""
    path: Path
    """A local folder, whatever the name was (the hub's snapshot, the cache of a packaged model)."""
    revision: str | None
    """The hub's commit, or None for a folder."""
    content_hash: str
    """sha256 over the sorted names and sha256 of config, tokenizer and weight files."""


def read_model_ref(described: Json) -> ModelRef:
    """Return what JSON holds of a model."""
    return ModelRef(**{**described, "path": Path(described["path"])})


@dataclass(frozen=True)
class Layout:
    """The processes of a training, as far as their memory goes."""

    processes: int = 1
    """Of all machines."""
    machines: int = 1
    sharded: bool = False
    """Whether each has a part of the model (fsdp) or all of it (ddp)."""

    @property
    def of_machine(self) -> int:
        """Processes that share the memory of a machine."""
        return self.processes // self.machines


ALONE = Layout()


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training will need, part by part, and what the device has."""

    parts: dict[str, int]
    """weights, adapter, gradients, optimizer, activations, logits; reference, where weights from before are kept.

    Of a sharded model also gathered, what is whole for a while, and evaluation, what that needs beyond training."""
    lower_bound: int
    """All parts but activations and logits, and logits of one token row: cannot be less."""
    limit: int | None
    """Bytes the device (or the control group) has in total; None where it cannot be known."""
    device: str
    tokens: int = 0
    """The token budget of the first micro-batch that the plan allows."""
    processes: int = 1
    """The plan is that of one of so many."""
    base_quantization: str | None = None
    """As that of the model."""

    @property
    def total(self) -> int:
        """All parts added up."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class SelectedModel:
    """A model chosen, checked and loaded, with its tokenizer."""

    model_ref: ModelRef
    model: PreTrainedModel
    processor: PreTrainedTokenizerBase
    plan: MemoryPlan
    quantized: bool
    trains_head: bool = False
    """Whether a head that the model's files need not hold is trained whole."""
    peft_task_type: str | None = None
    """PEFT's name for the task; None: `AutoPeftModel` loads the adapter."""
    base_quantization: str | None = None
    """transformers' name of how the files' weights are quantised, where they stay so in memory."""
    needs_reference_model: bool = False
    """Whether training compares with the model as it was."""
    new_weights: tuple[str, ...] = ()
    """Parameters that the model's files do not hold: those of a new head, at random from the recipe's seed."""
    packs: bool = False
    """Whether rows stand end to end in a micro-batch: the task and the recipe say so, and it is proven of the model."""


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
class Loss:
    """A loss as a sum and a count, so that it can be divided once over all micro-batches and processes."""

    sum: torch.Tensor
    """Scalar, float32, nats (of a regression: squares)."""
    count: int
    """Predictions that it is the sum of: tokens, rows, windows or pairs."""
    correct: torch.Tensor | None = None
    """Scalar: how many of them were right at first choice."""
    row_sums: torch.Tensor | None = None
    """[rows] the sum a row, without gradient unless it was asked for; None where a loss is not made of rows."""
    row_correct: torch.Tensor | None = None
    """[rows] first choices that were right a row, only when asked for."""


Batch = dict[str, Any]
"""The tensors of one micro-batch by name, and numbers and settings."""
Advance = Callable[[int], None]


@dataclass(frozen=True)
class StepTiming:
    """How a step went: seconds, peak resident bytes, and whether it was skipped because nothing had changed."""

    name: str
    seconds: float
    peak_bytes: int
    skipped: bool


@dataclass(frozen=True)
class Difference:
    """Tuned minus base on the same rows: value, 95 % interval, two-sided p, number of rows."""

    value: float
    low: float
    high: float
    p: float
    n: int
    test: str = ""
    """Where p comes from: `McNemar mid-p`, `paired permutation` or `paired bootstrap`; empty where there is none."""
    groups: int = 0
    """Groups of rows that belong together, which were drawn and swapped as one; 0 where each row is alone."""

    @property
    def units(self) -> int:
        """What was drawn: groups, or rows."""
        return self.groups or self.n


@dataclass(frozen=True)
class Flips:
    """Rows that one model got right and the other wrong, by one right-or-wrong metric."""

    gained: int
    """How many the base got wrong and the tuned model right."""
    lost: int
    """How many the base got right and the tuned model wrong."""
    rows: int
    gained_rows: tuple[dict[str, str], ...] = ()
    """A few of them, as in `Evaluation.samples`."""
    lost_rows: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Slice:
    """The test rows with one value of a column, and the scores on them."""

    value: str
    rows: int
    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    """By metric; without an interval where the rows are too few for one."""


@dataclass(frozen=True)
class GateResult:
    """One gate: the expression, what was wanted, what was got."""

    name: str
    wanted: str
    got: str
    passed: bool | None
    """None: inconclusive, where `evaluate.when_unsure` says `report`."""
    note: str = ""
    """Why it is inconclusive, whatever that counts as; or that it passed although the tuned model is worse."""


@dataclass(frozen=True)
class StudyTable:
    """A table that a study shows beside its scores; cells are text that a person reads."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Study:
    """What base and tuned model were asked beyond the test rows: forgetting, fairness, benchmarks.

    Metrics have plain names here; gates call them `study.metric`.
    """

    title: str
    base: dict[str, float]
    """Empty where the base model could not be asked."""
    tuned: dict[str, float]
    difference: dict[str, Difference]
    meanings: dict[str, str]
    """By metric, a few words for a person."""
    better: dict[str, int]
    """By metric: 1 where more is better, -1 where less is, 0 where neither is."""
    signatures: dict[str, str] = field(default_factory=dict)
    """How a metric was computed."""
    limits: str = ""
    """In plain words, what these numbers can show and what they cannot."""
    tables: tuple[StudyTable, ...] = ()


@dataclass(frozen=True)
class Contamination:
    """Test rows that stand in the training rows, in one way or another; a row counts in each way that it does."""

    rows: int
    """Test rows."""
    train_rows: int
    equal: int
    near: int
    short: int
    """Test rows of fewer than 13 words."""
    worded: int
    """Of those, rows whose words are all those of a training row, in order."""
    shared: int
    """Of the others, rows that have 13 words in a row in common with a training row."""
    overlapping: int
    """Test rows that overlap in any of these ways."""
    common: int
    """Runs of 13 words of the test rows that were left out, since more than ten training rows have them."""
    dropped: dict[str, int]
    """Rows that were left out before, by reason, since they were too like a test row."""
    examples: tuple[dict[str, str], ...]
    """A few that overlap: kind, where the test row and the training row stand, what they share."""
    scores: tuple[Slice, ...]
    """Both models on clean and on overlapping rows; empty where none overlaps."""
    prompted: int = 0
    """Test rows whose whole prompt is that of a training row; earlier versions did not count them."""


@dataclass(frozen=True)
class Champion:
    """The run that the tuned model is compared with, on rows that neither was trained on."""

    folder: str
    scores: dict[str, float]
    """On the rows of both."""
    difference: dict[str, Difference]
    """Tuned minus champion."""
    left_out: dict[str, str]
    """By metric, why it could not be compared."""
    tuned: dict[str, float] = field(default_factory=dict)
    """Scores of the tuned model on the rows of both."""
    rows: int = 0
    """Test rows of both."""
    asked: int = 0
    """Those of them that were not test rows of the champion: its model answered them now."""


@dataclass(frozen=True)
class Evaluation:
    """Base and tuned model on the same held-out rows."""

    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    samples: tuple[dict[str, str], ...]
    """A few rows side by side: prompt, reference, base, tuned."""
    rows: int
    signatures: dict[str, str] = field(default_factory=dict)
    """How a metric was computed, e.g. sacrebleu's signature."""
    baseline: str | None = None
    """Where the base model has no trained head: what stands in its place, by name."""
    guessable: tuple[str, ...] = ()
    """Metrics in which guessing by class frequency beats that baseline on these rows."""
    details: Json = field(default_factory=dict)
    """What a task shows beside the scores, of base and tuned: a table of classes, a confusion matrix."""
    flips: dict[str, Flips] = field(default_factory=dict)
    """By right-or-wrong metric."""
    slices: dict[str, tuple[Slice, ...]] = field(default_factory=dict)
    """By column of `evaluate.slices`: the most frequent values first."""
    studies: dict[str, Study] = field(default_factory=dict)
    """By name: forgetting, fairness, benchmarks; those that the recipe asks for."""
    contamination: Contamination | None = None
    """None without test rows."""
    champion: Champion | None = None
    """None where the recipe names none."""

    def by_name(self, split: str) -> dict[str, float]:
        """Return the scores of `base` or `tuned` by the names that gates use, those of the studies among them."""
        scores = dict(getattr(self, split))
        for name, study in self.studies.items():
            scores |= {f"{name}.{metric}": value for metric, value in getattr(study, split).items()}
        return scores

    def differences(self) -> dict[str, Difference]:
        """Return the differences by the names that gates use."""
        found = dict(self.difference)
        for name, study in self.studies.items():
            found |= {f"{name}.{metric}": value for metric, value in study.difference.items()}
        return found
