"""The user's own test rows with the words for groups swapped: whether the answer changes when only the group does."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from llmtune.evaluate.choice_likelihood import grow_trees, most_likely
from llmtune.evaluate.eval_inputs import Plan, render, show
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.generation import generate_texts
from llmtune.evaluate.metric import Measure, measure_right
from llmtune.evaluate.shared_prefix import Tree, score_trees
from llmtune.evaluate.slices import difference_of, write_value
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, cut_evenly
from llmtune.evaluate.word_swaps import Swaps
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.memory_plan import context_length
from llmtune.recipe.eval_suites_section import UNSWAPPED
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Advance, Difference, Row, StudyTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

TEXTS = ("prompt", "completion", "source", "document", "question", "context", "text", "pair", "chosen", "rejected")
"""Keys of a row without its answer that hold text; of a conversation it is each message."""
MOVED = 0.1
"""Of the standard deviation of the reference numbers: a prediction that moves by more has changed."""
METRIC = "swap_changes"
NO_ANSWERS = "no test row asks for an answer that could change: a prompt, a mask, the better of two"
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
Said = dict[int, tuple[Any, Any]]
"""By row of the plan, the answer to it as it stands and with the words swapped."""


@dataclass(frozen=True)
class SwapPlan:
    """Rows of the test side with words swapped, and how answers to them are taken."""

    swaps: Swaps
    questions: dict[int, Row]
    """Index into the rows of the plan -> the row without its answer, swapped."""
    words: dict[int, tuple[str, ...]]
    ambiguous: int
    """Rows left out for a word with several partners."""
    without: int
    """Rows without any of the words."""
    how: str
    """What is compared: the likeliest of the choices, generated texts, or predictions."""
    trees: dict[int, tuple[Tree, Tree]]
    prompts: dict[int, tuple[list[int], list[int]]]
    apart: float = 0.0
    """Of predicted numbers: from where on two of them differ."""
    labels: tuple[str, ...] = ()
    """What answers are chosen from; empty where they are free."""

    def said_of(self) -> str:
        """Say how many rows were swapped, and why others were not."""
        left_out = f"{self.without} without any of the words"
        if self.ambiguous:
            left_out += f", {self.ambiguous} with an ambiguous one"
        return f"{len(self.questions)} test rows ({left_out}): {self.how}"


def plan_swaps(
    plan: Plan, swaps: Swaps, task: EvaluatedTask, processor: PreTrainedTokenizerBase, recipe: Recipe
) -> SwapPlan | str:
    """Swap the words in the rows of the plan, or say why that makes no sense here."""
    if recipe.task in UNSWAPPED:
        return UNSWAPPED[recipe.task]
    found: dict[int, tuple[Row, tuple[str, ...]]] = {}
    counts: Counter[str] = Counter()
    for i, question in enumerate(plan.questions):
        if not asks(question, task, processor):
            continue
        row, words, ambiguous = swap_row(question, swaps)
        kind = "ambiguous" if ambiguous else "swapped" if words else "without"
        counts[kind] += 1
        if kind == "swapped":
            found[i] = row, words
    if not counts:
        return NO_ANSWERS
    if TASK_FACTS[recipe.task].generates and not plan.trees:
        every = list(found)
        found = {every[at]: found[every[at]] for at in cut_evenly(len(every), recipe.evaluate.limit)}
    if task.rates_answers:
        found = {i: one for i, one in found.items() if not isinstance(task.encode([one[0]], processor, recipe)[0], str)}
    questions = {i: row for i, (row, _) in found.items()}
    swapped = {i: words for i, (_, words) in found.items()}
    made = SwapPlan(swaps, questions, swapped, counts["ambiguous"], counts["without"], "", {}, {})
    return choose_manner(made, plan, task, processor, recipe)


def choose_manner(
    made: SwapPlan, plan: Plan, task: EvaluatedTask, processor: PreTrainedTokenizerBase, recipe: Recipe
) -> SwapPlan:
    """Settle how answers are taken: predictions of tasks that predict, choices where there are any, else texts."""
    if task.predicts:
        numbers = [float(value) for value in plan.targets if isinstance(value, float)]
        apart = MOVED * statistics.pstdev(numbers) if len(numbers) == len(plan.targets) and numbers else 0.0
        how = f"predictions compared, numbers by {apart:.3g}" if apart else "predictions compared"
        labels = tuple(recipe.classify.labels or ()) if recipe.classify else ()
        return replace(made, how=how, apart=apart, labels=labels)
    if plan.trees:
        asked = [i for i in made.questions if i in plan.trees]
        grown = grow_trees([made.questions[i] for i in asked], plan.choices, task, processor, recipe)
        trees = {i: (plan.trees[i], tree) for i, tree in zip(asked, grown, strict=True) if tree is not None}
        kept = {i: made.questions[i] for i in trees}
        how = f"the likeliest of {len(plan.choices)} answers compared"
        return replace(made, questions=kept, how=how, trees=trees, labels=plan.choices)
    prompts = {
        i: (render(task, plan.questions[i], processor, recipe), render(task, row, processor, recipe))
        for i, row in made.questions.items()
    }
    return replace(made, how="answers compared, generated greedily", prompts=prompts)


def asks(question: Row, task: EvaluatedTask, processor: PreTrainedTokenizerBase) -> bool:
    """Whether a row asks anything that can be answered: a prompt, a mask, two answers to judge."""
    if task.rates_answers:
        return "chosen" in question
    if task.auto_class == "AutoModelForMaskedLM":
        return str(processor.mask_token) in question["prompt"] + question["completion"]
    return bool(show(question))


def swap_row(row: Row, swaps: Swaps) -> tuple[Row, tuple[str, ...], bool]:
    """Return a row with the words swapped in all that is read, which ones, and whether one of them is ambiguous."""
    words: list[str] = []
    ambiguous = False

    def swap(text: Any) -> Any:
        nonlocal ambiguous
        if not isinstance(text, str):
            return text
        found = swaps.swap(text)
        words.extend(found.words)
        ambiguous |= bool(found.ambiguous)
        return found.text

    def swap_content(content: Any) -> Any:
        if not isinstance(content, list):
            return swap(content)
        return [{**part, "text": swap(part["text"])} if "text" in part else part for part in content]

    changed = {key: swap(row[key]) for key in TEXTS if key in row}
    if "messages" in row:
        changed["messages"] = [{**one, "content": swap_content(one.get("content"))} for one in row["messages"]]
    if "tokens" in row:
        changed["tokens"] = [swap(token) for token in row["tokens"]]
    return {**row, **changed}, tuple(words), ambiguous


def ask_swapped(
    model: torch.nn.Module,
    made: SwapPlan,
    plan: Plan,
    task: EvaluatedTask,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    device: str,
    advance: Advance,
) -> Said:
    """Put each row to a model as it stands and swapped, in one go: rounding then differs as little as can be."""
    limit = context_length(unwrap(model).config) or 1 << 60
    if task.predicts:
        rows = list(made.questions)
        both = [plan.questions[i] for i in rows] + [made.questions[i] for i in rows]
        said = task.predict(model, both, processor, recipe, device=device, advance=advance) if both else []
        return dict(zip(rows, zip(said[: len(rows)], said[len(rows) :], strict=True), strict=True))
    if made.trees:
        fit = [i for i, pair in made.trees.items() if all(longest(tree) <= limit for tree in pair)]
        trees = [made.trees[i][side] for side in (0, 1) for i in fit]
        budget = budget_for(device, TOKEN_BUDGET)
        scores = score_trees(model, trees, device=device, budget=budget, advance=advance)
        chosen = [most_likely(one, plan.choices) for one in scores]
        return dict(zip(fit, zip(chosen[: len(fit)], chosen[len(fit) :], strict=True), strict=True))
    new = recipe.generation.max_new_tokens
    fit = [i for i, pair in made.prompts.items() if all(len(ids) + new <= limit for ids in pair)]
    prompts = [made.prompts[i][side] for side in (0, 1) for i in fit]
    texts = generate_texts(model, prompts, processor, greedily(recipe), device=device, advance=advance)
    return dict(zip(fit, zip(texts[: len(fit)], texts[len(fit) :], strict=True), strict=True))


def longest(tree: Tree) -> int:
    """Return the tokens of a tree's longest text."""
    return len(tree.prefix) + max(map(len, tree.branches))


def greedily(recipe: Recipe) -> Recipe:
    """Return the recipe with answers that are not drawn: else they change by chance."""
    plain = {"do_sample": False, **dict.fromkeys(SAMPLING)}
    return recipe.model_copy(update={"generation": recipe.generation.model_copy(update=plain)})


# What changed


def has_changed(made: SwapPlan, before: Any, after: Any) -> bool:
    """Whether the answer is another one. A word for a group in it is expected to be swapped as in the prompt."""
    if isinstance(before, dict) and "rejected" in before:
        return prefers_chosen(before) != prefers_chosen(after)
    if isinstance(before, dict):
        key = "label" if "label" in before else "text"
        return has_changed(made, before[key], after[key])
    if isinstance(before, float):
        return bool(abs(after - before) > made.apart)
    if isinstance(before, list) and made.labels:
        return sorted(expected(made, label) for label in before) != sorted(after)
    if isinstance(before, list):
        return bool(before != after)
    if made.labels:
        return bool(expected(made, before) != after)
    return not made.swaps.follows(before.strip(), after.strip())


def prefers_chosen(said: Mapping[str, float]) -> bool:
    """Whether the better answer of a pair is the one that a model rates higher."""
    return said["chosen"] > said["rejected"]


def expected(made: SwapPlan, label: str) -> str:
    """Return the label that is right once the words are swapped: another one only if it names a group."""
    swapped = made.swaps.swap(label).text
    return swapped if swapped in made.labels else label


def measure_changes(made: SwapPlan, said: Said, rows: Sequence[int]) -> Measure:
    """Measure the share of rows whose answer changes."""
    changed = [has_changed(made, *said[i]) for i in rows]
    return replace(measure_right(changed, METRIC, made.said_of()), at=tuple(rows))


def compare_changes(
    made: SwapPlan, base: Said | None, tuned: Said, seed: int
) -> tuple[float | None, float, Difference | None]:
    """Return the share of base and tuned model, and the difference on the rows that both answered."""
    rows = [i for i in tuned if base is None or i in base]
    after = measure_changes(made, tuned, rows)
    if base is None:
        return None, after.value, None
    before = measure_changes(made, base, rows)
    return before.value, after.value, difference_of(before, after, seed)


def show_changes(
    made: SwapPlan, base: Said | None, tuned: Said, plan: Plan, write: Callable[[Any], str], most: int
) -> StudyTable | None:
    """Show a few rows whose answer changes in the tuned model; None where there are none."""
    rows = [i for i, said in tuned.items() if has_changed(made, *said)]
    shown = [rows[at] for at in cut_evenly(len(rows), most)]
    if not shown:
        return None
    heads = ("row", "swapped", "tuned: as it stands", "tuned: swapped", *(("base changes too",) if base else ()))
    cells = []
    for i in shown:
        words = ", ".join(f"{word} → {made.swaps.swap(word).text}" for word in dict.fromkeys(made.words[i]))
        told = tuple(write_value(say(one, write)) for one in tuned[i])
        too = ("yes" if has_changed(made, *base[i]) else "no",) if base and i in base else ("",) if base else ()
        cells.append((plan.origins[i], words, *told, *too))
    return StudyTable("Answers that change with the group alone: a few of them", heads, tuple(cells))


def say(said: Any, write: Callable[[Any], str]) -> str:
    """Say an answer as a person reads it."""
    if isinstance(said, Mapping) and "rejected" in said:
        return "the chosen one" if prefers_chosen(said) else "the rejected one"
    return said if isinstance(said, str) else write(said)
