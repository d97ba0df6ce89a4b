"""Check a loaded model on pictures: rows do not change each other, and image tokens are as many as features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

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


def explain_unreadable_pictures(
    model: PreTrainedModel, dtype: torch.dtype, collate: Collate, examples: Sequence[ImageExample]
) -> str | None:
    """Return what prevents `model`, in eval mode, from reading rows with pictures; None if nothing does.

    All `examples` but the last must have the same scores together as alone. The last two, with the same text and
    different pictures of one size, must have different scores.
    """

    def read(*rows: ImageExample) -> torch.Tensor:
        return predicted_logits(model, move_to(model.device, collate(rows, 0))).float()

    with torch.inference_mode(), compute_context(dtype, model.device.type):
        alone = [read(one) for one in examples]
        together = read(*examples[:-1])
    if not logits_agree(together, torch.cat(alone[:-1]), dtype):
        return "reads a picture differently next to a row with another one"
    return "does not read pictures: two of them get the same scores" if torch.equal(*alone[-2:]) else None


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

    Tokens and features of a row depend on the sizes of its pictures alone: rows with equal sizes are counted once.
    """
    token, count = model.config.image_token_id, _counter(model, images)
    for number, example in enumerate(examples):
        pictures, tokens = example.list_pictures(), list(example.input_ids).count(token)
        written, features = count(pictures) if pictures else ([], 0)
        if not tokens == sum(written) == features:
            named = zip(map(picture_name, pictures), written, strict=True)
            parts = ", ".join(f"{name}: {tokens:,} tokens" for name, tokens in named) or "none"
            what = f"the row has {tokens:,} image tokens for {len(pictures)} pictures ({parts})"
            yield number, f"{what}, of which the model makes {features:,} features"


def _counter(model: PreTrainedModel, images: ImageProcessor) -> Callable[[Sequence[Picture]], tuple[list[int], int]]:
    """Return a function that counts the image tokens of each picture of a row, and the features of all of them."""
    features: dict[tuple[object, ...], int] = {}
    sizes: dict[tuple[object, ...], tuple[list[int], int]] = {}

    def count(pictures: Sequence[Picture]) -> tuple[list[int], int]:
        size = tuple(side for picture in pictures for side in picture["size"])
        if size not in sizes:
            texts, media = images.read(pictures)
            ids = images.processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            signature = tuple(
                (name, part.shape, None if part.is_floating_point() else hash_bytes(part.numpy().tobytes()))
                for name, part in media.items()
            )
            if signature not in features:
                with torch.inference_mode():
                    features[signature] = count_features(model, media)
            sizes[size] = [one.count(model.config.image_token_id) for one in ids], features[signature]
        return sizes[size]

    return count
