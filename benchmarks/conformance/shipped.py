"""Read the folders that a tool left, in plain torch: tuned weights, the loss they give, the text that was learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance.case import Case, Finding, Result
from conformance.models import IMAGE
from conformance.pictures import open_picture
from conformance.reference import TOWER, Reference, Text, Weights, distance, read_weights
from transformers import AutoProcessor

PREFIX = "base_model.model."
SAME_LOSS = 1e-4
"""Largest relative distance of two losses that count as the same; some tools print three decimals."""


def tuned_weights(reference: Reference, folder: Path) -> dict[str, torch.Tensor]:
    """Return the full weights of a trained folder; those of a LoRA are W + scale x B A, and modules saved in full."""
    saved = {name: weight.float() for name, weight in read_weights(folder).items()}
    if not (folder / "adapter_config.json").exists():
        return {**reference.start, **saved}
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    weights = dict(reference.start)
    for name, value in saved.items():
        bare = name.removeprefix(PREFIX)
        if bare.endswith(".lora_B.weight"):
            target = f"{bare.removesuffix('.lora_B.weight')}.weight"
            weights[target] = weights[target] + scale * value @ saved[name.replace("lora_B", "lora_A")]
        elif ".lora_" not in bare:
            weights[bare.replace(".base_layer", "")] = value
    return weights


@contextmanager
def loaded(reference: Reference, weights: Weights) -> Iterator[None]:
    """Give the reference model other weights for a while."""
    with torch.no_grad():
        for name, weight in reference.parameters.items():
            weight.copy_(weights[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in reference.parameters.items():
                weight.copy_(reference.start[name])


def loss_of(reference: Reference, weights: Weights, texts: Sequence[Text], by_row: bool = False) -> float:
    """Return the mean over all learned tokens of the texts, or the mean of the texts' means."""
    with loaded(reference, weights), torch.no_grad():
        pairs = [reference.loss(*reference.encode(text)) for text in texts]
    if by_row:
        return float(sum(total / count for total, count in pairs)) / len(pairs)
    return float(sum(total for total, _ in pairs)) / sum(count for _, count in pairs)


def closest_piece(reference: Reference, whole: str, step: Any) -> float:
    """Return the smallest distance of a step from the gradient of any part of a text, from one token to another.

    So it is near 0 if, and only if, the model saw this text, whatever part of it was learned.
    """
    moved, project = step
    ids = reference.tokenizer(whole, add_special_tokens=False)["input_ids"]
    logits = reference.model(input_ids=torch.tensor([ids])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    names, weights = zip(*reference.parameters.items(), strict=True)
    ends = [len(losses) - cut for cut in range(3)]
    best = float("inf")
    for begin in range(len(losses)):
        for end in (end for end in ends if end > begin):
            found = torch.autograd.grad(losses[begin:end].mean(), weights, retain_graph=True)
            best = min(best, distance(moved, project(dict(zip(names, found, strict=True)))))
    return best


def judge_tower_of_adapter(case: Case, reference: Reference, results: Mapping[str, Result]) -> Finding:
    """Require that an adapter has matrices in the language model only."""
    [result] = results.values()
    assert result.model is not None, "a job that is done has a model"
    names = [name.removeprefix(PREFIX) for name in read_weights(result.model) if ".lora_" in name]
    seeing = [name for name in names if name.startswith(TOWER)]
    if names and not seeing:
        return Finding("right", "")
    return Finding("silently wrong", f"an adapter in the tower: {len(seeing)} of {len(names)} matrices")


def judge_processor(case: Case, reference: Reference, results: Mapping[str, Result]) -> Finding:
    """Require that a merged folder opens with AutoProcessor, and reads a text and a picture as the base does."""
    [result] = results.values()
    merged = Path(result.found["merged"])
    lost = [file for file in ("preprocessor_config.json", "processor_config.json") if not (merged / file).exists()]
    try:
        base, after = (AutoProcessor.from_pretrained(folder) for folder in (reference.folder, merged))
        inputs = [one(text=f"{IMAGE['boi_token']}Which?", images=open_picture("a.png")) for one in (base, after)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return Finding("silently wrong", f"no processor: {type(error).__name__}, without {', '.join(lost)}")
    if base.chat_template != after.chat_template:
        return Finding("silently wrong", "another chat template")
    same = all(np.array_equal(inputs[0][key], inputs[1][key]) for key in ("input_ids", "pixel_values"))
    return Finding("right" if same else "silently wrong", "" if same else "another reading of a picture")


def judge_tower_of_merged(case: Case, reference: Reference, results: Mapping[str, Result]) -> Finding:
    """Require that every tensor outside the language model is equal to the base's."""
    [result] = results.values()
    base, merged = read_weights(reference.folder), read_weights(Path(result.found["merged"]))
    tower = {name: weight for name, weight in base.items() if name.startswith(TOWER)}
    lost = [name for name in tower if name not in merged]
    other = [name for name in tower if name in merged and not torch.equal(tower[name], merged[name])]
    if not lost and not other:
        return Finding("right", f"{len(tower)} tensors of the tower equal the base's")
    return Finding("silently wrong", f"the tower of {len(tower)} tensors: {len(lost)} lost, {len(other)} changed")
