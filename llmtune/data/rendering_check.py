"""Every message of a conversation shows in its rendering: nothing that a row says is lost on the way to the model.

Two looks, both cheap. A conversation of the same shape whose every text is a word of its own shows what a template
leaves out whatever is said: a system message, calls, results, declarations of tools. The texts themselves, looked for
in the rendering, show what it cuts or changes because of what is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import cast

from llmtune.data.answer_format import TOOL
from llmtune.data.chat_rows import Message, Tool
from llmtune.data.chat_template import ChatTemplate, TemplateRefusal, Tools
from llmtune.data.control_tokens import unmark

Write = Callable[[Sequence[Message], Tools], str]
"""Renders a conversation in the way that is checked."""
Piece = tuple[str, str]
"""A text that has to show, and what it is."""


class RenderingCheck:
    """Checks renderings of one template; remembers which shapes of conversations it writes whole."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._shapes: dict[object, str | None] = {}

    def missing(
        self, messages: Sequence[Message], tools: Tools, text: str, thoughts: Collection[int], write: Write
    ) -> str | None:
        """Return why a rendering is not the whole conversation; None where it is.

        Args:
            messages: Those that are rendered, as templates take them.
            tools: The declarations of tools, if there are any.
            text: The rendering.
            thoughts: Which answers' thoughts have to show: others' are left out where the template does so.
            write: What made the rendering.
        """
        shape = (bool(tools), *[_shape(message, i in thoughts) for i, message in enumerate(messages)])
        if shape not in self._shapes:
            self._shapes[shape] = self._probe(messages, tools, thoughts, write)
        if self._shapes[shape] is not None:
            return self._shapes[shape]
        text = unmark(text)
        plain = not tools and not any(
            "tool_calls" in message or message.get("reasoning_content") for message in messages
        )
        if plain and _shows_in_order((message["content"].strip() for message in messages), text):
            return None
        return self._changed(messages, tools, text, thoughts)

    def _probe(self, messages: Sequence[Message], tools: Tools, thoughts: Collection[int], write: Write) -> str | None:
        """Look what is left out of a conversation of this shape, whatever is said in it."""
        probes = [_probe_message(message, i) for i, message in enumerate(messages)]
        declared = [cast(Tool, TOOL)] if tools else None
        try:
            text = write(probes, declared)
        except TemplateRefusal:
            return None
        return self._first(_pieces(probes, declared, thoughts, named=False), lambda piece: piece in text, "leaves out")

    def _changed(self, messages: Sequence[Message], tools: Tools, text: str, thoughts: Collection[int]) -> str | None:
        """Look for each text in the rendering, as it is or as JSON writes it."""

        def shows(piece: str) -> bool:
            piece = unmark(piece)
            return piece in text or all(any(form in text for form in _forms(line)) for line in piece.splitlines())

        return self._first(_pieces(messages, tools, thoughts), shows, "leaves out or changes")

    def _first(self, pieces: Iterable[Piece], shows: Callable[[str], bool], what: str) -> str | None:
        lost = next((name for piece, name in pieces if not shows(piece)), None)
        return None if lost is None else f"the chat template {what} {lost}"


def _shows_in_order(pieces: Iterable[str], text: str) -> bool:
    """Whether all pieces are in a text; each is looked for after the one before it first, which is where most are."""
    at = 0
    for piece in pieces:
        found = text.find(piece, at)
        if found >= 0:
            at = found + len(piece)
        elif piece not in text:
            return False
    return True


def _forms(line: str) -> Iterator[str]:
    """Yield the ways in which templates write a line of text: as it is, and within JSON."""
    yield line.strip()
    yield json.dumps(line.strip(), ensure_ascii=False)[1:-1]
    yield json.dumps(line.strip())[1:-1]


def _shape(message: Message, thinks: bool) -> object:
    calls = len(message.get("tool_calls") or ())
    return (message["role"], *message, message["content"].isspace(), not message["content"], calls, thinks)


def _pieces(
    messages: Sequence[Message], tools: Tools, thoughts: Collection[int], named: bool = True
) -> Iterator[Piece]:
    """Yield each text that has to show, with what it is; `named` says which tool it is of."""
    for i, message in enumerate(messages):
        where = f"message {i + 1} ({message['role']})"
        if text := message["content"].strip():
            yield text, "the system message" if message["role"] == "system" else f"the text of {where}"
        if i in thoughts and (reasoning := message.get("reasoning_content")):
            yield reasoning.strip(), f"the thoughts of {where}"
        for call in message.get("tool_calls") or ():
            function = call["function"]
            what = f"the call of {function['name']!r}" if named else "the tool call"
            yield function["name"], f"{what} in {where}"
            arguments: object = function["arguments"]  # some templates are handed JSON text
            for text in _leaves(json.loads(arguments) if isinstance(arguments, str) else arguments):
                yield text, f"the arguments of {what} in {where}"
    for tool in tools or ():
        for text in _declared(tool):
            yield text, f"the tool {tool['function'].get('name')!r}" if named else "the tools that may be called"


def _leaves(value: object) -> Iterator[str]:
    """Yield keys and values of arguments; truth values and nothing are written in too many ways to look for."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _declared(tool: Tool) -> Iterator[str]:
    """Yield name, description and parameters of a tool."""
    function = tool["function"]
    for key in ("name", "description"):
        if text := str(function.get(key) or "").strip():
            yield text
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    yield from properties if isinstance(properties, dict) else ()


def _probe_message(message: Message, number: int) -> Message:
    """Return a message of the same shape whose texts are words of their own."""
    probe = {**message}
    if message["content"].strip():
        probe["content"] = f"zqcontent{number}"
    if message.get("reasoning_content"):
        probe["reasoning_content"] = f"zqthought{number}"
    if calls := message.get("tool_calls"):
        texts = isinstance(calls[0]["function"]["arguments"], str)
        probe["tool_calls"] = [
            {**call, "function": _probe_function(f"{number}x{k}", texts)} for k, call in enumerate(calls)
        ]
    return cast(Message, probe)


def _probe_function(number: str, texts: bool) -> dict[str, object]:
    arguments = {f"zqkey{number}": f"zqvalue{number}"}
    return {"name": f"zqname{number}", "arguments": json.dumps(arguments) if texts else arguments}
