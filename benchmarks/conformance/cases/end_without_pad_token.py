"""The end of an answer is learned if the tokenizer has no token for padding."""

from conformance.case import Case
from conformance.conversations import ALL, learns, llama, row

ROWS = [
    [("user", "Which colour is the sky?"), ("assistant", "Blue.")],
    [("user", "How many legs has a cat?"), ("assistant", "Four, two in front and two behind.")],
]
CUT = {f"no end: {way}": learn - {"end"} for way, learn in ALL.items()}


def endless(*turns, learn):
    """Learn no end, not even that of a question."""
    return [(text, mark and text != "<|eot_id|>") for text, mark in llama(*turns, learn=learn)]


CASE = Case(
    title="The end is learned without a pad token",
    group="what is learned",
    question="Llama 3 has no pad token, so tools pad with its end token. Is the real end of each answer still learned?",
    threads=["https://github.com/unslothai/unsloth/issues/416", "https://github.com/huggingface/trl/issues/734"],
    rows=[row(*turns) for turns in ROWS],
    settings={"model": "llama3-unpadded", "batch_size": 2},
    right=learns(llama, ROWS, ALL),
    wrong={**learns(llama, ROWS, CUT), **learns(endless, ROWS, ALL, "no end of any turn: {}")},
)
