"""A text tune of a checkpoint that sees learns what plain transformers and PEFT learn on the complete checkpoint."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.architecture_checks import (
    LENGTHS,
    adapt,
    example_for,
    gradients,
    load_plain,
    plain_step,
    recipe_for,
    relative_distance,
    take_step,
)
from support.architectures import build, shrink
from support.image_text import FAMILIES, build_image_text
from support.models import train_tokenizer
from transformers import Gemma3nConfig

from llmtune.errors import EnvironmentProblem, RecipeError

KIND, TOLERANCE = "image-text", 1e-5
FAST = ("gemma3", "qwen3_5", "qwen2_5_vl", "llava", "smolvlm")
ROWS_APART = ("qwen3_5", "qwen3_5_moe")
"""Their linear attention reads the row before, so packing is refused."""


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]
)
def test_loss_and_gradients_are_those_of_the_complete_checkpoint(family: str, packing: bool, tmp_path: Path) -> None:
    """Plain transformers reads one row at a time, with the towers loaded."""
    recipe = recipe_for(KIND, build_image_text(tmp_path, family), packing)
    if packing and family in ROWS_APART:
        with pytest.raises(RecipeError, match="packed rows see one another"):
            adapt(recipe)
        return
    adapted, task = adapt(recipe)
    plain = load_plain(KIND, adapted, tmp_path)
    examples = [example_for(KIND, length) for length in LENGTHS]
    expected = plain_step(KIND, plain, examples)
    loss = take_step(adapted, task, recipe, examples, packing)
    assert abs(float(loss - expected)) <= TOLERANCE * float(expected)
    assert gradients(adapted.model).keys() == gradients(plain).keys()
    assert relative_distance(gradients(adapted.model), gradients(plain)) <= TOLERANCE


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("blip", "cannot read text alone"),
        ("pi0", "cannot read text alone"),
        ("pix2struct", "cannot be used for the task chat"),
        ("diffusion_gemma", "does not ignore padding"),
    ],
)
def test_a_class_that_cannot_learn_from_text_alone_is_refused_by_name(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    build(KIND, model_type, tmp_path)
    with pytest.raises(RecipeError, match=reason) as error:
        adapt(recipe_for(KIND, tmp_path, packing=False))
    assert error.value.problems[0].where == "model.name"


def test_molmo2_which_asks_for_the_kinds_of_tokens_in_training_learns_from_text(tmp_path: Path) -> None:
    build(KIND, "molmo2", tmp_path)
    recipe = recipe_for(KIND, tmp_path, packing=True)
    adapted, task = adapt(recipe)
    assert float(take_step(adapted, task, recipe, [example_for(KIND, 9)], packs=True)) > 0
    assert gradients(adapted.model)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_tower_that_needs_a_missing_package_is_refused_with_its_name(tmp_path: Path) -> None:
    config = shrink(Gemma3nConfig)
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EnvironmentProblem, match="requires the timm library") as error:
        adapt(recipe_for(KIND, tmp_path, packing=False))
    assert error.value.problems[0].fix == "Install the package that it names."
