"""The same seed gives the same adapter, and another seed another one."""

import torch
from conformance.case import Case, Finding
from conformance.cases.accumulation import ROWS
from conformance.conversations import row
from conformance.reference import read_weights


def judge(case, reference, results):
    first, again, other = (read_weights(results[name].model) for name in ("first", "again", "other"))
    start = [name for name in first if "lora_A" in name]  # the first step leaves A as it was drawn
    if any(not torch.equal(first[name], again[name]) or torch.equal(again[name], other[name]) for name in start):
        return Finding("silently wrong", "the seed does not decide how the adapter starts")
    if not all(torch.equal(weight, again[name]) for name, weight in first.items()):
        return Finding("silently wrong", "the same seed gives other weights")
    return Finding("right", "equal to the last bit")


CASE = Case(
    title="The seed decides the weights",
    group="what is computed",
    question="A LoRA is trained for a step, twice with one seed and once with another: are the first two equal, and "
    "does the third start from other matrices?",
    threads=["https://github.com/MakazhanAlpamys/Soup/issues/354", "https://github.com/huggingface/trl/issues/6688"],
    rows=[row(*turns) for turns in ROWS],
    settings={"method": "lora"},
    jobs={"first": {}, "again": {}, "other": {"seed": 8}},
    judge=judge,
)
