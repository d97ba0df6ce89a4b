"""Of a prompt and its completion, only the completion is learned, with its end."""

from conformance.case import Case
from conformance.conversations import RIGHT, WHOLE, last_only, learns, qwen

TURNS = [
    ("system", "You are brief."),
    ("user", "Which colour is the sky?"),
    ("assistant", "Blue."),
    ("user", "And a cat?"),
    ("assistant", "Often black."),
]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]

CASE = Case(
    title="Only the completion is learned",
    group="what is learned",
    question="A row has a prompt of several messages, one by the assistant, and a completion. Is only the completion "
    "learned?",
    threads=["https://github.com/huggingface/trl/issues/1282", "https://github.com/huggingface/trl/issues/2424"],
    rows=[{"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}],
    settings={"kind": "prompt_completion"},
    right=last_only(qwen, TURNS, RIGHT),
    wrong={**learns(qwen, [TURNS], WHOLE), **learns(qwen, [TURNS], RIGHT, "earlier answers too: {}")},
)
