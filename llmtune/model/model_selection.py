"""Find which of several models suits a sample of the rows best: by bits per byte, or by the task's own score."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import is_offline_mode
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from llmtune.data.example import Example
from llmtune.data.row_store import read_rows
from llmtune.data.task_interface import TaskInterface
from llmtune.display.number_format import size as format_bytes
from llmtune.errors import DataError, EnvironmentProblem, Problem, RecipeError
from llmtune.model.catalogue import candidate_names, read_catalogue, refuse_licence
from llmtune.model.causal_lm_loss import move_to
from llmtune.model.config import find_class
from llmtune.model.device import compute_context, release_memory, resolve_dtype
from llmtune.model.loading import load_model
from llmtune.model.memory_plan import (
    context_length,
    micro_batch_tokens,
    plan_memory,
    plan_training,
    resolve_checkpointing,
)
from llmtune.model.processor import load_processor
from llmtune.model.resolve import find_license, resolve_model
from llmtune.recipe.gate_grammar import LOWER_IS_BETTER
from llmtune.recipe.schema import Recipe
from llmtune.records import Json, MemoryPlan, ModelRef, Row, Rows, read_model_ref
from llmtune.store.process_environment import is_remote_model

ChooseTask = Callable[[ModelRef], TaskInterface]
"""Returns the task variant that a model can do; raises RecipeError if there is none."""
_SAMPLE_ROWS = 64
"""Enough to separate models by more than a few per cent, few enough to take seconds."""
_MEASURED_ROWS = 1000
"""Number of training rows whose lengths are compared with a model's context."""


@dataclass(frozen=True)
class RankedModel:
    """One model in the ranking: its score, or why it is skipped."""

    name: str
    score: float | None = None
    """By the ranking's `metric`, before tuning."""
    reason: str | None = None
    lower_bound: int | None = None
    """Minimum bytes to train it."""
    context: int | None = None
    tuned: float | None = None
    """Bits per byte of the validation rows after its last trial."""
    steps: int | None = None
    """Steps of that trial."""


@dataclass(frozen=True)
class ModelRanking:
    """All candidates, best first and skipped ones last, and the winner."""

    chosen: ModelRef
    candidates: tuple[RankedModel, ...]
    rows: int
    """Number of rows that every candidate was scored on."""
    split: str
    model_refs: Mapping[str, ModelRef]
    """The scored candidates, by name."""
    metric: str = "bits_per_byte"

    def to_dict(self) -> dict[str, object]:
        """Return the report's data, ready for JSON."""
        return {
            "chosen": self.chosen.name,
            "revision": self.chosen.revision,
            "rows": self.rows,
            "side": self.split,
            "metric": self.metric,
            "candidates": [
                {self.metric if name == "score" else name: value for name, value in dataclasses.asdict(one).items()}
                for one in self.candidates
            ],
        }


def read_ranking(described: Json) -> ModelRanking:
    """Rebuild a ranking from JSON."""
    refs = {name: read_model_ref(one) for name, one in described["model_refs"].items()}
    candidates = tuple(RankedModel(**one) for one in described["candidates"])
    rows, split, metric = described["rows"], described["split"], described["metric"]
    return ModelRanking(refs[described["chosen"]["name"]], candidates, rows, split, refs, metric)


@dataclass(frozen=True)
class _Entrant:
    """A candidate that can do the task and fits, with the sample in its own tokens."""

    model_ref: ModelRef
    recipe: Recipe
    """With the task's settings that this model completes, such as pooling."""
    task: TaskInterface
    processor: PreTrainedTokenizerBase
    plan: MemoryPlan
    context: int | None
    examples: dict[int, list[Example]]


def rank_candidates(
    recipe: Recipe, choose: ChooseTask, rows: Rows, console: Console, folder: Path, device: str, offline: bool = False
) -> ModelRanking:
    """Score `model.candidates` on a seeded sample of validation rows (training rows without any), best first.

    Models are loaded one after the other. The ranking is printed and written to `ranking.json` in `folder`.

    Raises:
        RecipeError, EnvironmentProblem: a candidate is damaged, or none remains.
    """
    split = "validation" if rows.counts.get("validation", 0) else "train"
    sample, many = _sample(rows, split, _SAMPLE_ROWS, recipe.seed), _sample(rows, "train", _MEASURED_ROWS, recipe.seed)
    entrants: list[_Entrant] = []
    refs, out = resolve_candidates(recipe, choose, console, device, offline)
    for model_ref in refs:
        entrant = _admit(model_ref, recipe, choose, rows, sample, many, device)
        if isinstance(entrant, _Entrant):
            entrants.append(entrant)
        else:
            out.append(entrant)
    shared = sorted(set.intersection(*(set(entrant.examples) for entrant in entrants))) if entrants else []
    if not shared:
        raise none_left(out, *([Problem("no row can be encoded by all candidates")] if entrants else []))
    measured: list[RankedModel] = []
    metric = "bits_per_byte"
    for entrant in entrants:
        metric, score = _score_entrant(entrant, {index: sample[index] for index in shared}, device, console)
        measured.append(RankedModel(entrant.model_ref.name, score, None, entrant.plan.lower_bound, entrant.context))
    sign = 1 if metric in LOWER_IS_BETTER else -1
    measured.sort(key=lambda one: (math.isnan(one.score or 0), sign * (one.score or 0)))
    if math.isnan(measured[0].score or 0):
        raise none_left(out, Problem(f"{metric} has no value on the {len(shared)} {split} rows for any candidate"))
    by_name = {entrant.model_ref.name: entrant.model_ref for entrant in entrants}
    ranking = ModelRanking(by_name[measured[0].name], (*measured, *out), len(shared), split, by_name, metric)
    show_ranking(ranking, console, folder)
    return ranking


def none_left(out: Sequence[RankedModel], *problems: Problem) -> EnvironmentProblem:
    """Return the error if every candidate was skipped, with the reasons."""
    reasons = [Problem(f"{candidate.name} is skipped: {candidate.reason}") for candidate in out]
    first = Problem("no candidate remains", "model.candidates", "Name other models.")
    return EnvironmentProblem(first, *reasons, *problems)


def _sample(rows: Rows, split: str, size: int, seed: int) -> dict[int, Row]:
    count = rows.counts[split]
    indexes = sorted(random.Random(seed).sample(range(count), min(count, size)))  # noqa: S311
    return dict(zip(indexes, read_rows(rows, split, indexes), strict=True))


def show_ranking(ranking: ModelRanking, console: Console, folder: Path) -> None:
    """Print a ranking and write it to `ranking.json` in `folder`."""
    console.print(_draw_ranking(ranking))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ranking.json").write_text(json.dumps(ranking.to_dict(), indent=2) + "\n", "utf-8")


def _draw_ranking(ranking: ModelRanking) -> Table:
    """Draw the table that shows why the first was chosen."""
    measured, better = ranking.metric.replace("_", " "), "lower" if ranking.metric in LOWER_IS_BETTER else "higher"
    title = f"Candidates by {measured} on {ranking.rows} {ranking.split} rows ({better} is better)"
    tried = any(candidate.steps for candidate in ranking.candidates)
    if tried:
        title += "; candidates with a trial by the bits after it, on all validation rows"
    table = Table(title=title, title_justify="left")
    numbers = (measured, *(["tuned", "steps"] if tried else []), "needs at least", "context")
    for column in ("", "model", *numbers, "skipped because"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for candidate in ranking.candidates:
        table.add_row(
            "→" if candidate.name == ranking.chosen.name else "",
            candidate.name,
            _rank_number(candidate.score, ".4f"),
            *([_rank_number(candidate.tuned, ".4f"), _rank_number(candidate.steps, ",")] if tried else []),
            "" if candidate.lower_bound is None else format_bytes(candidate.lower_bound),
            _rank_number(candidate.context, ","),
            candidate.reason or "",
        )
    return table


def _rank_number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def resolve_candidates(
    recipe: Recipe, choose: ChooseTask, console: Console, device: str, offline: bool
) -> tuple[list[ModelRef], list[RankedModel]]:
    """Find every candidate; unavailable or unusable ones are skipped, with the reason.

    Raises RecipeError for keys that must be set first, EnvironmentProblem with all reasons if none is found.
    """
    refs: list[ModelRef] = []
    out: list[RankedModel] = []
    missing: list[Problem] = []
    refused: list[Problem] = []
    for name in candidate_names(recipe):
        if (reason := _reason_against(name, recipe, choose, device, offline)) is not None:
            out.append(RankedModel(name, None, reason))
            continue
        try:
            refs.append(resolve_model(name, recipe.model, console, offline))
        except (RecipeError, EnvironmentProblem) as error:
            named = [dataclasses.replace(problem, what=f"{name}: {problem.what}") for problem in error.problems]
            (refused if isinstance(error, RecipeError) else missing).extend(named)
            out.append(RankedModel(name, None, error.problems[0].what))
    RecipeError.collect(refused)
    if not refs:
        EnvironmentProblem.collect(missing)
        raise none_left(out)
    return refs, out


def _reason_against(name: str, recipe: Recipe, choose: ChooseTask, device: str, offline: bool) -> str | None:
    """Return why a candidate is skipped before its download: its licence, or a fact in the catalogue."""
    entry, allowed = read_catalogue().get(name), recipe.model.licences
    if allowed:
        base = name if is_remote_model(name) else None
        network = not offline and not is_offline_mode()
        licence = entry.licence if entry else find_license(name, Path(name), base, network=network)
        if (reason := refuse_licence(licence, allowed)) is not None:
            return reason
    if entry is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        model_ref = entry.write_config(Path(folder))
        try:
            return _too_large(plan_memory(model_ref, recipe, choose(model_ref), 1, device), recipe)
        except (RecipeError, EnvironmentProblem) as error:
            return error.problems[0].what


def _too_large(plan: MemoryPlan, recipe: Recipe) -> str | None:
    if not recipe.model.check_memory or plan.limit is None or plan.lower_bound <= plan.limit:
        return None
    return f"it needs {format_bytes(plan.lower_bound)}, but {plan.device} has {format_bytes(plan.limit)}"


def plan_candidates(
    recipe: Recipe, choose: ChooseTask, longest: int, device: str, console: Console, offline: bool
) -> dict[str, MemoryPlan]:
    """Show which candidates would be ranked or skipped, without downloads; return the plans of the known ones.

    Raises RecipeError if a query matches nothing, EnvironmentProblem if no candidate would remain.
    """
    plans: dict[str, MemoryPlan] = {}
    out: list[RankedModel] = []
    table = Table("model", "planned", "at least", "", title="Candidates", title_justify="left")
    names = candidate_names(recipe)
    for name in names:
        reason, plan, model_ref = _reason_against(name, recipe, choose, device, offline), None, None
        try:
            with tempfile.TemporaryDirectory() as folder:
                if reason is None:
                    model_ref = peek_model(name, recipe, console, Path(folder), offline)
                if model_ref is not None:
                    plan = plans[name] = plan_candidate(model_ref, recipe, choose(model_ref), longest, device)
                    reason = _too_large(plan, recipe)
        except (RecipeError, EnvironmentProblem) as error:
            reason = error.problems[0].what
        sizes = [format_bytes(plan.total), format_bytes(plan.lower_bound)] if plan else ["", ""]
        there = model_ref is not None and model_ref.content_hash
        table.add_row(name, *sizes, f"skipped: {reason}" if reason else "" if there else "would be downloaded first")
        out += [RankedModel(name, None, reason)] if reason else []
    console.print(table)
    if len(out) == len(names):
        raise none_left(out)
    return plans


def peek_model(name: str, recipe: Recipe, console: Console, folder: Path, offline: bool) -> ModelRef | None:
    """Return a local model, or the catalogue's shape of one to download (without a hash), or None.

    Raises EnvironmentProblem if it is unavailable.
    """
    try:
        return resolve_model(name, recipe.model, console, offline=True)
    except EnvironmentProblem:
        if offline or not is_remote_model(name):
            raise
        entry = read_catalogue().get(name)
        return entry.write_config(folder) if entry else None


def plan_candidate(model_ref: ModelRef, recipe: Recipe, task: TaskInterface, longest: int, device: str) -> MemoryPlan:
    """Plan training with `gradient_checkpointing: auto` resolved. Raises as `plan_memory` does."""
    if recipe.train.gradient_checkpointing == "auto":
        on = resolve_checkpointing(model_ref, recipe, task, longest, device)
        train = recipe.train.model_copy(update={"gradient_checkpointing": on})
        recipe = recipe.model_copy(update={"train": train})
    return plan_training(model_ref, recipe, task, longest, device)


def _admit(
    model_ref: ModelRef,
    recipe: Recipe,
    choose: ChooseTask,
    rows: Rows,
    sample: Mapping[int, Row],
    many: Mapping[int, Row],
    device: str,
) -> _Entrant | RankedModel:
    """Return the candidate ready to be scored, or skipped with the reason."""
    try:
        task = choose(model_ref)
        _, config = find_class(model_ref, recipe, task)
        recipe = task.infer_labels(recipe, rows, config)
        processor = load_processor(model_ref, recipe.model, recipe.data.system_prompt)
        plan = plan_memory(model_ref, recipe, task, recipe.data.max_length, device)
        context = context_length(config)
        out = RankedModel(model_ref.name, None, None, plan.lower_bound, context)
        if (reason := _too_large(plan, recipe)) is not None:
            return dataclasses.replace(out, reason=reason)
        encoded = task.encode(list(sample.values()), processor, recipe)
        lengths = [_longest(row) for row in task.encode(list(many.values()), processor, recipe)]
    except (RecipeError, DataError, EnvironmentProblem) as error:
        return RankedModel(model_ref.name, None, error.problems[0].what)
    examples = {index: row for index, row in zip(sample, encoded, strict=True) if isinstance(row, list) and row}
    if not examples:
        reason = f"none of the rows can be encoded: {next((row for row in encoded if isinstance(row, str)), 'no rows')}"
        return dataclasses.replace(out, reason=reason)
    lengths = [length for length in (*lengths, *map(_longest, examples.values())) if length]
    if context is not None and (reason := _too_short(context, lengths, recipe)) is not None:
        return dataclasses.replace(out, reason=reason)
    fitting = {index: row for index, row in examples.items() if context is None or _longest(row) <= context}
    return _Entrant(model_ref, recipe, task, processor, plan, context, fitting)


def _longest(row: list[Example] | str) -> int:
    """Return the longest example of an encoded row; 0 for an unusable row."""
    return 0 if isinstance(row, str) else max((example.reach for example in row), default=0)


def _too_short(context: int, lengths: Sequence[int], recipe: Recipe) -> str | None:
    """Return why a context is too short for the rows: all of them, or 99 % if longer ones may be changed."""
    longest, usual = max(lengths), int(np.percentile(lengths, 99, method="higher"))
    if usual > context:
        return f"its context of {context:,} tokens is shorter than the 99th percentile of the rows, {usual:,}"
    if longest > context and recipe.data.on_overlong == "error":
        return f"its context of {context:,} tokens is shorter than a row of {longest:,}, and data.on_overlong is error"
    return None


def _score_entrant(entrant: _Entrant, sample: Mapping[int, Row], device: str, console: Console) -> tuple[str, float]:
    """Return the metric that compares models of the task, and its value on the sample."""
    ref, recipe, task, processor = entrant.model_ref, entrant.recipe, entrant.task, entrant.processor
    plan = entrant.plan
    model = load_model(ref, recipe, task, processor, device=device, training=False, plan=plan, console=console).model
    with torch.inference_mode(), compute_context(resolve_dtype(recipe.model.dtype, device), device):
        metric_value = task.score_untuned([*sample.values()], model, processor, recipe, device)
        if metric_value is None:
            examples = [example for index in sample for example in entrant.examples[index]]
            metric_value = "bits_per_byte", _bits_per_byte(model, entrant, examples, device)
    del model
    release_memory()
    return metric_value


def _bits_per_byte(model: torch.nn.Module, entrant: _Entrant, examples: Sequence[Example], device: str) -> float:
    """Return bits per byte of the supervised text; end markers count as cost, not as bytes."""
    collate = entrant.task.collator(entrant.processor, entrant.recipe)
    longest = max(example.tokens for example in examples)
    budget = micro_batch_tokens(entrant.plan, entrant.recipe.data.max_length, longest)
    nats = 0.0
    for group in _batches_within(examples, budget):
        batch = move_to(device, collate(group, 0))
        nats += float(entrant.task.loss(model, batch, False).sum)
    return nats / math.log(2) / max(1, sum(example.target_bytes for example in examples))


def _batches_within(examples: Sequence[Example], budget: int) -> Iterator[list[Example]]:
    """Group neighbours as long as they fit into `budget` tokens."""
    group: list[Example] = []
    for example in examples:
        if group and sum(other.tokens for other in group) + example.tokens > budget:
            yield group
            group = []
        group.append(example)
    if group:
        yield group
