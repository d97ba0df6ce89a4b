"""Only the assistant's turns are learned, each with its end."""

from conformance.case import Case
from conformance.reference import Gradient, Piece, Reference, Weights

START = "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\nWhich colour is the sky?<|im_end|>\n"
NEXT = "<|im_start|>user\nAnd a cat?<|im_end|>\n"
ANSWERS = "Blue.", "Often black, sometimes red."


def pieces(prompt: bool, answer: bool, end: bool, newline: bool) -> Gradient:
    """Return the gradient of the conversation with these parts learned."""

    def gradient(reference: Reference) -> Weights:
        text: list[Piece] = []
        for question, words in zip((START, NEXT), ANSWERS, strict=True):
            text += [(f"{question}<|im_start|>assistant\n", prompt), (words, answer)]
            text += [("<|im_end|>", end), ("\n", newline)]
        return reference.gradient([text])

    return gradient


CASE = Case(
    title="Only answers are learned",
    group="what is learned",
    question="With the setting that learns answers only: are both answers of a conversation learned, each with its end, "
    "and nothing else?",
    threads=["https://github.com/huggingface/trl/issues/2424", "https://github.com/huggingface/trl/issues/1282"],
    rows=[
        {
            "messages": [
                {"role": "system", "content": "You are brief."},
                {"role": "user", "content": "Which colour is the sky?"},
                {"role": "assistant", "content": ANSWERS[0]},
                {"role": "user", "content": "And a cat?"},
                {"role": "assistant", "content": ANSWERS[1]},
            ]
        }
    ],
    right={
        "answers and their ends": pieces(False, True, True, False),
        "answers, their ends, and the line break": pieces(False, True, True, True),
    },
    wrong={
        "the whole text": pieces(True, True, True, True),
        "answers without their ends": pieces(False, True, False, False),
    },
)
