"""What a training step should compute, in plain torch: a forward pass, a sum of token losses, a count, a gradient.

It uses transformers for the model and the tokenizer, and none of the tools. A case writes the text that the model must
see by hand, as pieces: `[("<|im_start|>assistant\n", False), ("Blue.<|im_end|>", True)]`; True marks what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

Piece = tuple[str, bool]
Text = Sequence[Piece]
Weights = Mapping[str, torch.Tensor]
"""Names of parameters -> values, or gradients."""
TOLERANCE = 1e-3
"""Largest relative distance of two gradients that count as the same; float32 needs about 1e-5."""
IGNORED = -100


class Reference:
    """A model before training, and the gradients that texts give."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        kind = AutoModelForSeq2SeqLM if "t5" in folder.name else AutoModelForCausalLM
        self.model: Any = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.start = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def encode(self, text: Text, shift: int = 0) -> tuple[list[int], list[int]]:
        """Tokenise the pieces as one text; return ids and labels. A token is learned if its first character is."""
        whole = "".join(piece for piece, _ in text)
        learned = [mark for piece, mark in text for _ in piece]
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        pairs = zip(ids, encoded["offset_mapping"], strict=True)
        return ids, [token if learned[begin] else IGNORED for token, (begin, _) in pairs]

    def loss(self, ids: Sequence[int], labels: Sequence[int]) -> tuple[torch.Tensor, int]:
        """Return the sum of the token losses of one text, alone in its batch, and their number."""
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return total, int((targets != IGNORED).sum())

    def gradient(self, texts: Iterable[Text]) -> Weights:
        """Return the gradient of the mean loss over all learned tokens of a step."""
        return self.gradient_of([self.loss(*self.encode(text)) for text in texts])

    def gradient_of(self, losses: Sequence[tuple[torch.Tensor, float]]) -> Weights:
        """Return the gradient of the sums of all losses divided by the sum of their counts."""
        mean = torch.stack([total for total, _ in losses]).sum() / sum(count for _, count in losses)
        return self.differentiate(mean)

    def mean_of_means(self, texts: Iterable[Text], groups: int | None = None) -> Weights:
        """Return the gradient if each text (or each of `groups` micro-batches) is averaged before the step is."""
        losses = [self.loss(*self.encode(text)) for text in texts]
        size = len(losses) // (groups or len(losses))
        parts = [losses[at : at + size] for at in range(0, len(losses), size)]
        means = [sum(total for total, _ in part) / sum(count for _, count in part) for part in parts]
        return self.differentiate(sum(means) / len(means))

    def differentiate(self, loss: Any) -> Weights:
        names, weights = zip(*self.model.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return {n: torch.zeros_like(w) if g is None else g for n, w, g in zip(names, weights, found, strict=True)}

    def step_taken(self, folder: Path, learning_rate: float) -> Weights:
        """Return the gradient that one step of plain SGD used: the change of the saved weights over the rate."""
        saved = read_weights(folder)
        missing = self.start.keys() - saved.keys() - {"lm_head.weight"}
        if missing:
            raise KeyError(f"the trained model lacks {sorted(missing)[:3]}")
        return {name: (self.start[name] - saved[name].float()) / learning_rate for name in self.start if name in saved}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of all safetensors files of a folder."""
    return {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}


def distance(found: Weights, expected: Weights) -> float:
    """Return the norm of the difference relative to the norm of `expected`, over all weights of `found`."""
    wrong = sum(float((found[name] - expected[name]).double().square().sum()) for name in found)
    size = sum(float(expected[name].double().square().sum()) for name in found)
    return float((wrong / size) ** 0.5) if size else float("inf")


Gradient = Callable[[Reference], Weights]
