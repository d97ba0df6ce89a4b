"""Prompts with pictures: their tokens, and each picture as one stretch of them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL.Image import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llmtune.data.pictures import Picture, open_picture, picture_name, row_pictures
from llmtune.errors import DataError
from llmtune.evaluate.controls import grey_picture
from llmtune.explain.explainer import Target
from llmtune.explain.patch_grids import PatchGrid, find_grids
from llmtune.explain.token_text import Token, TokenLine, name_tokens
from llmtune.model.image_models import ImageProcessor, image_processor
from llmtune.recipe.schema import Recipe
from llmtune.records import Prompt

SHOWN_SIDE = 640
"""Longest side of a picture in a page, in pixels."""


@dataclass(frozen=True)
class PromptPicture:
    """A picture of a prompt, and the positions of its tokens."""

    picture: Picture
    places: tuple[int, ...]
    grids: tuple[PatchGrid, ...]
    """Its tokens as rows and columns; none if the layout of this type of model is unknown."""

    @property
    def stretch(self) -> range:
        """All positions from its first token to its last, with marks of rows and tiles."""
        return range(self.places[0], self.places[-1] + 1)

    @property
    def name(self) -> str:
        """The name of the file."""
        return picture_name(self.picture)

    @property
    def label(self) -> str:
        """The text of its stretch in a line of tokens."""
        return f"<picture:{self.grids[0].size if self.grids else len(self.places)}>"

    @cached_property
    def shown(self) -> Image:
        """The picture, small enough for a page."""
        image = open_picture(self.picture)
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return image

    def data_url(self) -> str:
        """Return the picture for a page."""
        self.shown.save(file := io.BytesIO(), "JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_prompt(
    target: Target, text: str | None, system: str | None, files: Sequence[Path], recipe: Recipe
) -> tuple[Prompt, tuple[PromptPicture, ...]]:
    """Return the prompt of a question with pictures, as in training, and where the pictures are.

    Raises DataError for a picture that cannot be read.
    """
    assert target.task is not None, "only a run or a model that was opened with its towers reads pictures"
    paths = json.dumps([str(file) for file in files]) if files else None
    row = target.task.make_row({"prompt": text, "system": system, "image": paths})
    prompt = target.task.prompt(row, target.processor, recipe)
    images = image_processor(target.processor, recipe.model.trust_remote_code)
    return prompt, tuple(_find_pictures(prompt.ids, row_pictures(dict(row)), images, target.config))


def _find_pictures(
    ids: Sequence[int], pictures: Sequence[Picture], images: ImageProcessor, config: PreTrainedConfig
) -> list[PromptPicture]:
    token = getattr(config, "image_token_id", None) or config.image_token_index
    places, shown = [at for at, one in enumerate(ids) if one == token], []
    for picture, text in zip(pictures, images.read(pictures).texts, strict=True):
        expanded = images.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        here, places = places[: (count := expanded.count(token))], places[count:]
        if not here:
            raise DataError.of("the prompt has no tokens of it", picture_name(picture), "Use another model.")
        grids = find_grids(images.processor, config.model_type, open_picture(picture), count)
        shown.append(PromptPicture(picture, tuple(here), tuple(grids)))
    return shown


def grey_tensors(
    target: Target, ids: Sequence[int], pictures: Sequence[PromptPicture], recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Return the inputs of a prompt with a grey picture of the same size in place of each picture."""
    images = image_processor(target.processor, recipe.model.trust_remote_code)
    return images.media([[grey_picture(*one.picture["size"]) for one in pictures]], [ids])


def picture_line(
    processor: PreTrainedTokenizerBase, ids: Sequence[int], pictures: Sequence[PromptPicture]
) -> TokenLine:
    """Return the rows of a text: a token each, and one for all tokens of a picture."""
    tokens, sizes, end = [], [], 0
    named = name_tokens(processor, ids)
    for picture in pictures:
        before = named[end : picture.stretch.start]
        tokens += [*before, Token(-1, picture.label, special=True, continues=False)]
        sizes += [*[1] * len(before), len(picture.stretch)]
        end = picture.stretch.stop
    return TokenLine((*tokens, *named[end:]), (*sizes, *[1] * (len(named) - end)))
