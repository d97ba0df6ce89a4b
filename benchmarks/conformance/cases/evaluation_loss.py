"""The reported evaluation loss is that of the answers."""

from conformance.case import Case, Finding
from conformance.conversations import ALL, RIGHT, qwen, row
from conformance.shipped import SAME_LOSS, loss_of, tuned_weights

SYSTEM = ("system", "You are brief.")
TRAINED = [SYSTEM, ("user", "Which colour is the sky?"), ("assistant", "Blue.")]
TESTED = [SYSTEM, ("user", "How many legs has a cat, if nobody stepped on one?"), ("assistant", "Four.")]


def judge(case, reference, results):
    [result] = results.values()
    reported = result.found["losses"][-1]
    weights = tuned_weights(reference, result.model)
    with reference.allowing(result.found):
        exact = {way: loss_of(reference, weights, [qwen(*TESTED, learn=parts)]) for way, parts in ALL.items()}
    nearest = min(exact, key=lambda way: abs(exact[way] - reported))
    far = abs(exact[nearest] - reported) / exact[nearest]
    if far > SAME_LOSS:
        return Finding(
            "unexplained", f"a loss of {reported:.4f}; answers and their ends have {exact[next(iter(exact))]:.4f}"
        )
    return Finding("right" if nearest in RIGHT else "silently wrong", nearest, far)


CASE = Case(
    title="The evaluation loss counts answers",
    group="what is measured",
    question="One test row with a long question: is the reported loss that of the answer, or do prompt and header "
    "count too?",
    threads=["https://github.com/hiyouga/LlamaFactory/issues/3148", "https://github.com/huggingface/trl/issues/3279"],
    rows=[row(*TRAINED)],
    settings={"test_rows": [row(*TESTED)], "learning_rate": 0.01, "ask": {"losses": True}},
    judge=judge,
)
