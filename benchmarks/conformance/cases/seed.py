"""The same seed gives the same adapter, and another seed another one."""

import torch
from conformance.case import Case, Finding
from conformance.cases.accumulation import ROWS
from conformance.conversations import row
from conformance.reference import read_weights


def judge(case, reference, results):
    first, again, other = (read_weights(results[name].model) for name in ("first", "again", "other"))
    if not all(torch.equal(weight, again[name]) for name, weight in first.items()):
        return Finding("silently wrong", "the same seed gives other weights")
    if all(torch.equal(weight, other[name]) for name, weight in first.items() if "lora_A" in name):
        return Finding("silently wrong", "another seed starts from the same adapter")
    return Finding("right", "equal to the last bit")


CASE = Case(
    title="The seed decides the weights",
    group="what is computed",
    question="A LoRA is trained twice with one seed and once with another: are the first two equal, and is the third "
    "not?",
    threads=["https://github.com/MakazhanAlpamys/Soup/issues/354", "https://github.com/huggingface/trl/issues/6688"],
    rows=[row(*turns) for turns in ROWS],
    settings={"method": "lora", "steps": 3},
    jobs={"first": {}, "again": {}, "other": {"seed": 8}},
    judge=judge,
)
