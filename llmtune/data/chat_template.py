"""The chat template: renders the prompt of an answer, and determines which part of an answer is supervised.

A turn is the difference of two renderings. The prompt of the assistant's turn i is the rendering of the messages before
it with `add_generation_prompt`; the model gets the same prompt when it answers. The target is the text that rendering
one more message adds, up to and including the end-of-turn token. So the model is trained on the prompts that it will
see, even if the template rewrites earlier turns. A template that does not fit this scheme is refused.

Ids equal those of `apply_chat_template(tokenize_each=True)`: the tokenizer adds no special tokens to the rendering.
A template is untrusted code: its time, memory and output are limited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from llmtune.data.answer_format import shared_start
from llmtune.data.chat_messages import (
    UnwritableTextError,
    clean_messages,
    control_pattern,
    encode_marked,
    find_control_token,
    is_marked,
    joined_text,
    list_pictures,
    mark,
    unmark,
    with_argument_texts,
    with_image_parts,
    with_short_ids,
)
from llmtune.data.chat_rows import ChatRow, Message, Tool
from llmtune.data.pictures import Picture
from llmtune.data.template_facts import FIX, NO_FACTS, TemplateFacts, TemplateRefusal, read_facts
from llmtune.data.template_text import ENDLESS, reads_date, refuse_unread
from llmtune.data.tokenization import tokenize_each
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.recipe.schema import Recipe
from llmtune.store.resource_limits import LimitExceeded, limited

Conversation = Sequence[Mapping[str, object]]
"""Messages from any source; `clean_messages` converts them to the templates' form."""
Tools = Sequence[Tool] | None
Expand = Callable[[Sequence[str], Sequence[Picture]], list[str] | str]
"""Writes the tokens of pictures in place of their placeholders in consecutive texts, or returns why it cannot."""
Rendered = str | TemplateRefusal
"""A rendered conversation, or the error that prevented it."""

SECONDS = 2.0
"""Seconds for one conversation; a thousand messages take a tenth of it."""
SECONDS_MORE = 0.05
"""Seconds for each further conversation of a batch."""
EXTRA_BYTES = 2**29
MAX_TEXT = 2**25
SPELL_OUT = "data.special_tokens_in_text: text writes it as plain text."
CLOSED = (
    "the prompt closes the thoughts before the answer begins, and this answer has some: "
    "set data.reasoning: drop, or set model.chat_template_kwargs to let the model think"
)
CUT_THOUGHTS = "an answer ends in its thoughts: raise generation.max_new_tokens"
"""Only a generated answer: those of files are refused when they are read."""
_RENDER_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, AssertionError, SyntaxError, NameError),  # Jinja compiles infinity to a name
)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template with its facts, such as the token that ends the assistant's turns."""

    processor: PreTrainedTokenizerBase
    kwargs: dict[str, object]
    name: str
    """The template's name in messages to users."""
    facts: TemplateFacts = NO_FACTS

    def render(self, messages: Conversation, tools: Tools = None, answer_next: bool = False) -> str:
        """Render messages as text; `answer_next` adds the header of an answer.

        Raises:
            EnvironmentProblem: the template takes too long or too much memory.
            TemplateRefusal: the template rejects these messages.
        """
        (rendered,) = self.render_batch([(messages, tools)], answer_next)
        if isinstance(rendered, TemplateRefusal):
            raise rendered
        return rendered

    def render_batch(self, chats: Sequence[tuple[Conversation, Tools]], answer_next: bool = False) -> list[Rendered]:
        """Render each conversation as `render` does; neighbours with the same tools share a call if none fails."""
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
        source = self.text(tools)
        try:
            with limited(SECONDS + SECONDS_MORE * (len(conversations) - 1), EXTRA_BYTES):
                compiled = _compile_jinja_template(source)  # cached; computes constants, such as a text of 10 GB
                compiled.globals = {**compiled.globals}  # a copy of their ChainMap takes longer than a rendering
                texts, _ = render_jinja_template(  # `apply_chat_template` calls it after copying all messages
                    conversations=[[with_image_parts(message) for message in messages] for messages in conversations],
                    tools=tools,
                    chat_template=source,
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
            self._check_text(text)
        return cast(list[str], texts)

    def _check_text(self, text: str) -> None:
        """Refuse a rendering that no tokenizer should get: endless text, or lone surrogates."""
        if len(text) > MAX_TEXT:
            what = f"the chat template writes {len(text):,} characters, but at most {MAX_TEXT:,} are allowed"
            raise EnvironmentProblem.of(what, self.name, ENDLESS)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"the chat template writes invalid text: {error}"
            raise EnvironmentProblem.of(what, self.name, ENDLESS) from error

    def text(self, tools: Tools = None) -> str:
        """Return the template's source; a tokenizer may have a separate template for tools."""
        return cast(str, self.processor.get_chat_template(None, tools))

    def prepare(self, messages: Conversation, drop_reasoning: bool = False) -> list[Message]:
        """Return messages in this template's form."""
        cleaned = clean_messages(messages, drop_reasoning)
        if self.facts.closes_thoughts:  # the prompt already states that there are no thoughts
            for message in cleaned:
                if message.get("reasoning_content") == "":
                    del message["reasoning_content"]
        if not any(message.get("tool_calls") or message.get("tool_call_id") for message in cleaned):
            return cleaned
        if self.facts.calls.short_ids:
            cleaned = [with_short_ids(message) for message in cleaned]
        return [with_argument_texts(message) for message in cleaned] if self.facts.calls.argument_texts else cleaned

    @property
    def end_ids(self) -> list[int]:
        """The ids that stop generation: the end-of-turn token, and the tokenizer's own end token."""
        ends = [self.facts.end, *filter(None, [self.facts.calls.end, self.facts.end_with_tools])]
        ids = [*self.processor.convert_tokens_to_ids(ends), self.processor.eos_token_id]
        return list(dict.fromkeys(token for token in ids if token is not None))


def read_template(processor: PreTrainedTokenizerBase, recipe: Recipe) -> ChatTemplate:
    """Return the template with its facts.

    Raises:
        EnvironmentProblem: the template is missing, or cannot be split into turns.
        RecipeError: `model.chat_template_kwargs` has a name that the template never reads, or the template omits
            or refuses `data.system_prompt`.
    """
    template = _without_facts(processor, recipe)
    refuse_unread(template.kwargs, processor.chat_template)
    system, fix = recipe.data.system_prompt, "Omit it, and write its content into the questions."
    try:
        template = with_kwargs(template, template.kwargs)
    except EnvironmentProblem as problem:
        if system is None or not isinstance(problem.__cause__, TemplateRefusal):
            raise
        what = str(problem.__cause__).replace(" refuses it", " refuses system messages")
        raise RecipeError.of(what, "data.system_prompt", fix) from problem
    if system is not None and system.strip() not in template.facts.preamble:
        raise RecipeError.of("it has no effect: the chat template omits system messages", "data.system_prompt", fix)
    return template


def with_kwargs(template: ChatTemplate, kwargs: Mapping[str, object]) -> ChatTemplate:
    """Return the template with these switches and the facts that result. Raises as `read_template` does."""
    switched = replace(template, kwargs={**kwargs})

    def render(messages: Conversation, tools: Sequence[Mapping[str, object]] | None, answer_next: bool) -> str:
        return switched.render(messages, cast(Tools, tools), answer_next)

    return replace(switched, facts=read_facts(template.processor, kwargs, template.name, render))


def _without_facts(processor: PreTrainedTokenizerBase, recipe: Recipe) -> ChatTemplate:
    where = recipe.model.chat_template or f"{processor.name_or_path or 'the tokenizer'} (chat_template)"
    if not processor.chat_template:
        fix = f"{FIX} suits the model, name a model that has one (often called Instruct), or use task: completion."
        raise EnvironmentProblem.of("the tokenizer has no chat template", str(where), fix)
    named = processor.chat_template
    if isinstance(named, dict) and "default" not in named:
        what = f"the tokenizer has templates named {', '.join(map(repr, sorted(named)))}, but none named 'default'"
        raise EnvironmentProblem.of(what, str(where), f"{FIX} suits the model.")
    template = ChatTemplate(processor, recipe.model.chat_template_kwargs, str(where))
    if any(reads_date(text) for text in {template.text(), template.text([])}):
        what = "the template writes today's date, so its prompts change every day"
        raise EnvironmentProblem.of(what, template.name, f"{FIX} has a fixed date instead.")
    return template


def stop_ids(processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Return the ids that end an answer in this template, and the tokenizer's own end token.

    A base model's tokenizer often ends at `<|endoftext|>` but the template ends turns with `<|im_end|>`, so generation
    must stop at both. Without a template, only the tokenizer's own end token counts.
    """
    if not processor.chat_template:
        return [processor.eos_token_id]
    return read_template(processor, recipe).end_ids


def refuse_pictures(texts: Sequence[str], pictures: Sequence[Picture]) -> list[str] | str:
    """Return the texts, or why they cannot be read if there are pictures."""
    return "it has pictures, but chat.images is false" if pictures else [*texts]


# Conversations in the template's form


@dataclass(frozen=True)
class PreparedChat:
    """A conversation in the form that its template takes."""

    messages: list[Message]
    tools: Tools = None
    keeps_reasoning: bool = False
    """Whether thoughts are part of the prompt and not supervised."""
    marked: bool = False
    """Whether it contains marked special tokens, which are encoded as plain text."""


def prepare_chats(rows: Sequence[ChatRow], template: ChatTemplate, recipe: Recipe) -> list[PreparedChat | str]:
    """Return each row's conversation, or the reason why it is unusable."""
    in_text = recipe.data.special_tokens_in_text
    pattern = control_pattern(template.processor, template.text() + template.text([]))
    texts = "\0".join(joined_text(row["messages"], row.get("tools")) for row in rows)
    present = pattern if in_text != "allow" and pattern.search(texts) else None
    return [_prepare_chat(row, template, recipe, present) for row in rows]


def _prepare_chat(
    row: ChatRow, template: ChatTemplate, recipe: Recipe, pattern: re.Pattern[str] | None
) -> PreparedChat | str:
    for message in row["messages"]:
        if message["role"] == "assistant" and not (message["content"].strip() or message.get("tool_calls")):
            return CUT_THOUGHTS if message.get("reasoning") else "an answer is empty"
    reasoning = row.get("train_reasoning", recipe.data.reasoning)
    messages = template.prepare(row["messages"], reasoning == "drop")
    tools = row.get("tools") or None
    token = find_control_token(pattern, messages, tools) if pattern is not None else None
    if pattern is None or token is None:
        return PreparedChat(messages, tools, reasoning == "keep")
    if recipe.data.special_tokens_in_text == "refuse":
        return f"the conversation contains the special token {token}. {SPELL_OUT}"
    return PreparedChat(mark(messages, pattern), mark(tools, pattern), reasoning == "keep", marked=True)


def render_prompt(
    messages: Conversation,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    tools: Tools = None,
    reasoning: str | None = None,
    expand: Expand = refuse_pictures,
) -> list[int]:
    """Return the token ids of the prompt for an answer to `messages`. Every prompt is made here.

    `reasoning` is the row's own setting for its thoughts; it overrides `data.reasoning`. `expand` writes the tokens of
    pictures.

    Raises:
        DataError: the template rejects these messages, or they contain special tokens that cannot be text.
        EnvironmentProblem: the model has no template.
    """
    calls = any(message.get("tool_calls") or message.get("tool_call_id") for message in messages)
    template = read_template(processor, recipe) if calls else _without_facts(processor, recipe)
    row = {"messages": messages, "tools": tools, "train_reasoning": reasoning or recipe.data.reasoning}
    (chat,) = prepare_chats([cast(ChatRow, row)], template, recipe)
    if isinstance(chat, str):
        raise DataError.of(chat.removesuffix(f". {SPELL_OUT}"), template.name, SPELL_OUT)
    try:
        expanded = expand([template.render(chat.messages, chat.tools, answer_next=True)], list_pictures(chat.messages))
        if isinstance(expanded, str):
            raise TemplateRefusal(expanded)
        (text,) = expanded
        return encode_marked(processor, text) if chat.marked else tokenize_each(processor, [text])[0]
    except UnwritableTextError as error:
        raise DataError.of(str(error), template.name, "Remove it from the conversation.") from error
    except TemplateRefusal as refusal:
        raise DataError.of(str(refusal), template.name, "Look at the order and the roles of the messages.") from refusal


# Answers: the difference of two renderings


def inline_thoughts(template: ChatTemplate, messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages with the thoughts of the last one moved into its text, if the template reads them there."""
    *before, answer = messages
    reasoning = answer.get("reasoning_content")
    if reasoning is None or template.facts.thoughts.written_by != "content":
        return messages
    inline = {**answer, "content": template.facts.thoughts.inline(reasoning, answer["content"])}
    del inline["reasoning_content"]
    return [*before, cast(Message, inline)]


def split_answer(
    facts: TemplateFacts, message: Message, prompt: str, whole: str, keep_reasoning: bool
) -> tuple[str, str, int]:
    """Return the prompt of an answer, its supervised text, and how many bytes of the message that contains.

    `prompt` is the rendering up to the answer, `whole` includes it. With `keep_reasoning` the thoughts belong to the
    prompt; otherwise the complete answer is supervised. Text that the template adds around the message is supervised
    too, but not counted in its bytes.

    Raises:
        TemplateRefusal: the two renderings do not show where this turn begins.
    """
    if not prompt:
        raise TemplateRefusal("an answer has nothing before it")
    reasoning = message.get("reasoning_content")
    body, end = _split_end(facts, message, _written_after(facts, reasoning, prompt, whole))
    content = message["content"].strip()
    if facts.end in content and not is_marked(content):
        raise TemplateRefusal(f"an answer contains the end-of-turn token {facts.end}")
    if reasoning and reasoning not in body:
        raise TemplateRefusal("the chat template leaves out the thoughts of this answer")
    read, answer = "", content if content and content in body and not reasoning else body.strip()
    if reasoning and keep_reasoning:
        thought_end = body.index(reasoning) + len(reasoning)
        read = body[:thought_end] + shared_start(body[thought_end:], facts.thoughts.after)
        answer = body[len(read) :].strip()
    return read, body[len(read) :] + end, len(unmark(answer).encode())


def _written_after(facts: TemplateFacts, reasoning: str | None, prompt: str, whole: str) -> str:
    """Return the text that the model must write after the prompt.

    This is the difference of the two renderings. If the template omits the thoughts, they are inserted; if the prompt
    opens them, so is their end.
    """
    form = facts.thoughts
    if reasoning and facts.closes_thoughts:
        raise TemplateRefusal(CLOSED)
    inserted = reasoning if form.written_by == "prompt" else None
    if whole.startswith(prompt):
        rest = whole[len(prompt) :]
        return rest if inserted is None else form.inline(inserted, rest)
    bare_prompt = prompt.removesuffix(form.opener)
    if form.opener and bare_prompt != prompt and whole.startswith(bare_prompt):
        rest = whole[len(bare_prompt) :]
        if facts.closes_thoughts:
            return rest
        closed = rest.lstrip().startswith(form.after.strip())
        return (inserted or "") + ("" if closed else form.after) + rest
    raise TemplateRefusal("this answer does not start with the chat template's generation prompt")


def _split_end(facts: TemplateFacts, message: Message, difference: str) -> tuple[str, str]:
    """Split a turn into its text and its end; the end stops after the end-of-turn token.

    A turn that calls a tool may end in another token than an answer (Llama 3.1: `<|eom_id|>`). In some formats the
    header of the next message is the end (GLM: `<|user|>`, `<|observation|>`).
    """
    if facts.ends_with_next:
        end = facts.calls.end if message.get("tool_calls") else facts.end
        return difference, end or facts.end
    if difference.endswith(facts.tail):
        return difference[: len(difference) - len(facts.tail)], facts.tail.partition(facts.end)[0] + facts.end
    difference = difference.rstrip()
    for token in facts.special:
        if difference.endswith(token):
            return difference[: len(difference) - len(token)], token
    raise TemplateRefusal("the chat template does not end this answer in an end-of-turn token")
