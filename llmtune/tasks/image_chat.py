"""Task chat with pictures: a model that reads pictures answers conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmtune.data.chat_encoding import encode_chat
from llmtune.data.chat_messages import list_pictures
from llmtune.data.chat_rows import ChatRow, open_conversation
from llmtune.data.collators import collate_padded
from llmtune.data.example import Collate, ImageExample
from llmtune.data.pictures import IMAGE
from llmtune.data.rejected_rows import RowError, parse_cell
from llmtune.data.task_interface import Encoded
from llmtune.errors import DataError
from llmtune.model.image_models import ImageProcessor, image_processor
from llmtune.model.towers import image_text_class
from llmtune.recipe.model_kind import IMAGE_TEXT
from llmtune.recipe.schema import Recipe
from llmtune.records import Batch, Prompt
from llmtune.tasks.chat import Chat


class ImageChat(Chat):
    """A decoder that also reads the pictures of conversations."""

    model_kind = IMAGE_TEXT
    example_type = ImageExample
    required_inputs = ()
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
            raise DataError.of(str(error), "--image", "Give a text, a picture, or both.") from None

    def encode(self, rows: Sequence[ChatRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return the examples of each conversation, with the tokens of its pictures."""
        images = open_images(processor, recipe)
        encoded = encode_chat(rows, processor, recipe, images.expand)
        return [row if isinstance(row, str) else [*map(ImageExample.of, row)] for row in encoded]

    def prompt(self, row: ChatRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Prompt:
        """Return the rendered conversation, ready for the next answer, with its pictures."""
        images = open_images(processor, recipe)
        ids = self._render(row, processor, recipe, images.expand)
        return Prompt(ids, partial(images.media, list_pictures(row["messages"]), [ids]))

    def prompt_ids(self, row: ChatRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
        """Return the token ids of the rendered conversation, with those of pictures."""
        images = open_images(processor, recipe)
        return self._render(row, processor, recipe, images.expand)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return the function that makes padded micro-batches; `media` lists the names of the pictures' inputs."""
        images = open_images(processor, recipe)

        def collate(examples: Sequence[ImageExample], draw: int = 0) -> Batch:
            pictures = [picture for example in examples for picture in example.list_pictures()]
            media = images.media(pictures, [example.input_ids for example in examples])
            return {**collate_padded(examples, processor.pad_token_id), **media, "media": tuple(media)}

        return collate


def _make_absolute(picture: str) -> str:
    return picture if picture.startswith("data:") or "://" in picture else str(Path(picture).absolute())


def open_images(processor: PreTrainedTokenizerBase, recipe: Recipe) -> ImageProcessor:
    """Return the processor of a run's pictures. Raises EnvironmentProblem if the model has none that opens."""
    return image_processor(processor, recipe.model.trust_remote_code)


VARIANTS = (ImageChat(),)
