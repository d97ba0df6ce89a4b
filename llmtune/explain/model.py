"""`llmtune explain model`: the parts of a model, their shapes and sizes, their cost, and which of them were trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llmtune.errors import EnvironmentProblem
from llmtune.explain.adapter_weights import Carriers, find_carriers
from llmtune.explain.architecture import Architecture, branches_of, describe_model, norms_of
from llmtune.explain.flops import Cost, UncountableError, choose_lengths, count_cost
from llmtune.explain.labels import TITLES
from llmtune.explain.length_cost import Measured, measure_block
from llmtune.explain.meta_model import Blueprint, draw_blueprint
from llmtune.explain.model_page import write_model_page
from llmtune.explain.orders import BIASES
from llmtune.explain.target import Subject
from llmtune.model.config import UNREADABLE, first_line
from llmtune.store.atomic_files import explained, write_json


@dataclass(frozen=True)
class Portrait:
    """All that is told of a model."""

    architecture: Architecture
    carriers: Carriers | None
    """None of a model that is no run's."""
    cost: Cost | None
    uncounted: str | None
    """Why there is no cost."""
    measured: Measured | None
    unmeasured: str | None
    """Why nothing was measured."""
    model: str | None
    """Of a run, the name of its base model."""

    @property
    def name(self) -> str:
        """As a heading has it: of a run the folder's own name."""
        return Path(self.architecture.name).name if self.carriers else self.architecture.name

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters by kind of part; they add up to all that the model has."""
        return count_parts(self.architecture)

    @property
    def lengths(self) -> list[int]:
        """Lengths of a text at which its cost is told."""
        return choose_lengths(self.architecture.context)

    def as_facts(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            **self.architecture.as_facts(),
            "base": self.model,
            "parameters_by_part": self.sizes,
            "trained": self.carriers.as_facts() if self.carriers else None,
            "flops": self.cost.as_facts(self.lengths) if self.cost else None,
            "flops_unknown": self.uncounted,
            "measured": self.measured.as_facts() if self.measured else None,
            "not_measured": self.unmeasured,
        }


def explain_model(
    subject: Subject, folder: Path, console: Console, *, measure: bool = True
) -> tuple[Portrait, dict[str, Any], list[Path]]:
    """Write page, drawings and numbers into `folder`; no weights are loaded.

    Returns:
        What was found out, the same as JSON values, and the files.

    Raises:
        EnvironmentProblem: the model cannot be built from its configuration, the run's adapter is gone, or the files
            cannot be written.
    """
    carriers = find_carriers(subject)
    try:
        blueprint = draw_blueprint(subject)
    except UNREADABLE as error:
        raise EnvironmentProblem.of(
            f"the model cannot be built from its configuration: {first_line(error)}",
            str(subject.config.name_or_path),
            "Get the model again from where it comes from; `llmtune doctor` shows what this machine has.",
        ) from error
    with console.status("reading the architecture"):
        architecture = describe_model(subject, blueprint)
        cost, uncounted = _count(blueprint, architecture)
    measured = measure_block(blueprint, architecture, console) if measure else "--no-measure was given"
    portrait = Portrait(
        architecture,
        carriers,
        cost,
        uncounted,
        measured if isinstance(measured, Measured) else None,
        measured if isinstance(measured, str) else None,
        subject.recipe.model.name if subject.recipe else None,
    )
    told = portrait.as_facts()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        written = write_model_page(folder, portrait)
        write_json(folder / "model.json", told)
    return portrait, told, [*written, folder / "model.json"]


def _count(blueprint: Blueprint, architecture: Architecture) -> tuple[Cost | None, str | None]:
    try:
        return count_cost(blueprint, architecture), None
    except UncountableError as error:
        return None, str(error)


def count_parts(architecture: Architecture) -> dict[str, int]:
    """Return parameters by kind of part; they add up to all that the model has."""
    counts: dict[str, int] = {}

    def add(name: str, size: int) -> None:
        if size:
            counts[name] = counts.get(name, 0) + size

    for stack in architecture.stacks:
        for piece in (*stack.before, *stack.behind):
            kinds = {"norm": "Norms", "embedding": "Embedding", "positions": "Positions", "linear": "Head"}
            add(kinds.get(piece.kind, "Other"), piece.parameters)
        for group in stack.blocks:
            times, rest = len(group.numbers), group.parameters
            parts = [(TITLES[branch.kind], branch.modules) for branch in branches_of(group)]
            parts.append(("Norms", tuple(norm.module for norm in norms_of(group))))
            for title, modules in parts:
                size = times * sum(group.sizes.get(name, 0) for name in dict.fromkeys(modules))
                add(title, size)
                rest -= size
            add("Positions" if any(name.endswith(BIASES) for name in group.extras) else "Other", rest)
    add("Other", sum(architecture.other.values()))
    return counts
