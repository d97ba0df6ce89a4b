"""Calibration: whether a model is right as often as its probabilities say, and the temperature that corrects them.

Shapes: U choices, K labels, N rows, C numbers per choice (1, or K yes-or-no questions), B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.intervals import Floats, Formula
from llmtune.evaluate.metric import Measure, PairedMeasures, brier_bounds, columns, quotient, ratio, without_interval
from llmtune.evaluate.paired_statistics import Bounds, share_bounds
from llmtune.recipe.task_facts import CALIBRATION
from llmtune.store.atomic_files import read_json, write_json
from llmtune.store.run_folder import RunFolder
from llmtune.store.score_records import Calibration, Reliability

RulesT = TypeVar("RulesT")
RECORD = "calibration.json"
BINS = 15
"""Bins of equal width, as in Guo et al."""
FEWEST_ROWS = 20
"""Validation rows needed to fit a temperature."""
SPREAD = 0.5
"""Standard deviation of the prior: without evidence, a temperature is between 0.37 and 2.7 in 19 of 20 models."""
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Chosen:
    """A model's choices among K labels, with the right labels: one choice per row, or one per word of a row."""

    labels: tuple[str, ...]
    logits_UK: Floats  # noqa: N815
    """Scores of the labels, before softmax or sigmoids."""
    right_UK: NDArray[np.bool_]  # noqa: N815
    """Whether a label is right: one of each choice, or none if its reference is no label; with `many` any number."""
    rows: tuple[int, ...]
    """[U] index of each choice's row into `EvalInputs.rows`, ascending."""
    many: bool = False
    """Whether each label is a yes-or-no question of its own."""

    @property
    def outside_U(self) -> NDArray[np.bool_]:  # noqa: N802
        """Whether no label can be right, because the reference is none of them; never if `many`."""
        return np.zeros(len(self.rows), bool) if self.many else np.asarray(~self.right_UK.any(1))

    @property
    def outside(self) -> int:
        """The number of rows with such a choice."""
        return len({row for row, outside in zip(self.rows, self.outside_U, strict=True) if outside})

    def probabilities(self, temperature: float = 1.0) -> Floats:
        """Return the probability of each label [U, K]."""
        return np.exp(log_probabilities(self.logits_UK / temperature, many=self.many))

    def one_row_each(self, clusters: Sequence[int]) -> Chosen:
        """Return the choices of the first row of each cluster; `clusters` is indexed by row, and may be empty."""
        first = {cluster: row for row, cluster in reversed([*enumerate(clusters)])}
        kept = [u for u, row in enumerate(self.rows) if not clusters or first[clusters[row]] == row]
        rows = tuple(self.rows[u] for u in kept)
        return replace(self, logits_UK=self.logits_UK[kept], right_UK=self.right_UK[kept], rows=rows)


def log_probabilities(logits: Floats, *, many: bool) -> Floats:
    """Return the logarithm of the softmax over the last dimension, or with `many` of the sigmoids."""
    if many:
        return -np.logaddexp(0, -logits)
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def name_probabilities(
    labels: Sequence[str], logits: Sequence[Sequence[float]], *, many: bool, temperature: float
) -> list[dict[str, float]]:
    """Return the probability of each label for each choice of a row; empty for a choice without logits."""
    logits_UK = (np.asarray(scores, dtype=np.float64) / temperature for scores in logits)
    return [
        dict(zip(labels, np.exp(log_probabilities(scores_K, many=many)).tolist(), strict=True)) if len(scores_K) else {}
        for scores_K in logits_UK
    ]


def gather_choices(
    labels: Sequence[str],
    logits: Mapping[int, Sequence[Sequence[float]]],
    right: Mapping[int, Sequence[Sequence[str]]],
    *,
    many: bool,
) -> Chosen | None:
    """Join each row's choices with their right labels; None without any. A choice without logits is skipped."""
    choices = [
        (row, scores, names)
        for row in sorted(logits)
        for scores, names in zip(logits[row], right[row], strict=True)
        if len(scores)
    ]
    if not choices:
        return None
    rows, scores, names = zip(*choices, strict=True)
    right_UK = np.array([[label in one for label in labels] for one in names])
    return Chosen(tuple(labels), np.array(scores, dtype=np.float64), right_UK, rows, many)


def measure_calibration(metric: str, chosen: Chosen, temperature: float = 1.0) -> Measure:
    """Build a metric of `CALIBRATION`; all choices of a row are added up.

    `ece` is the expected calibration error of Guo et al., "On Calibration of Modern Neural Networks", 2017: it compares
    the probability of the likeliest label, or with `many` of each label, with how often that label is right. It has no
    interval: noise in the bins makes it larger, by more the less certain a model is, so two calibrated models differ.
    `brier` (Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950) sums over the labels, from 0 to
    2; with `many` it is a mean over them, as `nll` is. If the reference is none of the labels, the answer is wrong for
    `ece`; `brier` adds the unlisted answer as a label of probability 0, and `nll` is the mean over the labels, which is
    lowest if no label is preferred.
    """
    logits_UK, right_UK, many = chosen.logits_UK / temperature, chosen.right_UK, chosen.many
    formula: Formula = ratio
    bounds: Bounds | None = share_bounds if many else brier_bounds
    if metric == "ece":
        what = "each label's probability" if many else "the highest probability"
        signature = f"distance between {what} and how often it is right, mean over {BINS} bins of equal width by size"
        parts, formula, bounds = sum_bins(chosen, temperature), ece_formula, without_interval
    elif metric == "brier":
        signature = f"squared errors of the probabilities, {'mean' if many else 'sum'} over the labels"
        parts = count_choices((chosen.probabilities(temperature) - right_UK) ** 2, many=many)
        parts[:, 0] += chosen.outside_U
    else:
        signature = f"negative log-likelihood of {'each label' if many else 'the right label'}, nats"
        wrong_UK = log_probabilities(-logits_UK, many=True) if many else np.zeros(1)
        logs_UK = log_probabilities(logits_UK, many=many)
        parts = count_choices(-np.where(right_UK, logs_UK, wrong_UK), many=many)
        parts[:, 0] -= np.where(chosen.outside_U, logs_UK.mean(1), 0.0)
        bounds = None
    rows, row_U = np.unique(chosen.rows, return_inverse=True)
    sums_NK = np.zeros((len(rows), parts.shape[1]))
    np.add.at(sums_NK, row_U, parts)
    return Measure(metric, sums_NK, formula, signature=signature, bounds=bounds, at=tuple(rows.tolist()))


def count_choices(parts_UK: Floats, *, many: bool) -> Floats:
    """Return [U, 2]: the sum over the labels, and its divisor."""
    return columns(parts_UK.sum(1), np.full(len(parts_UK), parts_UK.shape[1] if many else 1))


def sum_bins(chosen: Chosen, temperature: float) -> Floats:
    """Return [U, 3 B]: by bin of the probability, its sum, how many were right, and their number.

    A bin excludes its lower and includes its upper edge.
    """
    p_UC, right_UC = chosen.probabilities(temperature), chosen.right_UK.astype(np.float64)
    every_U1 = np.arange(len(p_UC))[:, None]
    if not chosen.many:
        best_U1 = chosen.logits_UK.argmax(1)[:, None]
        p_UC, right_UC = p_UC[every_U1, best_U1], right_UC[every_U1, best_U1]
    bin_UC = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], p_UC)
    sums_U3B = np.zeros((len(p_UC), 3, BINS))
    for part, value_UC in enumerate((p_UC, right_UC, np.ones_like(p_UC))):
        np.add.at(sums_U3B[:, part], (every_U1, bin_UC), value_UC)
    return sums_U3B.reshape(len(p_UC), 3 * BINS)


def ece_formula(sums: Floats) -> Floats:
    """[..., 3 B] -> expected calibration error [...]; 0 without choices."""
    probability, right, count = np.split(sums, 3, axis=-1)
    return quotient(np.abs(probability - right).sum(-1), count.sum(-1))


def list_bins(measure: Measure) -> tuple[tuple[float, float, float], ...]:
    """Return mean probability, share right, and number of choices of each bin of an `ece` that is not empty."""
    probability, right, count = np.split(measure.sums_NK.sum(0), 3)
    kept = np.flatnonzero(count)
    return tuple((float(probability[b] / count[b]), float(right[b] / count[b]), float(count[b])) for b in kept)


# The temperature


def fit_temperature(chosen: Chosen) -> float:
    """Return the temperature with the lowest negative log-likelihood of the right labels (Guo et al., section 4.2).

    The logarithm of the temperature has a normal prior around 0. It decides if there are few choices: without it, a
    model that is right on all of 20 rows would get a temperature of 0 (docs/calibration.md has a simulation).
    """
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]  # late, as in `paired_statistics`

    def nats(log_temperature: float) -> float:
        likelihood = measure_calibration("nll", chosen, float(np.exp(log_temperature))).sums_NK[:, 0].sum()
        return float(likelihood) + (log_temperature / SPREAD) ** 2 / 2

    optimum = minimize_scalar(nats, bounds=tuple(np.log([COLDEST, HOTTEST])), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(optimum.x))


def calibrate(validation: Chosen | None) -> Calibration | str:
    """Fit the temperature on the choices of validation rows; or return why there is none."""
    rows = len(set(validation.rows)) if validation is not None else 0
    if validation is None or rows < FEWEST_ROWS:
        return f"a temperature needs {FEWEST_ROWS} validation rows, and {rows} have choices: set data.validation higher"
    if not np.isfinite(validation.logits_UK).all():
        return "the tuned model's outputs on the validation rows are not finite"
    temperature = fit_temperature(validation)
    before, after = (
        {metric: measure_calibration(metric, validation, one).value for metric in CALIBRATION}
        for one in (1.0, temperature)
    )
    labels, many, outside = validation.labels, validation.many, validation.outside
    return Calibration(temperature, labels, many, rows, before, after, outside=outside)


def describe_reliability(
    test: Chosen | None, calibration: Calibration | str, seed: int, clusters: Sequence[int] = ()
) -> Reliability:
    """Measure the probabilities of test rows at temperature 1 and at the fitted temperature, paired."""
    record, why = (None, calibration) if isinstance(calibration, str) else (calibration, "")
    if test is None:
        return Reliability(record, why)
    before, after = (
        {metric: measure_calibration(metric, test, one).in_clusters(clusters) for metric in CALIBRATION}
        for one in (1.0, record.temperature if record else 1.0)
    )
    before_bins, after_bins = list_bins(before["ece"]), list_bins(after["ece"])
    if record is None:
        return Reliability(None, why, PairedMeasures(before).scores()[0], bins_before=before_bins)
    # One temperature cannot move a row across the range of a metric, which `bounds` allows for.
    paired = PairedMeasures(
        *(
            {name: one if name == "ece" else replace(one, bounds=None) for name, one in part.items()}
            for part in (before, after)
        )
    )
    return Reliability(record, why, *paired.scores(), paired.differences(seed), before_bins, after_bins)


def save_calibration(record: Calibration, folder: Path) -> None:
    """Write `calibration.json`."""
    write_json(folder / RECORD, asdict(record))


def run_calibration(run: RunFolder) -> Calibration | None:
    """Return the calibration of a run's tuned model; None if its last evaluation fitted none.

    Raises EnvironmentProblem for a damaged file.
    """
    return read_rules(run.path / "evaluation" / RECORD, Calibration) if run.is_done("evaluate") else None


def run_temperature(run: RunFolder) -> float:
    """Return the temperature of a run's tuned model, 1 without a calibration."""
    record = run_calibration(run)
    return record.temperature if record else 1.0


def read_rules(file: Path, kind: type[RulesT]) -> RulesT | None:
    """Read `calibration.json` or `decision.json`; None if it is missing. Raises EnvironmentProblem if damaged."""
    if not file.exists():
        return None
    try:
        return TypeAdapter(kind).validate_python(read_json(file))
    except ValidationError as error:
        raise EnvironmentProblem.of("damaged", str(file), "Run: llmtune evaluate RUN") from error
