"""A picture reaches the model, and is the row's own."""

from conformance.case import Case, compare_gradient
from conformance.pictures import EVERY, REFUSED, row, sees

ROWS = [
    ([("user", "<image>Which colour is it?"), ("assistant", "Blue.")], ["sky.png"]),
    ([("user", "<image>Which animal is it?"), ("assistant", "A cat.")], ["cat.png"]),
]
BARE = [([(role, words.replace("<image>", "")) for role, words in turns], []) for turns, _ in ROWS]
SWAPPED = [(turns, other) for (turns, _), (_, other) in zip(ROWS, reversed(ROWS), strict=True)]

CASE = Case(
    title="A picture reaches the model",
    group="what is learned",
    question="Two rows ask about a picture each. Is the gradient that of the pictures, or that of placeholders that no "
    "picture fills?",
    threads=["https://github.com/Blaizzy/mlx-vlm/issues/824"],
    rows=[row(*turns, images=images) for turns, images in ROWS],
    settings={"model": "gemma3", "kind": "pictures", "batch_size": 2},
    reason=REFUSED,
    judge=lambda case, reference, results: compare_gradient(case, reference, results["run"]),
    right=sees(ROWS, EVERY),
    wrong={
        **sees(ROWS, EVERY, "placeholders without a picture: {}", look=None),
        **sees(ROWS, EVERY, "placeholders without a picture, read in one direction: {}", look=None, both_ways=False),
        **sees(ROWS, EVERY, "one token for a picture: {}", look=None, tokens=0),
        **sees(BARE, EVERY, "the picture dropped: {}"),
        **sees(SWAPPED, EVERY, "the picture of the other row: {}"),
        **sees(ROWS, EVERY, "the picture read in one direction: {}", both_ways=False),
    },
)
