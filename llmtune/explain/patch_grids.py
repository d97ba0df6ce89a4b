"""Where each token of a picture lies on the picture.

A grid is stated only for model types whose order of tokens is known and tested; others show no map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.Image import Image
from transformers import ProcessorMixin
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

Heat = npt.NDArray[np.float32]
Tokens = list[list[int]]
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
FULL_VIEW, TILES = "whole picture", "tiles"


@dataclass(frozen=True)
class PatchGrid:
    """Rows and columns of patches, each with its token."""

    name: str
    """FULL_VIEW, or TILES for the parts that some processors cut a large picture into, put together again."""
    tokens: Tokens
    """The token of each cell: its number among the picture's tokens, from 0."""
    box: Box = WHOLE
    """Left, top, right and bottom edge, as shares of the picture's width and height. Padding reaches beyond the
    picture, and a crop leaves its edges out."""

    @property
    def size(self) -> str:
        """Rows and columns, for display."""
        return f"{len(self.tokens)}×{len(self.tokens[0])}"

    def heat(self, weights_P: Sequence[float] | Heat, width: int, height: int) -> Heat:
        """Spread the weights of the picture's tokens over pixels [height, width]; NaN where no patch is."""
        cells = np.asarray(weights_P, dtype=np.float32)[np.array(self.tokens)]
        left, top, right, bottom = self.box
        places = []
        for count, start, end, pixels in zip(cells.shape, (top, left), (bottom, right), (height, width), strict=True):
            shares = (np.arange(pixels) + 0.5) / pixels
            places.append(np.floor((shares - start) / (end - start) * count).astype(int))
        rows, columns = places
        inside = ((rows >= 0) & (rows < len(cells)))[:, None] & ((columns >= 0) & (columns < cells.shape[1]))[None]
        spread = cells[rows.clip(0, len(cells) - 1)][:, columns.clip(0, cells.shape[1] - 1)]
        return np.where(inside, spread, np.float32(np.nan))


def find_grids(processor: ProcessorMixin, model_type: str, picture: Image, count: int) -> list[PatchGrid]:
    """Return the grids of a picture's `count` tokens; none if the model type is unknown or the tokens do not fit."""
    if model_type not in _LAYOUTS:
        return []
    output = _image_outputs(processor, picture)
    grids = _LAYOUTS[model_type](processor.image_processor, output, picture, count)
    return grids if sorted({token for grid in grids for row in grid.tokens for token in row}) == [*range(count)] else []


def _image_outputs(processor: ProcessorMixin, picture: Image) -> dict[str, Any]:
    """Return all outputs of a processor's image processor for a picture; the processor itself returns fewer."""
    output: dict[str, Any] = {}
    write = processor.replace_image_token

    def keep(processed: Mapping[str, Any], image_idx: int, **options: Any) -> str:
        output.update(processed)
        return str(write(processed, image_idx, **options))

    processor.replace_image_token = keep
    try:
        call = {"text": [processor.image_token], "images": [[picture]], "add_special_tokens": False}
        processor(**call, images_kwargs={"return_tensors": "pt"})
    finally:
        del processor.replace_image_token
    return output


def _tile(rows: int, columns: int, tile_rows: int = 1, tile_columns: int = 1, first: int = 0) -> Tokens:
    """Return the tokens of rows and columns of cells in each tile, tile after tile from `first` on, row by row."""
    size = rows * columns
    return [
        [
            first + (y // rows * tile_columns + x // columns) * size + y % rows * columns + x % columns
            for x in range(tile_columns * columns)
        ]
        for y in range(tile_rows * rows)
    ]


def _view(rows: int, columns: int, box: Box = WHOLE) -> list[PatchGrid]:
    return [PatchGrid(FULL_VIEW, _tile(rows, columns), box)]


def _tiles(rows: int, columns: int, cells: tuple[int, int], view: tuple[int, int] | None) -> list[PatchGrid]:
    """Return rows and columns of tiles with cells each, and the view of the whole picture after them."""
    if rows * columns <= 1:
        return _view(*(view or cells))
    tiles = [PatchGrid(TILES, _tile(*cells, rows, columns))]
    after = rows * columns * math.prod(cells)
    return tiles if view is None else [PatchGrid(FULL_VIEW, _tile(*view, first=after)), *tiles]


def _square_cells(height: int, width: int, count: int) -> tuple[int, int]:
    """Return rows and columns of `count` square cells; (0, 0) if they do not fill the picture."""
    edge = math.isqrt(height * width // max(count, 1))
    rows, columns = (height // edge, width // edge) if edge else (0, 0)
    return (rows, columns) if (rows * columns, rows * edge, columns * edge) == (count, height, width) else (0, 0)


# How each family lays out its tokens. `output` is that of the image processor.


def _merged_grid(processor: Any, output: Mapping[str, Any], picture: Image, count: int) -> list[PatchGrid]:
    """Patches of the whole picture, merged in squares (Qwen-VL, GLM-V)."""
    _, rows, columns = output["image_grid_thw"][0].tolist()
    return _view(rows // processor.merge_size, columns // processor.merge_size)


def _pooled_positions(processor: Any, output: Mapping[str, Any], picture: Image, count: int) -> list[PatchGrid]:
    """Patches of the whole picture with positions, pooled in squares (Gemma 4)."""
    columns, rows = (output["image_position_ids"][0].amax(0) + 1).tolist()
    return _view(rows // processor.pooling_kernel_size, columns // processor.pooling_kernel_size)


def _one_view(processor: Any, output: Mapping[str, Any], picture: Image, count: int) -> list[PatchGrid]:
    """One tensor of pixels, in square cells (Gemma 3, Mistral 3)."""
    pixels = output["pixel_values"]
    if pixels.shape[:-3].numel() != 1:  # Gemma 3's pan and scan adds crops
        return []
    height, width = pixels.shape[-2:]
    rows, columns = _square_cells(height, width, count)
    return _view(rows, columns) if rows else []


def _framed_view(processor: Any, output: Mapping[str, Any], picture: Image, count: int) -> list[PatchGrid]:
    """One tensor of pixels, of which the sides may be cropped or padded (LLaVA)."""
    if processor.do_pad and not hasattr(processor, "pad_to_square"):
        return []
    return [replace(grid, box=_frame(processor, picture)) for grid in _one_view(processor, output, picture, count)]


def _frame(processor: Any, picture: Image) -> Box:
    """Return the part of a picture that a processor keeps: it pads to a square, resizes, and crops the centre."""
    sides, frame, size = picture.size, [float(side) for side in picture.size], processor.size
    if processor.do_pad:
        frame = [float(max(sides))] * 2
    if processor.do_center_crop:
        if processor.do_resize and size.shortest_edge:
            resized = [int(size.shortest_edge * side / min(frame)) for side in frame]
        else:
            resized = [size.width, size.height] if processor.do_resize else [int(side) for side in frame]
        crop = (processor.crop_size.width, processor.crop_size.height)
        frame = [side * kept / all_of_it for side, kept, all_of_it in zip(frame, crop, resized, strict=True)]
    left, top = (0.5 - part / side / 2 for part, side in zip(frame, sides, strict=True))
    return left, top, 1 - left, 1 - top


def _marked_tiles(processor: Any, output: Mapping[str, Any], picture: Image, count: int) -> list[PatchGrid]:
    """Square tiles, then the whole picture in one of the same size (Idefics 3, SmolVLM)."""
    rows, columns = (int(output[name][0][0]) for name in ("rows", "cols"))
    height, width = output["pixel_values"].shape[-2:]
    cells = _square_cells(height, width, count // (rows * columns + 1))
    return _tiles(rows, columns, cells, cells) if all(cells) else []


def _canvas_tiles(processor: Any, output: Mapping[str, Any], picture: Image, count: int) -> list[PatchGrid]:
    """Tiles on the canvas whose shape is nearest to the picture's, then the whole picture (InternVL)."""
    tiles, _, height, width = output["pixel_values"].shape
    cells = _square_cells(height, width, count // tiles)
    columns = rows = 1
    if tiles > 1:
        most = (processor.min_patches, processor.max_patches)
        columns, rows = get_optimal_tiled_canvas(picture.size[::-1], (height, width), *most)
    return _tiles(rows, columns, cells, cells) if all(cells) and tiles in (1, rows * columns + 1) else []


def _shaped_tiles(processor: Any, output: Mapping[str, Any], picture: Image, count: int) -> list[PatchGrid]:
    """Tiles with a number of rows and columns of patches each, then the whole picture (LFM2-VL)."""
    shapes = [[side // processor.downsample_factor for side in shape] for shape in output["spatial_shapes"].tolist()]
    rows, columns = (int(output[name][0]) if len(shapes) > 1 else 1 for name in ("image_rows", "image_cols"))
    (first, *_), last = shapes, shapes[-1] if len(shapes) != rows * columns or len(shapes) == 1 else None
    return _tiles(rows, columns, (first[0], first[1]), (last[0], last[1]) if last else None)


_Layout = Callable[[Any, Mapping[str, Any], Image, int], list[PatchGrid]]
_LAYOUTS: dict[str, _Layout] = {
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "glm46v"), _merged_grid),
    **dict.fromkeys(("gemma3", "mistral3"), _one_view),
    **dict.fromkeys(("idefics3", "smolvlm"), _marked_tiles),
    "llava": _framed_view,
    "gemma4": _pooled_positions,
    "internvl": _canvas_tiles,
    "lfm2_vl": _shaped_tiles,
}
"""By model type. A test compares each with the tokens that change when a pixel does."""
MAPPED_TYPES = frozenset(_LAYOUTS)
