"""Fairness: paired sentences, swapped words and gaps between groups, of base and tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from llmtune.data.hub_datasets import HUB, resolve_commit
from llmtune.errors import RecipeError
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.group_gaps import METHOD, find_gaps, gap_tables, score_gap
from llmtune.evaluate.inference import add_bar, inference_on
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.paired_sentences import Pair, hub_source, read_pairs
from llmtune.evaluate.sentence_scores import (
    EncodedPair,
    Scores,
    count_texts,
    encode_pairs,
    score_by_decoder,
    score_by_encoder,
)
from llmtune.evaluate.shared_prefix import Tree
from llmtune.evaluate.stereotypes import keep_scored, measure_pairs, pair_tables
from llmtune.evaluate.suite import EvalSuite
from llmtune.evaluate.swapped_rows import METRIC, SwapAnswers, SwappedRows, read_swaps, swap_rows
from llmtune.recipe.eval_suites_section import OWN
from llmtune.records import Difference, Study, StudyTable
from llmtune.report.verdict import FEWEST_ROWS

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

MASKED = "AutoModelForMaskedLM"
WITH_LIKELIHOODS = ("AutoModelForCausalLM", MASKED)
"""Models that give a sentence a likelihood."""
WITHOUT = "gives a sentence by itself no likelihood"
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


def check_fairness(recipe: Recipe) -> None:
    """Read the files that the suite reads, and look its data sets up on the hub; nothing else is needed for that.

    Raises:
        DataError: files or data sets that are missing or cannot be used.
        EnvironmentProblem: the hub cannot be reached.
    """
    section = recipe.evaluate.fairness
    if section is None:
        return
    read_pairs([source for source in section.pairs if not source.startswith(HUB)])
    for source in section.pairs:
        if source.startswith(HUB):
            resolve_commit(hub_source(source).path.removeprefix(HUB), None)
    read_swaps(section.swaps)


def check_likelihoods(recipe: Recipe, task: EvaluatedTask, model: str) -> None:
    """Refuse pairs that the recipe names for a model that gives sentences no likelihood. Raises RecipeError."""
    section = recipe.evaluate.fairness
    if section is not None and section.pairs not in ((), (OWN,)) and task.auto_class not in WITH_LIKELIHOODS:
        fix = "Remove it (`pairs: []`); swaps and groups work here."
        raise RecipeError.of(f"{model}, as a {task.auto_class}, {WITHOUT}", "evaluate.fairness.pairs", fix)


@dataclass(frozen=True)
class Outputs:
    """What one model makes of pairs and swapped rows."""

    pairs: Sequence[Scores | None]
    swapped: SwapAnswers


@dataclass
class Results:
    """The parts of the suite, put together one after the other."""

    base: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, float] = field(default_factory=dict)
    difference: dict[str, Difference] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    tables: list[StudyTable] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    def add(self, measures: PairedMeasures, seed: int) -> None:
        """Add scores and differences."""
        base, tuned = measures.scores()
        self.base |= base
        self.tuned |= tuned
        self.difference |= measures.differences(seed, FEWEST_ROWS)
        self.signatures |= {metric: one.signature for metric, one in measures.tuned.items()}


class FairnessSuite(EvalSuite):
    """Pairs and swapped rows, read and encoded before a model is loaded; gaps come from the scores of the rows."""

    name = "fairness"

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        self.outputs: dict[str, Outputs] = {}
        self.pairs: list[Pair] = []
        self.encoded: list[EncodedPair] = []
        self.swapped: SwappedRows | None = None
        self.notes: dict[str, str] = {}
        """By metric, why it is not measured."""
        self.masked = context.task.auto_class == MASKED
        """Whether the model guesses masked words."""
        section = context.recipe.evaluate.fairness
        assert section is not None
        if section.pairs and context.task.auto_class in WITH_LIKELIHOODS:
            self.pairs = read_pairs(section.pairs)
            self.encoded = encode_pairs(self.pairs, context.processor, self.masked)
        elif section.pairs:
            self.notes["stereotype"] = f"not measured: a model of the class {context.task.auto_class} {WITHOUT}"
        if section.swaps:
            swapped = swap_rows(context, read_swaps(section.swaps))
            if isinstance(swapped, str):
                self.notes[METRIC] = f"not measured: {swapped}"
            elif swapped.questions:
                self.swapped = swapped
            else:
                self.notes[METRIC] = f"not measured on {swapped.signature}"
        for note, why in self.notes.items():
            context.console.print(f"fairness.{note}: {why}", style="dim", highlight=False)

    def run(self, name: str, model: torch.nn.Module) -> None:
        """Score the pairs and answer the swapped rows with one model."""
        device = self.context.device
        scores: list[Scores | None] = []
        answers: SwapAnswers = {}
        with inference_on(model, self.context) as bars:
            if self.pairs:
                advance = add_bar(bars, f"{name}: fairness, pairs", count_texts(self.encoded))
                trees = [one for one in self.encoded if isinstance(one, Tree)]
                options = [one for one in self.encoded if not isinstance(one, Tree)]
                if options:
                    scores = score_by_encoder(model, options, self.context.processor, device, advance)
                else:
                    scores = score_by_decoder(model, self.pairs, trees, device, advance)
            if self.swapped is not None:
                advance = add_bar(bars, f"{name}: fairness, swaps", 2 * len(self.swapped.questions))
                answers = self.swapped.answers_of(model, advance)
        self.outputs[name] = Outputs(scores, answers)

    def compare(self, measures: PairedMeasures) -> Study:
        """Compare both models on pairs, swapped rows and groups."""
        base, tuned = self.outputs.get("base"), self.outputs["tuned"]
        results = Results(signatures=dict(self.notes))
        self.compare_pairs(base, tuned, results)
        self.compare_swaps(base, tuned, results)
        self.compare_groups(measures, results)
        measured = [metric for metric in MEANINGS if metric in results.tuned]
        return Study(
            title="Fairness",
            base={metric: results.base[metric] for metric in measured if metric in results.base},
            tuned={metric: results.tuned[metric] for metric in measured},
            difference={metric: results.difference[metric] for metric in measured if metric in results.difference},
            meanings={metric: MEANINGS[metric] for metric in measured},
            better={metric: BETTER[metric] for metric in measured},
            signatures=results.signatures,
            limits=" ".join(results.limits),
            tables=tuple(results.tables),
        )

    def compare_pairs(self, base: Outputs | None, tuned: Outputs, results: Results) -> None:
        """Add how often the stereotypical sentence is the likelier."""
        if not self.pairs:
            return
        scored = keep_scored(self.pairs, None if base is None else base.pairs, tuned.pairs)
        if not scored.pairs:
            results.signatures["stereotype"] = "not measured: every pair is longer than the model's context"
            return
        measures, seed = measure_pairs(scored, self.masked), self.context.recipe.seed
        results.add(measures, seed)
        results.tables += pair_tables(scored, measures, seed)
        own = all(pair.source == OWN for pair in scored.pairs)
        language = "English of a few sentences" if own else "the words of the sets that you chose"
        results.limits.append(LIMITS["pairs"].format(language))

    def compare_swaps(self, base: Outputs | None, tuned: Outputs, results: Results) -> None:
        """Add how often answers change with the group."""
        if self.swapped is None:
            return
        before = None if base is None else base.swapped
        if not tuned.swapped:
            results.signatures[METRIC] = "not measured: prompts and answers exceed the model's context"
            return
        results.add(self.swapped.measure(before, tuned.swapped), self.context.recipe.seed)
        results.signatures[METRIC] = f"{len(tuned.swapped)} of {self.swapped.signature}"
        results.tables += self.swapped.table(before, tuned.swapped)
        results.limits.append(LIMITS["swaps"])

    def compare_groups(self, measures: PairedMeasures, results: Results) -> None:
        """Add the gaps between groups."""
        inputs = self.context.inputs
        if inputs is None or not inputs.groups:
            return
        gaps = find_gaps(inputs.groups, measures, self.context.recipe.seed)
        without = [column for column in inputs.groups if column not in {gap.column for gap in gaps}]
        few = f"no two groups of {' or '.join(without)} have {FEWEST_ROWS} rows" if without else ""
        if not gaps:
            results.signatures["gap"] = f"not measured: {few}"
            return
        metric = gaps[0].metric
        score = score_gap([gap for gap in gaps if gap.metric == metric])
        results.base["gap"], results.tuned["gap"] = score.base, score.tuned
        results.difference["gap"] = score.difference
        columns = ", ".join(dict.fromkeys(gap.column for gap in gaps))
        by_chance = (
            f"groups of these sizes drawn by lot have a gap of {score.chance:.3g} on average, "
            f"and one as large as the tuned model's in {100 * score.p:.2g} of 100 draws"
        )
        parts = (f"{metric} by {columns}", METHOD, by_chance, few)
        results.signatures["gap"] = "; ".join(part for part in parts if part)
        results.tables += gap_tables(gaps)
        results.limits.append(f"{LIMITS['groups']} Here {by_chance}.")
