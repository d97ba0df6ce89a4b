"""The grammar of a gate: `metric[.low|.high] OP wanted`; wanted is a number, or a model's score and a number.

Examples: `exact_match >= 0.8`, `rougeL > base`, `loss < base - 0.02`, `perplexity <= base * 1.05`,
`exact_match.low > base`, `exact_match.low > champion - 0.01`, `accuracy.low >= 0.8`. Metrics of a study
are `study.metric`: `forgetting.perplexity <= base * 1.05`, `fairness.gap <= 0.05`, `benchmarks.arc_easy.acc > base`.
Metrics of an export are `deploy.format.metric`, compared with the tuned model:
`deploy.gguf.accuracy.low > tuned - 0.01`. A baseline without a language model has a name: `accuracy.low > tfidf`,
`ndcg@10.low > bm25`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from llmtune.errors import RecipeError
from llmtune.recipe.task_facts import SIMPLE_BASELINES

Operator = Literal[">=", "<=", ">", "<", "=="]
IntervalEnd = Literal["low", "high"]
Opponent = Literal["base", "champion", "tuned", "tfidf", "bm25", "unigram", "lead3"]

JUDGE = "judge."
"""How the scores of `evaluate.judge` begin: its own interval belongs to each."""
EXPORT = "deploy."
"""How the metrics of exports begin."""
NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
NAME = r"[A-Za-z][A-Za-z0-9_]*(?:-[A-Za-z0-9_]+)*(?:@[0-9]+)?"
OPPONENT = "|".join(("base", "champion", "tuned", *SIMPLE_BASELINES))
GATE = re.compile(
    rf"\s*(?P<metric>{NAME}(?:\.(?!(?:low|high)\b){NAME})*)(?:\.(?P<part>low|high))?"
    r"\s*(?P<op>>=|<=|==|>|<)"
    rf"\s*(?:(?P<number>{NUMBER})|(?P<against>{OPPONENT})(?:\s*(?P<sign>[*+-])\s*(?P<operand>{NUMBER}))?)\s*",
    re.ASCII,
)
FORMS = (
    "`exact_match >= 0.8`, `rougeL > base`, `loss < base - 0.02`, `perplexity <= base * 1.05`, "
    "`exact_match.low > base`, `exact_match.low > champion - 0.01`, `accuracy.low > tfidf`, "
    "`forgetting.perplexity <= base * 1.05`"
)


@dataclass(frozen=True)
class Gate:
    """A condition on one metric: `metric[.part] op number`, or `metric[.part] op against * factor + offset`."""

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
    """The model whose score is wanted: base, champion, a simple baseline, or for an export the tuned model."""
    factor: float = 1.0
    offset: float = 0.0

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
    return Gate(
        text=" ".join(text.split()),
        metric=match["metric"],
        part=part,
        op=cast("Operator", match["op"]),
        number=None if match["number"] is None else float(match["number"]),
        against=cast("Opponent | None", match["against"]),
        factor=operand if sign == "*" else 1.0,
        offset=-operand if sign == "-" else operand if sign == "+" else 0.0,
    )
