"""A picture is not cut off by the maximum length without a word."""

from conformance.case import Case
from conformance.pictures import EVERY, REFUSED, row, sees

GOOD = [("user", "<image>Which colour is it?"), ("assistant", "Blue.")], ["sky.png"]
LONG = [("user", " ".join(["one two three four"] * 20) + "<image>"), ("assistant", "A cat.")], ["cat.png"]
BARE = [(LONG[0][0][0], LONG[0][0][1].removesuffix("<image>")), LONG[0][1]], []
LONGER = r"too (long|short)|exceeds|longer than|left out|dropp(ed|ing) \d+|due to .{0,2}truncation|"

CASE = Case(
    title="A picture that the maximum length cuts off",
    group="what is learned",
    question="In one of two rows, the maximum length falls between the tokens of a picture. Is the row refused, or "
    "left out with a word, or trained on without its picture?",
    threads=[
        "https://github.com/huggingface/trl/pull/5927",
        "https://github.com/huggingface/transformers/issues/37222",
    ],
    rows=[row(*turns, images=images) for turns, images in (GOOD, LONG)],
    settings={"model": "gemma3", "kind": "pictures", "batch_size": 2, "max_length": 96},
    reason=LONGER + REFUSED,
    left_out=sees([GOOD], EVERY, "the long row left out: {}"),
    right=sees([GOOD, LONG], EVERY, "nothing is cut off: {}"),
    wrong=sees([GOOD, BARE], EVERY, "the picture dropped: {}"),
)
