"""How thoughts and tool calls are written in answers: a table of known families, then what a template's probes show.

This tells what a model has to write of thoughts that the template leaves out. It also gives the response template by
which transformers reads answers (https://huggingface.co/docs/transformers/chat_response_parsing).
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
"""What a template may leave out of a conversation with tools."""
A_NAME = r"[\w.:/-]+"
"""Names of tools, as a pattern."""
BEGINNING = r"\A\s*"
"""An unmarked call may occur only at the start of an answer."""
_NAMED: Json = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_JSON = json.JSONDecoder()


def call_message(calls: int = 1, texts: bool = False, call_id: str = CALL_ID) -> Json:
    """Return an answer that calls the probe's tool, with its arguments as an object or as JSON text."""
    arguments = dict(zip(KEYS, VALUES, strict=True))
    function = {"name": NAME, "arguments": json.dumps(arguments) if texts else arguments}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call] * calls}


# Thoughts


@dataclass(frozen=True)
class ThoughtFormat:
    """How an answer holds thoughts."""

    written_by: Literal["template", "content", "prompt"] = "content"
    """What puts them there: the template, out of the field for them; the text of the answer, which the template takes
    with thoughts in it; or nothing, where the template leaves them out of what it renders, and only asks for them."""
    before: str = THINK_OPEN
    after: str = THINK_CLOSE
    opener: str = ""
    """What the generation prompt has, and a rendered answer has not: `<think>`, or empty thoughts."""

    def inline(self, reasoning: str, content: str) -> str:
        """Write thoughts into the text of an answer."""
        return f"{self.before}{reasoning}{self.after}{content}"


INLINE_THOUGHTS = ThoughtFormat()
"""How thoughts are written under templates that know nothing of them."""


def shared_start(one: str, other: str) -> str:
    """Return the longest common prefix of two texts."""
    ends = (i for i, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return one[: next(ends, min(len(one), len(other)))]


# Calls


@dataclass(frozen=True)
class CallFormat:
    """How an answer holds calls of tools."""

    writes: frozenset[str]
    """What of tools is written: of `TOOL_PARTS`."""
    argument_texts: bool = False
    """Whether arguments have to be handed over as JSON texts."""
    end: str = ""
    """What follows the last call, up to the next message."""
    field: Mapping[str, object] | None = None
    """The field `tool_calls` of a response template; None where the way of writing calls is not known."""
    marks: tuple[str, ...] = ()
    """Text around all calls of an answer."""
    short_ids: bool = False
    """Whether ids of calls have to be nine letters and digits (Mistral)."""


NO_CALLS = CallFormat(frozenset())
"""Nothing of tools is written, or known."""


@dataclass(frozen=True)
class _Call:
    """A call in what a template wrote, up to the end of its arguments."""

    start: int
    end: int
    field: Json
    """How it is read, as a field of a response template without its marks."""


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
    {  # Hermes, Qwen 2.5 and 3, SmolLM 3
        "open_pattern": "<tool_call>",
        "close": "</tool_call>",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}},
    },
)
"""How calls of known families are read: fields of a response template."""


def read_calls(one: str, two: str | None) -> tuple[Json | None, tuple[str, ...]]:
    """Return the field of a response template for calls, and the text around all of them.

    Known families first; other formats are inferred. `one` is an answer with one call, `two` one with two, if the
    template writes that.
    """
    for known in KNOWN_CALLS:
        opened = re.search(known["open_pattern"], one)
        if opened and (known["content"] != "json" or re.match(r'\s*\{.*"arguments"', one[opened.end() :])):
            around = one[: opened.start()].strip(), one.partition(known["close"])[2].strip()
            return known, tuple(filter(None, around))
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
    """Find the call of the probe's tool from `start` on, in one of the ways in which templates write calls."""
    name = text.index(NAME, start)
    return _as_object(text, name) or _with_object(text, name) or _as_python(text)


def _as_object(text: str, name: int) -> _Call | None:
    """Read a call that is a JSON object, or a list of them: `{"name": ..., "arguments": ...}`."""
    for found in re.finditer(r"(\[\s*)?(?=\{)", text[:name]):
        value, end = _decoded(text, found.end())
        if not isinstance(value, dict) or end <= name:
            continue
        called = _path(value, lambda part: part == NAME)
        arguments = _path(value, lambda part: isinstance(part, dict | str) and all(key in part for key in KEYS))
        if called is None or arguments is None:
            continue
        listed = found[1] is not None and isinstance(_decoded(text, found.start())[0], list)
        start, end = (found.start(), _decoded(text, found.start())[1]) if listed else (found.end(), end)
        prefix = "" if listed else "content."
        function = {"name": f"{{{prefix}{called}}}", "arguments": f"{{{prefix}{arguments}}}"}
        field: Json = {"content": "json", "transform": {"type": "function", "function": function}}
        field |= {"transform_each": True} if listed else {"repeats": True}
        keys = ".*".join(rf'"{re.escape(path.split(".")[0])}"\s*:' for path in dict.fromkeys((called, arguments)))
        return _Call(start, end, {**field, "head": "", "first": rf"(?={re.escape(text[start])}.*{keys})"})
    return None


def _with_object(text: str, name: int) -> _Call | None:
    """Read a call whose name is before its arguments, which are a JSON object."""
    for found in re.finditer(r"\{", text[name:]):
        start = name + found.start()
        value, end = _decoded(text, start)
        if isinstance(value, dict) and all(key in value for key in KEYS):
            between = re.escape(text[name + len(NAME) : start].rstrip())
            field: Json = {"content": "json", "repeats": True, "transform": _NAMED}
            return _Call(name, end, {**field, "head": rf"(?P<name>{A_NAME}){between}\s*(?=\{{)"})
    return None


def _adjacent_objects(one: str) -> Json | None:
    """Return the field of calls that are objects with nothing between them: each ends where the next begins."""
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
    """Read calls that are a list in Python: `[name(key="value")]`."""
    found = re.search(rf"\[\s*{NAME}\({KEYS[0]}\s*=", text)
    if found is None or "]" not in text:
        return None
    function = {"name": "{name}", "arguments": "{arguments}"}
    field: Json = {"content": "python-call-list", "transform_each": True}
    field["transform"] = {"type": "function", "function": function}
    return _Call(found.start(), text.rindex("]") + 1, {**field, "head": "", "first": rf"(?=\[{A_NAME}\()"})


def _decoded(text: str, start: int) -> tuple[object, int]:
    """Read JSON that begins at `start`, and return it with where it ends; None where there is none."""
    try:
        return cast(tuple[object, int], _JSON.raw_decode(text, start))
    except ValueError:
        return None, start


def _path(value: object, found: Callable[[object], bool]) -> str | None:
    """Return the keys, joined by dots, of a part of an object."""
    for key, part in value.items() if isinstance(value, dict) else ():
        if found(part):
            return str(key)
        inner = _path(part, found)
        if inner is not None:
            return f"{key}.{inner}"
    return None


def _shared_end(one: str, other: str) -> str:
    return shared_start(one[::-1], other[::-1])[::-1]


def _from_mark(shared: str, whole: str) -> str:
    """Cut what two texts share at their ends to whole marks: `></b>` of `<a></b>` and `<c></b>` is `</b>`."""
    if shared == whole:
        return shared
    begin = re.search(r"[<\[\n]", shared)
    return shared[begin.start() :] if begin else ""


# Reading


def make_response_template(thoughts: ThoughtFormat, calls: CallFormat, heading: str, ending: str) -> Json:
    """Return what transformers' `ResponseParser` needs to find thoughts, calls and text in answers.

    `heading` and `ending` are what a rendered answer has around its text; marks that are no part of a text get a field
    of their own, which stays empty.
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
