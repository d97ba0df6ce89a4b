"""The last step of an epoch, with fewer rows, is a full step."""

from itertools import combinations

from conformance.case import Case
from conformance.conversations import ALL, qwen, row

THREE = [[("system", "You are brief."), ("user", f"Is {number} odd?"), ("assistant", "Yes.")] for number in (1, 3, 5)]
"""Of equal length, so that a mean of means is the mean."""
RATE = 0.1


def two_steps(way, first, second, scale=1.0):
    def gradient(reference):
        texts = [[qwen(*THREE[index], learn=ALL[way]) for index in step] for step in (first, second)]
        return reference.after_steps(texts, [RATE, RATE * scale])

    return gradient


CHOICES = [(first, ({0, 1, 2} - set(first)).pop(), way) for first in combinations(range(3), 2) for way in ALL]

CASE = Case(
    title="The last step of an epoch",
    group="what is computed",
    question="Three rows, two per step, in micro-batches of one: is the second step the mean over its one row, or half"
    " of it?",
    threads=["https://github.com/huggingface/transformers/pull/39659"],
    rows=[row(*turns) for turns in THREE],
    settings={"batch_size": 2, "micro_batch_size": 1, "steps": 2, "learning_rate": RATE},
    right={
        **{f"one row: {way}, {first}": two_steps(way, first, [last]) for first, last, way in CHOICES},
        **{
            f"one row of this epoch, one of the next: {way}, {first}, {other}": two_steps(way, first, [last, other])
            for first, last, way in CHOICES
            for other in first
        },
    },
    wrong={f"half a step: {way}, {first}": two_steps(way, first, [last], 0.5) for first, last, way in CHOICES},
)
