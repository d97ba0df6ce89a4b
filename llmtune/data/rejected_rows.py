"""Lists of rows that were not used, one JSON line each, beside the folder that a step replaces as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

Add = Callable[[dict[str, str]], None]


@contextmanager
def listed(path: Path) -> Iterator[Add]:
    """Give a function that adds a line; the list takes its name at the end, and an old one goes if there is nothing.

    A list that was not ended, because an error passed through, is thrown away, and the old one stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    file: IO[str] | None = None

    def add(entry: dict[str, str]) -> None:
        nonlocal file
        if file is None:
            file = partial.open("w", encoding="utf-8", errors="backslashreplace")
        file.write(json.dumps(entry) + "\n")

    try:
        yield add
        if file is None:
            path.unlink(missing_ok=True)
        else:
            file.close()
            partial.replace(path)
    finally:
        if file is not None:
            file.close()
        partial.unlink(missing_ok=True)
