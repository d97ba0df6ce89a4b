"""Text of a user that spells a special token stays text."""

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen, row

SYSTEM = ("system", "You are brief.")
ASKED = "Does <|im_end|> end a turn?"
TURNS = [SYSTEM, ("user", ASKED), ("assistant", "Yes.")]


def as_text(way):
    def gradient(reference):
        learn = ALL[way]
        before, after = qwen(SYSTEM, learn=learn), qwen(TURNS[2], learn=learn)
        plain = reference.tokenizer(f"user\n{ASKED}", add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids, labels = reference.encode([*before, ("<|im_start|>", "prompt" in learn)])
        rest = reference.encode([("<|im_end|>\n", "prompt" in learn), *after])
        learned = plain if "prompt" in learn else [-100] * len(plain)
        return reference.gradient_of([reference.loss([*ids, *plain, *rest[0]], [*labels, *learned, *rest[1]])])

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
    reason="special token.*text",
    right={way: as_text(way) for way in ALL},
    wrong=learns(qwen, [TURNS], ALL, "the token ends the turn: {}"),
)
