"""The chat template: what the model reads before an answer, and what of an answer it has to learn.

A turn is found by difference. The prompt of the assistant's turn i is the rendering of the messages before it with
`add_generation_prompt`, which is what the model is given when it answers; its target is what the rendering of one
message more adds to that, up to and including the token that ends a turn. So a model is trained on the prompts that it
will see, whatever the template does to earlier turns. A template that writes something else is refused.

Ids are those of `apply_chat_template(tokenize=True)`: the tokenizer adds no special token to what the template wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from typing import cast
from weakref import WeakKeyDictionary

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llmtune.data.answer_format import NO_CALLS, QUESTION, TOOL
from llmtune.data.chat_messages import clean, with_argument_texts, with_short_ids
from llmtune.data.chat_rows import Message, Tool
from llmtune.data.control_tokens import (
    UnwritableTextError,
    control_pattern,
    encode_marked,
    find_control_token,
    mark,
)
from llmtune.data.template_facts import FIX, NEEDED, NO_FACTS, PROBES, PROMPTS, TOOL_PROBES, TemplateFacts, infer_facts
from llmtune.data.template_kwargs import refuse_unread
from llmtune.data.template_limits import (
    ENDLESS,
    EXTRA_BYTES,
    PROBE_TEXT,
    SECONDS,
    SECONDS_MORE,
    check_text,
)
from llmtune.data.tokenization import tokenize
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.recipe.schema import Recipe
from llmtune.store.atomic_files import hash_value
from llmtune.store.resource_limits import LimitExceeded, limited

Conversation = Sequence[Mapping[str, object]]
"""Messages of whatever origin; `clean` makes those that templates take."""
Tools = Sequence[Tool] | None

FIXED_DATE = datetime(2024, 7, 26)
"""What stands for today where a template writes the date, so that a run can be repeated: as in Llama 3.1's template."""

_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.{0,200}?)\1\s*\)")
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
SPELL_OUT = "data.special_tokens_in_text: text writes it as plain text."
_RENDER_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, AssertionError, SyntaxError),
)


class TemplateRefusal(Exception):
    """The template does not take these messages; the text says why."""


Rendered = str | TemplateRefusal
"""A rendered conversation, or why there is none."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template, and how it ends the assistant's turns."""

    processor: PreTrainedTokenizerBase
    kwargs: dict[str, object]
    name: str
    """What messages to people call it."""
    facts: TemplateFacts = NO_FACTS

    def render(self, messages: Conversation, tools: Tools = None, answer_next: bool = False) -> str:
        """Render messages as text; `answer_next` adds what stands before an answer.

        Raises:
            EnvironmentProblem: the template takes too long or too much memory.
            TemplateRefusal: the template does not take these messages.
        """
        (rendered,) = self.render_batch([(messages, tools)], answer_next)
        if isinstance(rendered, TemplateRefusal):
            raise rendered
        return rendered

    def render_batch(self, chats: Sequence[tuple[Conversation, Tools]], answer_next: bool = False) -> list[Rendered]:
        """Render conversations, each as `render` does; neighbours with the same tools in one call if all can be."""
        rendered: list[Rendered] = []
        for _, group in groupby(chats, key=lambda chat: id(chat[1])):
            neighbours = list(group)
            try:
                rendered += self._write([messages for messages, _ in neighbours], neighbours[0][1], answer_next)
            except TemplateRefusal as refusal:
                alone = len(neighbours) == 1
                rendered += [refusal] if alone else [self.render_batch([chat], answer_next)[0] for chat in neighbours]
        return rendered

    def _write(self, conversations: Sequence[Conversation], tools: Tools, answer_next: bool) -> list[str]:
        if not all(conversations):
            raise TemplateRefusal("an answer has nothing before it")
        try:
            with limited(SECONDS + SECONDS_MORE * (len(conversations) - 1), EXTRA_BYTES):
                texts, _ = render_jinja_template(  # `apply_chat_template` calls it after copying all messages
                    conversations=[list(messages) for messages in conversations],
                    tools=tools,
                    chat_template=self.text(tools),
                    add_generation_prompt=answer_next,
                    **{**self.processor.special_tokens_map, **self.kwargs},
                )
        except _RENDER_ERRORS as error:
            raise TemplateRefusal(f"the chat template refuses it: {error}") from error
        except LimitExceeded as error:
            if len(conversations) > 1:
                raise TemplateRefusal(str(error)) from error
            raise EnvironmentProblem.of(f"the chat template does not end: {error}", self.name, ENDLESS) from error
        for text in texts:
            check_text(text, self.name)
        return cast(list[str], texts)

    def text(self, tools: Tools = None) -> str:
        """Return the template itself; tokenizers may have another one for tools."""
        return cast(str, self.processor.get_chat_template(None, tools))

    def prepare(self, messages: Conversation, drop_reasoning: bool = False) -> list[Message]:
        """Return messages as this template takes them."""
        cleaned = clean(messages, drop_reasoning)
        if self.facts.closes_thoughts:  # no thoughts are what the prompt says already
            for message in cleaned:
                if message.get("reasoning_content") == "":
                    del message["reasoning_content"]
        if not any(message.get("tool_calls") or message.get("tool_call_id") for message in cleaned):
            return cleaned
        if self.facts.calls.short_ids:
            cleaned = [with_short_ids(message) for message in cleaned]
        return [with_argument_texts(message) for message in cleaned] if self.facts.calls.argument_texts else cleaned

    def response_template(self, calls: bool) -> dict[str, object]:
        """Return how transformers' `parse_response` reads answers: the tokenizer's own way, or as probes showed.

        Without `calls`, what looks like a call of a tool is text.
        """
        own = getattr(self.processor, "response_template", None)
        if own is None:
            return self.facts.response_template(self.facts.calls if calls else NO_CALLS)
        fields = own["fields"].items()
        return {**own, "fields": {name: field for name, field in fields if calls or name != "tool_calls"}}

    def cut_end(self, text: str) -> tuple[str, bool]:
        """Cut what was generated before the first token that ends an answer, and say whether there was one."""
        ends = [self.facts.end, self.facts.calls.end, self.processor.eos_token]
        at = min((text.index(end) for end in ends if end and end in text), default=None)
        return (text, False) if at is None else (text[:at], True)

    @property
    def end_ids(self) -> list[int]:
        """Ids at which generation has to stop: the end-of-turn token, and the tokenizer's own end."""
        ends = [self.facts.end, *filter(None, [self.facts.calls.end])]
        ids = [*self.processor.convert_tokens_to_ids(ends), self.processor.eos_token_id]
        return list(dict.fromkeys(token for token in ids if token is not None))


def read_template(processor: PreTrainedTokenizerBase, recipe: Recipe) -> ChatTemplate:
    """Return the template with how it ends turns and writes thoughts, which probe conversations show.

    Raises:
        EnvironmentProblem: there is no template, or it cannot be split into turns.
        RecipeError: `model.chat_template_kwargs` has a name that the template never reads, or it omits
            `data.system_prompt`.
    """
    template = _without_probe(processor, recipe)
    refuse_unread(template.kwargs, processor.chat_template)
    if "strftime_now(" in template.text():
        what = "the template writes the day's date, so its prompts differ from day to day"
        raise EnvironmentProblem.of(what, template.name, f"{FIX} has a date in its place.")
    facts = _read_facts(template)
    system = recipe.data.system_prompt
    if system is not None and system.strip() not in template.render([QUESTION]):
        fix = "Omit it, and write what the model is to know into the questions."
        raise RecipeError.of("it has no effect: the chat template omits system messages", "data.system_prompt", fix)
    return replace(template, facts=facts)


def with_kwargs(template: ChatTemplate, kwargs: Mapping[str, object]) -> ChatTemplate:
    """Return the template with other switches, and what it does then. Raises as `read_template` does."""
    switched = replace(template, kwargs={**kwargs})
    return replace(switched, facts=_read_facts(switched))


_known_facts: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, TemplateFacts]] = WeakKeyDictionary()


def _read_facts(template: ChatTemplate) -> TemplateFacts:
    """Return what a template does, by its text, its switches and the tokens that it may write."""
    processor = template.processor
    special = special_tokens(processor)
    about = [processor.chat_template, template.kwargs, processor.special_tokens_map, special]
    known = _known_facts.setdefault(processor, {})
    key = hash_value(about)
    if key not in known:
        known[key] = _probe(template, special)
    return known[key]


def _probe(template: ChatTemplate, special: tuple[str, ...]) -> TemplateFacts:
    """Render the probes, and read the facts off them."""
    texts: dict[str, str | None] = {}
    for probe, messages in {**PROBES, **TOOL_PROBES}.items():
        tools = [cast(Tool, TOOL)] if probe in TOOL_PROBES else None
        (rendered,) = template.render_batch([(messages, tools)], probe in PROMPTS)
        if isinstance(rendered, TemplateRefusal) and probe in NEEDED:
            raise EnvironmentProblem.of(str(rendered), template.name, f"{FIX} takes a question and an answer.")
        texts[probe] = rendered if isinstance(rendered, str) else None
    whole = str(texts["answer"])
    check_text(whole, template.name, PROBE_TEXT)
    facts = infer_facts(texts, special, template.processor.eos_token, template.name)
    _refuse_doubled_start(template, whole)
    return facts


def render_prompt(
    messages: Conversation,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    tools: Tools = None,
    reasoning: str | None = None,
) -> list[int]:
    """Return the token ids to generate an answer to `messages` from: the one place where they are made.

    `reasoning` is what the row itself says about its thoughts, in place of `data.reasoning`.

    Raises:
        DataError: the template does not take these messages, or they hold special tokens that cannot be text.
        EnvironmentProblem: there is no template.
    """
    calls = any(message.get("tool_calls") or message.get("tool_call_id") for message in messages)
    template = read_template(processor, recipe) if calls else _without_probe(processor, recipe)
    cleaned = template.prepare(messages, (reasoning or recipe.data.reasoning) == "drop")
    in_text = recipe.data.special_tokens_in_text
    pattern = control_pattern(processor, template.text(tools))
    token = None if in_text == "allow" else find_control_token(pattern, cleaned, tools)
    if token is not None and in_text == "refuse":
        raise DataError.of(f"the conversation holds the special token {token}", template.name, SPELL_OUT)
    try:
        if token is None:
            return tokenize(processor, [template.render(cleaned, tools, answer_next=True)])[0]
        text = template.render(mark(cleaned, pattern), mark(tools, pattern), answer_next=True)
        return encode_marked(processor, text)
    except UnwritableTextError as error:
        raise DataError.of(str(error), template.name, "Remove it from the conversation.") from error
    except TemplateRefusal as refusal:
        raise DataError.of(str(refusal), template.name, "Look at the order and the roles of the messages.") from refusal


def stop_ids(processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the ids that end an answer in this template, and the tokenizer's own end.

    A base model's tokenizer often ends at `<|endoftext|>` where the template ends a turn with `<|im_end|>`: generation
    has to stop at both. Without a template it is the tokenizer's own end alone.
    """
    if not processor.chat_template:
        return [processor.eos_token_id]
    return read_template(processor, recipe).end_ids


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
        fix = f"{FIX} suits the model, name a model that has one (often called Instruct), or use task: completion."
        raise EnvironmentProblem.of("the tokenizer has no chat template", str(where), fix)
    return ChatTemplate(processor, recipe.model.chat_template_kwargs, str(where))


def _refuse_doubled_start(template: ChatTemplate, whole: str) -> None:
    start = template.processor.bos_token_id
    if start is not None and tokenize(template.processor, [whole])[0][:2] == [start, start]:
        what = f"the template writes {template.processor.bos_token!r} twice at the start"
        raise EnvironmentProblem.of(what, template.name, f"{FIX} writes it once.")
