"""A padded batch gives the gradient of its rows alone."""

from conformance.case import Case
from conformance.cases.accumulation import ROWS
from conformance.conversations import ALL, learns, mean_of_means, qwen, row

CASE = Case(
    title="Padding changes nothing",
    group="what is computed",
    question="Four rows of unequal length in one padded batch: is the gradient the token mean of the rows alone?",
    threads=[
        "https://github.com/unslothai/unsloth/issues/416",
        "https://github.com/huggingface/transformers/issues/37474",
    ],
    rows=[row(*turns) for turns in ROWS],
    settings={"batch_size": 4},
    right=learns(qwen, ROWS, ALL),
    wrong=mean_of_means(qwen, ROWS, ALL, 4),
)
