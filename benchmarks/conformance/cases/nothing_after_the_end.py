"""Nothing is learned after the last token of a row."""

from conformance.case import Case, compare_gradients
from conformance.conversations import ALL, learns, qwen, row
from conformance.qwen_tools import OWN

TURNS = [("system", OWN), ("user", "Which colour is the sky?"), ("assistant", "Blue.")]


def judge(case, reference, results):
    [result] = results.values()
    result.found.pop("after", None)  # other cases allow for it
    return compare_gradients(case, reference, results)


def with_padding(token):
    def learn(way):
        def gradient(reference):
            ids, labels = reference.encode(qwen(*TURNS, learn=ALL[way]))
            return reference.gradient_of([reference.loss([*ids, token], [*labels, token])])

        return gradient

    return {f"token {token} after the end: {way}": learn(way) for way in ALL}


CASE = Case(
    title="Nothing after the end",
    group="what is learned",
    question="One row in a batch that may be padded: does the model learn to write another token after the end?",
    threads=["https://github.com/ml-explore/mlx-lm/pull/1697", "https://github.com/facebookresearch/XLM/issues/34"],
    rows=[row(*TURNS)],
    right=learns(qwen, [TURNS], ALL),
    wrong=with_padding(0) | with_padding(1) | with_padding(2),
    judge=judge,
)
