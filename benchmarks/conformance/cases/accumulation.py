"""Four micro-batches of one row give the same gradient as one batch of four."""

from conformance.case import Case
from conformance.conversations import ALL, learns, mean_of_means, qwen, row

SYSTEM = ("system", "You are brief.")
ROWS = [
    [SYSTEM, ("user", "Which colour is the sky?"), ("assistant", "Blue.")],
    [SYSTEM, ("user", "How many legs has a cat?"), ("assistant", "Four, two in front and two behind.")],
    [SYSTEM, ("user", "Count."), ("assistant", "one, two, three, four, five, six, seven, eight, nine, ten, " * 3)],
    [SYSTEM, ("user", "Is a fox a bird?"), ("assistant", "No.")],
]

CASE = Case(
    title="Accumulation equals one batch",
    group="what is computed",
    question="Four rows of unequal length, in four micro-batches: is the loss the mean over all tokens, or a mean of "
    "means?",
    threads=[
        "https://github.com/huggingface/transformers/pull/35438",
        "https://github.com/huggingface/transformers/pull/34191",
    ],
    rows=[row(*turns) for turns in ROWS],
    settings={"batch_size": 4, "micro_batch_size": 1},
    right=learns(qwen, ROWS, ALL),
    wrong=mean_of_means(qwen, ROWS, ALL, 4),
)
