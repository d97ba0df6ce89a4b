"""Ollama's Modelfile: the chat template as a Go template that is proven to write the same, stop tokens, sampling.

A chat template is taken apart by what it writes between messages: before the first one, from a system message to a
question, from a question to its answer and so on. Where texts put together from these pieces are, letter by letter,
what the chat template writes for a set of conversations, the pieces become a Go template; else none is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from llmtune.data.chat_template import TemplateRefusal, read_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

Messages = Sequence[dict[str, str]]

SAMPLES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
"""Roles of the conversations on which a Go template must write what the chat template writes."""
_SAID = ("Name the capital of {}.", "It's 7 \"o'clock\"\nin {{ place }} {}!", "{} \\ <ok> 4.2 % ünïcode 12")


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the texts of messages, up to where an answer begins."""

    start: str
    """Before the first question where nothing else is said before; a default system message stands in it."""
    system: str | None
    """Before a system message; None where the template takes none."""
    system_to_user: str
    user_to_assistant: str
    """Before an answer that was given."""
    assistant_to_user: str
    ask: str
    """Before an answer that is to come."""


def describe_chat(processor: PreTrainedTokenizerBase, recipe: Recipe, add_bos: bool) -> Pieces | None:
    """Take the chat template apart; None where it does more than to write something between messages.

    With `add_bos` the start token is left out, since programs that read the file write it by themselves.
    """
    template = read_template(processor, recipe)
    bos = cast(str, processor.bos_token) if add_bos else ""

    def render(messages: Messages) -> str:
        return template.render(messages, answer_next=True).removeprefix(bos)

    try:
        pieces = _take_apart(render)
        samples = [_converse(roles) for roles in SAMPLES if pieces.system is not None or roles[0] != "system"]
        same = all(render(messages) == write_chat(pieces, messages) for messages in samples)
    except (TemplateRefusal, ValueError):
        return None
    return pieces if same else None


def _converse(roles: Sequence[str]) -> Messages:
    return [{"role": role, "content": _SAID[k % 3].replace("{}", f"({k})")} for k, role in enumerate(roles)]


def _take_apart(render: Any) -> Pieces:
    """Raises ValueError where a message is not in what is written, or not once."""
    roles = ("user", "assistant", "user")
    start, answer, question, ask = _between(render, roles)
    try:
        system, first, *_ = _between(render, ("system", *roles))
    except TemplateRefusal:
        return Pieces(start, None, "", answer, question, ask)
    return Pieces(start, system, first, answer, question, ask)


def _between(render: Any, roles: Sequence[str]) -> list[str]:
    """Return what stands before, between and after messages of these roles."""
    marks = [f"Message {k} of the probe." for k in range(len(roles))]
    left = render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
    found = []
    for mark in marks:
        before, there, left = left.partition(mark)
        if not there or mark in left:
            raise ValueError(mark)
        found.append(before)
    return [*found, left]


def write_chat(pieces: Pieces, messages: Messages) -> str:
    """Write a conversation that ends with a question, as `go_template` does in Ollama."""
    text, before = "", None
    for message in messages:
        text += _before(pieces, before, message["role"]) + message["content"]
        before = message["role"]
    return text + pieces.ask


def _before(pieces: Pieces, before: str | None, role: str) -> str:
    if role == "system":
        return pieces.system or ""
    if role == "assistant":
        return pieces.user_to_assistant
    return {None: pieces.start, "system": pieces.system_to_user}.get(before, pieces.assistant_to_user)


def go_template(pieces: Pieces) -> str:
    """Return the pieces as Ollama's template; it joins messages of one role, so questions and answers alternate."""
    put = {name: "{{ " + _quote(text) + " }}" for name, text in vars(pieces).items() if text is not None}
    system = '{{ if eq .Role "system" }}' + put.get("system", "") + "{{ .Content }}{{ end }}"
    first = "{{ if eq $i 0 }}" + put["start"]
    if pieces.system is None:
        system = ""
        first = "{{ if or (eq $i 0) (and (eq $i 1) $.System) }}" + put["start"]
    else:
        first += "{{ else if and (eq $i 1) $.System }}" + put["system_to_user"]
    user = '{{ if eq .Role "user" }}' + first + "{{ else }}" + put["assistant_to_user"] + "{{ end }}{{ .Content }}"
    last = "{{ if eq (len (slice $.Messages $i)) 1 }}" + put["ask"] + "{{ end }}{{ end }}"
    answer = '{{ if eq .Role "assistant" }}' + put["user_to_assistant"] + "{{ .Content }}{{ end }}"
    return "{{ range $i, $_ := .Messages }}" + system + user + last + answer + "{{ end }}"


def _quote(text: str) -> str:
    """Return a Go string that stands within a Modelfile's triple quotes."""
    return json.dumps(text, ensure_ascii=False).replace('"""', '"\\""')


def write_modelfile(
    file: str,
    pieces: Pieces | None,
    stops: Sequence[str],
    recipe: Recipe,
    notes: Sequence[str],
    adapter: bool,
) -> str:
    """Return the text of a Modelfile for a GGUF file that lies beside it: a whole model, or an adapter."""
    source = ["FROM ./base.gguf", f"ADAPTER ./{file}"] if adapter else [f"FROM ./{file}"]
    lines = [*(f"# {note}" for note in notes), *source]
    if pieces is not None:
        lines.append(f'TEMPLATE """{go_template(pieces)}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in sampling(recipe).items()]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def sampling(recipe: Recipe) -> dict[str, float]:
    """Return the recipe's generation settings by Ollama's names; all of them, since Ollama has defaults of its own."""
    wanted = recipe.generation
    settings: dict[str, float] = {"repeat_penalty": wanted.repetition_penalty or 1.0}
    if not wanted.do_sample:
        return {"temperature": 0.0, **settings}
    return {
        "temperature": wanted.temperature or 1.0,
        "top_k": wanted.top_k or 0,
        "top_p": wanted.top_p or 1.0,
        "min_p": wanted.min_p or 0.0,
        **settings,
    }
