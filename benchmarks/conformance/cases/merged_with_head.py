"""Modules that were trained in full are in the adapter folder and in the merged model."""

from pathlib import Path

from conformance.case import Case, Finding
from conformance.conversations import row
from conformance.reference import read_weights
from conformance.shipped import tuned_weights

HEAD = "lm_head.weight"


def judge(case, reference, results):
    [result] = results.values()
    start, tuned = reference.start[HEAD], tuned_weights(reference, result.model)[HEAD]
    merged = read_weights(Path(result.found["merged"])).get(HEAD)
    if (tuned - start).norm() < 1e-6 * start.norm():
        return Finding("silently wrong", "the adapter folder lacks the trained head")
    if merged is None or (merged.float() - tuned.to(merged.dtype)).norm() > 1e-2 * (tuned - start).norm():
        return Finding("silently wrong", "the merged model lacks the trained head")
    return Finding("right", "")


CASE = Case(
    title="A head trained next to the adapter",
    group="what ships",
    question="`modules_to_save: [lm_head]`: is the trained head in the adapter folder, and in the merged model?",
    threads=["https://github.com/unslothai/unsloth-zoo/pull/369", "https://github.com/unslothai/unsloth/issues/4098"],
    rows=[row(("user", "Which colour is the sky?"), ("assistant", "Blue."))],
    settings={
        "model": "llama3",
        "test_rows": [row(("user", "And a cat?"), ("assistant", "Black."))],
        "method": "lora",
        "extra": {"lora": {"modules_to_save": ["lm_head"]}},
        "ask": {"merged": True},
    },
    judge=judge,
)
