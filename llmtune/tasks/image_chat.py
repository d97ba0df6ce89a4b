"""Task chat with pictures: a model that reads pictures answers conversations."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.chat_messages import list_pictures
from llmtune.data.chat_rows import ChatRow, Message, open_conversation
from llmtune.data.chat_template import Expand, render_prompt
from llmtune.data.collators import collate_padded
from llmtune.data.example import Collate, Example, ImageExample
from llmtune.data.pictures import IMAGE, PLACE, Picture, refuse_bare_marks
from llmtune.data.rejected_rows import RowError, parse_cell
from llmtune.data.task_interface import Encoded
from llmtune.errors import DataError, RecipeError, first_line
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.device import REFUSALS, is_out_of_memory, resolve_dtype
from llmtune.model.image_checks import explain_unreadable_pictures, find_miscounts
from llmtune.model.image_models import ImageProcessor, draw_probes, image_processor
from llmtune.model.towers import find_projectors, image_text_class
from llmtune.recipe.model_kind import IMAGE_TEXT
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Loss, Prompt
from llmtune.tasks.chat import Chat


class ImageChat(Chat):
    """A decoder that also reads the pictures of conversations."""

    model_kind = IMAGE_TEXT
    example_type = ImageExample
    required_inputs: tuple[str, ...] = ()
    optional_inputs = ("prompt", "system", "image")

    def matches(self, recipe: Recipe) -> bool:
        """Whether questions may have pictures."""
        return not super().matches(recipe)

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model reads pictures."""
        return image_text_class(config) is not None

    def make_row(self, given: Mapping[str, str | None]) -> ChatRow:
        """Return a conversation of one question with its pictures: a path, or several as a JSON list."""
        stated, text = given.get("image"), given.get("prompt") or ""
        system = given.get("system")
        if not stated and text.strip():
            return super().make_row({"prompt": text, "system": system})
        paths = parse_cell(stated) if stated else []
        try:
            question = [{"role": "user", "content": text if text.strip() or not paths else IMAGE}]
            images = [_make_absolute(str(one)) for one in (paths if isinstance(paths, list) else [stated])]
            return open_conversation(question, system=system, images=images, folder=Path("/"), reads_pictures=True)
        except RowError as error:
            fix = "Give a text, a picture's file, or both; and a file for each <image>."
            raise DataError.of(str(error), "--image", fix) from None

    def note_labels(self, stated: Recipe, inferred: Recipe) -> str | None:
        """Say that rows are not packed, whatever `data.packing` says."""
        why = "pictures are not packed"
        return f"Rows are padded, in batches of similar length, because {why}." if inferred.data.packing else None

    def encode(self, rows: Sequence[ChatRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return the examples of each conversation, with the tokens of its pictures."""
        images = open_images(processor, recipe)
        if any(list_pictures(row["messages"]) for row in rows):
            self._check_template(images, processor, recipe)
        encoded = super().encode(rows, processor, recipe)
        return [row if isinstance(row, str) else [_unlabel(one, images) for one in row] for row in encoded]

    def _check_template(self, images: ImageProcessor, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Raise RecipeError if the chat template writes no placeholder for a picture."""
        places: list[int] = []

        def count(texts: Sequence[str], pictures: Sequence[Picture]) -> list[str]:
            places.append(sum(text.count(images.placeholder) for text in texts))
            return [*texts]

        question: Message = {"role": "user", "content": f"{PLACE}What is it?", "images": draw_probes()[:1]}
        with suppress(DataError):  # reported with the first row
            render_prompt([question], processor, recipe, expand=count)
        if places == [0]:
            what = f"the chat template has no place for pictures: it never writes {images.placeholder}"
            fix = "Set model.chat_template to a file that writes it for each part of type image, or to the original's."
            raise RecipeError.of(what, "model.chat_template", fix)

    def expander(self, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Expand:
        """Return the function that writes the tokens of pictures, as the model's own processor does."""
        return open_images(processor, recipe).expand

    def prompt(self, row: ChatRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Prompt:
        """Return the rendered conversation, ready for the next answer, with its pictures."""
        ids = self.prompt_ids(row, processor, recipe)
        return Prompt(ids, partial(open_images(processor, recipe).media, [list_pictures(row["messages"])], [ids]))

    def prompt_ids(self, row: ChatRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids of the rendered conversation, with those of pictures.

        Raises DataError for a mark without its picture.
        """
        try:
            refuse_bare_marks(row["messages"])
        except RowError as error:
            raise DataError.of(str(error), "the question", f"Give the picture, or write {IMAGE} differently.") from None
        return super().prompt_ids(row, processor, recipe)

    def list_pictures(self, row: ChatRow) -> list[Picture]:
        """Return the pictures of a conversation."""
        return list_pictures(row["messages"])

    def with_pictures(self, row: ChatRow, pictures: Sequence[Picture]) -> ChatRow:
        """Return the conversation with other pictures in the places of its own."""
        left = iter(pictures)
        messages = [
            {**message, "images": [next(left) for _ in message["images"]]} if "images" in message else message
            for message in row["messages"]
        ]
        return cast(ChatRow, {**row, "messages": messages})

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return the function that makes padded micro-batches; `media` lists the names of the pictures' inputs."""
        images = open_images(processor, recipe)

        def collate(examples: Sequence[ImageExample], draw: int = 0) -> Batch:
            pictures = [example.list_pictures() for example in examples]
            media = images.media(pictures, [example.input_ids for example in examples])
            return {**collate_padded(examples, processor.pad_token_id), **media, "media": tuple(media)}

        return collate

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy; a trained projector always gets a gradient, which is zero for texts without pictures.

        A process with such texts alone would otherwise wait for gradients that never come.
        """
        loss = super().loss(model, batch, by_row)
        if not torch.is_grad_enabled():
            return loss
        inner = cast(PreTrainedModel, unwrap(model))
        parameters = (one for name in find_projectors(inner) for one in inner.get_submodule(name).parameters())
        zeros = [0 * parameter.sum() for parameter in parameters if parameter.requires_grad]
        return replace(loss, sum=sum(zeros, start=loss.sum)) if zeros else loss

    def check_examples(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        examples: Iterable[ImageExample],
    ) -> Iterator[tuple[int, str]]:
        """Count the image tokens of each example; refuse a model that does not read pictures one by one as together."""
        try:
            miscounts = [*find_miscounts(model, open_images(processor, recipe), examples)]
            reason = None if miscounts else self._explain_unreadable(model, processor, recipe)
        except REFUSALS as error:
            if is_out_of_memory(error):
                raise
            reason = f"cannot read pictures: {first_line(error)}"
        if reason is not None:
            what = f"model type {model.config.model_type} is not supported with pictures: it {reason}"
            raise RecipeError.of(what, "model.name", f"{self.model_kind.fix} Or set chat.images: false.")
        return iter(miscounts)

    def _explain_unreadable(
        self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> str | None:
        """Return what a model reads wrongly, tried on rows with one and two pictures; None if nothing."""
        long = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": sys.maxsize})})
        answer: Message = {"role": "assistant", "content": "It is a picture."}
        probes, images, expected = draw_probes(), open_images(processor, recipe), list[list[int]]()
        rows: list[ChatRow] = [
            {"messages": [{"role": "user", "content": f"What is it?{PLACE * len(one)}", "images": [*one]}, answer]}
            for one in (probes[:2], *([picture] for picture in probes))
        ]

        def expand(texts: Sequence[str], pictures: Sequence[Picture]) -> list[str] | str:
            expected.extend(torch.as_tensor(images.process(texts[0], pictures)["input_ids"]).tolist())
            return images.expand(texts, pictures)

        several, *single = self.encode(rows, processor, long)  # some processors take one picture alone
        if reason := next((row for row in single if isinstance(row, str)), None):
            return f"cannot encode them: {reason}"
        question = rows[isinstance(several, str)]["messages"][:1]
        if expected != [render_prompt(question, processor, recipe, expand=expand)]:
            return "needs other tokens around pictures, which its own processor writes"
        encoded = [row for row in (several, *single) if not isinstance(row, str)]
        examples = [cast(ImageExample, example) for row in encoded for example in row]
        dtype = resolve_dtype(recipe.model.dtype, model.device.type)
        return explain_unreadable_pictures(model, dtype, self.collator(processor, recipe), examples)


def _unlabel(example: Example, images: ImageProcessor) -> ImageExample:
    """Return an example without labels on the tokens of its pictures, which `train_on: all` would train."""
    read = ImageExample.of(example)
    pictures = read.list_pictures()
    return read.without_labels(images.special_ids(pictures)) if pictures else read


def _make_absolute(picture: str) -> str:
    return picture if picture.startswith("data:") or "://" in picture else str(Path(picture).absolute())


def open_images(processor: PreTrainedTokenizerBase, recipe: Recipe) -> ImageProcessor:
    """Return the processor of a run's pictures. Raises EnvironmentProblem if the model has none that opens."""
    return image_processor(processor, recipe.model.trust_remote_code)


VARIANTS = (ImageChat(),)
