"""The reported evaluation loss does not depend on the number of processes."""

import torch
from conformance.case import Case, Finding
from conformance.cases.accumulation import ROWS
from conformance.conversations import ALL, qwen, row
from conformance.shipped import loaded, loss_of, tuned_weights

EXACT = 1e-5
"""Many of the known losses are near each other, and tools report seven digits."""
TRAINED = row(("system", "You are brief."), ("user", "Name a fish."), ("assistant", "Cod."))


def mean_of_steps(reference, weights, texts):
    """Divide each row's loss by half of the tokens of both processes, where the first row fills the last step."""
    with loaded(reference, weights), torch.no_grad():
        (first, a), (second, b), (third, c) = (reference.loss(*reference.encode(text)) for text in texts)
    return float(2 * (first + second) / (a + b) + 2 * third / (c + a)) / 3


def judge(case, reference, results):
    [result] = results.values()
    reported = result.found["losses"][-1]
    weights = tuned_weights(reference, result.model)
    texts = {way: [qwen(*turns, learn=parts) for turns in ROWS[:3]] for way, parts in ALL.items()}
    known = {}
    with reference.allowing(result.found):
        for way, several in texts.items():
            known[way] = loss_of(reference, weights, several)
            known[f"the mean of the rows' means: {way}"] = loss_of(reference, weights, several, by_row=True)
            known[f"the mean of the steps' means, a repeated row counted: {way}"] = mean_of_steps(
                reference, weights, several
            )
            for index in range(3):
                twice = [*several, several[index]]
                known[f"row {index} counted twice: {way}"] = loss_of(reference, weights, twice)
                name = f"the mean of the rows' means, row {index} counted twice: {way}"
                known[name] = loss_of(reference, weights, twice, by_row=True)
    nearest = min(known, key=lambda name: abs(known[name] - reported))
    far = abs(known[nearest] - reported) / known[nearest]
    if far > EXACT:
        return Finding("unexplained", f"a loss of {reported:.4f}; the mean over all learned tokens is {known[way]:.4f}")
    return Finding("right" if nearest in ALL else "silently wrong", nearest, far)


CASE = Case(
    title="The evaluation loss on two processes",
    group="what is measured",
    question="Three test rows of unequal length, evaluated by two processes: is the loss the mean over all tokens, "
    "each counted once, or a mean of means?",
    threads=[
        "https://github.com/huggingface/transformers/issues/39241",
        "https://github.com/huggingface/accelerate/issues/956",
    ],
    rows=[TRAINED, TRAINED],
    settings={
        "test_rows": [row(*turns) for turns in ROWS[:3]],
        "batch_size": 2,
        "micro_batch_size": 1,
        "processes": 2,
        "learning_rate": 0.01,
        "ask": {"losses": True},
    },
    judge=judge,
)
