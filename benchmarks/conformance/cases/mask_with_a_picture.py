"""The mask of the answers fits a text that a picture has made longer."""

from conformance.case import Case
from conformance.conversations import RIGHT
from conformance.pictures import BORDERS, LABELLED, REFUSED, gemma, read, row, see, sees
from conformance.reference import IGNORED

TURNS = [
    ("user", "How many legs has a cat?"),
    ("assistant", "Four."),
    ("user", "<image>Which colour is it?"),
    ("assistant", "Blue."),
    ("user", "What is next?"),
    ("assistant", "Green or red."),
]
IMAGES = ["sky.png"]


def shifted(learn):
    """Return the gradient if the mask is that of the text before its placeholders were written out."""

    def gradient(reference):
        ids, _ = reference.encode(gemma(*TURNS))
        _, short = reference.encode(gemma(*TURNS, learn=learn, tokens=0))
        mask = [label != IGNORED for label in short] + [False] * (len(ids) - len(short))
        labels = [token if marked else IGNORED for token, marked in zip(ids, mask, strict=True)]
        return reference.gradient_of([reference.loss(ids, labels, **see(reference, ids, [read(*IMAGES)]))])

    return gradient


OTHERS = {name: learn for name, learn in (BORDERS | LABELLED).items() if name not in RIGHT}

CASE = Case(
    title="Only answers are learned, with a picture",
    group="what is learned",
    question="The picture of the second question takes 16 tokens. Does the mask of the answers move with them?",
    threads=["https://github.com/huggingface/transformers/pull/48793"],
    rows=[row(*TURNS, images=IMAGES)],
    settings={"model": "gemma3", "kind": "pictures"},
    reason=REFUSED,
    right=sees([(TURNS, IMAGES)], RIGHT),
    wrong={
        **{f"a mask that the picture did not move: {name}": shifted(learn) for name, learn in RIGHT.items()},
        **sees([(TURNS, IMAGES)], OTHERS, "the whole text: {}"),
    },
)
