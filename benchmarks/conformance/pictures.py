"""Pictures, conversations about them as Gemma 3 writes them, and what a tool may learn from them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance.conversations import ALL, WHOLE, Part, Turn, Ways
from conformance.models import IMAGE, IMAGE_TOKENS, SIDE
from conformance.reference import Gradient, Piece, Reference
from PIL import Image, ImageOps

ORIENTATION, UPSIDE_DOWN = 0x0112, 3
"""EXIF's tag, and its value of a picture that is stored upside down."""
MARK = "<image>"
[THE_TEXT] = WHOLE.values()
BORDERS: Ways = {**ALL, "the whole text and the borders of the picture": THE_TEXT | {"border"}}
"""What is right if the picture itself is not learned."""
LABELLED: Ways = {
    "the tokens of the picture too": THE_TEXT | {"border", "picture"},
    "the tokens of the picture too, without its borders": THE_TEXT | {"picture"},
}
EVERY: Ways = {**BORDERS, **LABELLED}
"""What is right in a case that is not about masks."""
REFUSED = r"content that is not text|\b(images?|pictures?|multimodal)\b.{0,40}\bnot (supported|offered|read|trained)"
"""A refusal of rows with pictures."""
Read = Callable[[str], torch.Tensor]


def draw(name: str, folder: Path) -> str:
    """Write a picture that has the size of the model's input, so that no tool resizes it; return its path."""
    (path := folder / name).write_bytes(encode(name))
    return str(path)


def encode(name: str) -> bytes:
    """Return the file of a picture; `turned.jpg` is stored upside down, and its EXIF data says so."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    tiles = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(tiles.repeat_interleave(SIDE // 4, 0).repeat_interleave(SIDE // 4, 1).numpy())
    exif = Image.Exif()
    if name.startswith("turned"):
        exif[ORIENTATION] = UPSIDE_DOWN
    image.save(file := io.BytesIO(), "JPEG" if name.endswith("jpg") else "PNG", exif=exif)
    return file.getvalue()


def open_picture(name: str) -> Image.Image:
    return Image.open(io.BytesIO(encode(name)))


def read(name: str, upright: bool = True) -> torch.Tensor:
    """Return the values between -1 and 1 that the model gets, with the shape [3, side, side]."""
    image = ImageOps.exif_transpose(open_picture(name)) if upright else open_picture(name)
    return torch.tensor(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


def row(*turns: Turn, images: Sequence[str]) -> dict[str, Any]:
    """Return a row of kind `pictures`: `<image>` in a text is the place of the next picture."""
    return {"messages": [{"role": role, "content": text} for role, text in turns], "images": list(images)}


def gemma(*turns: Turn, learn: frozenset[Part] = THE_TEXT, tokens: int = IMAGE_TOKENS) -> list[Piece]:
    """Write a conversation as Gemma 3 does, with the tokens of its pictures; 0 tokens: the mark of a picture only."""
    begin, soft, end = IMAGE.values()
    asked = "prompt" in learn
    picture = [("\n\n", asked), (begin, "border" in learn), (soft * tokens, "picture" in learn)]
    picture += [(end, "border" in learn), ("\n\n", asked)]
    text: list[Piece] = [("<bos>", asked)]
    for role, words in turns:
        if role == "assistant":
            text += [("<start_of_turn>model", asked), ("\n", "header" in learn), (words, "answer" in learn)]
            text += [("<end_of_turn>", "end" in learn), ("\n", "after" in learn)]
            continue
        text += [(f"<start_of_turn>{role}\n", asked)]
        for piece in re.split(f"({MARK})", words):
            text += [(piece, asked)] if piece != MARK else picture if tokens else [(begin, "border" in learn)]
        text += [("<end_of_turn>\n", asked)]
    return text


def see(reference: Reference, ids: Sequence[int], pixels: Sequence[torch.Tensor], both_ways: bool = True) -> Any:
    """Return the model's inputs for pictures. Tokens of a picture see each other both ways."""
    soft = reference.tokenizer.convert_tokens_to_ids(IMAGE["image_token"])
    kinds = torch.tensor([[int(token == soft and both_ways) for token in ids]])
    return {"token_type_ids": kinds} | ({"pixel_values": torch.stack(list(pixels))} if len(pixels) else {})


def sees(
    conversations: Sequence[tuple[Sequence[Turn], Sequence[str]]],
    ways: Ways,
    name: str = "{}",
    look: Read | None = read,
    both_ways: bool = True,
    tokens: int = IMAGE_TOKENS,
) -> Mapping[str, Gradient]:
    """Return, for each way, the gradient of the token mean over conversations with pictures; `name` has {} for the way.

    `look` reads a picture; None: no picture reaches the model.
    """

    def gradient(learn: frozenset[Part], reference: Reference) -> Any:
        losses = []
        for turns, images in conversations:
            ids, labels = reference.encode(gemma(*turns, learn=learn, tokens=tokens))
            pixels = [look(image) for image in images] if look else []
            losses.append(reference.loss(ids, labels, **see(reference, ids, pixels, both_ways)))
        return reference.gradient_of(losses)

    return {name.format(way): partial(gradient, learn) for way, learn in ways.items()}
