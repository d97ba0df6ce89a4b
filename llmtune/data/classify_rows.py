"""Rows of classify: labels of any type from any file, and doubts about how their classes were read."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias, TypedDict

from llmtune.data.rejected_rows import RowError, json_kind, nonempty_text, parse_cell, text_of
from llmtune.data.row_hash import DECIMAL
from llmtune.data.row_text import NearText, pair_text
from llmtune.recipe.class_names import SAME_WAY, join_labels, spelling_key, tidy_name
from llmtune.records import Row

Label: TypeAlias = str | float | list[str]
LIST_FIX = 'write the names of the classes that apply as a JSON list: ["sport", "news"]'
UNREAD_LIST = re.compile(r"""[\[({]\s*(['"]|-?[\d.]+[\s,])""")
"""Begins a list that is neither JSON nor Python: NumPy's, a set, a tuple."""
FLAGS = frozenset(("0", "1", "0.0", "1.0", "true", "false"))
SEPARATORS = ("|", ";", ",")
PLAIN_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
WRITTEN_NUMBER = re.compile(r"[+-]?\d+([.,'’\s]\d{3})*([.,]\d+)?\s*%?")
"""A number perhaps with a decimal comma, thousands separators or a percent sign."""
TRUTH = {"true": "1", "false": "0"}
SHOWN = 3


class ClassifyRow(TypedDict):
    """One or two texts with a label; a prompt has no label."""

    text: str
    pair: str | None
    label: Label | None


def classified(row: Mapping[str, object]) -> ClassifyRow:
    """Read `text` (and `pair`, a second text) with `label`: text, a number, or a list of texts."""
    pair = row.get("pair")
    return {
        "text": nonempty_text(row, "text"),
        "pair": None if pair is None or pair == "" else text_of(pair, "'pair'"),
        "label": _label(row["label"]),
    }


def _label(value: object) -> Label:
    parsed = parse_cell(value)
    value = parsed if isinstance(parsed, list) else value
    if isinstance(value, list):
        return _class_list(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowError("no number", f"'label' is {value}")
        return value
    if value is None or not isinstance(value, str) or not tidy_name(value):
        what = "empty" if isinstance(value, str) else json_kind(value)
        raise RowError("no label", f"'label' is {what}")
    name = tidy_name(value)
    if UNREAD_LIST.match(name):
        raise RowError("label list unreadable", f"'label' is {name[:60]!r}; {LIST_FIX}")
    return name.lower() if name.lower() in ("true", "false") else name


def _class_list(values: list[object]) -> list[str]:
    """Return class names, sorted. Refuse a 0 or 1 for each class: such a list does not name its classes."""
    texts = {str(value).strip().lower() for value in values}
    if values and texts <= FLAGS and (len(texts) < len(values) or not texts <= {"0", "1"}):
        what = f"'label' is {json.dumps(values)[:60]}: a value for each class"
        raise RowError("labels without names", f"{what}; {LIST_FIX}")
    names = [_label(item) for item in values if not isinstance(item, list)]
    if len(names) < len(values) or not all(isinstance(item, str) for item in names):
        raise RowError("wrong type", "'label' contains values that are not class names")
    return sorted({str(item) for item in names})


# Doubts: readings that are probably wrong


def class_doubts(labels: Iterable[Label], kind: str = "auto") -> Iterator[tuple[str, str]]:
    """Yield a sentence and a fix for each reading of the labels that is probably wrong.

    With `kind` single, a text with separators is one class, and numbers are classes, with one spelling each.
    """
    every = list(labels)
    texts = Counter(label for label in every if isinstance(label, str))
    listed = {name for label in every if isinstance(label, list) for name in label}
    if listed and listed <= {"0", "1"} and any(isinstance(label, list) and len(label) > 1 for label in every):
        yield "lists of 0 and 1 are read as two classes, 0 and 1", f"{_sentence(LIST_FIX)}"
    if kind != "single" and (written := _written_numbers(texts)):
        what = f"numbers are read as classes, because of their commas, separators or percent signs: {_some(written)}"
        fix = (
            "For numbers, set classify.kind: regression, or write a decimal point, such as 1234.5. "
            f"For several labels in a row, {LIST_FIX}. "
        )
        yield what, f"{fix}If each is a class, set classify.kind: single."
    elif kind != "single" and (joined := _joined(texts)):
        separator, names = joined
        what = f"classes are read as one each: {_some(names)}; parts between {separator!r} occur in several of them"
        yield what, f"For several labels in a row, {LIST_FIX}. If each is one class, set classify.kind: single."
    spellings: defaultdict[str, set[str]] = defaultdict(set)
    whole_numbers = {str(int(label)) for label in every if isinstance(label, float) and label.is_integer()}
    for name in {*texts, *listed, *(whole_numbers if kind == "single" else ())}:
        is_decimal = kind == "single" and DECIMAL.fullmatch(name)
        whole = name.removesuffix(".0") if is_decimal else spelling_key(name)
        spellings[TRUTH.get(name, whole)].add(name)
    for spelled in spellings.values():
        if len(spelled) > 1:
            yield f"one class in several spellings: {_some(sorted(spelled))}", SAME_WAY


def _written_numbers(texts: Iterable[str]) -> list[str]:
    """Return the texts that only a reader takes for numbers, if most texts are numbers."""
    names = sorted(texts)
    numbers = [name for name in names if PLAIN_NUMBER.fullmatch(name) or WRITTEN_NUMBER.fullmatch(name)]
    return [name for name in numbers if not PLAIN_NUMBER.fullmatch(name)] if 2 * len(numbers) > len(names) else []


def _joined(texts: Mapping[str, int]) -> tuple[str, list[str]] | None:
    """Return a separator and the classes that it joins, if most of them share a part with another class."""
    for separator in SEPARATORS:
        parts = {name: {part.strip() for part in name.split(separator)} - {""} for name in texts}
        uses = Counter(part for name_parts in parts.values() for part in name_parts)
        joined = sorted(name for name, name_parts in parts.items() if len(name_parts) > 1)
        shared = [name for name in joined if any(uses[part] > 1 for part in parts[name])]
        if joined and 2 * len(shared) > len(joined):
            return separator, joined
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def format_label(label: Label | None) -> str:
    """Write one label, several labels, or a number with all digits of its float32 value, or else of its own."""
    if isinstance(label, list):
        return join_labels(label) or "(none)"
    if not isinstance(label, float):
        return str(label)
    import numpy as np

    single = np.float32(label)
    return str(single if float(single) == label else label).removesuffix(".0")


def near_labelled(row: Row) -> NearText:
    """Return both texts; the label must be equal."""
    return pair_text(row["text"], row["pair"] or "")._replace(answer=str(row["label"]))
