"""Explanations of checkpoints that read text and images: of a text alone, and of a run with pictures."""

import pytest
import torch
from support.explaining import explain, open_quietly, values_of
from support.image_text import build_image_text
from transformers import AutoModelForImageTextToText

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


def test_positions_of_a_run_with_pictures_are_those_of_its_words(image_run, tmp_path):
    found = values_of(explain("positions", image_run, "--out", tmp_path, "--json"))
    assert [scheme["kind"] for scheme in found["schemes"]] == ["rotary", "rotary"]
    assert all(scheme["module"].startswith("model.language_model.") for scheme in found["schemes"])


def test_positions_of_three_axes_are_stated(tmp_path):
    folder = build_image_text(tmp_path / "model", "qwen3_vl")
    (scheme,) = values_of(explain("positions", folder, "--out", tmp_path, "--json"))["schemes"]
    assert scheme["facts"]["token of a picture"].startswith("rotated by time, row and column")


def test_the_model_of_a_run_with_pictures_has_its_towers_as_parts(image_run, tmp_path):
    found = values_of(explain("model", image_run, "--no-measure", "--out", tmp_path, "--json"))
    plain = AutoModelForImageTextToText.from_pretrained(image_run.parent / "model")
    parts = ("model.vision_tower", "model.multi_modal_projector")
    sizes = {name: sum(one.numel() for one in plain.get_submodule(name).parameters()) for name in parts}
    assert found["towers"] == sizes
    assert found["parameters"] == plain.num_parameters() == sum(found["parameters_by_part"].values())
    shown = explain("model", image_run, "--no-measure", "--out", tmp_path).stdout
    assert shown.count(" parameters, frozen") == 2
    assert "left out" not in shown


def test_the_adapter_of_a_run_with_pictures_names_what_is_frozen(image_run, tmp_path):
    found = values_of(explain("adapter", image_run, "--out", tmp_path, "--json"))
    assert found["frozen"] == ["model.vision_tower", "model.multi_modal_projector"]
    assert all(move["module"].startswith("model.language_model.") for move in found["moves"])
