"""Frozen, typed records of scores: slices, gates, studies, decisions, and an evaluation of them all."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmtune.records import Difference, Json
from llmtune.store.control_scores import ControlScores, TeacherScores


@dataclass(frozen=True)
class Flips:
    """Rows that one model got right and the other wrong, in one right-or-wrong metric."""

    gained: int
    """Number of rows that the base got wrong and the tuned model right."""
    lost: int
    """Number of rows that the base got right and the tuned model wrong."""
    rows: int
    gained_rows: tuple[dict[str, str], ...] = ()
    """A few of these rows, as in `Evaluation.samples`."""
    lost_rows: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Slice:
    """The test rows with one value of a column, and the scores on them."""

    value: str
    rows: int
    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    """By metric; without an interval if the rows are too few."""


@dataclass(frozen=True)
class NewRows:
    """All models on the test rows whose input the champion never saw; `scores` has base and tuned model on all."""

    scores: Slice
    intervals: dict[str, Difference]
    """The tuned model's scores with their own intervals."""
    from_old: dict[str, Difference]
    """The tuned model's score on these rows minus its score on the other test rows; only with an interval."""
    rows: int
    """Number of these rows that the champion's model could answer; `before` has its scores on them."""
    before: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    """Tuned minus champion on the answered rows; without an interval if they are too few."""


@dataclass(frozen=True)
class GateResult:
    """The result of one gate: expression, wanted and actual value."""

    name: str
    wanted: str
    got: str
    passed: bool | None
    """None: inconclusive, with `evaluate.when_unsure: report`."""
    note: str = ""
    """Why it is inconclusive, for any `when_unsure`; or that it passed although the tuned model is worse."""
    applies: bool = True
    """False if nothing was there to judge, as `note` says: the gate then counts as passed, and every report says so."""


@dataclass(frozen=True)
class StudyTable:
    """A table that a study shows with its scores; cells are formatted text."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    open: bool = False
    """Whether it shows at once, instead of on a click."""


@dataclass(frozen=True)
class Study:
    """Results of base and tuned model beyond the task's metrics: forgetting, fairness, benchmarks, a judge.

    Metrics have plain names here; gates use `study.metric`.
    """

    title: str
    base: dict[str, float]
    """Empty if the base model could not be evaluated."""
    tuned: dict[str, float]
    difference: dict[str, Difference]
    meanings: dict[str, str]
    """Short descriptions, by metric."""
    better: dict[str, int]
    """By metric: 1 if more is better, -1 if less is better, 0 if neither."""
    signatures: dict[str, str] = field(default_factory=dict)
    limits: str = ""
    """What these numbers can and cannot show, in plain words."""
    tables: tuple[StudyTable, ...] = ()
    verdict: str = ""
    """A sentence to add to the run's verdict."""
    intervals: dict[str, Difference] = field(default_factory=dict)
    """Scores of `tuned` with their own 95 % intervals."""
    doubtful: bool = False  # whether `verdict` is a reason not to call the tuned model better


@dataclass(frozen=True)
class Contamination:
    """Test `rows` that overlap with training rows, by kind of overlap; a row counts for each kind that applies."""

    rows: int
    train_rows: int
    equal: int
    near: int
    short: int
    """Test rows of fewer than 13 words."""
    worded: int
    """Short rows with the same words in the same order as a training row."""
    shared: int
    """Longer rows that share a 13-word passage with a training row."""
    overlapping: int
    """Test rows with any kind of overlap."""
    common: int
    """Number of 13-word passages ignored because more than ten training rows have them."""
    dropped: dict[str, int]
    """Rows already dropped for similarity to a test row, by reason."""
    examples: tuple[dict[str, str], ...]
    """A few overlaps: kind, origin of the test row and the training row, shared words."""
    scores: tuple[Slice, ...]
    """Scores of both models on clean and on overlapping rows; empty without overlap."""
    prompted: int = 0
    """Test rows with the complete prompt of a training row; earlier versions did not count them."""
    inherited: int = 0
    """Test rows whose input was in training or validation of an earlier run that this one starts from."""
    unknown: tuple[str, ...] = ()
    """Folders that this run starts from, trained on unknown rows."""


@dataclass(frozen=True)
class NewClass:
    """A class that the champion does not have: the tuned model's scores on it, with their 95 % intervals."""

    label: str
    rows: int
    """Test rows with the class; of tags, entities."""
    verdict: str
    """`learned` (more than half of its rows are recognised), `not learned`, `inconclusive`, or `too few rows`."""
    scores: dict[str, Difference] = field(default_factory=dict)
    """Recall, precision and f1; without test rows empty."""


@dataclass(frozen=True)
class ClassChanges:
    """How the classes of the rows differ from those of the champion."""

    new: tuple[NewClass, ...] = ()
    lost: tuple[str, ...] = ()
    """Classes of the champion without rows now."""
    renamed: dict[str, str] = field(default_factory=dict)
    """The champion's classes that have another name now."""
    hints: tuple[tuple[str, str, int, int], ...] = ()
    """A class that appeared, a class of the champion that stopped, and for how many of how many of its rows the
    champion's model answers that class."""
    known: Slice | None = None
    """Both models (`base` is the champion) on the rows of the champion's classes; None without other rows."""


@dataclass(frozen=True)
class Champion:
    """The run to compare the tuned model with, on rows that neither was trained on."""

    folder: str
    scores: dict[str, float]
    """Scores on the shared rows."""
    difference: dict[str, Difference]
    """Tuned minus champion."""
    left_out: dict[str, str]
    """Metrics that could not be compared, each with the reason."""
    tuned: dict[str, float] = field(default_factory=dict)
    """Scores of the tuned model on the shared rows."""
    rows: int = 0
    """Number of shared test rows."""
    asked: int = 0
    """Number of shared rows that the champion's model answered now, because its own run did not test them."""
    partial: dict[str, str] = field(default_factory=dict)
    """Metrics that are compared without some of the shared rows, each with their number and the reason."""
    classes: ClassChanges | None = None
    """None if the classes are the same, or not known."""
    new: NewRows | None = None
    """None if no test row is new to it, or if that is not known."""
    why_no_new: str = ""
    """Why there is no `new`."""


@dataclass(frozen=True)
class SimpleBaseline:
    """A baseline without fine-tuning on the rows that both it and the tuned model answered."""

    name: str
    """As gates name it, such as `tfidf`."""
    title: str
    scores: dict[str, float]
    difference: dict[str, Difference]
    """Tuned minus baseline."""
    tuned: dict[str, float]
    """Scores of the tuned model on the same rows."""
    note: str
    """What it was fitted on, and how."""


@dataclass(frozen=True)
class Control:
    """The test rows with pictures, answered by both models with other pictures."""

    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    """The tuned model with the rows' own pictures minus with the others: what the picture is worth."""
    base_difference: dict[str, Difference]
    """The same of the base model."""
    scores: Slice
    """Both models with the rows' own pictures, on the same rows."""
    rows: int = 0
    note: str = ""  # rows that were left out, and why


@dataclass(frozen=True)
class Calibration:
    """The temperature that corrects a tuned model's probabilities; `calibration.json` next to the model."""

    temperature: float
    """Divides the logits before softmax or sigmoids; the likeliest label stays the same."""
    labels: tuple[str, ...]
    """The labels that the model chooses from, in the order of its outputs; of chat and completion, the answers."""
    many: bool
    """Whether each label is a yes-or-no question (sigmoids), or one of them is right (softmax)."""
    rows: int
    """Validation rows that it was fitted on."""
    before: dict[str, float]
    """Metrics of the validation rows at temperature 1."""
    after: dict[str, float]
    trained_sha256: str | None = None
    """Hash of the trained weights that it belongs to."""
    outside: int = 0
    """Validation rows whose reference is none of the labels."""


@dataclass(frozen=True)
class Reliability:
    """The tuned model's probabilities on the test rows, before and after its temperature."""

    record: Calibration | None
    """None without a temperature."""
    why: str = ""
    """Why there is no temperature."""
    before: dict[str, float] = field(default_factory=dict)
    """At temperature 1; empty without test rows."""
    after: dict[str, float] = field(default_factory=dict)
    """Empty without a temperature."""
    difference: dict[str, Difference] = field(default_factory=dict)
    bins_before: tuple[tuple[float, float, float], ...] = ()
    """Of each bin that is not empty: mean probability, share right, number of choices."""
    bins_after: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Threshold:
    """The lowest confidence that proves `evaluate.decide` on validation `rows`."""

    risk: float
    confidence: float
    value: float | None
    """Answers with at least this confidence are decided; None: none is."""
    rows: int
    decided: int
    """Rows with at least this confidence."""
    wrong: int
    """Errors among them."""


@dataclass(frozen=True)
class Decision:
    """Rules for a tuned model's answers, fitted on validation `rows`; `decision.json` next to the model.

    `labels` and `many` are as in `Calibration`. Rules use temperature 1, which does not depend on these rows' labels.
    """

    labels: tuple[str, ...]
    many: bool
    rows: int
    checkpoints: int
    """Checkpoints that training chose from by their scores on the same rows."""
    threshold: Threshold | None = None
    """None without `evaluate.decide`."""
    set_bounds: tuple[float, ...] = ()
    """Probability from which each label belongs to the prediction set; empty without `evaluate.sets`."""
    coverage: float | None = None
    per_class: bool = False
    free_labels: tuple[str, ...] = ()
    """Labels that are in every set, because too few validation rows have them."""
    lowest_score: float | None = None
    """Rows with a lower score are out of scope; None if the validation rows are too few to call any."""
    false_alarms: float | None = None
    """Share of usual rows that may be called out of scope; None without `evaluate.out_of_scope`."""
    trained_sha256: str | None = None
    """Hash of the trained weights that they belong to."""
    outside: int = 0
    """Validation rows whose reference is none of the labels; they count as errors."""


@dataclass(frozen=True)
class Decided:
    """The decisions on test rows."""

    record: Decision | None
    """None if they could not be fitted."""
    why: str = ""
    """Why they could not."""
    curve: tuple[tuple[float, float], ...] = ()
    """Of the most confident test rows: their share, and the error rate among them."""


@dataclass(frozen=True)
class Evaluation:
    """Base and tuned model on the same held-out rows."""

    base: dict[str, float]
    tuned: dict[str, float]
    difference: dict[str, Difference]
    samples: tuple[dict[str, str], ...]
    """A few rows with prompt, reference, base answer and tuned answer."""
    rows: int
    signatures: dict[str, str] = field(default_factory=dict)
    """How each metric was computed, e.g. sacrebleu's signature."""
    baseline: str | None = None
    """Name of the baseline that replaces a base model without a trained head; None with a base model."""
    baseline_reason: str = ""
    """Why the base model cannot answer; the baseline then replaces it."""
    guessable: tuple[str, ...] = ()
    """Metrics in which guessing by class frequency beats the baseline on these rows."""
    details: Json = field(default_factory=dict)
    """Task-specific details of base and tuned: a table of classes, a confusion matrix."""
    flips: dict[str, Flips] = field(default_factory=dict)
    """By right-or-wrong metric."""
    slices: dict[str, tuple[Slice, ...]] = field(default_factory=dict)
    """By column of `evaluate.slices`, the most frequent values first."""
    studies: dict[str, Study] = field(default_factory=dict)
    """By name: the studies in the recipe, of forgetting, fairness, benchmarks and a judge."""
    exports: dict[str, Study] = field(default_factory=dict)
    """By format: the exports that the recipe names, `tuned` being the export's scores and `base` the tuned model's."""
    contamination: Contamination | None = None
    """None without test rows."""
    champion: Champion | None = None
    """None without a champion in the recipe."""
    simple_baselines: dict[str, SimpleBaseline] = field(default_factory=dict)
    """By name; `signatures` has the reason of one that could not be scored."""
    controls: dict[str, Control] = field(default_factory=dict)
    """By name, as in `evaluate.controls`; empty without pictures."""
    pictured: int = 0
    """Test rows with pictures."""
    control_run: ControlScores | None = None
    """None if the recipe has no control run; `why_none` tells if it was turned off."""
    teacher: TeacherScores | None = None
    """None without a teacher."""
    reliability: Reliability | None = None
    """None if the task does not choose, or without `evaluate.calibrate`."""
    decided: Decided | None = None
    """None without `evaluate.decide`, `evaluate.sets` and `evaluate.out_of_scope`."""
    intervals: dict[str, Difference] = field(default_factory=dict)
    """The tuned model's own scores on the test rows, each with its 95 % interval."""
    failed: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """The user's own metrics that failed, each with its problem: what, where, fix."""

    def by_name(self, split: str) -> dict[str, float]:
        """Return the scores of `base` or `tuned`, including studies, by the names that gates use."""
        scores = dict(getattr(self, split))
        exports = {f"deploy.{name}": study for name, study in self.exports.items()} if split == "tuned" else {}
        for name, study in (self.studies | exports).items():
            scores |= {f"{name}.{metric}": value for metric, value in getattr(study, split).items()}
        return scores

    def of_exports(self) -> dict[str, float]:
        """Return the tuned model's scores on the rows that its exports answered, by the names that gates use."""
        pairs = self.exports.items()
        return {f"deploy.{name}.{metric}": value for name, one in pairs for metric, value in one.base.items()}

    def own_intervals(self) -> dict[str, Difference]:
        """Return the tuned model's scores with their own intervals, including studies, by the names that gates use."""
        pairs = self.studies.items()
        return self.intervals | {
            f"{name}.{metric}": one for name, study in pairs for metric, one in study.intervals.items()
        }

    def differences(self) -> dict[str, Difference]:
        """Return the differences, including studies, by the names that gates use."""
        changes = dict(self.difference)
        exports = {f"deploy.{name}": study for name, study in self.exports.items()}
        for name, study in (self.studies | exports).items():
            changes |= {f"{name}.{metric}": value for metric, value in study.difference.items()}
        return changes
