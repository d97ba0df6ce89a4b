"""The grammar of a gate: `metric[.low|.high] OP wanted`; wanted is a number, or a model's score and a number.

Examples: `exact_match >= 0.8`, `rougeL > base`, `loss < base - 0.02`, `perplexity <= base * 1.05`,
`exact_match.low > base`, `exact_match.low > champion - 0.01`, `accuracy.low >= 0.8`. `accuracy[new] >= 0.6` and
`accuracy[new].low > champion - 0.05` count the test rows that the champion never saw. Metrics of a study
are `study.metric`: `forgetting.perplexity <= base * 1.05`, `fairness.gap <= 0.05`, `benchmarks.arc_easy.acc > base`.
Metrics of an export are `deploy.format.metric`, compared with the tuned model:
`deploy.gguf.accuracy.low > tuned - 0.01`. A baseline without a language model has a name: `accuracy.low > tfidf`,
`ndcg@10.low > bm25`. The tuned model with other pictures is `blind` (grey ones) and `swapped` (those of other rows):
`exact_match.low > blind`. A control run has a name: `loss.high < sft`, `reward.low > filter`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from llmtune.errors import RecipeError
from llmtune.recipe.task_facts import (
    CALIBRATION,
    CONTROL_RUNS,
    CONTROLS,
    COST,
    DECISIONS,
    NEAREST_TO_ONE,
    TaskFacts,
)
from llmtune.recipe.task_variant import at_ten

Operator = Literal[">=", "<=", ">", "<", "=="]
IntervalEnd = Literal["low", "high"]
Opponent = Literal[
    "base", "champion", "tuned", "tfidf", "frozen", "bm25", "unigram", "lead3", "blind", "swapped", "sft", "filter"
]

SIMPLE_BASELINES: Mapping[str, str] = {
    "tfidf": "TF-IDF with logistic regression",
    "frozen": "the frozen base with logistic regression",
    "bm25": "BM25",
    "unigram": "the most frequent tag of each word",
    "lead3": "the first three sentences",
}
"""Baselines without fine-tuning, by the names that gates use."""
JUDGE = "judge."
"""How the scores of `evaluate.judge` begin: its own interval belongs to each."""
NEW = "new"
"""Test rows whose input the champion never saw: the only rows that a gate can select."""
RESERVED = frozenset(
    {"base", "engine", "generated", "generation", "intervals", "passages", "queries", "vectors"}
    | {metric for metrics in DECISIONS.values() for metric in metrics}
)
"""Names next to those of the metrics in the tables of signatures and scores."""
EXPORT = "deploy."
"""How the metrics of exports begin."""
NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
NAME = r"[A-Za-z][A-Za-z0-9_]*(?:-[A-Za-z0-9_]+)*(?:@[0-9]+)?"
OPPONENT = "|".join(("base", "champion", "tuned", *SIMPLE_BASELINES, *CONTROLS, *CONTROL_RUNS))
LOWER_IS_BETTER = frozenset(
    {
        "loss",
        "perplexity",
        "bits_per_byte",
        "wer",
        "cer",
        "ter",
        "mse",
        "mae",
        "kl",
        "answers_cut",
        "samples_cut",
        "answer_tokens",
        *CALIBRATION,
        "decided_error",
        "set_size",
        "false_alarms",
        "random_cosine",
    },
)
GATE = re.compile(
    rf"\s*(?P<metric>{NAME}(?:\.(?!(?:low|high)\b){NAME})*)(?:\[(?P<rows>[^]]*)\])?(?:\.(?P<part>low|high))?"
    r"\s*(?P<op>>=|<=|==|>|<)"
    rf"\s*(?:(?P<number>{NUMBER})|(?P<against>{OPPONENT})(?:\s*(?P<sign>[*+-])\s*(?P<operand>{NUMBER}))?)\s*",
    re.ASCII,
)
FORMS = (
    "`exact_match >= 0.8`, `rougeL > base`, `loss < base - 0.02`, `perplexity <= base * 1.05`, "
    "`exact_match.low > base`, `exact_match.low > champion - 0.01`, `accuracy.low > tfidf`, `accuracy[new] >= 0.6`, "
    "`forgetting.perplexity <= base * 1.05`"
)


@dataclass(frozen=True)
class Gate:
    """A condition on one metric, `metric.part op number` or `metric.part op against * factor + offset`.

    `.part` is optional, and so is `[new]` after the metric.
    """

    text: str
    metric: str
    """Name of the score; dotted if it belongs to a study."""
    part: IntervalEnd | None
    """`low` or `high` end of a 95 % interval: of the difference from `against`, or of the tuned model's own score.
    None for the score itself."""
    op: Operator
    number: float | None
    """The wanted number, or None if it comes from the score of another model."""
    against: Opponent | None = None
    """The model whose score is wanted: base, champion, a simple baseline, a control run, for an export the tuned model,
    or the tuned model with other pictures."""
    factor: float = 1.0
    offset: float = 0.0
    rows: str = ""
    """`new`, or empty for all test rows."""

    @property
    def on_own_interval(self) -> bool:
        """Return whether the gate compares an interval of the tuned model's own score with a number."""
        return self.part is not None and self.number is not None

    @property
    def on_export(self) -> bool:
        """Return whether the gate is on an export, such as `deploy.gguf.loss`."""
        return self.metric.startswith(EXPORT)


def parse_gate(text: str) -> Gate:
    """Parse one gate. Raise RecipeError with examples if the text is not a gate."""
    match = GATE.fullmatch(text)
    if not match:
        raise RecipeError.of(f"{text!r} is not a gate", None, f"Write one like {FORMS}.")
    sign, operand = match["sign"], float(match["operand"] or 0)
    part = cast("IntervalEnd | None", match["part"])
    if part and match["number"] is not None and "." in match["metric"] and not match["metric"].startswith(JUDGE):
        raise RecipeError.of(
            f"{text!r} compares the {part} end of an interval with a number, but only test rows and a judge "
            "have such an interval",
            None,
            f"Write `{match['metric']}.{part} {match['op']} base`, or omit `.{part}`.",
        )
    if part and match["metric"].rpartition(".")[2] == "ece":
        what = f"{text!r} needs an interval, and ece has none: noise makes it larger, by more for some models"
        raise RecipeError.of(what, None, "Use brier or nll, which have intervals, such as `brier.high < base`.")
    if (rows := match["rows"]) is not None and (rows.strip() != NEW or "." in match["metric"]):
        what = f"{text!r} has no metric of the test rows"
        if rows.strip() != NEW:
            what = f"{text!r} selects rows by {rows!r}, and gates know only `{NEW}`"
        fix = "Write `METRIC[new]` for the test rows that the champion never saw, with a metric of the test rows."
        raise RecipeError.of(what, None, fix)
    return Gate(
        text=" ".join(text.split()),
        metric=match["metric"],
        part=part,
        op=cast("Operator", match["op"]),
        number=None if match["number"] is None else float(match["number"]),
        against=cast("Opponent | None", match["against"]),
        factor=operand if sign == "*" else 1.0,
        offset=-operand if sign == "-" else operand if sign == "+" else 0.0,
        rows=NEW if rows else "",
    )


def find_baseline_problem(gate: Gate, facts: TaskFacts, measured: Sequence[str]) -> tuple[str, str] | None:
    """Return the problem of a gate on a simple baseline, and a fix; `measured` are the recipe's metrics."""
    if gate.against not in SIMPLE_BASELINES:
        return None
    names, metrics = facts.simple_baselines, [one for one in measured if at_ten(one) in facts.baseline_metrics]
    name = gate.against if gate.against in names else "".join(names[:1])
    if gate.rows:
        what = f"the gate {gate.text!r} compares {gate.rows} rows with {gate.against}, which is scored on all rows"
        return what, "Compare them with a number, `base` or `champion`."
    has = f"`{gate.metric} {gate.op} {name}`" if gate.metric in metrics else f"{name}: {', '.join(metrics)}"
    if gate.against != name or not metrics:
        fix = f"Compare with {has}." if metrics else "Compare with `base` or a number."
        return f"the gate {gate.text!r} uses {gate.against}, which this recipe does not have", fix
    if gate.metric not in metrics:
        return f"the gate {gate.text!r} compares {gate.metric}, which {name} does not have", f"Metrics of {has}."
    return None


def find_control_problem(gate: Gate, takes_images: bool, controls: Sequence[str]) -> tuple[str, str] | None:
    """Return the problem of a gate on a control with other pictures, and a fix; `controls` are the recipe's."""
    if gate.against not in CONTROLS:
        return None
    what = f"the gate {gate.text!r} uses {gate.against}"
    if not takes_images:
        return f"{what}, but no question has a picture", "Remove it, or give rows with pictures."
    if gate.against not in controls:
        return f"{what}, which evaluate.controls does not have", f"Add {gate.against} to evaluate.controls."
    if gate.rows or "." in gate.metric:
        fix = f"Write `METRIC.low > {gate.against}` with a metric of the test rows."
        return f"{what}, which is scored on all test rows with pictures, and on them alone", fix
    return None


def find_reversed_problem(gate: Gate, facts: TaskFacts) -> tuple[str, str] | None:
    """Return the problem of a gate in the wrong direction, and a fix.

    The direction of the user's own metrics is unknown, unless their names end with `_cost`. A margin may be meant.
    """
    if gate.against is None or gate.metric in NEAREST_TO_ONE:
        return None
    metric = gate.metric.rpartition(".")[2]
    lower = metric in LOWER_IS_BETTER or metric.endswith(COST)
    if not lower and at_ten(metric) not in facts.metrics:
        return None
    wrong = (">", ">=") if lower else ("<", "<=")
    has_margin = gate.factor != 1 or (gate.offset < 0 if lower else gate.offset > 0)
    if gate.op not in wrong or has_margin:
        return None
    part = f".{'high' if lower else 'low'}" if gate.part else ""
    name = f"{gate.metric}{f'[{gate.rows}]' if gate.rows else ''}{part}"
    what = f"the gate {gate.text!r} passes a worse model, and fails a better one: "
    what += f"{'lower' if lower else 'higher'} {metric} is better"
    return what, f"Write `{name} {'<' if lower else '>'} {gate.against}`."
