"""Ollama's Modelfile: the chat template as a Go template that is proven to write the same, stop tokens, sampling.

A chat template is taken apart by what it writes between messages: before the first one, from a system message to a
question, from a question to its answer and so on. Where texts put together from these parts are, letter by letter, what
the chat template writes for a set of conversations, the parts become a Go template; else none is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llmtune.data.chat_template import TemplateRefusal, read_template
from llmtune.store.atomic_files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

Messages = Sequence[dict[str, str]]

MODELFILE = "Modelfile"
SAMPLES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
"""Roles of the conversations on which a Go template must write what the chat template writes."""
_TEXTS = ("Name the capital of {}.", "It's 7 \"o'clock\"\nin {{ place }} {}!", "{} \\ <ok> 4.2 % ünïcode 12")


@dataclass(frozen=True)
class TemplateParts:
    """What a chat template writes around the texts of messages, up to where an answer begins."""

    start: str
    """Before the first question without a system message; a default system message stands in it."""
    system: str | None
    """Before a system message; None where the template takes none."""
    system_to_user: str
    user_to_assistant: str
    """Before an answer that was given."""
    assistant_to_user: str
    generation_prompt: str
    """Before an answer that is to come."""


def split_template(processor: PreTrainedTokenizerBase, recipe: Recipe, add_bos: bool) -> TemplateParts | None:
    """Take the chat template apart; None where it does more than to write something between messages.

    With `add_bos` the start token is left out, since programs that read the file write it by themselves.
    """
    template = read_template(processor, recipe)
    bos = cast(str, processor.bos_token) if add_bos else ""

    def render(messages: Messages) -> str:
        return template.render(messages, answer_next=True).removeprefix(bos)

    try:
        parts = _probe(render)
        samples = sample_conversations(parts)
        same = all(render(messages) == write_chat(parts, messages) for messages in samples)
    except (TemplateRefusal, ValueError):
        return None
    return parts if same else None


def sample_conversations(parts: TemplateParts) -> list[Messages]:
    """Return the conversations of `SAMPLES` that the template takes."""
    return [
        [{"role": role, "content": _TEXTS[k % 3].replace("{}", f"({k})")} for k, role in enumerate(roles)]
        for roles in SAMPLES
        if parts.system is not None or roles[0] != "system"
    ]


def _probe(render: Callable[[Messages], str]) -> TemplateParts:
    """Raises ValueError where a message is not in what is written, or not once."""
    roles = ("user", "assistant", "user")
    start, answer, question, generation_prompt = _between(render, roles)
    try:
        system, first, *_ = _between(render, ("system", *roles))
    except TemplateRefusal:
        return TemplateParts(start, None, "", answer, question, generation_prompt)
    return TemplateParts(start, system, first, answer, question, generation_prompt)


def _between(render: Callable[[Messages], str], roles: Sequence[str]) -> list[str]:
    """Return what stands before, between and after messages of these roles."""
    marks = [f"Message {k} of the probe." for k in range(len(roles))]
    rest = render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
    between = []
    for mark in marks:
        before, present, rest = rest.partition(mark)
        if not present or mark in rest:
            raise ValueError(mark)
        between.append(before)
    return [*between, rest]


def write_chat(parts: TemplateParts, messages: Messages) -> str:
    """Write a conversation that ends with a question, as `go_template` does in Ollama."""
    text, previous = "", None
    for message in messages:
        before = {
            "system": parts.system or "",
            "assistant": parts.user_to_assistant,
            "user": {None: parts.start, "system": parts.system_to_user}.get(previous, parts.assistant_to_user),
        }
        text += before[message["role"]] + message["content"]
        previous = message["role"]
    return text + parts.generation_prompt


def go_template(parts: TemplateParts) -> str:
    """Return the parts as Ollama's template; it joins messages of one role, so questions and answers alternate."""
    put = {name: "{{ " + _quote(text) + " }}" for name, text in vars(parts).items() if text is not None}
    system = '{{ if eq .Role "system" }}' + put.get("system", "") + "{{ .Content }}{{ end }}"
    first = "{{ if eq $i 0 }}" + put["start"] + "{{ else if and (eq $i 1) $.System }}" + put["system_to_user"]
    if parts.system is None:
        system = ""
        first = "{{ if or (eq $i 0) (and (eq $i 1) $.System) }}" + put["start"]
    user = '{{ if eq .Role "user" }}' + first + "{{ else }}" + put["assistant_to_user"] + "{{ end }}{{ .Content }}"
    last = "{{ if eq (len (slice $.Messages $i)) 1 }}" + put["generation_prompt"] + "{{ end }}{{ end }}"
    answer = '{{ if eq .Role "assistant" }}' + put["user_to_assistant"] + "{{ .Content }}{{ end }}"
    return "{{ range $i, $_ := .Messages }}" + system + user + last + answer + "{{ end }}"


def _quote(text: str) -> str:
    """Return a Go string that stands within a Modelfile's triple quotes."""
    return json.dumps(text, ensure_ascii=False).replace('"""', '"\\""')


def write_modelfile(
    file: Path, parts: TemplateParts | None, stops: Sequence[str], recipe: Recipe, notes: Sequence[str], adapter: bool
) -> None:
    """Write a Modelfile beside a GGUF file: a whole model, or an adapter."""
    lines = [f"# {note}" for note in notes]
    lines += ["FROM ./base.gguf", f"ADAPTER ./{file.name}"] if adapter else [f"FROM ./{file.name}"]
    if parts is not None:
        lines.append(f'TEMPLATE """{go_template(parts)}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in sampling_parameters(recipe).items()]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    write_text(file.with_name(MODELFILE), "\n".join(lines) + "\n")


def sampling_parameters(recipe: Recipe) -> dict[str, float]:
    """Return the recipe's generation settings by Ollama's names; all of them, since Ollama has defaults of its own."""
    generation = recipe.generation
    settings = {"temperature": 0.0}
    if generation.do_sample:
        settings = {
            "temperature": generation.temperature or 1.0,
            "top_k": generation.top_k or 0,
            "top_p": generation.top_p or 1.0,
            "min_p": generation.min_p or 0.0,
        }
    return {**settings, "repeat_penalty": generation.repetition_penalty or 1.0}
