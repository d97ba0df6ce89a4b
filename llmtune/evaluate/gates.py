"""Gates: whether what the recipe wants of the scores holds."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

from llmtune.errors import GateFailed, Problem
from llmtune.recipe.gate_grammar import Gate, parse_gate
from llmtune.records import Evaluation, GateResult

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
    place of the difference itself: with nothing but `base` on the right, it must be above zero.

    Raises RecipeError for a text that is not a gate.
    """
    return tuple(check_gate(parse_gate(text), evaluation) for text in gates)


def check_gate(gate: Gate, evaluation: Evaluation) -> GateResult:
    """Check one gate."""
    base, tuned = evaluation.by_name("base"), evaluation.by_name("tuned")
    if gate.metric not in tuned or (gate.against_base and gate.metric not in base):
        return GateResult(gate.text, gate.text, "not measured", passed=False)
    if gate.part is None:
        actual, limit = tuned[gate.metric], threshold(gate, base.get(gate.metric, math.nan))
    else:
        change, score = evaluation.differences().get(gate.metric), base[gate.metric]
        if change is None:
            return GateResult(gate.text, gate.text, "no interval", passed=False)
        actual = change.low if gate.part == "low" else change.high
        limit = threshold(gate, score) - score
    passed = not (math.isnan(actual) or math.isnan(limit)) and COMPARE[gate.op](actual, limit)
    left = f"{gate.part} end of the difference" if gate.part else gate.metric
    return GateResult(gate.text, f"{left} {gate.op} {number(limit)}", number(actual), passed)


def require_gates(gates: Sequence[GateResult]) -> None:
    """Raise GateFailed for those that did not pass."""
    GateFailed.collect(
        Problem(f"gate failed: wanted {gate.wanted}, got {gate.got}", gate.name) for gate in gates if not gate.passed
    )


def threshold(gate: Gate, base: float) -> float:
    """Return the right-hand side of the gate as a score."""
    return base * gate.factor + gate.offset if gate.number is None else gate.number


def number(value: float) -> str:
    """Write a score with four significant digits."""
    return "not a number" if math.isnan(value) else f"{value:.4g}"
