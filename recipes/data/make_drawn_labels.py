"""Make drawn-labels.jsonl: sections and sizes of Debian packages, drawn in many fonts, with the fields as JSON.

    pip download --no-deps --dest /tmp/fonts -r recipes/data/label-fonts.txt
    python recipes/data/make_drawn_labels.py --lists /tmp/lists --fonts /tmp/fonts recipes/data/drawn-labels.jsonl

The pictures are within the rows, as data URLs. All fonts are under the SIL Open Font License, which allows this use.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

from debian_packages import read_all, write_rows
from make_debian_sections import SECTIONS, fetch_lists
from PIL import Image, ImageDraw, ImageFont

QUESTION = "What is on the label?"
DRAWS = 1000
"""Labels that are drawn; repetitions are omitted."""
SIZE = 112
MARGIN = 4
SECTION_HEIGHT = 36
"""Pixels for the section at the top; the digit has the rest. Both are as large as fits."""
MEGABYTES = range(1, 10)
"""Installed sizes that are drawn: one digit, because the packaged model sees a label as 4 x 4 patches."""
WEIGHT = 600
"""Weight of a variable font; its default may be a hairline."""


def main() -> None:
    """Choose packages, draw their labels, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, required=True, help="folder for apt's package lists")
    parser.add_argument("--fonts", type=Path, required=True, help="folder with the downloaded fontpkg wheels")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    fetch_lists(options.lists)
    write_rows(options.out, list(draw_rows(options.lists, read_fonts(options.fonts))))


def read_fonts(folder: Path) -> dict[str, bytes]:
    """Read the font file of each package: bold if it has that, else the upright one."""
    fonts = {}
    for wheel in sorted(folder.glob("fontpkg_*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".ttf") and "Italic" not in name]
            name = next((name for name in names if name.endswith("-Bold.ttf")), None) or min(names)
            fonts[wheel.name.split("-")[0].removeprefix("fontpkg_").replace("_", "-")] = archive.read(name)
    return fonts


def draw_rows(lists: Path, fonts: dict[str, bytes]) -> Iterator[dict[str, object]]:
    """Yield rows of the sections and sizes that packages have, each pair equally often, in random fonts."""
    pairs = {(package.section, int(package.fields.get("Installed-Size", 0)) // 1024) for package in read_all(lists)}
    pairs = sorted(pair for pair in pairs if pair[0] in SECTIONS and pair[1] in MEGABYTES)
    generator = random.Random(1)
    seen: set[tuple[str, int, str]] = set()
    for section, megabytes in itertools.islice(itertools.cycle(pairs), DRAWS):
        font = generator.choice(sorted(fonts))
        if (section, megabytes, font) in seen:
            continue
        seen.add((section, megabytes, font))
        url = to_data_url(draw_label(section, str(megabytes), fonts[font]))
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        answer = json.dumps({"section": section, "megabytes": megabytes})
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        yield {"messages": messages, "font": font}


def draw_label(section: str, digit: str, font: bytes) -> Image.Image:
    """Draw a section with a digit under it, black on white."""
    picture = Image.new("L", (SIZE, SIZE), 255)
    draw = ImageDraw.Draw(picture)
    for line, top, bottom in ((section, 0, SECTION_HEIGHT), (digit, SECTION_HEIGHT, SIZE)):
        letters, box = fit(draw, line, font, bottom - top - MARGIN)
        draw.text((MARGIN - box[0], (top + bottom - box[1] - box[3]) / 2), line, 0, letters)
    return picture


def fit(
    draw: ImageDraw.ImageDraw, line: str, font: bytes, height: int
) -> tuple[ImageFont.FreeTypeFont, tuple[float, ...]]:
    """Return the largest letters with which a line fits, and its box."""
    for pixels in range(2 * height, 0, -1):
        letters = ImageFont.truetype(io.BytesIO(font), pixels)
        set_weight(letters)
        box = draw.textbbox((0, 0), line, font=letters)
        if box[2] - box[0] <= SIZE - 2 * MARGIN and box[3] - box[1] <= height:
            break
    return letters, box


def set_weight(letters: ImageFont.FreeTypeFont) -> None:
    """Give a variable font one weight: the default of some is a hairline."""
    try:
        axes = letters.get_variation_axes()
    except OSError:  # not a variable font
        return
    letters.set_variation_by_axes([WEIGHT if axis["name"] == b"Weight" else axis["default"] for axis in axes])


def to_data_url(picture: Image.Image) -> str:
    """Write a picture as PNG into a data URL, with 16 grey levels to keep it small."""
    content = io.BytesIO()
    picture.quantize(16).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


if __name__ == "__main__":
    main()
