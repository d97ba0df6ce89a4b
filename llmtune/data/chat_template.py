"""The chat template: what the model reads before an answer, and what of an answer it has to learn.

A turn is found by difference. The prompt of the assistant's turn i is the rendering of the messages before it with
`add_generation_prompt`, which is what the model is given when it answers; its target is what the rendering of one
message more adds to that, up to and including the token that ends a turn. So a model is trained on the prompts that it
will see, whatever the template does to earlier turns. A template that writes something else is refused.

Ids are those of `apply_chat_template(tokenize=True)`: the tokenizer adds no special token to what the template wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, cast

import jinja2

from llmtune.data.chat_rows import Message, Tool, ToolCall
from llmtune.data.template_limits import (
    EXTRA_BYTES,
    PROBE_TEXT,
    SECONDS,
    SECONDS_MORE,
    bounded,
    check_text,
)
from llmtune.data.tokenization import tokenize
from llmtune.errors import DataError, EnvironmentProblem
from llmtune.store.resource_limits import LimitExceeded, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

Conversation = Sequence[Mapping[str, object]]
"""Messages of whatever origin; `clean` makes those that templates take."""
Tools = Sequence[Tool] | None

FIXED_DATE = datetime(2024, 7, 26)
"""What stands for today where a template writes the date, so that a run can be repeated: as in Llama 3.1's template."""

_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.{0,200}?)\1\s*\)")
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_ANSWER = "The answer of the probe is 4217."
_PROBE: Conversation = (
    {"role": "user", "content": "What is the probe?"},
    {"role": "assistant", "content": _ANSWER},
)
_RENDER_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, AssertionError, SyntaxError),
)
_FIX = "Set model.chat_template to a Jinja file that"


class TemplateRefusal(Exception):
    """The template does not take these messages; the text says why."""


@dataclass(frozen=True)
class Turn:
    """One answer of a conversation: the text before it, and the text to learn, which ends with an end-of-turn token."""

    index: int
    prompt: str
    target: str
    target_bytes: int

    @property
    def end(self) -> int:
        """Characters up to its end."""
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template, and how it ends the assistant's turns."""

    processor: PreTrainedTokenizerBase
    kwargs: dict[str, object]
    name: str
    """What messages to people call it."""
    tail: str = ""
    """What follows the text of an answer, e.g. `<|im_end|>` and a line break."""
    end: str = ""
    """The end-of-turn token in `tail`: the first token there that is not ordinary text."""
    special: tuple[str, ...] = ()
    """The tokens that are no ordinary text, longest first."""
    marked: bool = False
    """Whether it marks answers itself, where there are no tools."""
    opening: str = ""
    """What the generation prompt adds to a conversation: the header of an answer, and perhaps `<think>`."""

    def render(self, messages: Conversation, tools: Tools = None, answer_next: bool = False) -> str:
        """Render messages as text; `answer_next` adds what stands before an answer.

        Raises:
            TemplateRefusal: the template does not take these messages.
        """
        if not messages:
            raise TemplateRefusal("an answer has nothing before it")
        try:
            with bounded(self.name):
                text = self.processor.apply_chat_template(
                    list(messages),
                    tools=tools,
                    chat_template=self.text(tools),
                    add_generation_prompt=answer_next,
                    tokenize=False,
                    **self.kwargs,
                )
        except _RENDER_ERRORS as error:
            raise TemplateRefusal(f"the chat template refuses it: {error}") from error
        check_text(text, self.name)
        return cast(str, text)

    def render_batch(
        self, conversations: Sequence[Conversation], answer_next: bool = False
    ) -> list[str | TemplateRefusal]:
        """Render conversations without tools, each as `render` does; in one call where none of them is refused."""
        if not conversations:
            return []
        try:
            if not all(conversations):
                raise ValueError("an answer has nothing before it")
            with limited(SECONDS + SECONDS_MORE * len(conversations), EXTRA_BYTES):
                texts = self.processor.apply_chat_template(
                    [list(messages) for messages in conversations],
                    chat_template=self.text(),
                    add_generation_prompt=answer_next,
                    tokenize=False,
                    **self.kwargs,
                )
        except (*_RENDER_ERRORS, LimitExceeded):
            return [self._render_or_refuse(messages, answer_next) for messages in conversations]
        for text in texts:
            check_text(text, self.name)
        return list(cast(list[str], texts))

    def _render_or_refuse(self, messages: Conversation, answer_next: bool) -> str | TemplateRefusal:
        try:
            return self.render(messages, None, answer_next)
        except TemplateRefusal as refusal:
            return refusal

    def text(self, tools: Tools = None) -> str:
        """Return the template itself; tokenizers may have another one for tools."""
        return cast(str, self.processor.get_chat_template(None, tools))

    @property
    def response_template(self) -> dict[str, object]:
        """How answers are read, as transformers' `parse_response` wants it: the tokenizer's own, or the usual marks."""
        own = getattr(self.processor, "response_template", None)
        if own is not None:
            return cast(dict[str, object], own)
        call = {"type": "function", "function": "{content}"}
        return {
            "start_anchor": self.opening or "\0",
            "fields": {
                "reasoning_content": {"open": "<think>", "close": "</think>"},
                "tool_calls": {
                    "open": "<tool_call>",
                    "close": "</tool_call>",
                    "content": "json",
                    "repeats": True,
                    "transform": call,
                },
                "content": {"repeats": True, "join": "", "content_args": {"strip": False}},
            },
        }

    def cut_end(self, text: str) -> tuple[str, bool]:
        """Cut what was generated before the first token that ends an answer, and say whether there was one."""
        ends = [self.end, self.processor.eos_token]
        at = min((text.index(end) for end in ends if end and end in text), default=None)
        return (text, False) if at is None else (text[:at], True)

    @property
    def end_ids(self) -> list[int]:
        """Ids at which generation has to stop: the end-of-turn token, and the tokenizer's own end."""
        ids = [self.processor.convert_tokens_to_ids(self.end), self.processor.eos_token_id]
        return list(dict.fromkeys(token for token in ids if token is not None))


def read_template(processor: PreTrainedTokenizerBase, recipe: Recipe) -> ChatTemplate:
    """Return the template with how it ends turns, which a probe conversation shows.

    Raises:
        EnvironmentProblem: there is no template, or it cannot be split into turns.
    """
    template = _without_probe(processor, recipe)
    if "strftime_now(" in template.text():
        what = "the template writes the day's date, so its prompts differ from day to day"
        raise EnvironmentProblem.of(what, template.name, f"{_FIX} has a date in its place.")
    try:
        prompt = template.render(_PROBE[:1], answer_next=True)
        bare = template.render(_PROBE[:1])
        whole = template.render(_PROBE)
    except TemplateRefusal as refusal:
        raise EnvironmentProblem.of(str(refusal), template.name, f"{_FIX} takes a question and an answer.") from refusal
    check_text(whole, template.name, PROBE_TEXT)
    difference = _difference(template, prompt, whole)
    header, _, tail = difference.partition(_ANSWER)
    if prompt == bare and header.strip():
        what = f"the template ignores add_generation_prompt: a generated answer would have to begin with {header!r}"
        raise EnvironmentProblem.of(what, template.name, f"{_FIX} ends with that where add_generation_prompt is set.")
    special = special_tokens(processor)
    end = _first_special(tail, special)
    if end is None:
        what = f"an assistant's turn does not end in a token of its own but in {tail!r}: answers could not end"
        fix = f"{_FIX} writes {processor.eos_token!r} after each answer"
        fix += ", or add the marker to model.add_tokens." if tail.strip() else "."
        raise EnvironmentProblem.of(what, template.name, fix)
    _refuse_doubled_start(template, whole)
    marked = marks_answers(template.text())
    opening = prompt.removeprefix(bare)
    return ChatTemplate(processor, template.kwargs, template.name, tail, end, special, marked, opening)


def render_prompt(
    messages: Conversation, processor: PreTrainedTokenizerBase, recipe: Recipe, tools: Tools = None
) -> list[int]:
    """Return the token ids to generate an answer to `messages` from: the one place where they are made.

    Raises:
        DataError: the template does not take these messages.
        EnvironmentProblem: there is no template.
    """
    template = _without_probe(processor, recipe)
    try:
        text = template.render(clean(messages), tools, answer_next=True)
    except TemplateRefusal as refusal:
        raise DataError.of(str(refusal), template.name, "Look at the order and the roles of the messages.") from refusal
    return tokenize(processor, [text])[0]


def stop_ids(processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the ids that end an answer in this template, and the tokenizer's own end.

    A base model's tokenizer often ends at `<|endoftext|>` where the template ends a turn with `<|im_end|>`: generation
    has to stop at both. Without a template it is the tokenizer's own end alone.
    """
    if not processor.chat_template:
        return [processor.eos_token_id]
    return read_template(processor, recipe).end_ids


def clean(messages: Conversation) -> list[Message]:
    """Return messages as templates take them: without our `train`, with text for content and arguments as objects."""
    cleaned = []
    for message in messages:
        copy = cast(Message, {key: value for key, value in message.items() if key != "train"})
        copy["content"] = copy.get("content") or ""
        if calls := copy.get("tool_calls"):
            copy["tool_calls"] = [_with_arguments(call) for call in calls]
        cleaned.append(copy)
    return cleaned


def cut_turn(template: ChatTemplate, messages: Sequence[Message], tools: Tools, index: int) -> Turn:
    """Cut the assistant's turn `index` out of a conversation (as `clean` returns it).

    Raises:
        TemplateRefusal: the template does not take the messages, or this turn cannot be told from what is before it.
    """
    prompt = template.render(messages[:index], tools, answer_next=True)
    return split_turn(template, messages, index, prompt, template.render(messages[: index + 1], tools))


def split_turn(template: ChatTemplate, messages: Sequence[Message], index: int, prompt: str, whole: str) -> Turn:
    """Take the turn `index` out of the renderings up to it (`prompt`, ready for an answer) and with it.

    Raises:
        TemplateRefusal: this turn cannot be told from what is before it.
    """
    if not prompt:
        raise TemplateRefusal("an answer has nothing before it")
    if not whole.startswith(prompt):
        raise TemplateRefusal("the chat template does not begin this answer as it asks for one")
    difference = whole[len(prompt) :]
    body, end = _split_end(template, difference)
    content = messages[index]["content"].strip()
    if not content and not messages[index].get("tool_calls"):
        raise TemplateRefusal("an answer is empty")
    if template.end in content:
        raise TemplateRefusal(f"an answer contains the end-of-turn token {template.end}")
    learned = content if content and content in body else body.strip()
    return Turn(index, prompt, body + end, len(learned.encode()))


def marks_answers(template: str) -> bool:
    """Whether a template has `{% generation %}` marks around what is an answer."""
    return bool(_GENERATION.search(template))


def fix_date(template: str) -> str:
    """Replace calls for today's date in a template by `FIXED_DATE`.

    So it is part of the template, wherever that is saved, and the same on every day and in every program.
    """
    return _DATE_CALL.sub(lambda call: repr(FIXED_DATE.strftime(call[2])), template)


def special_tokens(processor: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the tokens that are no ordinary text, longest first."""
    known = {*processor.all_special_tokens, *processor.get_added_vocab()}
    return tuple(sorted((token for token in known if token.strip()), key=lambda token: (-len(token), token)))


def _without_probe(processor: PreTrainedTokenizerBase, recipe: Recipe) -> ChatTemplate:
    """Return the template without a look at how it ends turns."""
    where = recipe.model.chat_template or f"{processor.name_or_path or 'the tokenizer'} (chat_template)"
    if not processor.chat_template:
        fix = f"{_FIX} suits the model, name a model that has one (often called Instruct), or use task: completion."
        raise EnvironmentProblem.of("the tokenizer has no chat template", str(where), fix)
    return ChatTemplate(processor, recipe.model.chat_template_kwargs, str(where))


def _difference(template: ChatTemplate, prompt: str, whole: str) -> str:
    """Return what the probe's answer adds to its prompt."""
    if not whole.startswith(prompt):
        same = next((i for i, pair in enumerate(zip(prompt, whole, strict=False)) if len({*pair}) > 1), len(whole))
        start = max(0, same - 20)
        what = f"the template cannot be split into turns: it asks for an answer with {prompt[start:]!r}"
        what += f" but writes one as {whole[start:]!r}"
        raise EnvironmentProblem.of(what, template.name, f"{_FIX} begins an answer as it asks for one.")
    difference = whole[len(prompt) :]
    if difference.count(_ANSWER) != 1:
        what = f"the template cannot be split into turns: an answer is written as {difference!r}, not as given"
        raise EnvironmentProblem.of(what, template.name, f"{_FIX} writes an answer once and unchanged.")
    return difference


def _split_end(template: ChatTemplate, difference: str) -> tuple[str, str]:
    """Split a turn into its text and its end, which is cut after the end-of-turn token.

    A turn that calls a tool may end in another token than an answer (Llama 3.1: `<|eom_id|>`).
    """
    if difference.endswith(template.tail):
        body = difference[: len(difference) - len(template.tail)]
        return body, template.tail[: template.tail.index(template.end) + len(template.end)]
    difference = difference.rstrip()
    for token in template.special:
        if difference.endswith(token):
            return difference[: len(difference) - len(token)], token
    raise TemplateRefusal("the chat template does not end this answer in an end-of-turn token")


def _first_special(text: str, special: Sequence[str]) -> str | None:
    """Return the token in `text`, of those that are no ordinary text, that stands first."""
    present = [(text.index(token), -len(token), token) for token in special if token in text]
    return min(present)[2] if present else None


def _refuse_doubled_start(template: ChatTemplate, whole: str) -> None:
    start = template.processor.bos_token_id
    if start is not None and tokenize(template.processor, [whole])[0][:2] == [start, start]:
        what = f"the template writes {template.processor.bos_token!r} twice at the start"
        raise EnvironmentProblem.of(what, template.name, f"{_FIX} writes it once.")


def _with_arguments(call: ToolCall) -> ToolCall:
    """Return a tool call with its arguments as an object, as templates take them; OpenAI's format has JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(cast(str, function["arguments"]))
    except ValueError:
        return call
    return cast(ToolCall, {**call, "function": {**function, "arguments": arguments}})
