"""A split made by the tool does not put copies of a row on both sides."""

import math
import random

import torch
from conformance.case import Case, Finding
from conformance.conversations import RIGHT, qwen, row
from conformance.qwen_tools import OWN
from conformance.shipped import SAME_LOSS, loaded, tuned_weights

NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = [*NUMBERS, "red", "green", "blue", "cat", "dog", "bird", "fish"]
GUESS = 4 * math.log(len(WORDS))
"""The loss of four words that nobody can know; a learned answer is below."""


def draw_turns():
    """Return 24 questions whose answers have four random words, of one token each: every row counts the same."""
    draw = random.Random(0)
    questions = draw.sample(range(10**5, 10**6), 24)
    answers = [" ".join(["Code", *draw.choices(WORDS, k=4)]) for _ in questions]
    return [[("user", f"Code {n}?"), ("assistant", text)] for n, text in zip(questions, answers, strict=True)]


TURNS = draw_turns()


def losses_of(reference, turns, way):
    """Return the mean loss of a row's learned tokens, and the sum of those of its answer."""
    total, count = reference.loss(*reference.encode(qwen(("system", OWN), *turns, learn=RIGHT[way])))
    answer, _ = reference.loss(*reference.encode(qwen(("system", OWN), *turns, learn=frozenset({"answer"}))))
    return float(total) / count, float(answer)


def judge(case, reference, results):
    """The reported loss is that of rows that were not learned, or some of the held-out rows were learned."""
    [result] = results.values()
    reported = result.found["losses"][-1]
    with reference.allowing(result.found), loaded(reference, tuned_weights(reference, result.model)), torch.no_grad():
        pairs = {way: [losses_of(reference, turns, way) for turns in TURNS] for way in RIGHT}
    for several in pairs.values():
        unseen = [mean for mean, answer in several if answer >= GUESS]
        if unseen and abs(reported - sum(unseen) / len(unseen)) < SAME_LOSS * reported:
            return Finding("right", f"the validation loss {reported:.2f} is that of {len(unseen)} rows not learned")
    lowest = min(mean for several in pairs.values() for mean, answer in several if answer >= GUESS) if unseen else None
    if lowest and reported > lowest:
        return Finding(
            "unexplained", f"a validation loss of {reported:.2f}; rows not learned have {lowest:.2f} or more"
        )
    count = f"{len(unseen)} of {len(TURNS)} different rows are not learned"
    return Finding("silently wrong", f"learned rows are held out: a validation loss of {reported:.2f}, {count}")


CASE = Case(
    title="Copies on both sides of the split",
    group="what is measured",
    question="Each row is there twice, and its answer cannot be guessed. The tool holds out a quarter for validation: "
    "does its loss show answers that were trained on?",
    threads=["https://github.com/MakazhanAlpamys/Soup/issues/680"],
    rows=[row(*turns) for turns in TURNS for _ in range(2)],
    settings={
        "steps": 150,
        "batch_size": 12,
        "optim": "adamw_torch",
        "learning_rate": 0.003,
        "ask": {"losses": True},
        "extra": {"validation": 0.25},
    },
    reason="duplicate|deduplicat",
    judge=judge,
)
