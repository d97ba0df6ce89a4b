"""The last step of an epoch, with fewer rows than processes, learns each row once."""

from itertools import combinations

from conformance.case import Case
from conformance.cases.last_step_of_an_epoch import RATE, THREE, two_steps
from conformance.conversations import ALL, qwen, row

CHOICES = [(first, ({0, 1, 2} - set(first)).pop(), way) for first in combinations(range(3), 2) for way in ALL]


def one_step(way, first):
    return lambda reference: reference.after_steps([[qwen(*THREE[index], learn=ALL[way]) for index in first]], [RATE])


CASE = Case(
    title="The last step on several processes",
    group="what is computed",
    question="Three rows, one epoch, two processes with a row each: is the second step the mean over its one row?",
    threads=[
        "https://github.com/huggingface/accelerate/issues/2316",
        "https://github.com/huggingface/accelerate/pull/781",
    ],
    rows=[row(*turns) for turns in THREE],
    settings={
        "batch_size": 2,
        "micro_batch_size": 1,
        "processes": 2,
        "epochs": 1,
        "steps": 2,
        "learning_rate": RATE,
    },
    right={f"one row: {way}, {first}": two_steps(way, first, [last]) for first, last, way in CHOICES},
    left_out={f"the last row left out: {way}, {first}": one_step(way, first) for first, _, way in CHOICES},
    wrong={
        **{
            f"a row of the first step once more: {way}, {first}, {again}": two_steps(way, first, [last, again])
            for first, last, way in CHOICES
            for again in first
        },
        **{f"half a step: {way}, {first}": two_steps(way, first, [last], 0.5) for first, last, way in CHOICES},
    },
)
