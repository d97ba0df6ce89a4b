"""A merged model has the weights W + scale x B A."""

from pathlib import Path

import torch
from conformance.case import Case, Finding
from conformance.cases.evaluation_loss import TESTED, TRAINED
from conformance.conversations import row
from conformance.reference import distance, read_weights
from conformance.shipped import tuned_weights


def judge(case, reference, results):
    [result] = results.values()
    exact = tuned_weights(reference, result.model)
    merged = {
        name: weight for name, weight in read_weights(Path(result.found["merged"])).items() if name in reference.start
    }
    rounded = {name: exact[name].to(weight.dtype).float() for name, weight in merged.items()}
    moved = {name: weight - reference.start[name] for name, weight in rounded.items()}
    far = distance({name: merged[name].float() - reference.start[name] for name in merged}, moved)
    limit = 1e-3 if all(weight.dtype == torch.float32 for weight in merged.values()) else 1e-2  # the order of roundings
    return Finding(
        "right" if far < limit else "silently wrong", "" if far < limit else "other weights than adapter and base", far
    )


CASE = Case(
    title="A merged LoRA",
    group="what ships",
    question="Rank-stabilised LoRA (scale 8 / sqrt(4)), merged by the tool's own command: are the weights W + scale x "
    "B A?",
    threads=["https://github.com/Lightning-AI/litgpt/issues/1224", "https://github.com/huggingface/peft/issues/1388"],
    rows=[row(*TRAINED)],
    settings={
        "test_rows": [row(*TESTED)],
        "method": "lora",
        "extra": {"lora": {"use_rslora": True}},
        "ask": {"merged": True},
    },
    judge=judge,
)
