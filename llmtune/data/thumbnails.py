"""Small copies of pictures for pages, as data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from llmtune.data.chat_messages import list_pictures
from llmtune.data.pictures import Picture, open_picture
from llmtune.data.row_store import load_rows, read_rows
from llmtune.errors import LlmtuneError

SIDE, QUALITY = 160, 80
"""Longest side in pixels, and quality of JPEG: about 5 kB each."""
MOST = 64
"""Pictures on one page."""


def thumbnail(picture: Picture) -> str:
    """Return a small copy of a picture as a data URL. Raises DataError if the picture is missing or changed."""
    image = open_picture(picture)
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def read_thumbnails(folder: Path, split: str, numbers: Iterable[int]) -> dict[int, list[str]]:
    """Return small copies of the pictures of prepared rows by number; of missing pictures, none.

    At most MOST in all, which bounds the size of a page.
    """
    found: dict[int, list[str]] = {number: [] for number in sorted(set(numbers))}
    with suppress(LlmtuneError):  # a run whose rows were removed
        rows = read_rows(load_rows(folder), split, [*found])
        pictures = [
            (number, one) for number, row in zip(found, rows, strict=True) for one in list_pictures(row["messages"])
        ]
        for number, picture in pictures[:MOST]:
            with suppress(LlmtuneError):  # a picture that was moved, or an installation without Pillow
                found[number].append(thumbnail(picture))
    return found
