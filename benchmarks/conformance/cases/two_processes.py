"""Two processes give the gradient of one."""

from conformance.case import Case
from conformance.cases.accumulation import ROWS
from conformance.conversations import ALL, learns, mean_of_means, qwen, row

PAIRS = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)]

CASE = Case(
    title="Two processes equal one",
    group="what is computed",
    question="Four rows of unequal length on two processes: is the loss the mean over all tokens, or over the "
    "processes?",
    threads=[
        "https://github.com/huggingface/transformers/issues/34242",
        "https://github.com/huggingface/transformers/pull/40799",
    ],
    rows=[row(*turns) for turns in ROWS],
    settings={"batch_size": 4, "micro_batch_size": 2, "processes": 2},
    right=learns(qwen, ROWS, ALL),
    wrong={
        f"{name}, {order}": gradient
        for order in PAIRS
        for name, gradient in mean_of_means(qwen, [ROWS[index] for index in order], ALL, 2).items()
    },
)
