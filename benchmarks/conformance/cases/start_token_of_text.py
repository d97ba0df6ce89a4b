"""A plain text starts with the start token that its model was trained with."""

from conformance.case import Case
from conformance.conversations import gradient_of

TEXT = "The sky is blue, and a cat has four legs."
ENDS = {"": "", " and its end": "<|eot_id|>"}
START = ("<|begin_of_text|>", False)


def counting_the_first(end):
    """Return the gradient without a start token, if the first token, which nothing predicts, counts as learned."""

    def gradient(reference):
        total, count = reference.loss(*reference.encode([(TEXT + end, True)]))
        return reference.gradient_of([(total, count + 1)])

    return gradient


CASE = Case(
    title="The start token of a text",
    group="what is learned",
    question="Llama 3 saw every text after a start token, and its tokenizer adds it. Is it there in training?",
    threads=["https://github.com/h2oai/h2o-llmstudio/issues/636", "https://github.com/unslothai/unsloth/pull/10312"],
    rows=[{"text": TEXT}],
    settings={"model": "llama3", "kind": "text", "train_on": "all"},
    right={f"the text{name}": gradient_of([[START, (TEXT + end, True)]]) for name, end in ENDS.items()},
    wrong={
        **{f"no start token: the text{name}": gradient_of([[(TEXT + end, True)]]) for name, end in ENDS.items()},
        **{
            f"no start token, and one token too many in the mean: the text{name}": counting_the_first(end)
            for name, end in ENDS.items()
        },
        **{
            f"two start tokens: the text{name}": gradient_of([[START, START, (TEXT + end, True)]])
            for name, end in ENDS.items()
        },
    },
)
