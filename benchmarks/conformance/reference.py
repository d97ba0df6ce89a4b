"""What a training step should compute, in plain torch: a forward pass, a sum of token losses, a count, a gradient.

It uses transformers for the model and the tokenizer, and none of the tools. A case writes the text that the model must
see by hand, as pieces: `[("<|im_start|>assistant\n", False), ("Blue.<|im_end|>", True)]`; True marks what is learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoTokenizer

Piece = tuple[str, bool]
Text = Sequence[Piece]
Weights = Mapping[str, torch.Tensor]
"""Names of parameters -> values, or gradients."""
Project = Callable[[Weights], Weights]
TOLERANCE = 1e-3
"""Largest relative distance of two gradients that count as the same; float32 needs about 1e-5."""
IGNORED = -100
TOWER = "vision_tower.", "multi_modal_projector."
"""Beginnings of the names of weights that see."""
KINDS = {"t5": AutoModelForSeq2SeqLM, "gemma3": AutoModelForImageTextToText}


class Reference:
    """A model before training, and the gradients that texts give."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.after: int | None = None
        """A token that a tool learns after each text, which has a case of its own."""
        self.frozen: tuple[str, ...] = ()
        """Beginnings of the names of weights that a tool does not train, which has a case of its own."""
        self.both_ways = True
        """Whether tokens of a picture see each other both ways; a tool that ignores it has a case for it."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        kind = KINDS.get(folder.name.partition("-")[0], AutoModelForCausalLM)
        self.model: Any = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        named = {plain_name(name): weight for name, weight in self.model.named_parameters()}
        self.parameters = {name: weight for name, weight in named.items() if not name.startswith(TOWER)}
        """The weights of the language model: tools may freeze a tower."""
        self.start = {name: weight.detach().clone() for name, weight in self.parameters.items()}
        self._known: dict[tuple[Gradient, int | None, tuple[str, ...], bool], Weights] = {}

    @contextmanager
    def allowing(self, result: Mapping[str, Any]) -> Iterator[None]:
        """Compute with the habits of a tool that have cases of their own, as its adapter names them."""
        self.after, self.frozen = result.get("after"), tuple(result.get("frozen", ()))
        self.both_ways = not result.get("one_way")
        try:
            yield
        finally:
            self.after, self.frozen, self.both_ways = None, (), True

    def of(self, gradient: Gradient) -> Weights:
        """Return a case's gradient, computed once for all tools."""
        key = gradient, self.after, self.frozen, self.both_ways
        if key not in self._known:
            self._known[key] = gradient(self)
        return self._known[key]

    def encode(self, text: Text, split: bool = False) -> tuple[list[int], list[int]]:
        """Tokenise the pieces as one text; return ids and labels. A token is learned if its first character is.

        `split` reads special tokens as plain text.
        """
        whole = "".join(piece for piece, _ in text)
        learned = [mark for piece, mark in text for _ in piece]
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "split_special_tokens": split}
        encoded = self.tokenizer(whole, **options)
        ids = encoded["input_ids"]
        pairs = zip(ids, encoded["offset_mapping"], strict=True)
        after = [] if self.after is None else [self.after]
        return ids + after, [token if learned[begin] else IGNORED for token, (begin, _) in pairs] + after

    def loss(
        self, ids: Sequence[int], labels: Sequence[int], positions: Sequence[int] | None = None, **inputs: Any
    ) -> tuple[torch.Tensor, int]:
        """Return the sum of the token losses of one text, alone in its batch, and their number.

        Every token sees all tokens before it; `positions` replaces their numbers only. `inputs` are a picture's.
        """
        ones = torch.ones(1, len(ids), dtype=torch.long)
        places = None if positions is None else torch.tensor([positions])
        inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": ones, "position_ids": places}
        if "token_type_ids" in inputs and not self.both_ways:
            inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
        logits = self.model(**inputs).logits[0, :-1]
        return sum_losses(logits, torch.tensor(labels[1:]))

    def translate(self, source: str, target: str) -> tuple[torch.Tensor, int]:
        """Return the same for an encoder-decoder, whose tokenizer adds the end token to both texts."""
        ids, labels = (torch.tensor(self.tokenizer(text)["input_ids"]) for text in (source, target))
        return sum_losses(self.model(input_ids=ids[None], labels=labels[None]).logits[0], labels)

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

    def differentiate(self, loss: Any, again: bool = False) -> Weights:
        """Return the gradient of a loss; `again` keeps its graph for another."""
        names, weights = zip(*self.parameters.items(), strict=True)
        found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=again)
        return {n: torch.zeros_like(w) if g is None else g for n, w, g in zip(names, weights, found, strict=True)}

    def after_steps(self, steps: Sequence[Sequence[Text]], rates: Sequence[float]) -> Weights:
        """Take several steps of plain SGD; return the change of all weights over the first rate, negated."""
        encoded = [[self.encode(text) for text in texts] for texts in steps]
        weights = self.parameters
        for texts, rate in zip(encoded, rates, strict=True):
            gradient = self.gradient_of([self.loss(*pair) for pair in texts])
            with torch.no_grad():
                for name, weight in weights.items():
                    weight -= rate * gradient[name] * (not name.startswith(self.frozen))
        moved = {name: (self.start[name] - weight.detach()) / rates[0] for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(self.start[name])
        return moved

    def step_taken(self, folder: Path, learning_rate: float) -> tuple[Weights, Project]:
        """Return the gradient that one step of plain SGD used: the change of the saved weights over the rate.

        For an adapter it is that of the matrices B, which start at zero. The function that comes with it turns a
        gradient of the full model into one of the same weights.
        """
        saved = read_weights(folder)
        if (folder / "adapter_config.json").exists():
            return adapter_step(saved, json.loads((folder / "adapter_config.json").read_text()), learning_rate)
        missing = self.start.keys() - saved.keys() - {"lm_head.weight"}
        if missing:
            raise KeyError(f"the trained model lacks {sorted(missing)[:3]}")
        step = {name: (self.start[name] - saved[name].float()) / learning_rate for name in self.start if name in saved}
        return step, lambda gradient: gradient


def sum_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total, int((targets != IGNORED).sum())


def adapter_step(saved: Weights, config: Mapping[str, Any], learning_rate: float) -> tuple[Weights, Project]:
    """Return the gradients of all matrices B of a LoRA: scale x gradient of the full weight x A transposed."""
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    saved = {name.removeprefix("base_model.model."): weight.float() for name, weight in saved.items()}
    suffix = ".lora_B.weight"
    modules = [name.removesuffix(suffix) for name in saved if name.endswith(suffix)]
    step = {module: -saved[f"{module}{suffix}"] / learning_rate for module in modules}

    def project(gradient: Weights) -> Weights:
        return {module: scale * gradient[f"{module}.weight"] @ saved[f"{module}.lora_A.weight"].T for module in modules}

    return step, project


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of all safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {plain_name(name): weight for file in files for name, weight in load_file(file).items()}


def plain_name(name: str) -> str:
    """Return the name of a weight of Gemma 3 as its newest class has it; released files have older names."""
    name = re.sub(r"^(.*\.)?(language_model|vision_tower|multi_modal_projector)\.", r"\2.", name)
    return name.replace("language_model.model.", "language_model.").replace(
        "vision_tower.vision_model.", "vision_tower."
    )


def distance(found: Weights, expected: Weights) -> float:
    """Return the norm of the difference relative to the norm of `expected`, over all weights of `found`."""
    wrong = sum(float((found[name] - expected[name]).double().square().sum()) for name in found)
    size = sum(float(expected[name].double().square().sum()) for name in found)
    return float((wrong / size) ** 0.5) if size else float("inf")


Gradient = Callable[[Reference], Weights]
