"""Inputs of an evaluation: rows, prompts and answer choices. Made once, before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llmtune.data.answer_parser import ToolTurn
from llmtune.data.corpus import load_corpus
from llmtune.data.example import AnyExample
from llmtune.data.examples import ExampleReader
from llmtune.data.row_kind import write_prompt
from llmtune.data.row_store import iterate_groups, iterate_rows
from llmtune.errors import DataError
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.shared_prefix import SIGNATURE, Tree, check_choices, choice_trees, find_choice, find_choices
from llmtune.evaluate.slices import Parts, read_slices
from llmtune.evaluate.suites.own_metrics import read_full_rows
from llmtune.evaluate.text_metrics import CHOICE_METRIC
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.evaluate.tool_metrics import calls_tool, uncheckable_tools
from llmtune.recipe.class_names import show_name, similar_names
from llmtune.recipe.evaluate_section import EvaluateSection, metric_name
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import CHOICE_METRICS, GENERATED, TASK_FACTS, TOOL_METRICS
from llmtune.records import Examples, Prompt, Row, Rows

SPLIT = "test"
SCHEMAS_NOTE = "tool_call_valid.schemas"


class EncodedRows:
    """Examples in memory, with the interface of `ExampleReader`."""

    def __init__(self, encoded: Mapping[int, Sequence[AnyExample]]) -> None:
        """Take the examples of rows, by their numbers in ascending order."""
        self._examples = [example for examples in encoded.values() for example in examples]
        self.rows = np.array([row for row, examples in encoded.items() for _ in examples], dtype=np.int32)
        self.lengths = np.array([example.tokens for example in self._examples], dtype=np.int32)
        self.supervised = np.array([example.supervised for example in self._examples], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> AnyExample:
        return self._examples[index]


@dataclass(frozen=True)
class EvalInputs:
    """N rows of the test split (during training, of the validation split), in the order of `Rows`."""

    reader: ExampleReader | EncodedRows
    rows: tuple[int, ...]
    """[N] numbers of the rows that have at least one example."""
    origins: tuple[str, ...]
    prompts: tuple[str, ...]
    """[N] prompts for display."""
    references: tuple[str, ...]
    questions: tuple[Row, ...]
    """[N] the rows without their answers."""
    targets: tuple[object, ...]
    """[N] references that predictions are compared with, in the task's own form."""
    answered: tuple[int, ...]
    """Indexes into the rows above: the rows that get a predicted answer."""
    generation_prompts: dict[int, list[Prompt]]
    """Index into the rows above -> prompts to generate from; the row's own answer comes last, after other `turns`."""
    turns: dict[int, list[ToolTurn]]
    """Index into the rows above -> all answers of a row with tools, its own last."""
    choices: tuple[str, ...]
    trees: dict[int, Tree]
    """Index into the rows above -> the prompt with every choice."""
    metrics: tuple[str, ...]
    notes: dict[str, str]
    """Omissions and their reasons; shown in the report with the metrics' signatures."""
    slices: dict[str, Parts]
    """By column of `evaluate.slices`."""
    groups: dict[str, Parts]
    """By column of `evaluate.fairness.groups`."""
    clusters: tuple[int, ...] = ()
    """[N] equal for rows that belong together (`data.split_by`, a picture, a sampled prompt); empty if no rows do."""
    full_rows: tuple[Row, ...] = ()
    """[N] the rows with their answers and kept columns, for the user's own metrics; empty without any."""
    corpus: tuple[str, ...] = ()
    """The passages of `data.corpus`."""
    pictured: frozenset[int] = frozenset()
    """Indexes into the rows above: the rows with pictures."""
    measured: tuple[int, ...] = ()
    """Indexes into the rows above: the only rows that are measured; empty for all."""


@dataclass(frozen=True)
class EvalContext:
    """Data that every part of an evaluation needs."""

    recipe: Recipe
    task: EvaluatedTask
    processor: PreTrainedTokenizerBase
    inputs: EvalInputs | None
    """The test rows, or None."""
    device: str
    console: Console
    folder: Path | None = None
    """Where files of the evaluation go; None to keep nothing."""
    validation: EvalInputs | None = None
    """The validation rows to calibrate on, if the task chooses; they get no generated answers."""
    controls: Mapping[str, EvalInputs] = field(default_factory=dict)
    """By name, the test rows with other pictures (`llmtune.evaluate.controls`)."""
    checkpoints: int = 1
    """Number of checkpoints that training chose from by their scores on validation rows."""
    engine: str = ""
    """What generates the answers, if not our own loop."""


def make_inputs(
    rows: Rows,
    examples: Examples,
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    split: str = SPLIT,
) -> EvalInputs:
    """Read the encoded test rows, render their prompts, look for choices.

    Raises DataError if no reference answer is among the choices, or if a column of slices was not kept.
    """
    reader = ExampleReader(examples, split, task.example_type)
    numbers = sorted({*reader.rows.tolist()})
    fairness, facts, kept = recipe.evaluate.fairness, TASK_FACTS[recipe.task], set(numbers)
    held_out = [pair for number, pair in enumerate(iterate_rows(rows, split)) if number in kept]
    questions, references = zip(*(task.split_answer(row) for _, row in held_out), strict=True)
    pictures = [{picture["content"] for picture in task.list_pictures(question)} for question in questions]
    turns = [task.tool_turns(row, recipe) for _, row in held_out]
    metrics = measured_metrics(recipe, has_tools=any(turns))
    notes = start_notes(task, recipe) | task.row_notes(rows, split, recipe)
    generates, rated, prompts = not task.predicts, task.has_rewards, [*map(write_prompt, questions)]
    answerable = [i for i in range(len(numbers)) if not generates or (prompts[i] and (rated or references[i]))]
    needs_texts = bool(rated or not generates or recipe.evaluate.judge or recipe.evaluate.predicted & {*metrics})
    limit = (recipe.evaluate.limit if needs_texts else recipe.evaluate.samples) if facts.generates else None
    answered = [answerable[i] for i in cut_evenly(len(answerable), limit)]
    if needs_texts and len(answered) < len(numbers):
        notes["generated"] = describe_answered(len(answered), len(answerable), len(numbers))
    choices, trees = tuple[str, ...](), dict[int, Tree]()
    if not task.predicts and set(CHOICE_METRICS) & set(metrics):
        saying = {i: questions[i] for i in answerable if not calls_tool(turns[i])}
        choices = resolve_choices(rows, task, recipe, references, split)
        trees = grow_trees(saying, choices, task, processor, recipe) if choices else {}
        notes[CHOICE_METRIC + ".choices"] = describe_choices(choices, references, [*saying], trees)
    inputs = {i: [turn.question for turn in turns[i]] or [questions[i]] for i in answered if generates}
    asked = {i: [task.prompt(row, processor, recipe) for row in before] for i, before in inputs.items()}
    sampled = {i: tuple(each[-1].ids) for i, each in asked.items()} if rated else None
    groups = [group for at, group in enumerate(iterate_groups(rows, split)) if at in kept]
    return EvalInputs(
        reader=reader,
        rows=tuple(numbers),
        origins=tuple(origin for origin, _ in held_out),
        prompts=tuple(prompts),
        references=tuple(references),
        questions=tuple(questions),
        targets=tuple(task.reference(row) for _, row in held_out),
        answered=tuple(answered),
        generation_prompts=asked,
        turns={i: turns[i] for i in inputs if turns[i]},
        choices=choices,
        trees=trees,
        metrics=tuple(metric for metric in metrics if not (rated and "" in references and metric in GENERATED)),
        notes=notes | lack_notes(metrics, turns, references if rated else ()),
        slices=read_slices(rows, recipe.evaluate.slices, numbers),
        groups=read_slices(rows, fairness.groups if fairness else (), numbers, "evaluate.fairness.groups"),
        clusters=cluster_rows(pictures, groups, sampled),
        full_rows=tuple(read_full_rows(rows, split, kept)) if rated or recipe.evaluate.own_metrics else (),
        corpus=read_corpus(rows, split) if facts.searches else (),
        pictured=frozenset(i for i, contents in enumerate(pictures) if contents),
    )


def describe_answered(answered: int, answerable: int, rows: int) -> str:
    """Say for how many rows answers are generated, and how many cannot have one."""
    why = f"; {rows - answerable} have no prompt or no text answer" if answerable < rows else ""
    return f"answers are generated for {answered} of {rows} rows{why}"


def grow_trees(
    questions: Mapping[int, Row],
    choices: tuple[str, ...],
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> dict[int, Tree]:
    """Return the tree of each question's choices; none of a question that exceeds the context."""
    grown = choice_trees([*questions.values()], choices, task, processor, recipe)
    return {i: tree for i, tree in zip(questions, grown, strict=True) if tree is not None}


def limit_inputs(inputs: EvalInputs, limit: int | None) -> EvalInputs:
    """Measure at most `limit` rows, spread evenly; those with answers first: all metrics then share their rows."""
    rows = inputs.answered or range(len(inputs.rows))
    if limit is None or limit >= len(rows):
        return inputs
    measured = tuple(rows[at] for at in cut_evenly(len(rows), limit))
    kept = set(measured)
    return replace(
        inputs,
        measured=measured,
        answered=tuple(i for i in inputs.answered if i in kept),
        generation_prompts={i: prompts for i, prompts in inputs.generation_prompts.items() if i in kept},
        turns={i: turns for i, turns in inputs.turns.items() if i in kept},
        trees={i: tree for i, tree in inputs.trees.items() if i in kept},
    )


def read_corpus(rows: Rows, split: str) -> tuple[str, ...]:
    """Return the passages of `data.corpus`; none for other rows than the test rows."""
    return tuple(load_corpus(rows.folder)) if rows.corpus_hash and split == SPLIT else ()


def calibration_inputs(
    rows: Rows,
    examples: Examples,
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    test: EvalInputs | None,
) -> EvalInputs | None:
    """Return the validation rows to calibrate on, with the choices of the test rows, if any; no answer is generated.

    None without validation rows, without `evaluate.calibrate` and decisions, or if the task does not choose.
    """
    section, choices = recipe.evaluate, recipe.evaluate.choices
    chooses = bool(task.output_labels(recipe)) if task.predicts else section.chooses(recipe.variant)
    if not task.predicts and test is not None:
        chooses, choices = bool(test.trees), test.choices
    if not (chooses and (section.calibrate or section.decisions) and examples.counts.get("validation")):
        return None
    evaluate_section = EvaluateSection(metrics=("nll",), choices=choices, samples=0)
    recipe = recipe.model_copy(update={"evaluate": evaluate_section})
    try:
        return make_inputs(rows, examples, task, processor, recipe, "validation")
    except DataError:  # no validation row has one of the choices
        return None


def cluster_rows(
    pictures: Sequence[Set[str]], groups: Sequence[int], prompts: Mapping[int, tuple[int, ...]] | None = None
) -> tuple[int, ...]:
    """Return a number for each row, equal for rows that belong together; empty if no rows do.

    Rows belong together if they share a picture, their group, or a prompt. A picture of all rows with pictures counts
    only in a row without others: it may be an example.

    Args:
        pictures: Hashes of the contents of each row's pictures.
        groups: Each row's group by `data.split_by`; empty without it.
        prompts: By row, the ids of a prompt that is sampled: equal prompts get the same samples.
    """
    everywhere = frozenset[str]().union(*pictures).intersection(*filter(None, pictures))
    first, joined = dict[str | int | tuple[int, ...], int](), [*range(len(pictures))]

    def find_first(row: int) -> int:
        while joined[row] != row:
            row = joined[row]
        return row

    for row, contents in enumerate(pictures):
        sampled = [prompts[row]] if prompts and row in prompts else []
        keys: list[str | int | tuple[int, ...]] = [*groups[row : row + 1], *(contents - everywhere or contents)]
        for key in [*keys, *sampled]:
            joined[find_first(row)] = find_first(first.setdefault(key, row))
    numbers = {root: number for number, root in enumerate(dict.fromkeys(map(find_first, joined)))}
    return tuple(numbers[find_first(row)] for row in joined) if len(numbers) < len(joined) else ()


def start_notes(task: EvaluatedTask, recipe: Recipe) -> dict[str, str]:
    """Return the notes that follow from the recipe alone: unmeasured metrics with reasons, and the base used."""
    metrics = TASK_FACTS[recipe.task].default_metrics
    notes = {name: f"not measured: {why}" for name, why in recipe.variant.unmeasured.items() if name in metrics}
    if task.needs_reference_model(recipe) and recipe.adapter.start_from is not None:
        notes["base"] = "the base model with the adapter of adapter.start_from: what training started from"
    return notes


def lack_notes(
    metrics: Sequence[str], turns: Sequence[Sequence[ToolTurn]], references: Sequence[str]
) -> dict[str, str]:
    """Return notes on tools that `tool_call_valid` cannot check, and on metrics that references are missing for."""
    wrong = uncheckable_tools(turn for of_row in turns for turn in of_row) if "tool_call_valid" in metrics else {}
    listed = "; ".join(f"{name} ({why})" for name, why in wrong.items())
    notes = {SCHEMAS_NOTE: f"not measured for tools without a valid JSON Schema: {listed}"} if wrong else {}
    missing = references.count("")
    why = f"not measured: {missing} of {len(references)} test rows have no reference answer"
    return notes | {metric: why for metric in metrics if metric in GENERATED and missing}


def measured_metrics(recipe: Recipe, *, has_tools: bool) -> tuple[str, ...]:
    """Return the metrics to measure; a task's default tool metrics are dropped if no row has tools."""
    metrics = tuple(map(metric_name, recipe.evaluate.metrics)) or TASK_FACTS[recipe.task].default_metrics
    if has_tools or metrics != recipe.variant.default_metrics:
        return metrics
    return tuple(metric for metric in metrics if metric not in TOOL_METRICS)


def resolve_choices(
    rows: Rows, task: EvaluatedTask, recipe: Recipe, references: Sequence[str], split: str
) -> tuple[str, ...]:
    """Return the answers to choose from: the recipe's list, or the rows' answers if they are few."""
    stated = recipe.evaluate.choices
    if stated is None:
        return ()
    if stated != "auto":
        check_choices(stated, references)
        return tuple(stated)
    both = (row for name in ("train", split) for _, row in iterate_rows(rows, name))
    return find_choices(task.split_answer(row)[1] for row in both if not calls_tool(task.tool_turns(row, recipe)))


def describe_choices(
    choices: Sequence[str], references: Sequence[str], answerable: Sequence[int], trees: dict[int, Tree]
) -> str:
    """Describe which answers were compared and on how many rows, or why none were."""
    if not choices:
        return "not measured: the rows' answers are not few, short and repeated"
    text = (
        SIGNATURE.format(count=len(choices))
        + f", on {len(trees)} of {len(references)} rows: "
        + ", ".join(map(repr, choices))
    )
    for names in similar_names(choices):
        text += f"; {' and '.join(map(show_name, names))} differ only by case or width"
    unknown = sum(find_choice(references[i], choices) not in choices for i in answerable)
    return text + (f"; {unknown} references are not among them and count as wrong" if unknown else "")


def answer_lengths(
    rows: Rows, examples: Examples, task: EvaluatedTask, processor: PreTrainedTokenizerBase, recipe: Recipe
) -> list[int]:
    """Return the tokens of each reference answer of the test rows, including its end token, as training counts them."""
    reader = ExampleReader(examples, SPLIT, task.example_type)
    lengths: dict[int, list[int]] = {}
    for number, example in zip(reader.rows.tolist(), reader, strict=True):
        for _, spans in example.sequences:
            sizes = (end - start for start, end in zip(spans[::2], spans[1::2], strict=True))
            lengths.setdefault(number, []).extend(sizes)
    last_alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train_on": "last"})})
    token_counts = []
    for number, (_, row) in enumerate(iterate_rows(rows, SPLIT)):
        row_lengths = lengths.get(number, [])
        if row_lengths and recipe.data.train_on == "all" and TASK_FACTS[recipe.task].has_turns:
            encoded = task.encode([row], processor, last_alone)[0]
            row_lengths = [] if isinstance(encoded, str) else [encoded[-1].spans[-1] - encoded[-1].spans[-2]]
        token_counts += row_lengths if task.tool_turns(row, recipe) else row_lengths[-1:]
    return token_counts


def warn_of_cuts(
    rows: Rows,
    examples: Examples,
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    console: Console,
) -> None:
    """Print how many reference answers exceed max_new_tokens; nothing if none does or nothing is generated."""
    metrics = recipe.evaluate.chosen_metrics(recipe.variant)
    if not (examples.counts.get(SPLIT) and recipe.variant.generates and recipe.evaluate.predicted & set(metrics)):
        return
    lengths, room = answer_lengths(rows, examples, task, processor, recipe), recipe.generation.max_new_tokens
    longer = sum(length > room for length in lengths)
    if longer:
        what = f"{longer} of {len(lengths)} reference answers of the test rows have more than {room} tokens"
        fix = f"generation.max_new_tokens: {max(lengths)} fits all"
        text = f"{what}, so answers this long will be truncated and counted in answers_cut: {fix}"
        console.print(f"[yellow]{text}[/]", highlight=False)
