"""The placeholders of a picture are no words to learn."""

from conformance.case import Case
from conformance.conversations import WHOLE
from conformance.pictures import BORDERS, LABELLED, REFUSED, row, sees

ROW = [("user", "<image>Which colour is it?"), ("assistant", "Blue.")], ["sky.png"]
TEXT = {name: learn for name, learn in BORDERS.items() if WHOLE.items() & {(name, learn)} or "border" in learn}

CASE = Case(
    title="The tokens of a picture are not learned",
    group="what is learned",
    question="The whole text of a row with a picture is learned. Does the loss leave out the 16 placeholders that the "
    "picture fills?",
    threads=[
        "https://github.com/NielsRogge/Transformers-Tutorials/pull/513",
        "https://github.com/NielsRogge/Transformers-Tutorials/issues/511",
    ],
    rows=[row(*ROW[0], images=ROW[1])],
    settings={"model": "gemma3", "kind": "pictures", "train_on": "all"},
    reason=REFUSED,
    right=sees([ROW], TEXT),
    wrong=sees([ROW], LABELLED),
)
