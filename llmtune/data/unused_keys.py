"""Finds columns of rows, and keys of the objects in their cells, that are not part of the canonical row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmtune.data.chat_rows import MESSAGE_KEYS, WEIGHT_KEYS
from llmtune.data.column_mapping import fields, find, flatten
from llmtune.data.message_fields import CONTENT_KEYS, CONVERSATIONS, ROLE_KEYS, ROLES, first_key, is_message
from llmtune.data.pictures import IMAGES, LOCATIONS
from llmtune.data.rejected_rows import parse_cell
from llmtune.data.row_formats import RowFormat
from llmtune.data.search_rows import RELEVANCE_KEYS, TEXT_KEYS

_COLUMNS = {
    **dict.fromkeys(CONVERSATIONS, "message"),
    **dict.fromkeys(IMAGES, "picture"),
    **dict.fromkeys(("passage", "passages", "negatives", "judged_passages"), "passage"),
    "answers": "answer",
    "spans": "span",
    "tools": "tool",
}
"""Columns with objects, each with the name of one."""
_ONE_OF = (ROLE_KEYS, CONTENT_KEYS, WEIGHT_KEYS)
_READ: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "message": (*_ONE_OF, *((key,) for key in MESSAGE_KEYS.difference(*_ONE_OF, {"name"}))),
    "prompt": (("messages",), ("tools",)),
    "part": (("type",), ("text",), ("value",), ("thinking",), ("reasoning",), LOCATIONS),
    "picture": (("type",), ("media_type",), LOCATIONS),
    "tool": (("type",), ("function",)),
    "tool call": (("type",), ("id",), ("function",), ("name",), ("arguments",)),
    "passage": (("title",), TEXT_KEYS, RELEVANCE_KEYS),
    "answer": (("text",), ("answer_start", "start")),
    "span": (("start",), ("end",), ("label",)),
}
"""Keys of each object that are read; of several in one group, the first that it has."""
_INSIDE = {
    ("message", "content"): "part",
    ("message", "tool_calls"): "tool call",
    ("message", "function_call"): "tool call",
    ("tool call", "function"): "tool call",
    ("part", "image_url"): "picture",
    ("part", "source"): "picture",
    ("prompt", "messages"): "message",
    ("prompt", "tools"): "tool",
}
"""Objects inside others."""


def unused_keys(row: Mapping[str, object], row_format: RowFormat, columns: Mapping[str, str]) -> list[str]:
    """Return the columns, nested columns and keys of objects that are not part of the canonical row."""
    mapping = {name: columns.get(name, name) for name in row_format.columns}
    used = {field for theirs in mapping.values() for field in fields(theirs, row)}
    unused = []
    for path in flatten(row):
        if not any(f"{path}.".startswith(f"{field}.") for field in used):
            column = next(name for name in row if f"{path}.".startswith(f"{name}."))
            unused.append(path if any(field.startswith(f"{column}.") for field in used) else column)
    for name, theirs in mapping.items():
        if name in _COLUMNS:
            unused += _list_unread(parse_cell(find(row, theirs)), _COLUMNS[name])
    return [*dict.fromkeys(unused)]


def _list_unread(value: object, kind: str) -> Iterator[str]:
    """Yield the keys of an object, or of a list of them, that are not read."""
    items = value if isinstance(value, list) else [value]
    for item in (item for item in items if isinstance(item, Mapping)):
        present = [key for key in item if item[key] is not None]
        if kind == "tool" and "function" not in item:
            continue  # a bare function, which is kept as it is
        if kind == "message" and not is_message(item):
            yield from _list_unread(item, "prompt") if "messages" in item else ()
            continue
        read = {next((key for key in group if key in present), None) for group in _READ[kind]}
        for key in present:
            if (kind, key) == ("message", "name"):
                role = str(item.get(first_key(item, ROLE_KEYS))).strip().lower()
                if ROLES.get(role) != "tool":  # there it is the function's
                    yield "name (in a message, unless the chat template writes it)"
            elif key not in read:
                yield f"{key} (in {'an' if kind[0] == 'a' else 'a'} {kind})"
            elif (kind, key) in _INSIDE:
                yield from _list_unread(item[key], _INSIDE[kind, key])
