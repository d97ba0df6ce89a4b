"""A pair does not lose the end of one of its answers without a word."""

from conformance.case import Case
from conformance.cases.preference import BETA, PAIRS, SYSTEM, pair
from conformance.conversations import RIGHT, qwen

LONG = (("user", "Count."), "One, two.", " ".join(f"{number}," for number in range(60)))
LENGTH = 96


def step(way, pairs, rows=None):
    """Return DPO's first gradient; texts are cut at the maximum, and `rows` divides the sum of the pairs."""

    def gradient(reference):
        total = 0
        for asked, chosen, rejected in pairs:
            for sign, words in ((1, chosen), (-1, rejected)):
                ids, labels = reference.encode(qwen(SYSTEM, asked, ("assistant", words), learn=RIGHT[way]))
                loss, _ = reference.loss(ids[:LENGTH], labels[:LENGTH])
                total = total + sign * 0.5 * BETA * loss / (rows or len(pairs))
        return reference.differentiate(total)

    return gradient


CASE = Case(
    title="A pair of which one answer is cut off",
    group="what is learned",
    question="In one of two pairs, the rejected answer is longer than the maximum and the chosen one is not. Is the "
    "pair refused, or left out with a word, or is an answer with an end compared with one without?",
    threads=["https://github.com/hiyouga/LlamaFactory/issues/4402", "https://github.com/huggingface/trl/pull/5372"],
    rows=[pair(*PAIRS[0]), pair(*LONG)],
    settings={"kind": "preference", "batch_size": 2, "max_length": LENGTH},
    reason=r"too long|exceeds|(longer|larger) than|left out|dropped (\d+|lengthy)|\btruncated\b",
    left_out={
        **{f"the long pair left out: {way}": step(way, PAIRS[:1]) for way in RIGHT},
        **{f"the long pair left out, and half a step: {way}": step(way, PAIRS[:1], 2) for way in RIGHT},
    },
    wrong={f"the rejected answer cut off: {way}": step(way, [PAIRS[0], LONG]) for way in RIGHT},
)
