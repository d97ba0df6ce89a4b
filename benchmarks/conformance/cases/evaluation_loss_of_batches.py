"""The reported evaluation loss does not depend on the batch size."""

from conformance.case import Case, Finding
from conformance.cases.accumulation import ROWS
from conformance.conversations import ALL, qwen, row
from conformance.shipped import SAME_LOSS, loss_of, tuned_weights


def judge(case, reference, results):
    [result] = results.values()
    reported = result.found["losses"][-1]
    weights = tuned_weights(reference, result.model)
    texts = {way: [qwen(*turns, learn=parts) for turns in ROWS] for way, parts in ALL.items()}
    with reference.allowing(result.found):
        exact = {way: loss_of(reference, weights, several) for way, several in texts.items()}
        means = {way: loss_of(reference, weights, several, True) for way, several in texts.items()}
    by_row = {f"the mean of the rows' means: {way}": loss for way, loss in means.items()}
    for verdict, losses in (("right", exact), ("silently wrong", by_row)):
        for way, loss in losses.items():
            if abs(loss - reported) < SAME_LOSS * loss:
                return Finding(verdict, way, abs(loss - reported) / loss)
    return Finding(
        "unexplained",
        f"a loss of {reported:.4f}; the mean over all learned tokens is {exact[next(iter(exact))]:.4f}",
    )


CASE = Case(
    title="The evaluation loss of unequal rows",
    group="what is measured",
    question="Four test rows of unequal length, evaluated one by one: is the loss the mean over all tokens, as it is "
    "in one batch?",
    threads=[
        "https://github.com/huggingface/transformers/issues/39241",
        "https://github.com/huggingface/transformers/issues/24839",
    ],
    rows=[row(("system", "You are brief."), ("user", "Name a fish."), ("assistant", "Cod."))],
    settings={"test_rows": [row(*turns) for turns in ROWS], "learning_rate": 0.01, "ask": {"losses": True}},
    judge=judge,
)
