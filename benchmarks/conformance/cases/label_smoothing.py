"""Label smoothing divides by the tokens of the step, as the loss does without it."""

import torch
from conformance.case import Case
from conformance.cases.accumulation import ROWS
from conformance.conversations import ALL, learns, qwen, row

SHARE = 0.1


def losses(reference, way):
    """Return the smoothed loss of each row, summed over its learned tokens, and their number."""
    for turns in ROWS:
        ids, labels = (torch.tensor(part) for part in reference.encode(qwen(*turns, learn=ALL[way])))
        logits = reference.model(input_ids=ids[None]).logits[0, :-1]
        total = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", label_smoothing=SHARE)
        yield total, int((labels[1:] != -100).sum())


def joined(way, join):
    return lambda reference: reference.differentiate(join([*losses(reference, way)]))


def token_mean(pairs):
    return sum(total for total, _ in pairs) / sum(count for _, count in pairs)


def sum_of_means(pairs):
    return sum(total / count for total, count in pairs)


CASE = Case(
    title="Label smoothing under accumulation",
    group="what is computed",
    question="Label smoothing of 0.1, four rows of unequal length in four micro-batches: is the loss the mean over all "
    "tokens, as it is without smoothing?",
    threads=[
        "https://github.com/huggingface/transformers/issues/46731",
        "https://github.com/huggingface/transformers/pull/47261",
    ],
    rows=[row(*turns) for turns in ROWS],
    settings={"batch_size": 4, "micro_batch_size": 1, "extra": {"label_smoothing": SHARE}},
    right={way: joined(way, token_mean) for way in ALL},
    wrong={
        **{f"the mean of 4 means: {way}": joined(way, lambda pairs: sum_of_means(pairs) / 4) for way in ALL},
        **{f"the sum of 4 means: {way}": joined(way, sum_of_means) for way in ALL},
        **learns(qwen, ROWS, ALL, "not smoothed: {}"),
    },
)
