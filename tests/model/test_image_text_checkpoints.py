"""The tiny checkpoints of families that see are like those of the hub: processor, class and picture work."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from support.image_text import FAMILIES, build_image_text, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

OLD = Version(transformers.__version__) < Version("5.25")
BROKEN = (
    {"llama4": "Llama4ForConditionalGeneration reads image_outputs, which its decoder does not return"} if OLD else {}
)
"""Families whose class fails with any input."""


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Glm46VProcessor counts tensors
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.xfail(name in BROKEN, reason=BROKEN.get(name, ""), raises=AttributeError))
        for name in FAMILIES
    ],
)
def test_a_picture_changes_what_the_checkpoint_writes(family: str, tmp_path: Path) -> None:
    """The folder opens as its user would open it, and the tower and the projector reach the scores."""
    build_image_text(tmp_path, family)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["architectures"] == [type(model).__name__]
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "Which colour?"}]
    inputs = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = inputs.to(torch.float32)
    with torch.inference_mode():
        scores = model(**inputs).logits
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert (scores - other).abs().max() > 0.1 * scores.std()
