"""Which differences are significant: one bar for the p of many metrics, lowered for many looks at the same rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from llmtune.display.number_format import chance as chance_text
from llmtune.display.number_format import missing
from llmtune.evaluate.metric_info import COSTS, better_side, direction, rank_metrics
from llmtune.recipe.gate_grammar import Opponent, parse_gate
from llmtune.records import FEWEST_ROWS, Difference
from llmtune.store.score_records import GateResult

SAME_FINDING = (("loss", "bits_per_byte", "perplexity"),)
"""Metrics that are one number in several units."""
CHANCE = 0.05
TWINS = ("accuracy", "f1_micro")
"""Two names of one number if each row has one label; only then both changes are equal."""
INCONCLUSIVE = "inconclusive"
"""A word of every verdict, and of gates."""
NOT_APPLICABLE = "not applicable"
"""The result of a gate that finds nothing to judge."""
ALL_TIES, ALL_CHANCE = "the judge called every row a tie", "the judge agrees with people no more than chance"
"""The `test` of a difference that its judge cannot tell: the interval covers everything."""
Differences = Mapping[str, Difference]


@dataclass(frozen=True)
class MetricChanges:
    """Metrics, grouped by what their differences show."""

    better: list[str]
    worse: list[str]
    within: list[str]
    """Not better, and within the margin of a passed gate."""
    tolerated: list[str]
    """The metrics of `within` that are worse."""
    failed: list[str]
    """Worse, with a gate that did not pass."""
    contrary: Sequence[str] = ()
    """Metrics that tell more than all of `better` and `worse`, with values on the other side, but not clearly."""
    bar: str = ""
    """A sentence on the bar for p; empty if it is 0.05 and every metric below 0.05 is beyond it."""


def is_open(gate: GateResult) -> bool:
    """Return whether a gate is inconclusive, whatever `evaluate.when_unsure` makes of it."""
    return gate.passed is None or gate.note.startswith(INCONCLUSIVE)


def outcome(gate: GateResult) -> str:
    """Return the wanted value, the actual value and the note."""
    return "; ".join(part for part in (f"{gate.wanted}, got {gate.got}", gate.note) if part)


def countable(differences: Differences) -> dict[str, Difference]:
    """Return the differences with enough rows."""
    return {metric: change for metric, change in differences.items() if change.n >= FEWEST_ROWS}


def find_changes(
    differences: Differences,
    gates: Sequence[GateResult],
    against: Opponent,
    chance: float = CHANCE,
    sides: Mapping[str, int] | None = None,
    rows: str = "",
) -> MetricChanges:
    """Group the metrics by the differences from one opponent.

    A metric with a gate on its interval was chosen in advance, so only its interval decides, as in the gate. All other
    metrics share the error rate (`speaking`). `sides` are those of `list_sides`; `rows` names the slice that is judged.
    """
    sides = {metric: better_side(metric) for metric in differences} if sides is None else sides
    gated = defaultdict[str, list[GateResult]](list)
    for result in gates:
        gate = parse_gate(result.name)
        if gate.part and gate.against == against and gate.rows == rows and gate.metric in differences:
            gated[gate.metric].append(result)
    others = {metric: change for metric, change in differences.items() if metric not in gated}
    signs = speaking(others, chance, sides)
    signs |= {metric: direction(metric, differences[metric], sides.get(metric)) for metric in gated}
    passed = [name for name, results in gated.items() if all(one.passed and not is_open(one) for one in results)]
    within = [name for name in passed if signs[name] <= 0 and any(bounds_loss(one) for one in gated[name])]
    better, worse = ([name for name in differences if signs.get(name) == sign] for sign in (1, -1))
    clear = {*better, *worse, *within}
    short = {name: change for name, change in countable(differences).items() if name not in clear and sides.get(name)}
    sign = bool(better) - bool(worse)
    telling = takewhile(
        short.__contains__, rank_metrics([*better, *worse, *(name for name in short if name not in COSTS)])
    )
    return MetricChanges(
        better=distinct(better, differences),
        worse=distinct([name for name in worse if name not in within], differences),
        within=within,
        tolerated=[name for name in within if signs[name] < 0],
        failed=[name for name in gated if signs[name] < 0 and name not in passed],
        contrary=[name for name in telling if short[name].value * sides[name] * sign < 0],
        bar=describe_bar(short, list_family(others, sides), clear, chance),
    )


def bounds_loss(result: GateResult) -> bool:
    """Whether a gate is on the interval's worse end: the better end never shows that a model is not worse."""
    gate = parse_gate(result.name)
    return gate.part == ("low" if gate.op in (">", ">=") else "high")


def list_family(differences: Differences, sides: Mapping[str, int]) -> list[str]:
    """Return the metrics that share the error rate: no costs, none without a better side, each number once."""
    changes = countable(differences)
    return distinct([metric for metric in changes if metric not in COSTS and sides.get(metric)], changes)


def speaking(
    differences: Differences, chance: float = CHANCE, sides: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the metrics with a significant change: 1 for better, -1 for worse.

    The interval must exclude zero, at least ten rows must be measured, and p must be significant after correction for
    all metrics. At most one in twenty evaluations without any change then reports one, however many metrics. Source:
    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979. Metrics that are one number in several units
    count once. Costs (`kl`, `answers_cut`) and metrics without a better direction do not count.
    """
    sides = {metric: better_side(metric) for metric in differences} if sides is None else sides
    changes = countable(differences)
    signs = {metric: direction(metric, change, sides.get(metric)) for metric, change in changes.items()}
    signs = {metric: sign for metric, sign in signs.items() if metric not in COSTS and sides.get(metric)}
    counted = list_family(differences, sides)
    held = holm({metric: 1.0 if missing(p := changes[metric].p) else p for metric in counted}, chance)
    groups = (*SAME_FINDING, TWINS)
    held |= {
        metric for metric in signs.keys() - counted if any(metric in group and held & {*group} for group in groups)
    }
    return {metric: sign for metric, sign in signs.items() if sign and metric in held}


def holm(ps: Mapping[str, float], chance: float = CHANCE) -> set[str]:
    """Return the names with significant p at the family-wise error `chance` (Holm's procedure)."""
    held = set[str]()
    for place, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        if p > chance / (len(ps) - place):
            break
        held.add(name)
    return held


def describe_bar(short: Differences, family: Sequence[str], clear: set[str], chance: float) -> str:
    """Name the `short` metrics with p below 0.05 that do not reach the bar, and the bar; empty if both are trivial.

    The bar is that of the next metric in Holm's procedure, after the `clear` ones of the `family`.
    """
    names = distinct([name for name, change in short.items() if name not in COSTS and change.p <= CHANCE], short)
    looks = round(CHANCE / chance)
    if not names and looks == 1:
        return ""
    left = max(1, len([name for name in family if name not in clear]))
    level = f"{CHANCE:g}" + (f" / {looks} looks" if looks > 1 else "")
    text = f"The bar for p is {chance / left:.2g} ({level}"
    text += f" / {left} metrics, Holm's correction)." if left > 1 else ")."
    if names:
        parts = [f"{name.replace('_', ' ')} (p {chance_text(short[name].p)})" for name in names]
        text = f"Below {CHANCE:g}, but not beyond the bar: {', '.join(parts)}. {text}"
    return text


def distinct(metrics: Sequence[str], changes: Differences) -> list[str]:
    """Keep only the first of the metrics that are the same number in other units or under another name."""
    left_out = {metric for group in SAME_FINDING for metric in [one for one in group if one in metrics][1:]}
    if all(metric in metrics for metric in TWINS):
        first, second = (changes[metric].value for metric in TWINS)
        if abs(first - second) < 1e-9:  # the same number up to rounding
            left_out.add(TWINS[1])
    return [metric for metric in metrics if metric not in left_out]
