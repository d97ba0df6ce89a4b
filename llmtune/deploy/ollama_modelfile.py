"""Ollama's Modelfile: stop tokens, sampling, and the chat template as a Go template proven to render the same.

Without TEMPLATE, Ollama takes one of its own templates that differs from the file's chat template in fewer than 100
characters, or none, and reports neither. Each Modelfile therefore has a template, made from the texts that the chat
template writes between messages. On a set of conversations it must equal the chat template's output, character by
character. Otherwise no Modelfile is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from llmtune.data.chat_template import read_template, with_kwargs
from llmtune.data.template_text import without_secrets
from llmtune.deploy.tuned_model import TunedModel
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.store.atomic_files import write_text

Messages = Sequence[dict[str, str]]
TemplateParts = dict[tuple[str, str], str]
"""The texts that a chat template writes between two messages, by their roles. The role before the first message and
that of the coming answer are empty. System messages are omitted if the template does not support them."""

MODELFILE = "Modelfile"
SAMPLES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
"""Roles of the conversations on which the Go template must equal the chat template."""
_TEXTS = ("Name the capital of {}.", "It's 7 \"o'clock\"\nin {{ place }} {}!", "{} \\ <ok> 4.2 % ünïcode 12")


def split_template(processor: PreTrainedTokenizerBase, recipe: Recipe, add_bos: bool) -> TemplateParts | None:
    """Split the chat template into parts; return None if it does more than write text between messages.

    With `add_bos` the start token is omitted, since programs that read the file add it.
    """
    template = read_template(processor, recipe)
    template = with_kwargs(template, without_secrets(template.kwargs))
    if template.facts.between is None:
        return None
    bos = cast(str, processor.bos_token) if add_bos else ""
    parts = {step: text if step[0] else text.removeprefix(bos) for step, text in template.facts.between.items()}
    rendered = template.render_batch([(messages, None) for messages in sample_conversations(parts)], answer_next=True)
    written = [write_chat(parts, messages) for messages in sample_conversations(parts)]
    same = [isinstance(text, str) and text.removeprefix(bos) for text in rendered] == written
    return parts if same else None


def sample_conversations(parts: TemplateParts) -> list[Messages]:
    """Return the conversations of `SAMPLES` that the template supports."""
    return [
        [{"role": role, "content": _TEXTS[k % 3].replace("{}", f"({k})")} for k, role in enumerate(roles)]
        for roles in SAMPLES
        if ("", roles[0]) in parts
    ]


def write_chat(parts: TemplateParts, messages: Messages) -> str:
    """Write a conversation that ends with a question, as `go_template` does in Ollama."""
    steps = pairwise(["", *(message["role"] for message in messages), ""])
    contents = [*(message["content"] for message in messages), ""]
    return "".join(parts[step] + content for step, content in zip(steps, contents, strict=True))


def go_template(parts: TemplateParts) -> str:
    """Return the parts as an Ollama template. Ollama joins messages of one role, so questions and answers alternate."""
    put = {step: "{{ " + _quote(text) + " }}" for step, text in parts.items()}
    system, first = "", "{{ if or (eq $i 0) (and (eq $i 1) $.System) }}" + put["", "user"]
    if ("", "system") in put:
        system = '{{ if eq .Role "system" }}' + put["", "system"] + "{{ .Content }}{{ end }}"
        first = "{{ if eq $i 0 }}" + put["", "user"] + "{{ else if and (eq $i 1) $.System }}" + put["system", "user"]
    user = '{{ if eq .Role "user" }}' + first + "{{ else }}" + put["assistant", "user"] + "{{ end }}{{ .Content }}"
    last = "{{ if eq (len (slice $.Messages $i)) 1 }}" + put["user", ""] + "{{ end }}{{ end }}"
    answer = '{{ if eq .Role "assistant" }}' + put["user", "assistant"] + "{{ .Content }}{{ end }}"
    return "{{ range $i, $_ := .Messages }}" + system + user + last + answer + "{{ end }}"


def _quote(text: str) -> str:
    """Return a Go string for use within a Modelfile's triple quotes."""
    return json.dumps(text, ensure_ascii=False).replace('"""', '"\\""')


def write_modelfile(
    file: Path, tuned: TunedModel, stops: Sequence[int], notes: Sequence[str], *, adds_bos: bool, adapter: bool
) -> bool:
    """Write a Modelfile next to a GGUF file, model or adapter; return whether its template can be expressed.

    `adds_bos`: programs that read the file add the start token.
    """
    template = "{{ .Prompt }}"
    if TASK_FACTS[tuned.task.name].templated and tuned.processor.chat_template:
        parts = split_template(tuned.processor, tuned.recipe, adds_bos)
        if parts is None:
            return False
        template = go_template(parts)
    source = ["FROM ./base.gguf", f"ADAPTER ./{file.name}"] if adapter else [f"FROM ./{file.name}"]
    lines = [*(f"# {note}" for note in notes), *source, f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER {name} {value}" for name, value in sampling_parameters(tuned.recipe).items()]
    lines += [
        f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}"
        for token in tuned.processor.convert_ids_to_tokens(list(stops))
    ]
    write_text(file.with_name(MODELFILE), "\n".join(lines) + "\n")
    return True


def sampling_parameters(recipe: Recipe) -> dict[str, float]:
    """Return all generation settings of the recipe by Ollama's names, to override Ollama's own defaults."""
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
