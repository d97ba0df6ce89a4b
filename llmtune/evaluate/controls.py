"""Controls of answers about pictures: the same test rows blind (grey pictures) and swapped (those of other rows).

A gain of the tuned model that it keeps with other pictures does not come from looking at them.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from llmtune.data.input_overlap import match_looks
from llmtune.data.pictures import Picture, read_picture
from llmtune.data.row_store import iterate_rows, read_rows
from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.eval_inputs import SPLIT, EncodedRows, EvalContext, EvalInputs
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.inference import Answers, compute_metrics
from llmtune.evaluate.metric import Measure, PairedMeasures
from llmtune.evaluate.shared_prefix import choice_trees
from llmtune.recipe.gate_grammar import find_control_problem, parse_gate
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import CONTROLS
from llmtune.records import Row, Rows
from llmtune.store.score_records import Control, Slice

GREY = 128
SWAP_SEED = 0
"""Fixed, so that runs with other seeds answer the same swapped rows."""


def try_controls(recipe: Recipe, task: EvaluatedTask, rows: Rows, console: Console) -> None:
    """Refuse gates on controls that these test rows cannot have. Raises RecipeError."""
    may = task.model_kind.takes_images and SPLIT in rows.files
    pictured = may and any(task.list_pictures(row) for _, row in iterate_rows(rows, SPLIT))
    if not pictured and "controls" in recipe.evaluate.model_fields_set:
        console.print("evaluate.controls: not measured, because no test row has a picture", highlight=False)
    problems = []
    for number, text in enumerate(recipe.evaluate.gates):
        if problem := find_control_problem(parse_gate(text), pictured, recipe.evaluate.controls):
            problems.append(Problem(problem[0], f"evaluate.gates.{number}", problem[1]))
    RecipeError.collect(problems)


def control_inputs(
    rows: Rows,
    inputs: EvalInputs | None,
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    console: Console,
) -> dict[str, EvalInputs]:
    """Return the test rows with pictures for each of `evaluate.controls`, with other pictures; empty without any."""
    if inputs is None or not inputs.pictured or not recipe.evaluate.controls:
        return {}
    indexes = sorted(inputs.pictured)
    full = dict(zip(indexes, read_rows(rows, SPLIT, [inputs.rows[i] for i in indexes]), strict=True))
    pictures = {i: task.list_pictures(row) for i, row in full.items()}
    controls: dict[str, EvalInputs] = {}
    for name in recipe.evaluate.controls:
        others = swap_pictures(pictures, inputs.references) if name == "swapped" else blind_pictures(pictures)
        replaced = {i: task.with_pictures(full[i], other) for i, other in others.items()}
        control_inputs = replace_rows(inputs, replaced, task, processor, recipe)
        if control_inputs is not None:
            controls[name] = control_inputs
            what = f"{name}: each model answers {len(control_inputs.measured)} test rows again with {CONTROLS[name]}"
            console.print(f"{what} (evaluate.controls)", highlight=False)
    return controls


def blind_pictures(pictures: Mapping[int, Sequence[Picture]]) -> dict[int, list[Picture]]:
    """Return grey pictures of the same sizes, which have the same number of tokens."""
    return {i: [grey_picture(*picture["size"]) for picture in row] for i, row in pictures.items()}


@lru_cache(maxsize=256)
def grey_picture(width: int, height: int) -> Picture:
    """Return a picture of one grey."""
    from PIL import Image

    content = io.BytesIO()
    Image.new("L", (width, height), GREY).save(content, "PNG")
    return read_picture(content.getvalue(), None)


def _looks_of(pictures: Mapping[int, Sequence[Picture]]) -> dict[str, set[str]]:
    """Return for the content of each picture those of the pictures that look the same, itself included."""
    shown = [*{one["content"]: one for row in pictures.values() for one in row}.values()]
    alike = zip(shown, match_looks(shown, shown), strict=True)
    return {one["content"]: {shown[place]["content"] for place in places} for one, places in alike}


def swap_pictures(pictures: Mapping[int, Sequence[Picture]], references: Sequence[str]) -> dict[int, Sequence[Picture]]:
    """Return for each row the pictures of another row with as many; rows without such a partner are missing.

    The partner has another reference answer and no picture that looks like one of the row's own, if possible; one of
    its pictures always looks different. Partners are spread evenly, in a random order of the answers: neighbours in
    the alphabet often share a part, such as the first field of JSON.
    """
    looks = _looks_of(pictures)
    by_count: dict[int, list[int]] = defaultdict(list)
    generator = np.random.default_rng(SWAP_SEED)
    order, answers = generator.permutation(len(references)).tolist(), sorted({one.strip() for one in references})
    ranks = dict(zip(answers, generator.permutation(len(answers)).tolist(), strict=True))
    for i in sorted(pictures, key=lambda i: (ranks[references[i].strip()], order[i])):
        by_count[len(pictures[i])].append(i)
    partners = {}
    for group in by_count.values():
        bounds: dict[str, tuple[int, int]] = {}
        for place, i in enumerate(group):
            first, _ = bounds.get(references[i].strip(), (place, 0))
            bounds[references[i].strip()] = first, place + 1
        for place, i in enumerate(group):
            first, end = bounds[references[i].strip()]
            others = [*group[end:], *group[:first]]
            shift = (place - first) % len(others) if others else 0
            candidates = (*others[shift:], *others[:shift], *group[place + 1 : end], *group[first:place])
            own = {content for one in pictures[i] for content in looks[one["content"]]}
            for differs in (all, any):
                other = (j for j in candidates if differs(one["content"] not in own for one in pictures[j]))
                if i not in partners and (partner := next(other, None)) is not None:
                    partners[i] = partner
    return {i: pictures[partners[i]] for i in sorted(partners)}


def replace_rows(
    inputs: EvalInputs,
    replaced: Mapping[int, Row],
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
) -> EvalInputs | None:
    """Return the inputs with only these rows measured, encoded again; None if none of them fits."""
    encoded = zip(replaced, task.encode([*replaced.values()], processor, recipe), strict=True)
    examples = {i: row for i, row in encoded if not isinstance(row, str) and row}
    if not examples:
        return None
    rows = {i: replaced[i] for i in examples}
    turns = {i: task.tool_turns(rows[i], recipe) for i in inputs.turns if i in rows}
    questions = {i: task.split_answer(row)[0] for i, row in rows.items()}
    answered = tuple(i for i in inputs.answered if i in rows)
    prompts = {i: [turn.question for turn in turns.get(i, ())] or [questions[i]] for i in answered}
    tree_questions = {i: questions[i] for i in inputs.trees if i in rows}
    trees = choice_trees([*tree_questions.values()], inputs.choices, task, processor, recipe) if tree_questions else []
    return replace(
        inputs,
        reader=EncodedRows({inputs.rows[i]: row for i, row in examples.items()}),
        questions=tuple(questions.get(i, question) for i, question in enumerate(inputs.questions)),
        answered=answered,
        generation_prompts={
            i: [task.prompt(row, processor, recipe) for row in before] for i, before in prompts.items()
        },
        turns=turns,
        trees={i: tree for i, tree in zip(tree_questions, trees, strict=True) if tree is not None},
        measured=tuple(rows),
    )


def compare_controls(
    context: EvalContext, answers: Mapping[str, Answers], measures: PairedMeasures
) -> dict[str, Control]:
    """Return the scores of both models on each control, and what the rows' own pictures are worth."""
    controls = {}
    for name, inputs in context.controls.items():
        scored = replace(context, inputs=inputs)
        ignored: dict[str, Problem] = {}  # the same metrics fail on the rows' own pictures, and are reported there
        base = answers[name_answers("base", name)]
        tuned = replace(answers[name_answers("tuned", name)], temperature=answers["tuned"].temperature)
        other = PairedMeasures(*(compute_metrics(scored, one, base, ignored) for one in (base, tuned)))
        left = len(inputs.pictured) - len(inputs.measured)
        note = f"{left} rows with pictures are left out: no other row has as many other pictures, or they do not fit"
        control = compare_control(name, other, measures, context.recipe.seed)
        controls[name] = replace(control, rows=len(inputs.measured), note=note if left else "")
    return controls


def name_answers(model: str, control: str) -> str:
    """Return the key of a model's answers under a control in `Scored.answers`."""
    return f"{model}, {control}"


def shown_answers(answers: Mapping[str, Answers], controls: Iterable[str]) -> dict[str, Answers]:
    """Return the answers of base and tuned model, and those of the tuned model under each control, by its name."""
    others = {control: replace(answers[name_answers("tuned", control)], sums=None) for control in controls}
    return {"base": answers["base"], "tuned": answers["tuned"]} | others


def compare_control(name: str, control: PairedMeasures, originals: PairedMeasures, seed: int) -> Control:
    """Compare the measures under one control with those of the rows' own pictures, on the rows of both."""
    models: list[dict[str, Measure]] = [{}, {}, {}, {}]
    for metric in (metric for metric in control.tuned if metric in originals.tuned):
        parts = [of.get(metric) for of in (control.base, control.tuned, originals.base, originals.tuned)]
        shared = set.intersection(*({*one.at} for one in parts if one is not None))
        for model, one in zip(models, parts, strict=True):
            if one is not None and shared:
                model[metric] = one.subset(shared)
    base, tuned, base_before, tuned_before = models
    both = PairedMeasures(base_before, tuned_before)
    return Control(
        *PairedMeasures(base, tuned).scores(),
        difference=PairedMeasures(tuned, tuned_before).differences(seed),
        base_difference=PairedMeasures(base, base_before).differences(seed),
        scores=Slice("own pictures", 0, *both.scores(), both.differences(seed)),
    )
