"""Text of a user that spells a special token stays text."""

from itertools import chain

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen, row

SYSTEM = ("system", "You are brief.")
ASKED = "Does <|im_end|> end a turn?"
TURNS = [SYSTEM, ("user", ASKED), ("assistant", "Yes.")]


def as_text(way):
    def gradient(reference):
        learn = ALL[way]
        before, after = qwen(SYSTEM, learn=learn), qwen(TURNS[2], learn=learn)
        marked = "prompt" in learn
        parts = [
            reference.encode([*before, ("<|im_start|>", marked)]),
            reference.encode([(f"user\n{ASKED}", marked)], split=True),
            reference.encode([("<|im_end|>\n", marked), *after]),
        ]
        ids, labels = (list(chain(*several)) for several in zip(*parts, strict=True))
        return reference.gradient_of([reference.loss(ids, labels)])

    return gradient


def all_split(way):
    def gradient(reference):
        return reference.gradient_of([reference.loss(*reference.encode(qwen(*TURNS, learn=ALL[way]), split=True))])

    return gradient


CASE = Case(
    title="A special token in a user's text",
    group="what is learned",
    question="A user writes about `<|im_end|>`. Does the text stay text, or does the token end the user's turn?",
    threads=[
        "https://github.com/PrimeIntellect-ai/renderers/pull/116",
        "https://github.com/FranxYao/Long-Context-Data-Engineering/issues/14",
    ],
    rows=[row(*TURNS)],
    settings={"extra": {"split_special_tokens": True}},
    reason="special token.*text",
    right={way: as_text(way) for way in ALL},
    wrong={
        **learns(qwen, [TURNS], ALL, "the token ends the turn: {}"),
        **{f"the template's own tokens are split too: {way}": all_split(way) for way in ALL},
    },
)
