"""Packed rows are trained as if each were alone."""

from itertools import permutations

from conformance.case import Case
from conformance.conversations import ALL, learns, qwen, row

SYSTEM = ("system", "You are brief.")
ROWS = [
    [SYSTEM, ("user", "Which colour is the sky?"), ("assistant", "Blue.")],
    [SYSTEM, ("user", "How many legs has a cat?"), ("assistant", "Four, two in front and two behind.")],
]


def leaking(way, order, restart, border):
    """Return the gradient of one text of both rows in which the second sees the first."""

    def gradient(reference):
        encoded = [reference.encode(qwen(*ROWS[index], learn=ALL[way])) for index in order]
        ids = [token for row_ids, _ in encoded for token in row_ids]
        labels = [label for _, row_labels in encoded for label in row_labels]
        if not border:
            labels[len(encoded[0][0])] = -100
        positions = [place for row_ids, _ in encoded for place in range(len(row_ids))] if restart else None
        return reference.gradient_of([reference.loss(ids, labels, positions)])

    return gradient


LEAKS = {
    f"rows see each other, {'own' if restart else 'continued'} positions: {way}, {order}, {border}": leaking(
        way, order, restart, border
    )
    for way in ALL
    for order in permutations(range(2))
    for restart in (False, True)
    for border in (False, True)
}

CASE = Case(
    title="Packed rows do not see each other",
    group="what is learned",
    question="With packing, is the gradient that of the rows alone, in attention, positions and labels?",
    threads=["https://github.com/huggingface/trl/issues/1230", "https://github.com/huggingface/trl/pull/3699"],
    rows=[row(*turns) for turns in ROWS],
    settings={"packing": True, "batch_size": 2, "max_length": 256},
    reason=r"contamination|packing\b.{0,80}\b(flash|attention)|\b(flash|attention).{0,80}\bpack(ed|ing)\b",
    right=learns(qwen, ROWS, ALL),
    wrong=LEAKS,
)
