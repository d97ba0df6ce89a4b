"""The first step of DPO, in micro-batches of one pair."""

from conformance.case import Case
from conformance.conversations import RIGHT, qwen

SYSTEM = ("system", "You are brief.")
PAIRS = [
    (("user", "Which colour is the sky?"), "Blue.", "I do not know, sorry."),
    (("user", "How many legs has a cat?"), "Four, two in front and two behind.", "Two."),
]
BETA = 0.1


def step(way, divide):
    """Policy and reference are equal before the first step, so the sigmoid is one half."""

    def gradient(reference):
        total = 0
        for asked, chosen, rejected in PAIRS:
            for sign, words in ((1, chosen), (-1, rejected)):
                text = qwen(SYSTEM, asked, ("assistant", words), learn=RIGHT[way])
                loss, count = reference.loss(*reference.encode(text))
                total = total + sign * 0.5 * BETA * loss / (count if divide else 1) / len(PAIRS)
        return reference.differentiate(total)

    return gradient


def pair(asked, chosen, rejected):
    prompt = [{"role": role, "content": text} for role, text in (SYSTEM, asked)]
    answers = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, **{name: [{"role": "assistant", "content": words}] for name, words in answers.items()}}


CASE = Case(
    title="The first step of DPO",
    group="what is computed",
    question="Two pairs with answers of unequal length, in two micro-batches: is the gradient that of the paper's "
    "loss?",
    threads=[
        "https://github.com/huggingface/trl/pull/2615",
        "https://github.com/huggingface/transformers/issues/35856",
    ],
    rows=[pair(*entry) for entry in PAIRS],
    settings={"kind": "preference", "batch_size": 2, "micro_batch_size": 1},
    right={way: step(way, False) for way in RIGHT},
    wrong={f"answers averaged over their tokens: {way}": step(way, True) for way in RIGHT},
)
