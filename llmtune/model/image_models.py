"""Models that read pictures: the checkpoint's own processor, a picture's text and tensors, and batches of them.

Shapes: B rows of a batch, T positions.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from llmtune.data.pictures import Picture, open_picture, read_picture
from llmtune.errors import EnvironmentProblem, first_line
from llmtune.model.device import REFUSALS, is_out_of_memory
from llmtune.model.processor import check_image_processor, open_processor, set_image_size
from llmtune.recipe.model_kind import IMAGE_TEXT

CACHE_BYTES = 2**28
"""Memory for the tensors of pictures that were read last."""
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Names under which models take the kind of each token: 1 in a picture, 0 in text."""


PROBE_SIZES = ((64, 64), (96, 48), (96, 48))
"""Width and height of the pictures that a model is tried with; the last two differ in their colours alone."""


class PictureInputs(NamedTuple):
    """The pictures of a row as their model reads them; some processors read several differently than one."""

    texts: Sequence[str]
    """What the processor writes in place of each picture's placeholder."""
    media: Mapping[str, torch.Tensor]
    """Inputs of the model's forward by name, such as `pixel_values`."""


class ImageProcessor:
    """The processor of a checkpoint that reads pictures, with the tokenizer of a run."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.token_types = next((name for name in TOKEN_TYPES if name in processor.model_input_names), "")
        """Name of the model's input for the kinds of tokens; empty for a model without one."""
        self._read: OrderedDict[tuple[str, ...], PictureInputs] = OrderedDict()
        self._bytes = 0

    @property
    def placeholder(self) -> str:
        """The text that the chat template writes for a picture."""
        return str(self.processor.image_token)

    def read(self, pictures: Sequence[Picture]) -> PictureInputs:
        """Return the inputs of a row's pictures; the latest are kept in memory by the hashes of their contents."""
        key = tuple(picture["content"] for picture in pictures)
        if not key:
            return PictureInputs([], {})
        if key in self._read:
            self._read.move_to_end(key)
            return self._read[key]
        output = self.process(self.placeholder * len(pictures), pictures)
        (offsets,) = output.pop("text_replacement_offsets")
        of_text = ("input_ids", "attention_mask", self.token_types)
        media = {name: part for name, part in output.items() if name not in of_text}
        inputs = self._read[key] = PictureInputs([one["replacement"] for one in offsets], media)
        self._bytes += _count_bytes(inputs)
        while self._bytes > CACHE_BYTES and len(self._read) > 1:
            self._bytes -= _count_bytes(self._read.popitem(last=False)[1])
        return inputs

    def process(self, text: str, pictures: Sequence[Picture]) -> dict[str, Any]:
        """Return what the processor makes of a text with a placeholder for each picture."""
        call = {"text": [text], "images": [[*map(open_picture, pictures)]], "add_special_tokens": False}
        return dict(
            self.processor(**call, images_kwargs={"return_tensors": "pt"}, return_text_replacement_offsets=True)
        )

    def expand(self, texts: Sequence[str], pictures: Sequence[Picture]) -> list[str] | str:
        """Write the tokens of each picture in place of its placeholder in consecutive texts, as the processor does.

        Returns the reason if the placeholders are not as many as the pictures, or the processor refuses the pictures.
        """
        if not pictures:
            return [*texts]
        try:
            replacements = self.read(pictures).texts
        except REFUSALS as error:
            if is_out_of_memory(error):
                raise
            return f"the processor refuses its pictures: {first_line(error)}"
        marks = [*replacements, *[self.placeholder] * sum(text.count(self.placeholder) for text in texts)]
        expanded, offsets = self.processor.get_text_with_replacements([*texts], images_replacements=marks)
        if (places := sum(map(len, offsets))) != len(pictures):
            return f"the chat template has {places} places for {len(pictures)} pictures"
        return list(expanded)

    def special_ids(self, pictures: Sequence[Picture]) -> set[int]:
        """Return the special tokens that the processor writes for pictures."""
        tokenizer = self.processor.tokenizer
        texts = dict.fromkeys(self.read(pictures).texts)
        ids: set[int] = {one for text in texts for one in tokenizer(text, add_special_tokens=False)["input_ids"]}
        return ids & {*tokenizer.added_tokens_decoder}

    def media(self, pictures: Iterable[Sequence[Picture]], ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for the pictures of each text, and the kinds of the texts' tokens [B, T].

        Texts are padded on the right.
        """
        joined = join_media([self.read(row).media for row in pictures])
        if self.token_types:
            width = max(map(len, ids))
            types = self.processor.create_mm_token_type_ids([list(row) for row in ids])
            joined[self.token_types] = torch.tensor([[*row, *[0] * (width - len(row))] for row in types])
        return joined


def join_media(media: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join the inputs of several rows along their first dimension; others are padded with zeros."""
    parts = [*media]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _concatenate_padded([part[name] for part in parts if name in part]) for name in names}


def _concatenate_padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        room = [pad for size, most in zip(part.shape[:0:-1], shape[::-1], strict=True) for pad in (0, most - size)]
        padded.append(torch.nn.functional.pad(part, room) if any(room) else part)
    return torch.cat(padded)


def _count_bytes(inputs: PictureInputs) -> int:
    return sum(part.nbytes for part in inputs.media.values())


def draw_probes() -> list[Picture]:
    """Return the pictures of PROBE_SIZES, with colours that differ from pixel to pixel."""
    from PIL import Image

    pictures = []
    for number, (width, height) in enumerate(PROBE_SIZES):
        colours = (x * 3 + y * 5 + c * 7 + number * 91 for y in range(height) for x in range(width) for c in range(3))
        file = io.BytesIO()
        Image.frombytes("RGB", (width, height), bytes(value % 256 for value in colours)).save(file, "PNG")
        pictures.append(read_picture(file.getvalue(), None))
    return pictures


@lru_cache(maxsize=2)
def image_processor(tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> ImageProcessor:
    """Return the processor in the folder of a tokenizer, with that tokenizer in it.

    Raises EnvironmentProblem if the folder has none that opens, or one that does not say where it puts pictures.
    """
    folder = Path(str(tokenizer.name_or_path))
    check_image_processor(folder, trust_remote_code, "")
    processor = open_processor(folder, trust_remote_code)
    processor.tokenizer = tokenizer
    set_image_size(processor, tokenizer)
    images = ImageProcessor(processor)
    try:
        images.read(draw_probes()[:1])
    except REFUSALS as error:
        what = f"pictures are not supported with a {type(processor).__name__}: {first_line(error)}"
        raise EnvironmentProblem.of(what, str(folder), f"{IMAGE_TEXT.fix} Or set chat.images: false.") from error
    return images
