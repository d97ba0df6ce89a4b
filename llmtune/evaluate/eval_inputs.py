"""What is asked of both models: rows, prompts, answers to choose from; made once, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmtune.data import iterate_rows
from llmtune.data.examples import ExampleReader
from llmtune.evaluate.choice_likelihood import SIGNATURE, check_choices, find_choices, grow_trees
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.metrics import CHOICE_METRIC
from llmtune.evaluate.shared_prefix import Tree
from llmtune.evaluate.slices import Parts, read_slices
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.recipe.task_facts import PREDICTED, TASK_FACTS
from llmtune.records import Examples, Row, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

SIDE = "test"


@dataclass(frozen=True)
class Plan:
    """The questions: N rows of the test side, in the order of `Rows`."""

    reader: ExampleReader
    rows: tuple[int, ...]
    """[N] numbers of the rows that have at least one example."""
    origins: tuple[str, ...]
    prompts: tuple[str, ...]
    """[N] as a person reads them."""
    references: tuple[str, ...]
    prompt_ids: dict[int, list[int]]
    """Index into the rows above -> what to generate from."""
    questions: tuple[Row, ...] = ()
    """[N] the rows without their answers."""
    targets: tuple[Any, ...] = ()
    """[N] what predictions are held against: the reference, as the task has it."""
    asked: tuple[int, ...] = ()
    """Indexes into the rows above of those that are answered."""
    choices: tuple[str, ...] = ()
    trees: dict[int, Tree] = field(default_factory=dict)
    """Index into the rows above -> the prompt with every choice."""
    metrics: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    """What was left out and why; goes to the report beside the metrics' signatures."""
    slices: dict[str, Parts] = field(default_factory=dict)
    """By column of `evaluate.slices`."""
    groups: dict[str, Parts] = field(default_factory=dict)
    """By column of `evaluate.fairness.groups`."""


def make_plan(
    rows: Rows, examples: Examples, task: EvaluatedTask, processor: PreTrainedTokenizerBase, recipe: Recipe
) -> Plan:
    """Read the test rows that were encoded, render their prompts, look for choices.

    Raises DataError for choices that no reference answer is among, and for slices by columns that were not kept.
    """
    reader = ExampleReader(examples, SIDE)
    numbers = sorted({int(row) for row in reader.rows})
    slices = read_slices(rows, recipe.evaluate.slices, numbers)
    named = recipe.evaluate.fairness.groups if recipe.evaluate.fairness else ()
    groups = read_slices(rows, named, numbers, "evaluate.fairness.groups")
    origins, questions, references, targets = read_questions(rows, set(numbers), task)
    metrics = wanted_metrics(recipe)
    own = TASK_FACTS[recipe.task].default_metrics
    notes = {name: f"not measured: {why}" for name, why in recipe.variant.unmeasured.items() if name in own}
    if task.needs_reference_model(recipe) and recipe.adapter.start_from is not None:
        notes["base"] = "the base model with the adapter of adapter.start_from: what training started from"
    continues = not task.predicts
    answerable = [
        i
        for i, (row, answer) in enumerate(zip(questions, references, strict=True))
        if not continues or (show(row) and answer)
    ]
    texts_wanted = not continues or any(metric in PREDICTED for metric in metrics)
    limit = recipe.evaluate.limit if texts_wanted else recipe.evaluate.samples
    if not TASK_FACTS[recipe.task].generates:
        limit = None
    asked = [answerable[i] for i in cut_evenly(len(answerable), limit)]
    if texts_wanted and len(asked) < len(numbers):
        notes["generated"] = f"answers are generated for {len(asked)} of {len(numbers)} rows" + (
            ""
            if len(answerable) == len(numbers)
            else f"; {len(numbers) - len(answerable)} have no prompt or no text answer"
        )
    choices = choose(rows, task, recipe, references) if CHOICE_METRIC in metrics else None
    trees = plant(questions, answerable, choices or (), task, processor, recipe)
    if CHOICE_METRIC in metrics:
        notes[CHOICE_METRIC + ".choices"] = describe_choices(choices, references, answerable, trees)
    return Plan(
        reader=reader,
        rows=tuple(numbers),
        origins=tuple(origins),
        prompts=tuple(show(row) for row in questions),
        references=tuple(references),
        prompt_ids={i: render(task, questions[i], processor, recipe) for i in asked} if continues else {},
        questions=tuple(questions),
        targets=tuple(targets),
        asked=tuple(asked),
        choices=choices or (),
        trees=trees,
        metrics=metrics,
        notes=notes,
        slices=slices,
        groups=groups,
    )


def wanted_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Return the metrics of the recipe, or the task's own."""
    return tuple(recipe.evaluate.metrics) or TASK_FACTS[recipe.task].default_metrics


def render(task: EvaluatedTask, question: Row, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the token ids to go on from."""
    return [int(token) for token in task.prompt_ids(question, processor, recipe)]


def read_questions(
    rows: Rows, wanted: set[int], task: EvaluatedTask
) -> tuple[list[str], list[Row], list[str], list[Any]]:
    """Return origin, row without its answer, answer as text and answer as the task has it, of the wanted test rows."""
    origins, questions, references, targets = [], [], [], []
    for number, (origin, row) in enumerate(iterate_rows(rows, SIDE)):
        if number in wanted:
            question, answer = task.split_answer(row)
            origins.append(origin)
            questions.append(question)
            references.append(answer)
            targets.append(task.reference(row))
    return origins, questions, references, targets


def choose(rows: Rows, task: EvaluatedTask, recipe: Recipe, references: Sequence[str]) -> tuple[str, ...] | None:
    """Return the answers to choose from: those that the recipe lists, or those that the rows show to be few."""
    stated = recipe.evaluate.choices
    if stated is None:
        return None
    if stated != "auto":
        check_choices(stated, references)
        return tuple(stated)
    return find_choices(every_answer(rows, task))


def every_answer(rows: Rows, task: EvaluatedTask) -> Iterator[str]:
    """Yield the answer of each training and test row."""
    for side in ("train", SIDE):
        for _, row in iterate_rows(rows, side):
            yield task.split_answer(row)[1]


def plant(
    questions: Sequence[Row],
    answerable: Sequence[int],
    choices: Sequence[str],
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> dict[int, Tree]:
    """Grow the tree of each answerable row; rows that do not fit with every choice are left out."""
    if not choices:
        return {}
    grown = grow_trees([questions[i] for i in answerable], choices, task, processor, recipe)
    return {i: tree for i, tree in zip(answerable, grown, strict=True) if tree is not None}


def describe_choices(
    choices: Sequence[str] | None, references: Sequence[str], answerable: Sequence[int], trees: dict[int, Tree]
) -> str:
    """Say which answers were compared and on how many rows, or why none were."""
    if not choices:
        return "not measured: the rows' answers are not few, short and repeated"
    text = (
        SIGNATURE.format(count=len(choices))
        + f", on {len(trees)} of {len(references)} rows: "
        + ", ".join(map(repr, choices))
    )
    unknown = sum(references[i] not in choices for i in answerable)
    return text + (f"; {unknown} references are not among them and count as wrong" if unknown else "")


def show(row: Row) -> str:
    """Write a prompt for a person: the text alone where there is one message, else each with its role."""
    if "context" in row:
        return f"{row['question']}\n{row['context']}"
    if "audio" in row:
        return str(row["audio"]).rsplit("/", 1)[-1]
    if "tokens" in row:
        return " ".join(row["tokens"])
    if "messages" not in row:
        named = [row.get(name) for name in ("prompt", "source", "document", "text", "pair")]
        return "\n".join(str(part) for part in named if part)
    turns = [(str(message["role"]), plain_text(message.get("content"))) for message in row["messages"]]
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join(f"{role}: {text}" for role, text in turns)


def plain_text(content: object) -> str:
    """Return the text of a message, which may come in parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)
