"""Maps a file's columns to our names: by the recipe, by usual aliases, or guessed from values."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import mean

from llmtune.data.chat_rows import MESSAGE_KEYS, WEIGHT_KEYS
from llmtune.data.message_fields import (
    CONTENT_KEYS,
    CONVERSATIONS,
    ROLE_KEYS,
    ROLES,
    first_key,
    is_message,
    with_roles,
)
from llmtune.data.pictures import IMAGES, LOCATIONS, may_be_picture
from llmtune.data.rejected_rows import RowError, json_kind, parse_cell
from llmtune.data.search_rows import RELEVANCE_KEYS, TEXT_KEYS

FIELD = re.compile(r"\{([^{}]+)\}")
"""A column name in a template."""
JOINT = "\n\n"
"""Between the parts of a template; an empty part is left out."""
LIST = "[{"
"""Beginning of a mapping to several columns, which makes a list: `[{negative_1}, {negative_2}]`."""
NUMBERED = ("negatives",)
"""Columns that a file may spread over numbered ones, as sentence-transformers does: `negative_1`, `negative_2`."""
ANSWER_NAMES = ("response", "answer", "output", "outputs", "target", "targets", "assistant", "reply", "bot", "solution")
PASSAGE_NAMES = ("document", "doc", "text", "paragraph", "context", "content")
CHOSEN_NAMES = ("chosen_response", "chosen_messages", "preferred", "preferred_output")
REJECTED_NAMES = ("rejected_response", "rejected_messages", "dispreferred", "non_preferred_output")
COMPARED = ("chosen", "rejected", *CHOSEN_NAMES, *REJECTED_NAMES)
"""Answer columns that include a worse answer: only preference tasks may learn from them."""
Aliases = Mapping[str, tuple[str, ...]]
"""Our column names, each with its usual other names in files."""
PICTURES: Aliases = {
    "images": ("image",),
    "image": ("image_path", "image_file", "file_name", "filename", "path", "file", "picture", "photo", "images"),
    "answer": (*ANSWER_NAMES, "caption", "text", "description", "label"),
}

HEADINGS = frozenset(("subject", "title", "headline", "heading", "betreff", "titel", "asunto", "objet", "sujet"))
"""Words in the names of columns that head a text, and belong to it even if they repeat."""

NAMES_AT_ONCE = 200
"""How many columns and nested keys of a row are searched."""
MISSING = object()
"""Returned by `find` if the column or key is missing."""


def rename(
    row: Mapping[str, object], columns: Mapping[str, str], roles: Mapping[str, Sequence[str]] | None = None
) -> Mapping[str, object]:
    """Give mapped columns their canonical names, and messages our roles. A column that had such a name is replaced.

    A mapping names a column or a nested key (`thread.messages`), or is a template with such names in braces; in
    brackets, a list of those that a row has. Parts of a template between blank lines are left out if they are empty.
    Raises RowError if a template meets a value that is no text.
    """
    if columns:
        row = {
            **row,
            **{ours: _mapped_cell(row, theirs) for ours, theirs in columns.items() if has_columns(row, theirs)},
        }
    return with_roles(row, roles) if roles else row


def name_columns(error: RowError, columns: Mapping[str, str]) -> RowError:
    """Return the error of a renamed row with the file's column names in place of ours."""

    def file_name(match: re.Match[str]) -> str:
        return f"'{' '.join(columns[match[1]].split())}'" if match[1] in columns else match[0]

    return RowError(error.reason, re.sub(r"'(\w+)'", file_name, error.detail))


def find(row: Mapping[str, object], name: str) -> object:
    """Return the value of a column or nested key, such as `thread.messages`; MISSING if not found."""
    if name in row:
        return row[name]
    value: object = row
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return MISSING
        value = value[key]
    return value


def has_columns(row: Mapping[str, object], theirs: str) -> bool:
    """Whether a row has all columns that a mapping names; of a list, any."""
    enough = any if theirs.startswith(LIST) else all
    return enough(find(row, field) is not MISSING for field in fields(theirs, row))


def flatten(row: Mapping[str, object]) -> dict[str, object]:
    """Return a row with nested keys as columns, named by their paths."""
    flat: dict[str, object] = {}
    waiting = list(row.items())
    for name, value in waiting:  # grows in the loop
        if isinstance(value, dict) and value and len(waiting) < NAMES_AT_ONCE:
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            flat[name] = value
    return flat


def _mapped_cell(row: Mapping[str, object], theirs: str) -> object:
    value = find(row, theirs)
    if value is not MISSING:
        return value
    if theirs.startswith(LIST):
        cells = (find(row, name) for name in FIELD.findall(theirs))
        return [cell for cell in cells if cell is not MISSING and cell is not None and cell != ""]
    parts = theirs.split(JOINT)
    filled = [FIELD.sub(lambda field: _template_text(find(row, field[1]), field[1]), part) for part in parts]
    return JOINT.join(
        text for text, part in zip(filled, parts, strict=True) if text.strip() or not part.strip()
    ).strip()


def _template_text(value: object, name: str) -> str:
    if isinstance(value, dict | list):
        raise RowError("wrong type", f"{name!r} is {json_kind(value)}; a template takes texts and numbers")
    return "" if value is None or value != value else str(value)  # a number that is not equal to itself is NaN


def join_columns(names: Sequence[str]) -> str:
    """Return the mapping to one column, or to several with a blank line between those that a row has."""
    return names[0] if len(names) == 1 else JOINT.join(f"{{{name}}}" for name in names)


def fields(theirs: str, names: Collection[str]) -> set[str]:
    """Return the columns or nested keys that a mapping names; `names` are the file's columns."""
    return {theirs} if theirs in names else set(FIELD.findall(theirs)) or {theirs}


def used_columns(columns: Mapping[str, str], names: Collection[str]) -> set[str]:
    """Return the file's columns that a mapping reads; `names` are all its columns."""
    paths = {field for theirs in columns.values() for field in fields(theirs, names)}
    return {field if field in names or (top := field.split(".")[0]) not in names else top for field in paths}


def with_aliases(
    columns: Mapping[str, str], wanted: Collection[str], names: Collection[str], aliases: Aliases
) -> dict[str, str]:
    """Return `columns` plus each `wanted` column that the file has under exactly one other usual name."""
    taken = used_columns(columns, names)
    plain = {name: re.sub(r"[\s-]+", "_", name.strip().casefold()) for name in names if name not in taken}
    mapped = dict(columns)
    for ours in wanted:
        if ours in mapped or ours in names:
            continue
        spellings = (ours, *aliases.get(ours, ()))
        matches = [name for name, spelled in plain.items() if spelled in spellings]
        if len(matches) == 1:
            mapped[ours] = matches[0]
        elif not matches and ours in NUMBERED and (numbered := _numbered_columns(plain, spellings)):
            mapped[ours] = "[" + ", ".join(f"{{{name}}}" for name in numbered) + "]"
    return mapped


def _numbered_columns(plain: Mapping[str, str], stems: Collection[str]) -> list[str]:
    """Return the columns whose names are one of the stems with a number, in the order of the numbers."""
    parts = {name: spelled.rpartition("_") for name, spelled in plain.items()}
    matches = [(int(number), name) for name, (stem, _, number) in parts.items() if stem in stems and number.isdecimal()]
    return [name for _, name in sorted(matches)]


# Guesses: which task could read a file with unknown column names?


RawRows = Sequence[Mapping[str, object]]
TEXT_SHARE = 0.5
MANY_ROWS = 8
"""Fewer rows do not show which values repeat."""
IDENTIFIER = re.compile(r"(?=.*\d)[\w.:/@+=-]{4,}", re.ASCII)
"""One word of letters and digits, such as an order number or a UUID."""
IDENTIFIER_WORDS = frozenset(("id", "ids", "uuid", "guid"))
RECORDING = re.compile(r"\.(wav|flac|mp3|ogg|opus)$", re.IGNORECASE)


def infer_columns(rows: RawRows, wanted: Sequence[str], aliases: Aliases) -> dict[str, str] | None:
    """Guess the columns for our `wanted` ones; None if some have no column that fits."""
    if not wanted:
        return None
    rows = [flatten(row) for row in rows]
    usual_names = {name for ours in wanted for name in (ours, *aliases.get(ours, ()))}
    refused = () if wanted[-1] in COMPARED else COMPARED
    names = dict.fromkeys(name for row in rows for name in row if name.lower() not in refused)
    heard = [name for name in names if wanted[0] == "audio" and names_recordings(rows, name)]
    texts = [name for name in names if name.lower() in usual_names or is_text(rows, name) or name in heard]
    if len(texts) < len(wanted):
        return None
    return _assign(rows, wanted, texts, aliases)


def _assign(rows: RawRows, wanted: Sequence[str], texts: Sequence[str], aliases: Aliases) -> dict[str, str] | None:
    """Assign a column to each wanted name, by name or values; columns left over are added to the first."""
    left, columns = list(texts), dict[str, str]()
    for ours in reversed(wanted[1:]):
        named = _columns_called(ours, left, aliases)
        if ours in COMPARED and not named:
            return None  # values do not show which of two answers is better
        columns[ours] = named[0] if named else _by_values(rows, ours, left)
        left.remove(columns[ours])
    if wanted[0] == "audio":
        left = [name for name in left if names_recordings(rows, name)]
    left = _columns_called(wanted[0], left, aliases) or [name for name in left if not repeats(rows, name)] or left
    if not left:
        return None
    joined = left if wanted[0] in ("prompt", "text", "document") else left[:1]
    return {wanted[0]: join_columns(joined), **{ours: columns[ours] for ours in wanted[1:]}}


def _by_values(rows: RawRows, ours: str, names: Sequence[str]) -> str:
    """Return the column whose values look like `ours`: classes repeat, a context is long, an answer comes last."""
    if ours == "label":
        return min(names, key=lambda name: len({str(row.get(name)) for row in rows}))
    if ours in ("context", "text"):
        return max(names, key=lambda name: mean(len(str(row.get(name) or "")) for row in rows))
    return next((name for name in reversed(names) if not repeats(rows, name)), names[-1])


def _columns_called(ours: str, names: Sequence[str], aliases: Aliases) -> list[str]:
    """Return the columns with this name or a usual alias; else those whose names contain such a word."""
    usual_names = {ours, *aliases.get(ours, ())}
    return [name for name in names if name.lower() in usual_names] or [
        name for name in names if name_words(name) & usual_names
    ]


def name_words(name: str) -> set[str]:
    """Return the words in a column's name."""
    return set(re.findall(r"[^\W\d_]+", name.lower()))


def repeats(rows: RawRows, name: str) -> bool:
    """Whether a column repeats few values, as a category does."""
    return len(rows) >= MANY_ROWS and len({str(row.get(name)) for row in rows}) <= len(rows) / 4


def names_recordings(rows: RawRows, name: str) -> bool:
    """Whether all cells of a column end as recordings do."""
    return all(RECORDING.search(str(row.get(name))) for row in rows)


def names_pictures(rows: RawRows, name: str) -> bool:
    """Whether all cells of a column look like pictures."""
    return all(may_be_picture(find(row, name)) for row in rows)


def is_text(rows: RawRows, name: str) -> bool:
    """Whether a column has text that differs from row to row; numbers, dates, identifiers and files do not count."""
    values = [value for row in rows if isinstance(value := row.get(name), str) and value.strip()]
    is_file = names_recordings(rows, name) or names_pictures(rows, name)
    if is_file or (len(values) > 2 and len(set(values)) == 1) or name_words(name) & IDENTIFIER_WORDS:
        return False
    if sum(map(bool, map(IDENTIFIER.fullmatch, values))) > len(values) / 2:
        return False
    letters = [sum(sign.isalpha() or sign.isspace() for sign in value) / len(value) for value in values]
    return len(values) >= TEXT_SHARE * len(rows) and mean(letters) > TEXT_SHARE


# Unused: columns, and keys of the objects in their cells


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


def unused_keys(row: Mapping[str, object], ours: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """Return the columns, nested columns and keys of objects that a format with `ours` does not read."""
    mapping = {name: columns.get(name, name) for name in ours}
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
