"""The study `fairness`: paired sentences, swapped words and gaps between groups, of base and tuned model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llmtune.data.hub_datasets import HUB, resolve_commit
from llmtune.errors import RecipeError
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.group_gaps import METHOD, find_gaps, gap_tables, score_gap
from llmtune.evaluate.inference import count, progress
from llmtune.evaluate.paired_sentences import Pair, hub_source, read_pairs
from llmtune.evaluate.sentence_scores import (
    Encoded,
    Scores,
    count_texts,
    encode_pairs,
    score_by_decoder,
    score_by_encoder,
)
from llmtune.evaluate.shared_prefix import Tree
from llmtune.evaluate.stereotypes import compare_pairs, judge, pair_tables
from llmtune.evaluate.suite_runner import Inquiry, Scored, Setting
from llmtune.evaluate.swapped_rows import (
    METRIC,
    Said,
    SwapPlan,
    ask_swapped,
    compare_changes,
    plan_swaps,
    show_changes,
)
from llmtune.evaluate.word_swaps import read_swaps
from llmtune.model import compute_context, resolve_dtype
from llmtune.recipe.eval_suites_section import OWN
from llmtune.records import Difference, Study, StudyTable
from llmtune.report.verdict import FEWEST_ROWS

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

NAME = "fairness"
SPEAKS = ("AutoModelForCausalLM", "AutoModelForMaskedLM")
"""Models that give a sentence a likelihood."""
SILENT = "gives a sentence by itself no likelihood"
MEANINGS = {
    "gap": "between best and worst served group",
    "stereotype": "pairs whose stereotypical sentence is likelier; 0.5 is neutral",
    "stereotype_distance": "of fairness.stereotype from 0.5",
    METRIC: "rows whose answer changes when only the group is swapped",
    "lm_score": "StereoSet: sensible above senseless sentences, 0 to 100",
    "icat": "StereoSet: sensible and without stereotype, 0 to 100",
}
BETTER = {"gap": -1, "stereotype": 0, "stereotype_distance": -1, METRIC: -1, "lm_score": 1, "icat": 1}
LIMITS = {
    "pairs": "Pairs ask which of two sentences a model finds likelier, in {}, and not what it says to your users. They "
    "are few, written by people, and about what counts as a stereotype where those live: 0.5 does not prove fairness, "
    "and some distance from it comes by chance. Base and tuned model read the same pairs, so they can be compared.",
    "swaps": "Swaps see words for groups alone, not names or hints, and an answer that changes rightly counts too. "
    "Answers that hang by a thread change with any word, whatever it stands for.",
    "groups": "A gap is the largest difference, so it lies above zero by chance alone, the more so the more groups and "
    "the fewer rows there are. It says that groups are served differently, and not why: their rows may be harder.",
}


@dataclass
class Questions:
    """What is asked, read and encoded before a model is loaded."""

    setting: Setting
    pairs: list[Pair] = field(default_factory=list)
    encoded: list[Encoded] = field(default_factory=list)
    swaps: SwapPlan | None = None
    notes: dict[str, str] = field(default_factory=dict)
    """By metric, why it is not measured."""

    @property
    def masked(self) -> bool:
        """Whether the model guesses masked words."""
        return self.setting.task.auto_class == "AutoModelForMaskedLM"


@dataclass(frozen=True)
class Replies:
    """What one model said."""

    pairs: list[Scores | None]
    swapped: Said


def check_fairness(recipe: Recipe) -> None:
    """Read the files that the study reads, and ask the hub for its data sets; nothing else is needed for that.

    Raises:
        DataError: files or data sets that are not there or cannot be used.
        EnvironmentProblem: the hub cannot be reached.
    """
    section = recipe.evaluate.fairness
    if section is None:
        return
    read_pairs([place for place in section.pairs if not place.startswith(HUB)])
    for place in section.pairs:
        if place.startswith(HUB):
            resolve_commit(hub_source(place).path.removeprefix(HUB), None)
    read_swaps(section.swaps)


def check_speaks(recipe: Recipe, task: EvaluatedTask, model: str) -> None:
    """Refuse pairs that the recipe names for a model that gives sentences no likelihood. Raises RecipeError."""
    section = recipe.evaluate.fairness
    if section is not None and section.pairs not in ((), (OWN,)) and task.auto_class not in SPEAKS:
        fix = "Remove it (`pairs: []`); swaps and groups work here."
        raise RecipeError.of(f"{model}, as a {task.auto_class}, {SILENT}", "evaluate.fairness.pairs", fix)


def make_fairness(setting: Setting) -> Inquiry:
    """Read and encode what the study asks.

    Raises:
        DataError: files that cannot be read or used.
        EnvironmentProblem: the hub cannot be reached, or the tokenizer lacks what the pairs need.
    """
    questions = Questions(setting)
    add_pairs(questions)
    add_swaps(questions)
    for note, about in questions.notes.items():
        setting.console.print(f"fairness.{note}: {about}", style="dim", highlight=False)
    return Inquiry(
        NAME,
        lambda name, model: ask(questions, name, model),
        lambda base, tuned, scored: compare(questions, base, tuned, scored),
    )


def add_pairs(questions: Questions) -> None:
    """Read the paired sentences, if the model can say how likely they are."""
    setting = questions.setting
    section, task = setting.recipe.evaluate.fairness, setting.task
    assert section is not None
    if not section.pairs:
        return
    if task.auto_class not in SPEAKS:
        questions.notes["stereotype"] = f"not measured: a model of the class {task.auto_class} {SILENT}"
        return
    questions.pairs = read_pairs(section.pairs)
    questions.encoded = encode_pairs(questions.pairs, setting.processor, questions.masked)


def add_swaps(questions: Questions) -> None:
    """Swap words in the test rows, if there are any."""
    setting = questions.setting
    section = setting.recipe.evaluate.fairness
    assert section is not None
    if not section.swaps:
        return
    swaps = read_swaps(section.swaps)
    if setting.plan is None:
        questions.notes[METRIC] = "not measured: there are no test rows"
        return
    made = plan_swaps(setting.plan, swaps, setting.task, setting.processor, setting.recipe)
    if isinstance(made, str):
        questions.notes[METRIC] = f"not measured: {made}"
    elif made.questions:
        questions.swaps = made
    else:
        questions.notes[METRIC] = f"not measured on {made.said_of()}"


def ask(questions: Questions, name: str, model: torch.nn.Module) -> Replies:
    """Put all questions to one model; sets it to evaluation mode."""
    setting = questions.setting
    model.eval()
    dtype = resolve_dtype(setting.recipe.model.dtype, setting.device)
    scores: list[Scores | None] = []
    said: Said = {}
    with torch.inference_mode(), compute_context(dtype, setting.device), progress(setting.console) as bars:
        if questions.pairs:
            advance = count(bars, f"{name}: fairness, pairs", count_texts(questions.encoded))
            trees = [one for one in questions.encoded if isinstance(one, Tree)]
            masked = [one for one in questions.encoded if not isinstance(one, Tree)]
            if masked:
                scores = score_by_encoder(model, masked, setting.processor, setting.device, advance)
            else:
                scores = score_by_decoder(model, questions.pairs, trees, setting.device, advance)
        if questions.swaps is not None:
            assert setting.plan is not None
            advance = count(bars, f"{name}: fairness, swaps", 2 * len(questions.swaps.questions))
            about = (setting.plan, setting.task, setting.processor, setting.recipe, setting.device)
            said = ask_swapped(model, questions.swaps, *about, advance)
    return Replies(scores, said)


@dataclass
class Findings:
    """The parts of the study, put together one after the other."""

    base: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)
    difference: dict[str, Difference] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    tables: list[StudyTable] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)


def compare(questions: Questions, base: Any, tuned: Any, scored: Scored) -> Study:
    """Turn what both models said into the study."""
    found = Findings(signatures=dict(questions.notes))
    find_stereotypes(questions, base, tuned, found)
    find_changes(questions, base, tuned, found)
    find_group_gaps(questions, scored, found)
    measured = [metric for metric in MEANINGS if metric in found.tuned]
    return Study(
        title="Fairness",
        base={metric: found.base[metric] for metric in measured if metric in found.base},
        tuned={metric: found.tuned[metric] for metric in measured},
        difference={metric: found.difference[metric] for metric in measured if metric in found.difference},
        meanings={metric: MEANINGS[metric] for metric in measured},
        better={metric: BETTER[metric] for metric in measured},
        signatures=found.signatures,
        limits=" ".join(found.limits),
        tables=tuple(found.tables),
    )


def find_stereotypes(questions: Questions, base: Replies | None, tuned: Replies, found: Findings) -> None:
    """Add what the paired sentences say."""
    if not questions.pairs:
        return
    seed = questions.setting.recipe.seed
    judged = judge(questions.pairs, None if base is None else base.pairs, tuned.pairs)
    if not judged.pairs:
        found.signatures["stereotype"] = "not measured: every pair is longer than the model's context"
        return
    before, after, changes = compare_pairs(judged, questions.masked, seed)
    found.base |= {metric: one.value for metric, one in (before or {}).items()}
    found.tuned |= {metric: one.value for metric, one in after.items()}
    found.difference |= changes
    found.signatures |= {metric: one.signature for metric, one in after.items()}
    found.tables += pair_tables(judged, seed)
    sources = "the words of the sets that you chose"
    own = all(pair.source == OWN for pair in judged.pairs)
    found.limits.append(LIMITS["pairs"].format("English of a few sentences" if own else sources))


def find_changes(questions: Questions, base: Replies | None, tuned: Replies, found: Findings) -> None:
    """Add how often answers change with the group."""
    made, plan = questions.swaps, questions.setting.plan
    if made is None or plan is None:
        return
    before = None if base is None else base.swapped
    if not tuned.swapped:
        found.signatures[METRIC] = "not measured: prompts and answers exceed the model's context"
        return
    value, found.tuned[METRIC], change = compare_changes(made, before, tuned.swapped, questions.setting.recipe.seed)
    if value is not None:
        found.base[METRIC] = value
    if change is not None:
        found.difference[METRIC] = change
    found.signatures[METRIC] = f"{len(tuned.swapped)} of {made.said_of()}"
    most = questions.setting.recipe.evaluate.samples
    table = show_changes(made, before, tuned.swapped, plan, questions.setting.task.format_prediction, most)
    found.tables += [table] if table else []
    found.limits.append(LIMITS["swaps"])


def find_group_gaps(questions: Questions, scored: Scored, found: Findings) -> None:
    """Add the gaps between groups."""
    plan = questions.setting.plan
    if plan is None or not plan.groups:
        return
    gaps = find_gaps(plan.groups, scored.base, scored.tuned, questions.setting.recipe.seed)
    without = [column for column in plan.groups if column not in {gap.column for gap in gaps}]
    few = f"no two groups of {' or '.join(without)} have {FEWEST_ROWS} rows" if without else ""
    if not gaps:
        found.signatures["gap"] = f"not measured: {few}"
        return
    headline = gaps[0].metric
    score = score_gap([gap for gap in gaps if gap.metric == headline])
    found.base["gap"], found.tuned["gap"], found.difference["gap"] = score.base, score.tuned, score.difference
    columns = ", ".join(dict.fromkeys(gap.column for gap in gaps))
    by_chance = f"groups of these sizes drawn by lot have a gap of {score.chance:.3g} on average"
    as_large = f"and one as large as the tuned model's in {100 * score.p:.2g} of 100 draws"
    told = (f"{headline} by {columns}", METHOD, f"{by_chance}, {as_large}", few)
    found.signatures["gap"] = "; ".join(part for part in told if part)
    found.tables += gap_tables(gaps, plan.groups)
    found.limits.append(f"{LIMITS['groups']} Here {by_chance}, {as_large}.")
