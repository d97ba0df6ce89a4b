"""Cells of a picture's grid, compared with the tokens that change when a pixel of the cell does."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_text import FAMILIES, build_image_text
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmtune.explain.patch_grids import MAPPED_TYPES, TILES, WHOLE, find_grids

GREY, LIGHT = 90, 250
TILED = {
    "idefics3": {"size": {"longest_edge": 112}},
    "smolvlm": {"size": {"longest_edge": 112}},
    "internvl": {"crop_to_patches": True},
    "lfm2_vl": {"do_image_splitting": True, "min_tiles": 2, "max_tiles": 4},
}
"""Arguments with which a processor cuts a wide picture into tiles."""


@contextmanager
def patches_see_only_themselves():
    """Switch attention off, so each token of a picture comes from its own pixels."""

    def nothing(module, query, key, value, *args, **kwargs):
        return query.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["eager"] = nothing
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]


class Reader:
    """A tiny model of a family, and the inputs of its language model for a picture's tokens."""

    def __init__(self, folder, family, **arguments):
        build_image_text(folder, family)
        self.processor = AutoProcessor.from_pretrained(folder)
        for name, value in arguments.items():
            setattr(self.processor.image_processor, name, value)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
        self.type = self.model.config.model_type

    def embed(self, pixels):
        call = {"text": [self.processor.image_token], "images": [[Image.fromarray(pixels)]]}
        read = self.processor(**call, add_special_tokens=False, images_kwargs={"return_tensors": "pt"})
        inputs = {name: torch.as_tensor(part) for name, part in read.items()}
        read = {}
        hook = self.model.get_decoder().register_forward_pre_hook(lambda *call: read.update(call[2]), with_kwargs=True)
        with torch.inference_mode(), patches_see_only_themselves():
            self.model(**inputs, use_cache=False)
        hook.remove()
        config = self.model.config
        token = getattr(config, "image_token_id", None) or config.image_token_index
        return read["inputs_embeds"][0][inputs["input_ids"][0] == token]

    def changes(self, pixels, x, y):
        """Return how much each token changes with the 4 x 4 pixels around a point."""
        marked = pixels.copy()
        marked[max(0, y - 2) : y + 2, max(0, x - 2) : x + 2] = LIGHT
        return (self.embed(marked) - self.embed(pixels)).abs().amax(-1).numpy()


def check(reader, width, height):
    pixels = np.full((height, width, 3), GREY, np.uint8)
    grids = find_grids(reader.processor, reader.type, Image.fromarray(pixels), len(reader.embed(pixels)))
    assert grids
    for grid in grids:
        left, top, right, bottom = grid.box
        rows, columns = len(grid.tokens), len(grid.tokens[0])
        for row in {0, rows // 2, rows - 1}:
            for column in {0, columns // 2, columns - 1}:
                x = int((left + (column + 0.5) * (right - left) / columns) * width)
                y = int((top + (row + 0.5) * (bottom - top) / rows) * height)
                if not (0 <= x < width and 0 <= y < height):
                    continue
                changes = reader.changes(pixels, x, y)
                here = max((token for line in grid.tokens for token in line), key=changes.__getitem__)
                assert changes[here] > 1e-3
                assert here == grid.tokens[row][column], (grid.name, row, column)
                attention = np.eye(len(changes), dtype=np.float32)[here]
                heat = grid.heat(attention, width, height)
                assert heat.shape == (height, width)
                assert heat[y, x] == 1
                cell = width * height * (right - left) * (bottom - top) / (rows * columns)
                assert 0 < np.nansum(heat == 1) <= cell * 1.5
    return grids


@pytest.mark.parametrize("family", sorted(MAPPED_TYPES))
def test_each_cell_is_where_its_token_comes_from(tmp_path, family):
    reader = Reader(tmp_path, family)
    check(reader, 80, 40)
    check(reader, 40, 88)


@pytest.mark.parametrize("family", sorted(TILED))
def test_tiles_are_put_together_again(tmp_path, family):
    width, height = (320, 160) if family == "lfm2_vl" else (112, 56)
    grids = check(Reader(tmp_path, family, **TILED[family]), width, height)
    assert TILES in [grid.name for grid in grids]


def test_what_a_processor_crops_has_no_patch_and_padding_lies_outside(tmp_path):
    reader = Reader(tmp_path, "llava")
    (cropped,) = check(reader, 112, 56)
    assert cropped.box == (0.25, 0, 0.75, 1)
    pixels = np.full((56, 112, 3), GREY, np.uint8)
    assert not reader.changes(pixels, 10, 20).any()
    assert np.isnan(cropped.heat(np.ones(16), 112, 56)[:, 10]).all()
    reader.processor.image_processor.do_pad = True
    (padded,) = check(reader, 112, 56)
    assert padded.box == (0, -0.5, 1, 1.5)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - MAPPED_TYPES - {"mistral4"}))
def test_a_family_without_a_tested_layout_has_no_grid(tmp_path, family):
    processor = AutoProcessor.from_pretrained(build_image_text(tmp_path, family))
    assert find_grids(processor, family, Image.new("RGB", (56, 56)), 4) == []


def test_tokens_that_do_not_fill_the_grid_have_none(tmp_path):
    reader = Reader(tmp_path, "qwen3_vl")
    picture = Image.new("RGB", (80, 40))
    (grid,) = find_grids(reader.processor, reader.type, picture, 6)
    assert (grid.size, grid.box) == ("2×3", WHOLE)
    assert find_grids(reader.processor, reader.type, picture, 5) == []
