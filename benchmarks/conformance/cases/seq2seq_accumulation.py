"""Accumulation equals one batch for an encoder-decoder too."""

from conformance.case import Case
from conformance.reference import Reference

ROWS = [
    {"source": "Which colour is the sky?", "target": "Blue."},
    {"source": "How many legs has a cat?", "target": "Four, two in front and two behind."},
]


def losses(reference: Reference):
    return [reference.translate(row["source"], row["target"]) for row in ROWS]


def scaled(how):
    def gradient(reference):
        return reference.differentiate(how(losses(reference)))

    return gradient


CASE = Case(
    title="Accumulation of an encoder-decoder",
    group="what is computed",
    question="Two rows of unequal length train a T5 in two micro-batches: is the loss the mean over all tokens?",
    threads=[
        "https://github.com/huggingface/transformers/issues/37766",
        "https://github.com/huggingface/transformers/pull/39659",
    ],
    rows=ROWS,
    settings={"model": "t5", "kind": "seq2seq", "batch_size": 2, "micro_batch_size": 1, "learning_rate": 0.1},
    right={"the token mean": lambda reference: reference.gradient_of(losses(reference))},
    wrong={
        "the mean of two means": scaled(lambda found: sum(total / count for total, count in found) / 2),
        "the sum of two means": scaled(lambda found: sum(total / count for total, count in found)),
    },
)
