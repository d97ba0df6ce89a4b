"""A split made by the tool does not put copies of a row on both sides."""

import random

from conformance.case import Case, Finding
from conformance.conversations import row

LETTERS = "abcdefghijklmnop"
CHANCE = 1.0
"""Below half of ln(16), the loss of a letter that nobody can know and of the end token after it."""


def make_rows():
    """Return 24 questions whose answers are random letters, each question twice."""
    draw = random.Random(0)
    rows = [row(("user", f"Code {draw.randrange(10**6)}?"), ("assistant", draw.choice(LETTERS))) for _ in range(24)]
    return [entry for entry in rows for _ in range(2)]


def judge(case, reference, results):
    [result] = results.values()
    loss = result.found["losses"][-1]
    known = loss < CHANCE
    return Finding(
        "silently wrong" if known else "right", f"validation loss {loss:.2f}" + ", of rows that were learned" * known
    )


CASE = Case(
    title="Copies on both sides of the split",
    group="what is measured",
    question="Each row is there twice, and its answer cannot be guessed. The tool holds out a quarter for validation: "
    "does its loss show answers that were trained on?",
    threads=["https://github.com/MakazhanAlpamys/Soup/issues/680"],
    rows=make_rows(),
    settings={
        "steps": 60,
        "batch_size": 12,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "ask": {"losses": True},
        "extra": {"validation": 0.25},
    },
    reason="duplicate|deduplicat",
    judge=judge,
)
