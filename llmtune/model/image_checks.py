"""Check a loaded model on pictures: rows do not change each other, and image tokens are as many as features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel
from xxhash import xxh3_128_hexdigest as hash_bytes

from llmtune.data.example import Collate, ImageExample
from llmtune.data.pictures import Picture, picture_name
from llmtune.model.causal_lm_loss import move_to, predicted_logits
from llmtune.model.device import compute_context
from llmtune.model.image_models import ImageProcessor
from llmtune.model.self_checks import logits_agree


class _FeaturesSeenError(Exception):
    """Ends a forward pass as soon as the model has made the features of a picture."""

    def __init__(self, features: torch.Tensor | None) -> None:
        super().__init__()
        self.features = features


class PictureTokens(NamedTuple):
    """How a picture is counted."""

    tokens: int
    """Image tokens that the processor writes for it."""
    features: int
    """Features that the model makes of it."""


def explain_unreadable_pictures(
    model: PreTrainedModel, dtype: torch.dtype, collate: Collate, examples: Sequence[ImageExample]
) -> str | None:
    """Return what prevents `model`, in eval mode, from reading rows with pictures; None if nothing does.

    `examples` have the pictures of `draw_probes`. The first two must have the same scores together as alone, and the
    last two, with the same text, different ones.
    """

    def read(*rows: ImageExample) -> torch.Tensor:
        return predicted_logits(model, move_to(model.device, collate(rows, 0))).float()

    first, second, other = examples
    with torch.inference_mode(), compute_context(dtype, model.device.type):
        alone = [read(one) for one in (first, second, other)]
        together = read(first, second)
    if not logits_agree(together, torch.cat(alone[:2]), dtype):
        return "reads a picture differently next to a row with another one"
    return "does not read pictures: two of them get the same scores" if torch.equal(*alone[1:]) else None


def count_features(model: PreTrainedModel, media: Mapping[str, torch.Tensor]) -> int:
    """Return the number of features that the model puts in place of image tokens for these inputs."""
    inputs = {name: part.to(model.device) for name, part in media.items()}
    inputs = {name: part.to(model.dtype) if part.is_floating_point() else part for name, part in inputs.items()}
    merging = next((one for one in model.modules() if hasattr(one, "get_placeholder_mask")), None)
    if merging is None:  # idefics3
        return _count_vectors(model.get_image_features(**inputs))

    def stop(*args: object, image_features: torch.Tensor | None = None, **kwargs: object) -> None:
        raise _FeaturesSeenError(image_features)

    token = torch.tensor([[model.config.image_token_id]], device=model.device)
    merging.get_placeholder_mask = stop
    try:
        model(input_ids=token, attention_mask=torch.ones_like(token), **inputs)
    except _FeaturesSeenError as error:
        if error.features is not None:
            return _count_vectors(error.features)
    finally:
        del merging.get_placeholder_mask
    return _count_vectors(merging.get_image_features(**inputs))  # Gemma 4 finds tokens first


def _count_vectors(features: object) -> int:
    vectors = getattr(features, "pooler_output", features)
    parts = vectors if isinstance(vectors, tuple | list) else [vectors]
    return sum(int(part.shape[:-1].numel()) for part in cast(Sequence[torch.Tensor], parts))


def find_miscounts(
    model: PreTrainedModel, images: ImageProcessor, examples: Iterable[ImageExample]
) -> Iterator[tuple[int, str]]:
    """Yield the number of each example whose image tokens are not as many as the features of its pictures, and why.

    Tokens and features of a picture depend on its size alone: pictures of one size are counted once.
    """
    token, count = model.config.image_token_id, _counter(model, images)
    for number, example in enumerate(examples):
        pictures, tokens = example.list_pictures(), list(example.input_ids).count(token)
        counts = [count(picture) for picture in pictures]
        parts = ", ".join(
            f"{picture_name(picture)}: {one.features:,} features, {one.tokens:,} tokens"
            for picture, one in zip(pictures, counts, strict=True)
        )
        if tokens != sum(one.features for one in counts) or any(one.tokens != one.features for one in counts):
            yield number, f"the row has {tokens:,} image tokens for {len(pictures)} pictures ({parts or 'none'})"


def _counter(model: PreTrainedModel, images: ImageProcessor) -> Callable[[Picture], PictureTokens]:
    features: dict[tuple[object, ...], int] = {}
    sizes: dict[tuple[int, ...], PictureTokens] = {}

    def count(picture: Picture) -> PictureTokens:
        size = tuple(picture["size"])
        if size not in sizes:
            text, media = images.read(picture)
            ids = images.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            signature = tuple(
                (name, part.shape, None if part.is_floating_point() else hash_bytes(part.numpy().tobytes()))
                for name, part in media.items()
            )
            if signature not in features:
                with torch.inference_mode():
                    features[signature] = count_features(model, media)
            sizes[size] = PictureTokens(ids.count(model.config.image_token_id), features[signature])
        return sizes[size]

    return count
