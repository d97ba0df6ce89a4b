"""Explanations of checkpoints that read text and images show the language model alone."""

import pytest
import torch
from support.explaining import open_quietly
from support.image_text import build_image_text

from llmtune.explain.architecture import describe_architecture
from llmtune.explain.fake_model import build_fake_model
from llmtune.explain.position_encodings import find_schemes
from llmtune.model.towers import find_towers


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "qwen3_5", "smolvlm"])
def test_architecture_and_positions_are_those_of_the_language_model(tmp_path, family):
    target = open_quietly(build_image_text(tmp_path, family))
    drawn = describe_architecture(target, build_fake_model(target))
    with target.open_model("model") as model:
        assert find_towers(model) == []
        assert drawn.parameters == model.num_parameters()
        assert model(input_ids=torch.arange(4, 12)[None]).logits.shape[:2] == (1, 8)
        rotations = find_schemes(model)
    assert not drawn.untraced
    assert len(drawn.stacks) == 1
    assert any(name.startswith(("model.vision", "model.visual")) for name in drawn.towers)
    assert all(scheme.name.startswith(("model.language_model.", "model.text_model.")) for scheme in rotations)


def test_layers_with_heads_of_different_sizes_are_described_one_by_one(tmp_path):
    target = open_quietly(build_image_text(tmp_path, "gemma4"))
    (stack,) = describe_architecture(target, build_fake_model(target)).stacks
    heads = [part.about[:13] for blocks in stack.blocks for part in blocks.parts if part.kind == "attention"]
    assert heads == ["4 heads of 16", "4 heads of 32"]
    with target.open_model("model") as model:
        assert {scheme.facts["rotated"] for scheme in find_schemes(model)} == {
            "16 of 16 dimensions a head",
            "32 of 32 dimensions a head",
        }
