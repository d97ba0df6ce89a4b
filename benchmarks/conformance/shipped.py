"""Read the folders that a tool left, in plain torch: tuned weights, the loss they give, the text that was learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conformance.reference import Reference, Text, Weights, distance, read_weights

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
        for name, weight in reference.model.named_parameters():
            weight.copy_(weights[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in reference.model.named_parameters():
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
    names, weights = zip(*reference.model.named_parameters(), strict=True)
    ends = [len(losses) - cut for cut in range(3)]
    best = float("inf")
    for begin in range(len(losses)):
        for end in (end for end in ends if end > begin):
            found = torch.autograd.grad(losses[begin:end].mean(), weights, retain_graph=True)
            best = min(best, distance(moved, project(dict(zip(names, found, strict=True)))))
    return best
