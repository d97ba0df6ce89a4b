"""Two assistant turns, one after the other, are both learned, and nothing else is."""

from conformance.case import Case
from conformance.conversations import ENDLESS, RIGHT, WHOLE, last_only, learns, qwen, row

START = [("system", "You are brief."), ("user", "Which colour is the sky?")]
FIRST, SECOND, ASKED = ("assistant", "Let me look."), ("assistant", "It is blue."), ("user", "Thank you.")
LAST = ("assistant", "Gladly.")
TURNS = [*START, FIRST, SECOND, ASKED, LAST]


def joined_by(space):
    return [*START, ("assistant", f"{FIRST[1]}{space}{SECOND[1]}"), ASKED, LAST]


CASE = Case(
    title="Two answers in a row",
    group="what is learned",
    question="The assistant speaks twice before the user does. Is each turn learned, with its end, and nothing else?",
    threads=[
        "https://github.com/huggingface/trl/issues/1994",
        "https://github.com/hiyouga/LlamaFactory/issues/2962",
        "https://github.com/modelscope/ms-swift/issues/5831",
    ],
    rows=[row(*TURNS)],
    reason=r"alternat|consecutive|adjacent|invalid role",
    right=learns(qwen, [TURNS], RIGHT),
    wrong={
        **learns(qwen, [TURNS], {**WHOLE, **ENDLESS}),
        **last_only(qwen, TURNS, RIGHT),
        **learns(qwen, [joined_by("\n")], RIGHT, "joined by a line break: {}"),
        **learns(qwen, [joined_by("")], RIGHT, "joined: {}"),
        **learns(qwen, [[*START, SECOND, ASKED, LAST]], RIGHT, "without the first: {}"),
    },
)
