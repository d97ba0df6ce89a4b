"""Which of several models knows the user's rows best already: bits per byte of the answers, on a sample of them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from llmtune.data.row_store import read_rows
from llmtune.data.task_interface import TaskInterface
from llmtune.errors import DataError, EnvironmentProblem, Problem, RecipeError
from llmtune.model.config import find_class
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.loading import load_model
from llmtune.model.memory_plan import context_length, micro_batch_tokens, plan_memory
from llmtune.model.model_inputs import move_to
from llmtune.model.oom import release_memory
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.records import Example, MemoryPlan, ModelRef, Row, Rows
from llmtune.report.number_format import size as format_bytes

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

ChooseTask = Callable[[ModelRef], TaskInterface]
"""Gives the form of the task that a model can do; raises RecipeError where there is none."""
_SAMPLE_ROWS = 64
"""Enough to tell models apart by more than a few per cent, few enough to take seconds."""


@dataclass(frozen=True)
class Candidate:
    """One model in the ranking: its measure, or the reason why it is left out."""

    name: str
    bits_per_byte: float | None = None
    reason: str | None = None
    lower_bound: int | None = None
    """Bytes that training it takes at least."""
    context: int | None = None


@dataclass(frozen=True)
class Ranking:
    """All candidates, the best first and those left out last, and the best."""

    chosen: ModelRef
    candidates: tuple[Candidate, ...]
    rows: int
    """Rows that every candidate was measured on."""
    split: str

    def to_dict(self) -> dict[str, object]:
        """Return what the report shows, ready for JSON."""
        return {
            "chosen": self.chosen.name,
            "revision": self.chosen.revision,
            "rows": self.rows,
            "side": self.split,
            "candidates": [dataclasses.asdict(candidate) for candidate in self.candidates],
        }


@dataclass(frozen=True)
class _Entrant:
    """A candidate that can do the task and fits, with the sample in its own tokens."""

    model_ref: ModelRef
    task: TaskInterface
    processor: PreTrainedTokenizerBase
    plan: MemoryPlan
    context: int | None
    examples: dict[int, list[Example]]


def rank_candidates(
    recipe: Recipe, choose: ChooseTask, rows: Rows, console: Console, folder: Path, device: str, offline: bool = False
) -> Ranking:
    """Measure `model.candidates` on a seeded sample of the validation rows (of train if there are none), best first.

    Models are loaded one after the other. The ranking is printed and written to `ranking.json` in `folder`.

    Raises:
        RecipeError, EnvironmentProblem: a candidate is damaged, or none is left.
    """
    assert recipe.model.candidates, "the recipe names candidates"
    split = "validation" if rows.counts.get("validation", 0) else "train"
    count = rows.counts[split]
    indexes = sorted(random.Random(recipe.seed).sample(range(count), min(count, _SAMPLE_ROWS)))  # noqa: S311
    sample = dict(zip(indexes, read_rows(rows, split, indexes), strict=True))
    entrants: list[_Entrant] = []
    refs, out = resolve_candidates(recipe, console, offline)
    for model_ref in refs:
        entrant = _admit(model_ref, recipe, choose, sample, device)
        if isinstance(entrant, _Entrant):
            entrants.append(entrant)
        else:
            out.append(entrant)
    shared = sorted(set.intersection(*(set(entrant.examples) for entrant in entrants))) if entrants else []
    if not shared:
        problems = [Problem(f"{candidate.name} is left out: {candidate.reason}") for candidate in out]
        problems += [Problem("there is no row that all candidates can encode")] if entrants else []
        raise EnvironmentProblem(Problem("no candidate is left", "model.candidates", "Name other models."), *problems)
    measured: list[tuple[float, Candidate, ModelRef]] = []
    for entrant in entrants:
        bits = _bits_per_byte(entrant, shared, recipe, device, console)
        candidate = Candidate(entrant.model_ref.name, bits, None, entrant.plan.lower_bound, entrant.context)
        measured.append((bits, candidate, entrant.model_ref))
    measured.sort(key=lambda entry: (math.isnan(entry[0]), entry[0]))
    ranking = Ranking(measured[0][2], (*(candidate for _, candidate, _ in measured), *out), len(shared), split)
    console.print(_draw(ranking))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ranking.json").write_text(json.dumps(ranking.to_dict(), indent=2) + "\n", "utf-8")
    return ranking


def _draw(ranking: Ranking) -> Table:
    """Draw the table that shows why the first was taken."""
    title = f"Candidates by bits per byte on {ranking.rows} {ranking.split} rows (lower knows the rows better)"
    table = Table(title=title, title_justify="left")
    for column in ("", "model", "bits per byte", "needs at least", "context", "left out because"):
        table.add_column(
            column, justify="right" if column in ("bits per byte", "needs at least", "context") else "left"
        )
    for candidate in ranking.candidates:
        table.add_row(
            "→" if candidate.name == ranking.chosen.name else "",
            candidate.name,
            "" if candidate.bits_per_byte is None else f"{candidate.bits_per_byte:.4f}",
            "" if candidate.lower_bound is None else format_bytes(candidate.lower_bound),
            "" if candidate.context is None else f"{candidate.context:,}",
            candidate.reason or "",
        )
    return table


def resolve_candidates(recipe: Recipe, console: Console, offline: bool) -> tuple[list[ModelRef], list[Candidate]]:
    """Find every candidate; one that is not there is left out with the reason.

    Raises RecipeError for keys that have to be set first, EnvironmentProblem with all reasons where none is there.
    """
    refs: list[ModelRef] = []
    out: list[Candidate] = []
    missing: list[Problem] = []
    refused: list[Problem] = []
    for name in recipe.model.candidates or ():
        try:
            refs.append(resolve_model(name, recipe.model, console, offline))
        except (RecipeError, EnvironmentProblem) as error:
            named = [dataclasses.replace(problem, what=f"{name}: {problem.what}") for problem in error.problems]
            (refused if isinstance(error, RecipeError) else missing).extend(named)
            out.append(Candidate(name, None, error.problems[0].what))
    RecipeError.collect(refused)
    if not refs:
        EnvironmentProblem.collect(missing)
    return refs, out


def _admit(
    model_ref: ModelRef, recipe: Recipe, choose: ChooseTask, sample: dict[int, Row], device: str
) -> _Entrant | Candidate:
    """Return the candidate ready to be measured, or left out with the reason."""
    try:
        task = choose(model_ref)
        _, config = find_class(model_ref, recipe, task)
        processor = load_processor(model_ref, recipe.model, recipe.data.system_prompt)
        plan = plan_memory(model_ref, recipe, task, recipe.data.max_length, device)
        context = context_length(config)
        out = Candidate(model_ref.name, None, None, plan.lower_bound, context)
        if recipe.model.check_memory and plan.limit is not None and plan.lower_bound > plan.limit:
            reason = f"it needs {format_bytes(plan.lower_bound)}, and {device} has {format_bytes(plan.limit)}"
            return dataclasses.replace(out, reason=reason)
        encoded = task.encode(list(sample.values()), processor, recipe)
    except (RecipeError, DataError, EnvironmentProblem) as error:
        return Candidate(model_ref.name, None, error.problems[0].what)
    examples = {index: row for index, row in zip(sample, encoded, strict=True) if isinstance(row, list) and row}
    longest = max((example.reach for row in examples.values() for example in row), default=0)
    if context is not None and longest > context:
        reason = f"its context of {context:,} tokens is shorter than a row of {longest:,}"
        return dataclasses.replace(out, reason=reason)
    if not examples:
        reason = f"none of the rows can be encoded: {next((row for row in encoded if isinstance(row, str)), 'no rows')}"
        return dataclasses.replace(out, reason=reason)
    return _Entrant(model_ref, task, processor, plan, context, examples)


def _bits_per_byte(entrant: _Entrant, shared: Sequence[int], recipe: Recipe, device: str, console: Console) -> float:
    """Return bits per byte of the supervised text: the cost of its end markers counts, their bytes do not."""
    task = entrant.task
    collate = task.collator(entrant.processor, recipe)
    examples = [example for index in shared for example in entrant.examples[index]]
    longest = max(example.tokens for example in examples)
    budget = micro_batch_tokens(entrant.plan, recipe.data.max_length, longest)
    model = load_model(
        entrant.model_ref,
        recipe,
        task,
        entrant.processor,
        device=device,
        training=False,
        plan=entrant.plan,
        console=console,
    ).model
    nats = 0.0
    with torch.inference_mode(), compute_context(resolve_dtype(recipe.model.dtype, device), device):
        for group in _group(examples, budget):
            batch = move_to(device, collate(group, 0))
            nats += float(task.loss(model, batch, False).sum)
    del model
    release_memory()
    return nats / math.log(2) / max(1, sum(example.target_bytes for example in examples))


def _group(examples: Sequence[Example], budget: int) -> Iterator[list[Example]]:
    """Put neighbours together as long as they stay within `budget` tokens."""
    group: list[Example] = []
    for example in examples:
        if group and sum(other.tokens for other in group) + example.tokens > budget:
            yield group
            group = []
        group.append(example)
    if group:
        yield group
