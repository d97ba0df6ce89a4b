"""Files for others to read: each put in its place in one step, as UTF-8 and as JSON that any parser takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from llmtune.records import Difference


def replace_file(path: Path, text: str) -> None:
    """Put `text` in the place of `path` in one step; text that UTF-8 cannot hold is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: object) -> str:
    """Write JSON that any parser takes."""
    return json.dumps(as_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_json(value: object) -> Any:
    """Return what JSON can hold, all the way down: records by their fields, NaN and infinities as None, paths as text.

    A difference is `{value, interval: [low, high], p, n, test}`.
    """
    if isinstance(value, Difference):
        middle, low, high, p = map(as_json, (value.value, value.low, value.high, value.p))
        return {"value": middle, "interval": [low, high], "p": p, "n": value.n, "test": value.test}
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
