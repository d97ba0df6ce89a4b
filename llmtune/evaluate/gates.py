"""Gates: decide whether the recipe's requirements on the scores pass, fail or are inconclusive on these rows."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from llmtune.errors import GateFailed, GateUnsure, Problem, RecipeError
from llmtune.evaluate.champion import open_champion
from llmtune.evaluate.evaluation_file import list_failed, load_with_exports
from llmtune.evaluate.paired_statistics import (
    ROUNDING,
    allow_for_other,
    name_groups,
    row_deviation,
    rows_needed,
    smallest_difference,
    widen,
)
from llmtune.evaluate.significance import ALL_CHANCE, ALL_TIES, INCONCLUSIVE, NOT_APPLICABLE, is_open, outcome
from llmtune.evaluate.source_labels import DOUBTFUL
from llmtune.recipe.evaluate_section import ERROR, EvaluateSection, WhenUnsure
from llmtune.recipe.gate_grammar import SIMPLE_BASELINES, Gate, Operator, parse_gate
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import RELEASE_PREFIX
from llmtune.recipe.task_facts import CONTROL_RUNS, CONTROLS
from llmtune.records import Difference, Json
from llmtune.store.report_record import Power
from llmtune.store.run_folder import RunFolder
from llmtune.store.score_records import Champion, Evaluation, GateResult

COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
NO_INTERVAL = "{} are too few for an interval, or the metric has no range and nearly all of them have the same value"
ORIGINS: Mapping[str | None, str] = {
    "champion": " from the champion",
    **{name: f" from {name}" for name in (*SIMPLE_BASELINES, *CONTROL_RUNS)},
    **{name: f" from the tuned model with {pictures}" for name, pictures in CONTROLS.items()},
}
"""What a difference is from, by the gate's other model; the base needs no name."""
UNABLE = (ALL_TIES, ALL_CHANCE)
UNDEFINED = "the score is undefined on these rows"
UNDECIDABLE = "no number of rows would decide it"
NOT_MEASURED = "not measured"
READ = "Read the rows that it gets wrong in report.html."
COUNTED: dict[WhenUnsure, bool | None] = {"fail": False, "pass": True, "report": None}


def check_gates(section: EvaluateSection, evaluation: Evaluation) -> tuple[GateResult, ...]:
    """Check each gate of `evaluate.gates`; a gate on an unmeasured metric does not pass.

    `X > base` compares the scores. `X.low > base` compares the low end of the difference's paired interval (95 %, wider
    with `evaluate.looks`) with zero. `X.high <= 0.05` compares an end of the score's own interval. `champion` is the
    run named by `evaluate.champion`; scores are then compared on the rows that both runs share, and a gate passes if
    `release:NAME` has no release yet. A simple baseline such as `tfidf` and a control run such as `sft` answer the same
    rows. `blind` and `swapped` are the tuned model itself, on the test rows with pictures. `decide` has the rule for
    interval ends. `when_unsure` sets how an inconclusive gate counts.

    Raises RecipeError for a text that is not a gate.
    """
    return tuple(check_with_classes(parse_gate(text), evaluation, section) for text in section.gates)


def check_with_classes(gate: Gate, evaluation: Evaluation, section: EvaluateSection) -> GateResult:
    """Check a gate on the champion also on the rows of the classes that the champion has; the worse result counts.

    Rows of new classes are wrong for the champion, so a gain there could hide a loss elsewhere.
    """
    result, champion = check_gate(gate, evaluation, section), evaluation.champion
    class_slice = champion.classes.known if champion and champion.classes else None
    applies = gate.against == "champion" and not gate.rows
    if champion is None or class_slice is None or not applies or gate.metric not in class_slice.difference:
        return result
    part = replace(champion, scores=class_slice.base, tuned=class_slice.tuned, difference=class_slice.difference)
    other = check_gate(gate, replace(evaluation, champion=part), section)
    order = (False, None, True)
    if order.index(other.passed) >= order.index(result.passed):
        return result
    where = f"on the {class_slice.rows} rows of the champion's classes; {result.got} on all"
    return replace(other, note="; ".join(part for part in (other.note, where) if part))


def check_gate(gate: Gate, evaluation: Evaluation, section: EvaluateSection) -> GateResult:
    """Check one gate; it does not apply without a release to compare with, or without new rows."""
    if why := why_idle(gate, evaluation, section):
        return GateResult(gate.text, gate.text, NOT_APPLICABLE, passed=True, note=why, applies=False)
    tuned, scores, differences = compared_scores(gate, evaluation)
    if gate.metric not in tuned or (gate.against and gate.metric not in scores):
        return GateResult(gate.text, gate.text, why_unmeasured(gate, evaluation), passed=False)
    name = f"{gate.metric}[{gate.rows}]" if gate.rows else gate.metric
    if gate.part is None:
        actual, limit = tuned[gate.metric], threshold(gate, scores.get(gate.metric, math.nan))
        wanted = f"{name} {gate.op} {number(limit)}"
        passed: bool | None = is_met(gate.op, actual, limit)
        note = UNDEFINED if math.isnan(actual) or math.isnan(limit) else ""
        own = evaluation.own_intervals().get(gate.metric)
        if own is not None and own.test in UNABLE:
            passed, note = COUNTED[section.when_unsure], f"{INCONCLUSIVE}: {own.test}, so {UNDECIDABLE}"
        return GateResult(gate.text, wanted, number(actual), passed, note)
    change, limit = differences.get(gate.metric), margin(gate, scores[gate.metric])
    if change is None:
        return GateResult(gate.text, gate.text, "no interval: these rows give none", passed=False)
    change = allow_for_other(change, scores[gate.metric], gate.factor)
    wide, alpha = widen(change, section.alpha), section.alpha
    actual = wide.low if gate.part == "low" else wide.high
    passed, note = decide(gate, actual, wide, limit), ""
    if passed is None:
        passed, note = COUNTED[section.when_unsure], f"{INCONCLUSIVE}: {explain_unsure(gate, change, limit, alpha)}"
    elif math.isnan(change.value):
        note = UNDEFINED
    elif passed and not gate.on_own_interval and is_worse(gate.op, wide):
        note = f"worse, and shown to be within the margin: {number(wide.low)} to {number(wide.high)}"
    origin = ORIGINS.get(gate.against, "")
    level = f", at {100 * (1 - alpha):.5g} %," if section.looks else ""
    what = f"interval of {name}" if gate.on_own_interval else f"difference{origin}"
    what += f" in {name}" if gate.rows and not gate.on_own_interval else ""
    what += f", widened by the error of {gate.against} * {gate.factor:g}," if gate.factor != 1 else ""
    wanted = f"{gate.part} end of the {what}{level} {gate.op} {number(limit)}"
    return GateResult(gate.text, wanted, number(actual), passed, note)


def decide(gate: Gate, actual: float, change: Difference, limit: float) -> bool | None:
    """Whether a gate on one end of an interval passes; None if the rows are inconclusive.

    A gate fails if the entire interval is beyond the limit. A gate with a margin, which equal models pass, also fails
    if the entire interval is on the worse side of zero: the tuned model is shown to be worse, and not shown to be
    within the margin.
    """
    op = gate.op
    if is_met(op, actual, limit):
        return True
    if op == "==" or math.isnan(limit) or math.isnan(change.value):
        return False
    beyond = is_met("<", change.high, limit) if op in (">", ">=") else is_met(">", change.low, limit)
    is_margin = not gate.on_own_interval and is_met(op, 0.0, limit)
    return False if beyond or (is_margin and is_worse(op, change)) else None


def is_worse(op: Operator, change: Difference) -> bool:
    """Whether the entire interval is on the side of zero that this operator's gates call worse."""
    return change.high < 0 if op in (">", ">=") else op in ("<", "<=") and change.low > 0


def explain_unsure(gate: Gate, change: Difference, limit: float, alpha: float) -> str:
    """Return how many rows would decide the gate, and at which true difference; `change` has its 95 % interval."""
    if math.isnan(change.low):
        return NO_INTERVAL.format(f"{change.n} rows{name_groups(change.n, change)}")
    if change.test in UNABLE:
        return f"{change.test}, so {UNDECIDABLE}"
    assumed, needed = plan_rows(gate, change, limit, alpha)
    score = gate.metric if gate.on_own_interval else "the difference"
    if needed is None:
        return f"{score} is at the limit, {number(limit)}, so {UNDECIDABLE}"
    if needed <= change.n:  # the plan has 80 % power: this is the other 20 %, or there was a change
        assumed, needed = change.value, rows_needed(row_deviation(change), abs(change.value - limit), alpha)
    unchanged = assumed == 0 and not gate.on_own_interval
    case = "nothing changed" if unchanged else f"{score} is {number(assumed)}"
    few = f"{change.n} rows{name_groups(change.n, change)} are too few"
    return (
        f"{few}; about {needed:,}{name_groups(needed, change)} would tell, with 80 % power, if {case}"
        if needed
        else few
    )


def plan_rows(gate: Gate, change: Difference, limit: float, alpha: float) -> tuple[float, int | None]:
    """Return a true difference to plan with, and the rows needed to decide a gate with 80 % power.

    A gate with a margin is meant for models that do not differ: zero. Otherwise it is the observed difference; for a
    gate on the tuned model's own interval, the observed score.
    """
    is_margin = not gate.on_own_interval and limit != 0 and is_met(gate.op, 0.0, limit)
    assumed = 0.0 if is_margin else change.value
    return assumed, rows_needed(row_deviation(change), abs(assumed - limit), alpha)


def is_met(op: Operator, actual: float, limit: float) -> bool:
    """Whether a comparison of two numbers holds; False for NaN. Numbers that differ only by rounding are equal."""
    if math.isclose(actual, limit, rel_tol=ROUNDING, abs_tol=ROUNDING):
        actual = limit
    return not (math.isnan(actual) or math.isnan(limit)) and COMPARE[op](actual, limit)


def margin(gate: Gate, other: float) -> float:
    """Return the right-hand side of the gate as a difference from the `other` model's score."""
    return threshold(gate, other) - other


def compared_scores(
    gate: Gate, evaluation: Evaluation
) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, Difference]]:
    """Return scores of the tuned model and of the gate's other model on the same rows, and the differences.

    A gate on the tuned model's own interval compares with a model that scores zero.
    """
    if gate.rows:
        return scores_on_new(gate, evaluation)
    if gate.on_own_interval:
        scores = evaluation.by_name("tuned")
        return scores, dict.fromkeys(scores, 0.0), evaluation.own_intervals()
    if gate.against is not None and gate.against in CONTROLS:
        control = evaluation.controls.get(gate.against)
        return (control.scores.tuned, control.tuned, control.difference) if control else ({}, {}, {})
    if gate.against is not None and gate.against in CONTROL_RUNS:
        control_run = evaluation.control_run
        return (control_run.tuned, control_run.scores, control_run.difference) if control_run else ({}, {}, {})
    if gate.against != "champion" and gate.against not in SIMPLE_BASELINES:
        others = evaluation.of_exports() if gate.on_export else evaluation.by_name("base")
        return evaluation.by_name("tuned"), others, evaluation.differences()
    known = evaluation.simple_baselines
    opponent = evaluation.champion if gate.against == "champion" else known.get(gate.against or "")
    if opponent is None:
        return evaluation.by_name("tuned"), {}, {}
    return {**evaluation.by_name("tuned"), **opponent.tuned}, opponent.scores, opponent.difference


def scores_on_new(
    gate: Gate, evaluation: Evaluation
) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, Difference]]:
    """Return what `compared_scores` does, on the rows that are new to the champion."""
    new = evaluation.champion.new if evaluation.champion else None
    if new is None:
        return {}, {}, {}
    if gate.on_own_interval:
        return new.scores.tuned, dict.fromkeys(new.scores.tuned, 0.0), new.intervals
    if gate.against == "champion":
        return new.tuned, new.before, new.difference
    return new.scores.tuned, new.scores.base, new.scores.difference


def why_idle(gate: Gate, evaluation: Evaluation, section: EvaluateSection) -> str:
    """Return why a gate has nothing to judge; empty if it applies."""
    champion, address = evaluation.champion, section.champion or ""
    if champion is None and address.startswith(RELEASE_PREFIX) and (gate.rows or gate.against == "champion"):
        return f"{address} has no release yet"
    if not gate.rows or (champion and champion.new):
        return ""
    if champion is None:
        return "without a champion, all test rows are new"
    return champion.why_no_new or "an earlier version of llmtune scored this run"


def why_unmeasured(gate: Gate, evaluation: Evaluation) -> str:
    """Return why there is no score to compare with."""
    if gate.on_export:
        return "not measured: `llmtune run` makes and scores the exports"
    study, notes = evaluation.studies.get(gate.metric.partition(".")[0]), evaluation.signatures
    known = [study.signatures.get(gate.metric.partition(".")[2], ""), *study.signatures.values()] if study else []
    reasons = [one for one in (notes.get(gate.metric, ""), *known) if one.startswith(NOT_MEASURED)]
    if gate.metric not in evaluation.by_name("tuned"):
        return next(iter(reasons), f"{NOT_MEASURED}: the last evaluation did not compute it")
    if (name := gate.against or "") in SIMPLE_BASELINES and name not in evaluation.simple_baselines and name in notes:
        return notes[name]
    if name in CONTROLS and name not in evaluation.controls:
        return f"{NOT_MEASURED}: no test row has a picture, or evaluate.controls was off"
    run = evaluation.control_run if evaluation.control_run and name == evaluation.control_run.name else None
    if run and (why := run.why_none or run.left_out.get(gate.metric, "")):
        return f"{NOT_MEASURED}: {why}"
    if gate.rows and gate.against == "champion":
        return "not comparable: the champion's model could not answer the new rows"
    left_out = evaluation.champion.left_out if evaluation.champion and gate.against == "champion" else {}
    absent = f"{NOT_MEASURED}: {name or 'the tuned model'} has no {gate.metric} on these rows"
    return f"not comparable: {left_out[gate.metric]}" if gate.metric in left_out else absent


def require_gates(gates: Sequence[GateResult], report: Json, failed_metrics: Sequence[Problem] = ()) -> None:
    """Raise GateFailed if any gate failed, else GateUnsure if any is inconclusive; the error has the run's report.

    Raises RecipeError first if metrics of the user's own failed: gates on them say nothing about the model.
    """
    RecipeError.collect(failed_metrics)
    failed, unsure = ([to_problem(gate) for gate in gates if gate.passed is one] for one in (False, None))
    if failed or unsure:
        error = GateFailed(*failed) if failed else GateUnsure(*unsure)
        error.report = report
        raise error


def to_problem(gate: GateResult) -> Problem:
    """Return why a gate did not pass, and what may help."""
    failed = "gate failed: " if gate.passed is False else ""
    return Problem(f"{failed}wanted {outcome(gate)}", gate.name, suggest_step(gate))


def suggest_step(gate: GateResult) -> str:
    """Return what may help a gate that did not pass."""
    if gate.name == DOUBTFUL:
        return "Correct the labels, or remove the file from data."
    if not is_open(gate):
        named = gate.got.startswith((NOT_MEASURED, "not comparable", "no interval")) or gate.note == UNDEFINED
        return "Correct the cause, or change the gate." if named else f"{READ} Then correct rows, training or gate."
    if UNDECIDABLE in gate.note:
        return "More test rows do not help: change the training or its rows, or the gate's limit."
    return "Add rows to data.test or widen the gate's margin; evaluate.when_unsure sets how this counts."


def note_gates(run: RunFolder, recipe: Recipe, gates: Sequence[GateResult]) -> None:
    """Record in a trained run whether it passed its gates, which decides what its name means.

    None if they are not judged: the run was not scored, or metrics of the user's own failed.
    """
    results = [gate.passed for gate in gates]
    judged = len(results) >= len(recipe.evaluate.gates) and not list_failed(run.path / "evaluation")
    together = "failed" if False in results else "undecided" if None in results else "passed"
    run.note(gates=together if judged else None)


def threshold(gate: Gate, other: float) -> float:
    """Return the right-hand side of the gate as a score; `other` is the score of the model it compares with."""
    return other * gate.factor + gate.offset if gate.number is None else gate.number


def number(value: float) -> str:
    """Write a score with four significant digits."""
    return "not a number" if math.isnan(value) else f"{value:.4g}"


# Resolution of the test rows


OF_RUN = "the tuned model and the base differed row by row in this run's last evaluation"
OF_CHAMPION = "the champion and its own base differ row by row"


def list_power(section: EvaluateSection, evaluation: Evaluation, rows: int | None = None) -> list[Power]:
    """Return what the test rows can show: gates on intervals first, then metrics without such a gate.

    `rows` is the current number of test rows, if it differs from the evaluation's. Metrics without any row
    differences are skipped.
    """
    powers = []
    for gate in map(parse_gate, section.gates):
        _, scores, differences = compared_scores(gate, evaluation)
        change = differences.get(gate.metric)
        if gate.part and change and gate.metric in scores and has_spread(change):
            change = allow_for_other(change, scores[gate.metric], gate.factor)
            assumed, needed = plan_rows(gate, change, margin(gate, scores[gate.metric]), section.alpha)
            one = measure_power(gate.metric, gate.against or "", change, evaluation, rows, section.alpha)
            powers.append(replace(one, gate=gate.text, assumed=assumed, rows_needed=needed))
    gated = {(one.metric, one.against) for one in powers}
    champion = evaluation.champion.difference if evaluation.champion else {}
    for against, differences in (("base", evaluation.difference), ("champion", champion)):
        for metric, change in differences.items():
            if (metric, against) not in gated and has_spread(change):
                powers.append(measure_power(metric, against, change, evaluation, rows))
    return powers


def has_spread(change: Difference) -> bool:
    """Whether an interval shows how much rows differ."""
    return math.isfinite(change.low) and change.high > change.low


def measure_power(
    metric: str, against: str, change: Difference, evaluation: Evaluation, rows: int | None, alpha: float = ERROR
) -> Power:
    """Return the smallest difference that one metric's rows can detect."""
    rows = rows if rows is not None and change.n == evaluation.rows else change.n
    return Power(metric, against, rows, smallest_difference(row_deviation(change), rows, alpha))


def plan_power(recipe: Recipe, run: RunFolder, *, prepared: bool) -> tuple[list[Power], str]:
    """Return what the test rows will be able to show, based on an existing evaluation, and where that is from.

    Uses the run's own evaluation, else the champion's: the champion's difference from its base then replaces the
    tuned model's differences from base and champion. The number of test rows is the run's if they are `prepared`.
    """
    rows = run.facts("prepare")["kept"].get("test") if prepared else None
    run_evaluation = load_with_exports(run)
    champion = open_champion(recipe, run.path)
    seen, source = (
        (run_evaluation, OF_RUN) if run_evaluation else (champion.evaluation if champion else None, OF_CHAMPION)
    )
    if seen is not None and champion is not None and (run_evaluation is None or run_evaluation.champion is None):
        like = champion.evaluation
        seen = replace(seen, champion=Champion(recipe.evaluate.champion or "", like.tuned, like.difference, {}))
    power = list_power(recipe.evaluate, seen, rows) if seen else []
    return power, source
