"""Rows with pictures, and the same rows in plain transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llmtune.data.pictures import PLACE, open_picture, read_picture
from llmtune.model.towers import patch_text_forward

SIZES = {"square": (56, 56), "wide": (80, 40), "tall": (45, 90)}


def draw(folder: Path) -> dict[str, Path]:
    """Save pictures of different sizes; return their files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        colours = (x * 3 + y * 5 + c * 7 + 50 * number for y in range(height) for x in range(width) for c in range(3))
        Image.frombytes("RGB", (width, height), bytes(one % 256 for one in colours)).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in SIZES}


def mixed_rows(folder: Path, names: Sequence[str] = tuple(SIZES)) -> list[dict[str, Any]]:
    """Return prepared rows: without a picture, with two in a row, and with some in several turns."""
    files = draw(folder)
    first, second, third = (read_picture(str(files[name]), folder) for name in names)
    return [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]},
        {
            "messages": [
                {"role": "user", "content": f"{PLACE}one{PLACE} two?", "images": [first, second]},
                {"role": "assistant", "content": "yes it is"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": f"what {PLACE}?", "images": [third]},
                {"role": "assistant", "content": "no"},
                {"role": "user", "content": "and without"},
                {"role": "assistant", "content": "more words"},
                {"role": "user", "content": f"the same {PLACE}", "images": [second]},
                {"role": "assistant", "content": "three"},
            ]
        },
    ]


class PlainModel:
    """A checkpoint in plain transformers, one row at a time."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        patch_text_forward(self.model)

    def inputs(self, messages: Sequence[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
        """Return the inputs of a conversation, as the processor makes them."""
        pictures = [open_picture(one) for message in messages for one in message.get("images", ())]
        text = self.processor.apply_chat_template([as_parts(one) for one in messages], tokenize=False, **options)
        images = {"images": [pictures]} if pictures else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # GLM's, with numpy 2
            return dict(self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **images))

    def loss(self, inputs: dict[str, torch.Tensor], spans: Sequence[int]) -> torch.Tensor:
        """Return the summed cross entropy of the tokens in `spans`."""
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        for start, end in zip(spans[::2], spans[1::2], strict=True):
            labels[0, start:end] = ids[0, start:end]
        logits = self.model(**_as_float(inputs), use_cache=False).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")

    def generate(self, inputs: dict[str, torch.Tensor], **options: Any) -> list[int]:
        """Return the ids that follow a prompt."""
        with torch.inference_mode():
            output = self.model.generate(**_as_float(inputs), **options)
        return cast(list[int], output[0, inputs["input_ids"].shape[1] :].tolist())


def _as_float(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part.float() if part.is_floating_point() else part for name, part in inputs.items()}


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with a list of parts as its content."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(message["content"].split(PLACE)):
        parts += [{"type": "image"}] * bool(number) + [{"type": "text", "text": text}] * bool(text)
    return {"role": message["role"], "content": parts}


def write_picture_rows(folder: Path, count: int = 24) -> Path:
    """Write rows in OpenAI's format; every third has no picture, and some have two."""
    names = list(draw(folder))
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(count):
            shown = [names[i % 3], names[(i + 1) % 3]][: i % 3]
            parts = [{"type": "image_url", "image_url": {"url": f"{name}.png"}} for name in shown]
            question = [*parts, {"type": "text", "text": f"What comes after {i} and before {i + 2}?"}]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": str(i + 1)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder / "rows.jsonl"
