"""Infers how a template writes thoughts and tool calls: a table of known families, then probes of the template.

The result supplies thoughts that the template omits. It also yields the response template with which transformers
parses answers (https://huggingface.co/docs/transformers/chat_response_parsing).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from llmtune.data.message_fields import THINK_CLOSE, THINK_OPEN
from llmtune.records import Json

QUESTION: Json = {"role": "user", "content": "What is the probe?"}
ANSWER = "The answer of the probe is 4217."
THOUGHT = "Let me recall: 4217 was the probe."
NAME, KEYS, VALUES = "measure_probe", ("probe_depth", "probe_place"), ("fathoms", "harbour")
CALL_ID, LONG_ID = "callprob1", "call_0123456789abcdef01234567"
RESULT = "4217 by the gauge"
TOOL: Json = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Reads the gauge of a probe.",
        "parameters": {
            "type": "object",
            "properties": {key: {"type": "string", "description": f"Which {key}."} for key in KEYS},
            "required": list(KEYS),
        },
    },
}
TOOLS, CALLS, RESULTS = TOOL_PARTS = ("tools", "calls of tools", "results of calls")
"""The parts of a conversation with tools that a template may omit."""
A_NAME = r"[\w.:/-]+"
"""A pattern for the names of tools."""
BEGINNING = r"\A\s*"
"""An unmarked call may occur only at the start of an answer."""
_NAMED: Json = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_JSON = json.JSONDecoder()


def call_message(calls: int = 1, texts: bool = False, call_id: str = CALL_ID) -> Json:
    """Return an answer that calls the probe's tool. Its arguments are an object, or JSON text."""
    arguments = dict(zip(KEYS, VALUES, strict=True))
    function = {"name": NAME, "arguments": json.dumps(arguments) if texts else arguments}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call] * calls}


# Thoughts


@dataclass(frozen=True)
class ThoughtFormat:
    """How an answer contains thoughts."""

    written_by: Literal["template", "content", "prompt"] = "content"
    """Their source: the template writes them from their own field, or finds them in the text of the answer. It may also
    omit them from renderings and only prompt for them."""
    before: str = THINK_OPEN
    after: str = THINK_CLOSE
    opener: str = ""
    """In the generation prompt, but not in a rendered answer: `<think>`, or empty thoughts."""

    def inline(self, reasoning: str, content: str) -> str:
        """Write thoughts into the text of an answer."""
        return f"{self.before}{reasoning}{self.after}{content}"


INLINE_THOUGHTS = ThoughtFormat()
"""The format of thoughts for templates that do not know them."""


def shared_start(one: str, other: str) -> str:
    """Return the longest common prefix of two texts."""
    ends = (i for i, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return one[: next(ends, min(len(one), len(other)))]


# Calls


@dataclass(frozen=True)
class CallFormat:
    """How an answer contains tool calls."""

    writes: frozenset[str]
    """Which of `TOOL_PARTS` the template writes."""
    argument_texts: bool = False
    """Whether arguments must be passed as JSON text."""
    end: str = ""
    """The text between the last call and the next message."""
    field: Mapping[str, object] | None = None
    """The field `tool_calls` of a response template; None if the format of calls is unknown."""
    marks: tuple[str, ...] = ()
    """The text around all calls of an answer."""
    short_ids: bool = False
    """Whether ids of calls must be nine letters and digits (Mistral)."""


NO_CALLS = CallFormat(frozenset())
"""The template writes nothing about tools, or its format is unknown."""


@dataclass(frozen=True)
class _Call:
    """A call in the template's output, up to the end of its arguments."""

    start: int
    end: int
    field: Json
    """The field of a response template that reads it, without the text around all calls."""


def _tagged(opening: str, close: str, argument: str) -> Json:
    """Return the field for calls whose arguments are each between tags; `argument` finds one."""
    return {
        "open_pattern": opening.replace("NAME", f"(?P<name>{A_NAME})"),
        "close": close,
        "repeats": True,
        "content": "xml-inline",
        "content_args": {"tag_pattern": argument},
        "transform": _NAMED,
    }


KNOWN_CALLS: Sequence[Json] = (
    _tagged(  # Qwen 3 Coder, Qwen 3.5
        "<function=NAME>", "</function>", r"<parameter=(?P<key>[^>]+)>\n?(?P<value>.*?)\n?</parameter>"
    ),
    _tagged(  # MiniMax M2
        '<invoke name="NAME">', "</invoke>", r'<parameter name="(?P<key>[^"]+)">(?P<value>.*?)</parameter>'
    ),
    _tagged(  # GLM 4.5
        r"<tool_call>\s*NAME\s*(?=<arg_key>|</tool_call>)",
        "</tool_call>",
        r"<arg_key>(?P<key>.+?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
    ),
    {  # Gemma 4
        "open_pattern": rf"<\|tool_call>call:(?P<name>{A_NAME})(?=\{{)",
        "close": "<tool_call|>",
        "repeats": True,
        "content": "json",
        "content_args": {"string_delims": [['<|"|>', '<|"|>']], "unquoted_keys": True},
        "transform": _NAMED,
    },
    {  # Hermes, Qwen 2.5 and 3, SmolLM 3
        "open_pattern": "<tool_call>",
        "close": "</tool_call>",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}},
    },
)
"""The calls of known families, as fields of a response template."""


def read_calls(one: str, two: str | None) -> tuple[Json | None, tuple[str, ...]]:
    """Return the field of a response template for calls, and the text around all of them.

    Known families are tried first; other formats are inferred. `one` is an answer with one call. `two` has two calls,
    if the template writes such answers.
    """
    for family in KNOWN_CALLS:
        opened = re.search(family["open_pattern"], one)
        if opened and (family["transform"] is _NAMED or re.match(r'\s*\{.*"arguments"', one[opened.end() :])):
            around = one[: opened.start()].strip(), one.partition(family["close"])[2].strip()
            return family, tuple(filter(None, around))
    call = _find_call(one, 0)
    if call is None:
        return None, ()
    before, behind = one[: call.start], one[call.end :]
    opens, closes, between = before, behind, None
    if two and not call.field.get("transform_each"):
        first, second = _find_call(two, 0), _find_call(two, two.rindex(NAME))
        between = two[first.end : second.start] if first and second else None
        if between == "" and (objects := _adjacent_objects(one)):
            return objects, ()
    if between:
        opens = _from_mark(_shared_end(before, between), before)
        closes = shared_start(behind, between.removesuffix(opens))
    marks = (before.removesuffix(opens).strip(), behind.removeprefix(closes).strip())
    field = {**call.field}
    head = str(field.pop("head"))
    opening = re.escape(opens.strip())
    again = re.escape(between.strip()) if between else ""
    if not opening:
        opening = f"(?:{BEGINNING}|{again})" if again else BEGINNING
        head = head or str(call.field["first"])
    field.pop("first", None)
    field["open_pattern"] = f"{opening}{head}"
    if closes.strip():
        field["close"] = closes.strip()
    elif between:
        field["close_pattern"] = f"(?={again}{head})"
    return field, tuple(mark for mark in marks if mark)


def _find_call(text: str, start: int) -> _Call | None:
    """Find the call of the probe's tool at or after `start`, in any of the known styles."""
    name = text.index(NAME, start)
    return _as_object(text, name) or _with_object(text, name) or _as_python(text) or _with_tags(text, name)


def _as_object(text: str, name: int) -> _Call | None:
    """Read a call that is a JSON object, or a list of such objects: `{"name": ..., "arguments": ...}`."""
    for opening in re.finditer(r"(\[\s*)?(?=\{)", text[:name]):
        value, end = _decoded(text, opening.end())
        if not isinstance(value, dict) or end <= name:
            continue
        called = _path(value, lambda part: part == NAME)
        arguments = _path(value, lambda part: isinstance(part, dict | str) and all(key in part for key in KEYS))
        if called is None or arguments is None:
            continue
        listed = opening[1] is not None and isinstance(_decoded(text, opening.start())[0], list)
        start, end = (opening.start(), _decoded(text, opening.start())[1]) if listed else (opening.end(), end)
        prefix = "" if listed else "content."
        function = {"name": f"{{{prefix}{called}}}", "arguments": f"{{{prefix}{arguments}}}"}
        field: Json = {"content": "json", "transform": {"type": "function", "function": function}}
        field |= {"transform_each": True} if listed else {"repeats": True}
        keys = ".*".join(rf'"{re.escape(path.split(".")[0])}"\s*:' for path in dict.fromkeys((called, arguments)))
        return _Call(start, end, {**field, "head": "", "first": rf"(?={re.escape(text[start])}.*{keys})"})
    return None


def _with_object(text: str, name: int) -> _Call | None:
    """Read a call whose name precedes its arguments, which are a JSON object."""
    for brace in re.finditer(r"\{", text[name:]):
        start = name + brace.start()
        value, end = _decoded(text, start)
        if isinstance(value, dict) and all(key in value for key in KEYS):
            between = re.escape(text[name + len(NAME) : start].rstrip())
            field: Json = {"content": "json", "repeats": True, "transform": _NAMED}
            return _Call(name, end, {**field, "head": rf"(?P<name>{A_NAME}){between}\s*(?=\{{)"})
    return None


def _adjacent_objects(one: str) -> Json | None:
    """Return the field for calls that are adjacent objects: each ends where the next begins."""
    name = one.index(NAME)
    call = _with_object(one, name)
    if call is None:
        return None
    begin, end = (
        r"\s*".join(map(re.escape, re.split(r"\s+", part))) for part in (one[:name].strip(), one[call.end :].strip())
    )
    field = {**call.field}
    field["open_pattern"] = rf"(?:{BEGINNING}|(?<=\}}\s*)){begin}{field.pop('head')}"
    return {**field, "close_pattern": rf"{end}(?=\s*(?:{begin}|\Z))"}


def _as_python(text: str) -> _Call | None:
    """Read calls that are a Python list: `[name(key="value")]`."""
    match = re.search(rf"\[\s*{NAME}\({KEYS[0]}\s*=", text)
    if match is None or "]" not in text:
        return None
    function = {"name": "{name}", "arguments": "{arguments}"}
    field: Json = {"content": "python-call-list", "transform_each": True}
    field["transform"] = {"type": "function", "function": function}
    return _Call(match.start(), text.rindex("]") + 1, {**field, "head": "", "first": rf"(?=\[{A_NAME}\()"})


def _with_tags(text: str, name: int) -> _Call | None:
    """Read a call whose arguments are each between tags: `<parameter=key>value</parameter>`."""
    places = [name]
    for part in (KEYS[0], VALUES[0], KEYS[1], VALUES[1]):
        if part not in text[places[-1] :]:
            return None
        places.append(text.index(part, places[-1]))
    _, key, value, next_key, last = places
    before, inside = text[name + len(NAME) : key], text[key + len(KEYS[0]) : value]
    between, behind = text[value + len(VALUES[0]) : next_key], text[last + len(VALUES[1]) :]
    opens = _from_mark(_shared_end(before, between), before)
    closes = shared_start(between.removesuffix(opens), behind)
    if not opens.strip() or not closes.strip():
        return None
    pair = f"{re.escape(opens)}(?P<key>.+?){re.escape(inside)}(?P<value>.*?){re.escape(closes)}"
    head = rf"(?P<name>{A_NAME}){re.escape(before.removesuffix(opens).rstrip())}"
    field: Json = {"content": "xml-inline", "content_args": {"tag_pattern": pair}, "repeats": True}
    return _Call(name, last + len(VALUES[1]) + len(closes), {**field, "transform": _NAMED, "head": head})


def _decoded(text: str, start: int) -> tuple[object, int]:
    """Decode the JSON that begins at `start`. Return the value and its end, or None and `start`."""
    try:
        return cast(tuple[object, int], _JSON.raw_decode(text, start))
    except ValueError:
        return None, start


def _path(value: object, predicate: Callable[[object], bool]) -> str | None:
    """Return the key path, joined by dots, of the first part of an object for which `predicate` is true."""
    for key, part in value.items() if isinstance(value, dict) else ():
        if predicate(part):
            return str(key)
        inner = _path(part, predicate)
        if inner is not None:
            return f"{key}.{inner}"
    return None


def _shared_end(one: str, other: str) -> str:
    return shared_start(one[::-1], other[::-1])[::-1]


def _from_mark(shared: str, whole: str) -> str:
    """Cut the common end of two texts to complete marks: `></b>` of `<a></b>` and `<c></b>` becomes `</b>`."""
    if shared == whole:
        return shared
    begin = re.search(r"[<\[\n]", shared)
    return shared[begin.start() :] if begin else ""


# Reading


def make_response_template(thoughts: ThoughtFormat, calls: CallFormat, heading: str, ending: str) -> Json:
    """Return the template with which transformers' `ResponseParser` finds thoughts, calls and text in answers.

    `heading` and `ending` surround the text of a rendered answer. Marks outside texts get a field of their own, which
    stays empty.
    """
    heading = heading.rpartition(thoughts.after.strip())[2].strip() if thoughts.after.strip() else heading.strip()
    begin, end = thoughts.before.strip(), thoughts.after.strip().removesuffix(heading).strip()
    fields: dict[str, Json] = {}
    if begin and end:
        opening = re.escape(begin) if begin.startswith("<|") else f"{BEGINNING}{re.escape(begin)}"
        fields["reasoning_content"] = {"open_pattern": opening, "close": end}
    if calls.field is not None:
        fields["tool_calls"] = {**calls.field}
    if marks := [mark for mark in (heading, ending.strip(), *calls.marks) if mark]:
        fields["marks"] = {"open": list(dict.fromkeys(marks)), "close_pattern": ""}
    fields["content"] = {"repeats": True, "join": "", "content_args": {"strip": False}}
    return {"start_anchor_pattern": "(?!)", "fields": fields}
