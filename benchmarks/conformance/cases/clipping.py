"""Clipping sees the gradient of the whole step, over all micro-batches and processes."""

from conformance.case import Case
from conformance.cases.accumulation import ROWS
from conformance.cases.two_processes import PAIRS
from conformance.conversations import ALL, qwen, row

LIMIT = 0.1


def clip(gradient):
    """Scale a gradient to the limit, as clip_grad_norm_ does with one that is longer."""
    norm = sum(float(weight.double().square().sum()) for weight in gradient.values()) ** 0.5
    return {name: weight * min(1.0, LIMIT / (norm + 1e-6)) for name, weight in gradient.items()}


def add(gradients, share=1.0):
    return {name: share * sum(gradient[name] for gradient in gradients) for name in gradients[0]}


def parts(reference, way, groups):
    """Return what each group of rows adds to the gradient of the token mean."""
    losses = [reference.loss(*reference.encode(qwen(*turns, learn=ALL[way]))) for turns in ROWS]
    count = sum(tokens for _, tokens in losses)
    return [reference.differentiate(sum(losses[index][0] for index in group) / count) for group in groups]


def whole(way):
    return lambda reference: clip(add(parts(reference, way, [range(4)])))


def each(way, groups):
    """Clip what each group adds; with the weights of a mean, it is `len(groups)` times as long."""
    return lambda reference: add(
        [clip(add([part], len(groups))) for part in parts(reference, way, groups)], 1 / len(groups)
    )


CASE = Case(
    title="Clipping sees the whole step",
    group="what is computed",
    question="Four rows of unequal length on two processes, with two micro-batches each: is the gradient of the step "
    "clipped, or that of each micro-batch or process?",
    threads=[
        "https://github.com/huggingface/transformers/issues/1563",
        "https://github.com/huggingface/diffusers/pull/721",
    ],
    rows=[row(*turns) for turns in ROWS],
    settings={"batch_size": 4, "micro_batch_size": 1, "processes": 2, "max_grad_norm": LIMIT},
    right={way: whole(way) for way in ALL},
    wrong={
        **{f"not clipped: {way}": lambda r, way=way: add(parts(r, way, [range(4)])) for way in ALL},
        **{f"each micro-batch clipped: {way}": each(way, [[0], [1], [2], [3]]) for way in ALL},
        **{f"each process clipped: {way}, {o}": each(way, [o[:2], o[2:]]) for way in ALL for o in PAIRS},
    },
)
