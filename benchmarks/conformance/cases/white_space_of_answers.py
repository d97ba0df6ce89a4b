"""White space at both ends of an answer is learned as the row has it."""

from conformance.case import Case
from conformance.conversations import ENDLESS, RIGHT, WHOLE, last_only, learns, qwen, row

CODE = "    return 4\n\n"
START = [("system", "You are brief."), ("user", "Write the line.")]
ASKED, LAST = ("user", "And a cat?"), ("assistant", "Four.")
TURNS = [*START, ("assistant", CODE), ASKED, LAST]


def cut(code):
    return [*START, ("assistant", code), ASKED, LAST]


CASE = Case(
    title="White space of answers",
    group="what is learned",
    question="An answer is a line of code, with spaces before it and line breaks after it, which the model's template "
    "keeps. Are they learned, and is nothing else?",
    threads=[
        "https://github.com/huggingface/transformers/issues/47325",
        "https://github.com/PrimeIntellect-ai/prime-rl/pull/1103",
    ],
    rows=[row(*TURNS)],
    reason=r"white ?space|strip|trim",
    right=learns(qwen, [TURNS], RIGHT),
    wrong={
        **learns(qwen, [TURNS], {**WHOLE, **ENDLESS}),
        **last_only(qwen, TURNS, RIGHT),
        **learns(qwen, [cut(CODE.strip())], {**RIGHT, **WHOLE}, "stripped at both ends: {}"),
        **learns(qwen, [cut(CODE.lstrip())], {**RIGHT, **WHOLE}, "stripped on the left: {}"),
        **learns(qwen, [cut(CODE.rstrip())], {**RIGHT, **WHOLE}, "stripped on the right: {}"),
    },
)
