"""A control run: the recipe with other sections, trained on the same rows, to show what its own sections are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmtune.recipe.gate_grammar import Gate
from llmtune.recipe.task_facts import CONTROL_RUNS


@dataclass(frozen=True)
class ControlRun:
    """The control run of a recipe. A section that has one has the key `control`, and returns it in `as_control`."""

    name: str
    """A key of `CONTROL_RUNS`: its folder, and its name in gates."""
    claim: str
    """The statement that the verdict tests, such as `GRPO beat filter`."""
    key: str
    """The key that turns it off, such as `reinforce.control`."""
    changes: Mapping[str, object]
    """Sections that replace those of the recipe, by name; None removes one."""
    on: bool = True

    @property
    def meaning(self) -> str:
        """The training of the control run, in words."""
        return CONTROL_RUNS[self.name]


def find_control_run_problem(gate: Gate, control: ControlRun | None) -> tuple[str, str] | None:
    """Return the problem of a gate on a control run that the recipe does not have, and a fix."""
    if gate.against is None or gate.against not in CONTROL_RUNS:
        return None
    what = f"the gate {gate.text!r} uses {gate.against}"
    if control is None or control.name != gate.against:
        return f"{what}, which this recipe does not have: {CONTROL_RUNS[gate.against]}", "Compare with `base`."
    if not control.on:
        return f"{what}, but {control.key} is false", f"Remove {control.key}, or compare with `base`."
    if gate.rows or "." in gate.metric:
        fix = f"Write `METRIC.low > {gate.against}` with a metric of the test rows."
        return f"{what}, which is compared on all test rows, and on nothing else", fix
    return None
