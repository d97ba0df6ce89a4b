"""Attention on the patches of pictures: which row is drawn, the figure, and the data of the page.

Shapes: Q rows, P tokens of all pictures in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from llmtune.display.blocks import Block, Column, Table, Text
from llmtune.errors import RecipeError
from llmtune.explain.attention_figures import MODEL_TITLES, STEM
from llmtune.explain.attention_maps import DIFFERENCE, MASKED, MEAN, AttentionMaps, Matrix
from llmtune.explain.explainer import in_percent
from llmtune.explain.figures import DIFFERENCE_COLOURS, MUTED, WEIGHT_COLOURS, figure_settings, label_width, save_figure
from llmtune.explain.patch_grids import Heat
from llmtune.explain.picture_prompts import PromptPicture
from llmtune.explain.token_text import TokenLine, token_label

PICTURE_IN = 3.4
"""Width of a picture in a figure, in inches."""
FAINT, OPAQUE = 0.15, 0.8
"""Opacities of a patch. The darkest covers the picture most, so it shows through where attention is; for differences,
it shows through where there is none."""
UNKNOWN_LAYOUT = "No map: the order of its {} tokens on the picture is unknown for models of type {}."


def find_row(line: TokenLine, answer: int, word: str | None) -> int:
    """Return the row from which a model predicts a word of its answer: that before the word's first token.

    `answer` is the row of the answer's first token. Raises RecipeError if the answer does not have the word.
    """
    texts = [token.text for token in line.tokens[answer:]]
    at = "".join(texts).find(word) if word else 0
    if at < 0:
        what = f"the answer has no {word!r}"
        raise RecipeError.of(what, "--word", f"Use a word of {''.join(texts).strip()!r}, or give another --target.")
    ends = accumulate(map(len, texts))
    return answer - 1 + next((number for number, end in enumerate(ends) if end > at), 0)


def describe_row(line: TokenLine, row: int) -> str:
    """Return what a row shows: the token that looks, and the one that it predicts."""
    following = f", to predict “{token_label(line.tokens[row + 1], 30)}”" if row + 1 < len(line) else ""
    return f"“{token_label(line.tokens[row], 30)}” looks at the picture{following}"


def split_pictures(weights_P: Matrix, pictures: Sequence[PromptPicture]) -> list[Matrix]:
    """Return the weights of each picture."""
    return np.split(weights_P, [*accumulate(len(picture.places) for picture in pictures)][:-1])


def draw_pictures(maps: AttentionMaps, pictures: Sequence[PromptPicture], row: int, out: Path) -> list[Path]:
    """Draw the selected layer and head on the pictures, as PNG and SVG; no file if no picture has a grid."""
    layer = maps.drawn_layers[MASKED]
    by_model = {model: split_pictures(maps.on_pictures(model, layer, maps.head)[row], pictures) for model in maps.shown}
    panels = [(number, grid) for number, picture in enumerate(pictures) for grid in picture.grids]
    if not panels:
        return []
    head = maps.head if isinstance(maps.head, str) else f"head {maps.head}"
    title = f"{describe_row(maps.lines.source, row)} (layer {layer}, {head})"
    columns = 1 + len(by_model)
    heights = [PICTURE_IN / pictures[number].shown.width * pictures[number].shown.height for number, _ in panels]
    with figure_settings([title, *(picture.name for picture in pictures)], STEM):
        width = max(PICTURE_IN * columns, 1.25 * label_width([title]))
        figure = Figure(figsize=(width, sum(heights) + 0.3 * len(panels) + 0.5), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
        rows = figure.subplots(len(panels), columns, squeeze=False, height_ratios=heights)
        for (number, grid), axes_of_row in zip(panels, rows, strict=True):
            shown = pictures[number].shown
            for model, axes in zip((None, *by_model), axes_of_row, strict=True):
                axes.imshow(shown, extent=(0, shown.width, shown.height, 0))
                axes.axis("off")
                name = f"{pictures[number].name}, {grid.name}" if model is None else MODEL_TITLES[model]
                if model is not None:
                    weights_P = by_model[model][number]
                    heat = paint_heat(
                        grid.heat(weights_P, *shown.size), float(np.abs(weights_P).max()), model == DIFFERENCE
                    )
                    axes.imshow(heat, extent=(0, shown.width, shown.height, 0), interpolation="none")
                    name = f"{name or 'attention'}, up to {float(np.abs(weights_P).max()):.2g} a patch"
                axes.set_title(name, fontsize=9, color=MUTED, loc="left")
        return save_figure(figure, out / f"{STEM}-picture")


def paint_heat(heat: Heat, most: float, difference: bool) -> Heat:
    """Return a heat map [height, width] as RGBA; NaN is transparent."""
    shares = np.sqrt(np.abs(np.nan_to_num(heat)) / max(most, 1e-9))
    colours = LinearSegmentedColormap.from_list("heat", list(DIFFERENCE_COLOURS if difference else WEIGHT_COLOURS))
    rgba = colours(0.5 + np.sign(np.nan_to_num(heat)) * shares / 2 if difference else shares)
    rgba[..., 3] = np.where(np.isnan(heat), 0, FAINT + (OPAQUE - FAINT) * (shares if difference else 1 - shares))
    return np.asarray(rgba, dtype=np.float32)


def list_shares(maps: AttentionMaps, row: int) -> list[Block]:
    """Return the share of a row's attention that the pictures have, by layer and model: the mean over heads."""
    layers = sorted(maps.picture_maps[maps.models[0]])
    columns = [Column("layer", "number"), *(Column(model, "number") for model in maps.models)]
    cells = [
        [in_percent(float(maps.on_pictures(model, at, MEAN)[row].sum())) for model in maps.models] for at in layers
    ]
    rows = [[str(at), *shares] for at, shares in zip(layers, cells, strict=True)]
    says = f"The share of its attention that the pictures have: {describe_row(maps.lines.source, row)}."
    return [Text(says), Table(columns, rows)]


def picture_facts(pictures: Sequence[PromptPicture]) -> list[dict[str, Any]]:
    """Return the pictures as JSON values: their names, numbers of tokens, and grids."""
    return [
        {
            "name": picture.name,
            "size": picture.picture["size"],
            "count": len(picture.places),
            "grids": [{"name": grid.name, "box": grid.box, "tokens": grid.tokens} for grid in picture.grids],
        }
        for picture in pictures
    ]


def picture_values(maps: AttentionMaps, pictures: Sequence[PromptPicture], row: int) -> dict[str, Any]:
    """Return pictures and the weights of a row in the drawn layer and head, as JSON values."""
    layer = maps.drawn_layers[MASKED]
    weights = {model: maps.on_pictures(model, layer, maps.head)[row] for model in maps.models}
    by_model = {
        model: [[round(float(weight), 6) for weight in part] for part in split_pictures(weights_P, pictures)]
        for model, weights_P in weights.items()
    }
    looks = {"row": row, "layer": layer, "head": maps.head, "says": describe_row(maps.lines.source, row)}
    return {"pictures": picture_facts(pictures), "on_pictures": {**looks, "weights": by_model}}


def picture_data(
    maps: AttentionMaps, pictures: Sequence[PromptPicture], row: int, layers: Sequence[int], pack: Callable[..., str]
) -> dict[str, Any]:
    """Return the data of the page's script: pictures, and weights of all rows in the given layers."""
    values = {
        f"{model}/{layer}/{head}": pack(weights_QP, masked=False)
        for model, by_layer in maps.picture_maps.items()
        for layer in layers
        for head, weights_QP in by_layer[layer].items()
    }
    items = [
        {**facts, "src": one.data_url(), "width": one.shown.width, "height": one.shown.height}
        for facts, one in zip(picture_facts(pictures), pictures, strict=True)
    ]
    return {"items": items, "values": values, "row": row, "first": first_row(maps.lines.source)}


def first_row(line: TokenLine) -> int:
    """Return the first row after a picture: those before it cannot see it."""
    return next((at for at, token in enumerate(line.tokens) if token.id < 0), 0)


def list_unmapped(pictures: Sequence[PromptPicture], model_type: str) -> Iterator[str]:
    """Yield why a picture has no map, for those without a grid."""
    for picture in pictures:
        if not picture.grids:
            yield f"{picture.name}: {UNKNOWN_LAYOUT.format(len(picture.places), model_type)}"
