"""Only the assistant's turns are learned, each with its end."""

from conformance.case import Case
from conformance.conversations import ENDLESS, RIGHT, WHOLE, last_only, learns, qwen, row

TURNS = [
    ("system", "You are brief."),
    ("user", "Which colour is the sky?"),
    ("assistant", "Blue."),
    ("user", "And a cat?"),
    ("assistant", "Often black, sometimes red."),
]

CASE = Case(
    title="Only answers are learned",
    group="what is learned",
    question="With the setting that learns answers only: are both answers of a conversation learned, each with its "
    "end, and nothing else?",
    threads=["https://github.com/huggingface/trl/issues/2424", "https://github.com/huggingface/trl/issues/1282"],
    rows=[row(*TURNS)],
    right=learns(qwen, [TURNS], RIGHT),
    wrong={**learns(qwen, [TURNS], {**WHOLE, **ENDLESS}), **last_only(qwen, TURNS, RIGHT)},
)
