"""Compares base and tuned answers in both orders, and labelled pairs measure its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from rich.console import Console

from llmtune.data.file_readers import parse_lines, read_lazily
from llmtune.data.rejected_rows import RowError
from llmtune.display.console import counting_bars
from llmtune.display.number_format import DASH
from llmtune.errors import DataError, Problem
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.metric import PairedMeasures
from llmtune.evaluate.significance import ALL_TIES
from llmtune.evaluate.suites.eval_suite import EvalSuite, read_sources
from llmtune.evaluate.suites.judge_client import (
    Judge,
    JudgeQuestion,
    JudgeReply,
    host,
    key_variable,
    read_journal,
    write_question,
)
from llmtune.evaluate.suites.judge_statistics import JudgedPairs, fit_correction, measure_judge, win_rate
from llmtune.recipe.data_section import DATA_ENDINGS, data_ending
from llmtune.recipe.schema import Recipe
from llmtune.records import Difference, Rows
from llmtune.store.atomic_files import explained, write_text
from llmtune.store.processes import once
from llmtune.store.score_records import Study, StudyTable

JOURNAL = "judge.jsonl"
"""In the run folder every reply as it came, in `evaluation` the questions of the last evaluation."""
LABELS = {"a": 1.0, "tie": 0.0, "b": -1.0}
"""Verdicts of people on answer A."""
FIX = 'Write a row like {"prompt": "2 + 2 =", "answer_a": "4", "answer_b": "5", "label": "A"}; labels: A, B, tie.'
COLUMNS = ("answer_a", "answer_b", "label")
SIDES = {"A": 1.0, "tie": 0.0, "B": -1.0}
"""A verdict as wins of the answer shown first."""
MEASURES = {
    "ties": ("ties in both orders", 0),
    "inconsistent": ("verdicts that change with the order", -1),
    "first_position": ("picks of the answer shown first; 0.5 is neutral", 0),
    "longer_wins": ("wins of the longer answer, deserved or not", 0),
    "agreement": ("same verdict as people", 1),
    "kappa": ("agreement beyond chance", 1),
    "error_rate": ("picks the answer that people reject", -1),
    "length_bias": ("wins minus losses gained by length", 0),
}
"""Measures of the judge itself: meaning, and better direction."""
ASKED = "asked in both orders, with names hidden; a win in both is 1, in none 0, else 0.5"
OPEN = "the interval takes a pair whose orders disagree as either verdict"
LIMITS = (
    "A judge's errors are corrected as far as labelled pairs show them: pairs of the same kind of prompts and answers, "
    "and a bias for length. Other biases, such as for answers in its own style, remain."
)
TEXT_ALONE = "The judge reads text alone: it does not see the pictures, and did not compare answers without them."
UNJUDGED = "The judge's accuracy is unknown: set evaluate.judge.labelled to measure and correct its errors."


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt: of the tuned and the base model, or A and B of a labelled pair."""

    origin: str
    prompt: str
    first: str
    second: str
    people: float | None = None
    """Verdict of people on a labelled pair: 1, 0 or -1."""
    cluster: int | None = None

    @property
    def is_equal(self) -> bool:
        """Whether the answers are the same: a tie that nobody needs to judge."""
        return self.first.strip() == self.second.strip()

    def questions(self, question: str) -> tuple[JudgeQuestion, JudgeQuestion]:
        """Return the questions to the judge: with the first answer shown first, and shown second."""
        both = (self.first, self.second), (self.second, self.first)
        one, other = (write_question(question, self.prompt, *answers) for answers in both)
        return one, other


class JudgeSuite(EvalSuite[None]):
    """Ask the judge about the answers to the test rows, and about labelled pairs."""

    key = "judge"
    runs_models = False
    metrics: ClassVar = {
        "win_rate": ("the judge prefers its answer; with labelled pairs corrected for the judge's errors", 1),
        "win_rate_uncorrected": ("as the judge says", 1),
        **{name: (f"the judge: {meaning}", better) for name, (meaning, better) in MEASURES.items()},
    }

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        section = context.recipe.evaluate.judge
        assert section is not None
        self.section = section
        self.labelled = self.read(context.recipe)
        self.judge = Judge(section, context.recipe.seed)
        self.journal = context.folder.parent / JOURNAL if context.folder else None
        sent = f", with the key in {variable}" if (variable := key_variable(section)) else ""
        what = f"judge: sends prompts and answers of the test rows to {host(section)}{sent}"
        context.console.print(what, highlight=False, markup=False)
        if once(lambda: not self.known()):
            once(self.judge.check)

    @classmethod
    def read(cls, recipe: Recipe) -> list[AnswerPair]:
        """Read the labelled pairs. Raises DataError."""
        section = recipe.evaluate.judge
        return read_labelled(section.labelled) if section and section.labelled else []

    @classmethod
    def try_out(cls, recipe: Recipe, task: EvaluatedTask, rows: Rows, console: Console) -> None:
        """Ask the judge a question. Raises EnvironmentProblem if it does not answer."""
        assert recipe.evaluate.judge is not None
        Judge(recipe.evaluate.judge, recipe.seed).check()

    def known(self) -> dict[str, JudgeReply]:
        """Return the replies to earlier questions."""
        replies = read_journal([self.journal]) if self.journal else {}
        return {key: self.judge.without_key(reply) for key, reply in replies.items()}

    def run(self, name: str, model: torch.nn.Module) -> None:
        """Do nothing: the answers to the test rows are generated for the other metrics too."""

    def compare(self, rows: PairedMeasures) -> Study:
        """Ask the judge, and return the win rate, the judge's own measures, and the costs."""
        test = self.test_pairs()
        if not test:
            self.unmeasured = "not measured: no test row has an answer of both models"
            return self.study({}, {}, {}, {})
        replies = once(lambda: self.ask_pairs([*test, *self.labelled]))
        judged, people = self.judged(test, replies), self.judged(self.labelled, replies)
        if not len(judged.longer_N):
            self.unmeasured = f"not measured: no reply about {len(test)} rows has a verdict"
            return self.study({}, {}, {}, {}, tables=[self.costs(replies)])
        labelled, seed = people if len(people.longer_N) else None, self.context.recipe.seed
        changes = {"win_rate": win_rate(judged, labelled)}
        changes |= {"win_rate_uncorrected": win_rate(judged)} if labelled else {}
        if not (judged.shown_first_N.any() or judged.shown_second_N.any() or all(pair.is_equal for pair in test)):
            changes = {name: replace(one, low=-1.0, high=1.0, p=1.0, test=ALL_TIES) for name, one in changes.items()}
        measures = measure_judge(judged, seed)
        of_people = measure_judge(people, seed) if labelled else {}
        scores = of_people | measures
        base, tuned = ({name: (1 + sign * one.value) / 2 for name, one in changes.items()} for sign in (-1, 1))
        texts = self.signatures(judged, labelled, len(test))
        tables = [judge_table(measures, of_people), self.costs(replies)]
        study = self.study(
            base, tuned | {name: one.value for name, one in scores.items()}, changes, texts, self.limits(), tables
        )
        scores |= {name: halve(one) for name, one in changes.items()}
        return replace(
            study, verdict=describe_win_rate(scores["win_rate"], labelled, scores["inconsistent"]), intervals=scores
        )

    def limits(self) -> str:
        """Describe what the numbers can show."""
        pictured = self.context.inputs is not None and self.context.inputs.pictured
        return f"{LIMITS} {TEXT_ALONE}" if pictured else LIMITS

    def test_pairs(self) -> list[AnswerPair]:
        """Return the answers of both models to the test rows."""
        inputs = self.context.inputs
        if inputs is None:
            return []
        base, tuned = self.row_answers["base"].texts, self.row_answers["tuned"].texts
        return [
            AnswerPair(
                inputs.origins[i],
                inputs.prompts[i],
                tuned[i],
                base[i],
                cluster=inputs.clusters[i] if inputs.clusters else None,
            )
            for i in inputs.answered
            if i in base and i in tuned
        ]

    def ask_pairs(self, pairs: Sequence[AnswerPair]) -> dict[str, JudgeReply]:
        """Ask about all pairs, in both orders, and save the questions of this evaluation."""
        questions = [one for pair in pairs if not pair.is_equal for one in pair.questions(self.section.question)]
        known_replies, console = self.known(), self.context.console
        keys = {self.judge.hash_question(one): one for one in questions}
        known_replies = {key: reply for key, reply in known_replies.items() if key in keys}
        what = f"judge: {len(keys) - len(known_replies):,} questions to {self.section.model} at {host(self.section)}"
        console.print(
            f"{what}{f', {len(known_replies):,} are answered' if known_replies else ''}", highlight=False, markup=False
        )
        with counting_bars(console) as bars:
            bar = bars.add_task("judge", total=len(keys) - len(known_replies))
            replies = self.judge.ask_all(list(keys.values()), known_replies, self.journal, partial(bars.advance, bar))
        if self.context.folder is not None:
            lines = [json.dumps(replies[key], ensure_ascii=False) for key in keys]
            with explained(self.context.folder):
                write_text(self.context.folder / JOURNAL, "".join(f"{line}\n" for line in lines))
        return replies

    def judged(self, pairs: Sequence[AnswerPair], replies: Mapping[str, JudgeReply]) -> JudgedPairs:
        """Return the verdicts on the pairs that have two."""
        rated_pairs = []
        for pair in pairs:
            one, other = (
                replies.get(self.judge.hash_question(question)) for question in pair.questions(self.section.question)
            )
            verdicts = [SIDES[reply["verdict"]] for reply in (one, other) if reply and reply["verdict"]]
            if pair.is_equal or len(verdicts) == 2:
                first, second = (0.0, 0.0) if pair.is_equal else verdicts
                rated_pairs.append((pair, first, -second))
        kept = [pair for pair, _, _ in rated_pairs]
        return JudgedPairs(
            np.array([first for _, first, _ in rated_pairs]),
            np.array([second for _, _, second in rated_pairs]),
            np.sign([float(len(pair.first) - len(pair.second)) for pair in kept]),
            np.array([pair.people for pair in kept if pair.people is not None]),
            [pair.cluster for pair in kept if pair.cluster is not None],
        )

    def signatures(self, judged: JudgedPairs, labelled: JudgedPairs | None, rows: int) -> dict[str, str]:
        """Return how the win rate was computed."""
        source = f"{len(judged.longer_N)} of {rows} rows, {self.section.model} at {host(self.section)}, {ASKED}"
        if labelled is None:
            return {"win_rate": f"{source}; {OPEN}; not corrected: {UNJUDGED}"}
        fit, pairs = fit_correction(labelled, pseudo=False), len(labelled.longer_N)
        how = f"slope {fit.slope:.3g} and length {fit.length:.3g} from {pairs} of {len(self.labelled)} labelled pairs"
        return {
            "win_rate": f"{source}; corrected with {how}; Fieller interval",
            "win_rate_uncorrected": f"{source}; {OPEN}",
        }

    def costs(self, replies: Mapping[str, JudgeReply]) -> StudyTable:
        """Return the judge's costs, and the number of unanswered questions."""
        every = list(replies.values())
        models = dict.fromkeys(reply["model"] for reply in every)
        counts = {
            "model, as the endpoint names it": ", ".join(models) or DASH,
            "questions": f"{len(every):,}",
            "asked again after a reply without a verdict": f"{sum(len(one['texts']) > 1 for one in every):,}",
            "without a verdict": f"{sum(one['verdict'] is None and not one['refused'] for one in every):,}",
            "refused by the endpoint": f"{sum(bool(one['refused']) for one in every):,}",
            "prompt tokens": f"{sum(one['prompt_tokens'] for one in every):,}",
            "completion tokens": f"{sum(one['completion_tokens'] for one in every):,}",
            "replies whose tokens the endpoint did not count": f"{sum(one['uncounted'] for one in every):,}",
        }
        return StudyTable("Questions to the judge", ("", "number"), tuple(counts.items()), open=True)


def halve(change: Difference) -> Difference:
    """Return a win rate with its interval, from wins minus losses."""
    value, low, high = ((1 + one) / 2 for one in (change.value, change.low, change.high))
    return replace(change, value=value, low=low, high=high)


def describe_win_rate(rate: Difference, labelled: JudgedPairs | None, inconsistent: Difference) -> str:
    """Return a sentence for the verdict: whom the judge prefers, and who judged the judge."""
    if rate.test == ALL_TIES:
        return "The judge cannot tell: it called every row a tie in both orders."
    if labelled and not fit_correction(labelled).is_informative():
        pairs = len(labelled.longer_N)
        return f"The judge cannot tell: on {pairs} labelled pairs it does not agree with people more than chance."
    who = "the tuned model" if rate.low > 0.5 else "the base" if rate.high < 0.5 else "neither model clearly"
    text = f"The judge prefers {who}: win rate {rate.value:.3g} ({rate.low:.3g} to {rate.high:.3g})"
    if labelled is None:
        share = f"{inconsistent.value:.0%} of its verdicts change with the order of the answers"
        widened = f" {share}, which widens the interval." if inconsistent.value else ""
        return f"{text}.{widened} {UNJUDGED}"
    return f"{text}, corrected for its errors on {len(labelled.longer_N)} labelled pairs."


def judge_table(test: Mapping[str, Difference], labelled: Mapping[str, Difference]) -> StudyTable:
    """Return the measures of the judge on the test rows and on the labelled pairs."""

    def cells(change: Difference | None) -> Iterator[str]:
        yield DASH if change is None or np.isnan(change.value) else f"{change.value:.3g}"
        yield DASH if change is None or np.isnan(change.low) else f"{change.low:.3g} to {change.high:.3g}"

    rows = [(f"{name}: {MEASURES[name][0]}", *cells(test.get(name)), *cells(labelled.get(name))) for name in MEASURES]
    heads = ("measure", "test rows", "95 % interval", "labelled pairs", "95 % interval")
    return StudyTable("The judge itself", heads, tuple(row for row in rows if {*row[1:]} != {DASH}), open=True)


# Labelled pairs


def read_labelled(file: str) -> list[AnswerPair]:
    """Read pairs that people judged; those with the same prompt belong together. Raises DataError with all bad rows."""
    pairs = read_sources([file], read_pairs, "labelled pair", FIX)
    clusters = {prompt: i for i, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
    if len(clusters) == len(pairs):
        return pairs
    return [replace(pair, cluster=clusters[pair.prompt]) for pair in pairs]


def read_pairs(file: str) -> list[AnswerPair | Problem]:
    """Read one file of labelled pairs, with a Problem for each bad row."""
    path = Path(file)
    container = DATA_ENDINGS.get(data_ending(path))
    if not path.is_file():
        raise DataError.of("file not found", file, "Correct evaluate.judge.labelled.")
    if container is None or container == "text":
        raise DataError.of(
            f"the ending {path.suffix!r} is not that of a table", file, "Use JSON Lines, CSV or Parquet."
        )
    return [read_pair(origin, line) for origin, line in parse_lines(read_lazily(path, path.name, container))]


def read_pair(origin: str, line: Mapping[str, object] | RowError) -> AnswerPair | Problem:
    """Read one labelled pair."""
    if isinstance(line, RowError):
        return Problem(str(line), origin, FIX)
    cells = {"prompt": line.get("prompt", line.get("question"))} | {name: line.get(name) for name in COLUMNS}
    if missing := [name for name, cell in cells.items() if not isinstance(cell, str) or not cell.strip()]:
        return Problem(f"no text in {', '.join(missing)}", origin, FIX)
    prompt, first, second, label = map(str, cells.values())
    people = LABELS.get(label.strip().lower())
    if people is None:
        return Problem(f"the label is {label!r:.40}", origin, FIX)
    return AnswerPair(origin, prompt, first, second, people)
