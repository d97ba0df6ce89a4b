"""Packed rows with pictures are trained as if each were alone."""

from itertools import permutations

from conformance.case import Case
from conformance.pictures import EVERY, REFUSED, gemma, read, row, see, sees

ROWS = [
    ([("user", "<image>Which colour is it?"), ("assistant", "Blue.")], ["sky.png"]),
    ([("user", "<image>Which animal is it?"), ("assistant", "A cat, or a small dog.")], ["cat.png"]),
]


def leaking(learn, order, restart):
    """Return the gradient of one text of both rows in which the second sees the first and its picture."""

    def gradient(reference):
        encoded = [reference.encode(gemma(*ROWS[index][0], learn=learn)) for index in order]
        ids, labels = ([token for one in encoded for token in one[part]] for part in range(2))
        positions = [place for row_ids, _ in encoded for place in range(len(row_ids))] if restart else None
        pixels = [read(name) for index in order for name in ROWS[index][1]]
        return reference.gradient_of([reference.loss(ids, labels, positions, **see(reference, ids, pixels))])

    return gradient


CASE = Case(
    title="Packed rows with pictures do not see each other",
    group="what is learned",
    question="With packing, is the gradient that of two rows with a picture each, alone?",
    threads=[
        "https://github.com/modelscope/ms-swift/pull/4838",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/3817",
    ],
    rows=[row(*turns, images=images) for turns, images in ROWS],
    settings={"model": "gemma3", "kind": "pictures", "packing": True, "batch_size": 2, "max_length": 256},
    reason=rf"packing\b.{{0,80}}\b(not supported|not support|flash|require)|{REFUSED}",
    right=sees(ROWS, EVERY),
    wrong={
        f"rows see each other, {'own' if restart else 'continued'} positions: {way}, {order}": leaking(
            learn, order, restart
        )
        for way, learn in EVERY.items()
        for order in permutations(range(2))
        for restart in (False, True)
    },
)
