"""The placeholders of a picture are no words to learn."""

from conformance.case import Case
from conformance.conversations import WHOLE
from conformance.models import IMAGE
from conformance.pictures import BORDERS, LABELLED, REFUSED, gemma, read, row, see, sees
from conformance.reference import IGNORED

ROW = [("user", "<image>Which colour is it?"), ("assistant", "Blue.")], ["sky.png"]
[WHOLE_TEXT] = WHOLE.values()
TEXT = {name: learn for name, learn in BORDERS.items() if WHOLE.items() & {(name, learn)} or "border" in learn}


def without_its_lines(reference):
    """Return the gradient without the line breaks around the picture, and without the last one."""
    ids, labels = reference.encode(gemma(*ROW[0]))
    begin, end = (
        ids.index(reference.tokenizer.convert_tokens_to_ids(IMAGE[name])) for name in ("boi_token", "eoi_token")
    )
    for place in (begin - 2, begin - 1, end + 1, end + 2, len(ids) - 1):
        labels[place] = IGNORED
    return reference.gradient_of([reference.loss(ids, labels, **see(reference, ids, [read(*ROW[1])]))])


def without_its_end(reference):
    """Return the gradient of the text without the picture's tokens and borders, and without the last line break."""
    ids, labels = reference.encode(gemma(*ROW[0], learn=WHOLE_TEXT))
    return reference.gradient_of([reference.loss(ids, [*labels[:-1], IGNORED], **see(reference, ids, [read(*ROW[1])]))])


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
    right={
        **sees([ROW], TEXT),
        "the whole text without the picture's lines": without_its_lines,
        "the whole text without its end": without_its_end,
    },
    wrong=sees([ROW], LABELLED),
)
