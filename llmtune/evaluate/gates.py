"""Gates: whether what the recipe wants of the scores holds."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence

from llmtune.errors import GateFailed, Problem
from llmtune.recipe.gate_grammar import Gate, parse_gate
from llmtune.records import Difference, Evaluation, GateResult

COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": math.isclose,
}


def check_gates(gates: Sequence[str], evaluation: Evaluation) -> tuple[GateResult, ...]:
    """Check each gate of `evaluate.gates`; one whose metric was not measured does not pass.

    `X > base` compares the scores. `X.low > base` sets the low end of the paired 95 % interval of the difference in
    place of the difference itself: with nothing but `base` on the right, it must be above zero. `champion` stands for
    the run that `evaluate.champion` names.

    Raises RecipeError for a text that is not a gate.
    """
    return tuple(check_gate(parse_gate(text), evaluation) for text in gates)


def check_gate(gate: Gate, evaluation: Evaluation) -> GateResult:
    """Check one gate."""
    tuned, (scores, differences) = evaluation.by_name("tuned"), opponent(gate, evaluation)
    if gate.metric not in tuned or (gate.against and gate.metric not in scores):
        return GateResult(gate.text, gate.text, why_unmeasured(gate, evaluation), passed=False)
    if gate.part is None:
        actual, limit = tuned[gate.metric], threshold(gate, scores.get(gate.metric, math.nan))
    else:
        change, score = differences.get(gate.metric), scores[gate.metric]
        if change is None:
            return GateResult(gate.text, gate.text, "no interval", passed=False)
        actual = change.low if gate.part == "low" else change.high
        limit = threshold(gate, score) - score
    passed = not (math.isnan(actual) or math.isnan(limit)) and COMPARE[gate.op](actual, limit)
    left = f"{gate.part} end of the difference" if gate.part else gate.metric
    left += " from the champion" if gate.part and gate.against == "champion" else ""
    return GateResult(gate.text, f"{left} {gate.op} {number(limit)}", number(actual), passed)


def opponent(gate: Gate, evaluation: Evaluation) -> tuple[Mapping[str, float], Mapping[str, Difference]]:
    """Return the scores of the model that the gate compares with, and the tuned model's differences from them."""
    if gate.against != "champion":
        return evaluation.by_name("base"), evaluation.differences()
    champion = evaluation.champion
    return (champion.scores, champion.difference) if champion else ({}, {})


def why_unmeasured(gate: Gate, evaluation: Evaluation) -> str:
    """Return why there is no score to compare with."""
    left_out = evaluation.champion.left_out if evaluation.champion and gate.against == "champion" else {}
    return f"not comparable: {left_out[gate.metric]}" if gate.metric in left_out else "not measured"


def require_gates(gates: Sequence[GateResult]) -> None:
    """Raise GateFailed for those that did not pass."""
    GateFailed.collect(
        Problem(f"gate failed: wanted {gate.wanted}, got {gate.got}", gate.name) for gate in gates if not gate.passed
    )


def threshold(gate: Gate, other: float) -> float:
    """Return the right-hand side of the gate as a score; `other` is that of the model it compares with."""
    return other * gate.factor + gate.offset if gate.number is None else gate.number


def number(value: float) -> str:
    """Write a score with four significant digits."""
    return "not a number" if math.isnan(value) else f"{value:.4g}"
