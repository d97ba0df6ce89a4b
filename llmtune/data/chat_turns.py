"""A turn of a conversation: the text that an answer is asked for with, and the text of the answer that is learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from llmtune.data.answer_format import shared_start
from llmtune.data.chat_rows import ChatRow, Message
from llmtune.data.chat_template import SPELL_OUT, ChatTemplate, TemplateRefusal, Tools
from llmtune.data.control_tokens import (
    UnwritableTextError,
    control_pattern,
    encode_marked,
    find_control_token,
    is_marked,
    joined_text,
    mark,
    unmark,
)
from llmtune.data.overlong import Encoded
from llmtune.data.tokenization import tokenize_distinct
from llmtune.recipe.schema import Recipe

CLOSED = (
    "the prompt closes the thoughts before the answer begins, and this answer has some: "
    "set data.reasoning: drop, or model.chat_template_kwargs so that the template lets the model think"
)


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


def with_answer(template: ChatTemplate, messages: Sequence[Message], index: int) -> Sequence[Message]:
    """Return the messages up to the answer `index`, its thoughts where the template takes them from."""
    answer = messages[index]
    reasoning = answer.get("reasoning_content")
    if reasoning is None or template.thoughts.written_by != "content":
        return messages[: index + 1]
    inline = {**answer, "content": template.thoughts.inline(reasoning, answer["content"])}
    del inline["reasoning_content"]
    return [*messages[:index], cast(Message, inline)]


def cut_turn(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools, index: int, keep_reasoning: bool = False
) -> Turn:
    """Cut the assistant's turn `index` out of a conversation (as `template.prepare` returns it).

    Raises:
        TemplateRefusal: the template does not take the messages, or this turn cannot be told from what is before it.
    """
    prompt = template.render(messages[:index], tools, answer_next=True)
    whole = template.render(with_answer(template, messages, index), tools)
    return split_turn(template, messages, index, prompt, whole, keep_reasoning)


def split_turn(
    template: ChatTemplate,
    messages: Sequence[Message],
    index: int,
    prompt: str,
    whole: str,
    keep_reasoning: bool = False,
) -> Turn:
    """Take the turn `index` out of the renderings up to it (`prompt`, ready for an answer) and with it.

    With `keep_reasoning` its thoughts are a part of the prompt.

    Raises:
        TemplateRefusal: this turn cannot be told from what is before it.
    """
    if not prompt:
        raise TemplateRefusal("an answer has nothing before it")
    message = messages[index]
    reasoning = message.get("reasoning_content")
    body, end = _split_end(template, message, _written(template, reasoning, prompt, whole))
    content = message["content"].strip()
    if not content and not message.get("tool_calls"):
        raise TemplateRefusal("an answer is empty")
    if template.end in content and not is_marked(content):
        raise TemplateRefusal(f"an answer contains the end-of-turn token {template.end}")
    learned = content if content and content in body and not reasoning else body.strip()
    given = ""
    if reasoning and reasoning not in body:
        raise TemplateRefusal("the chat template leaves out the thoughts of this answer")
    if reasoning and keep_reasoning:
        thought_end = body.index(reasoning) + len(reasoning)
        given = body[:thought_end] + shared_start(body[thought_end:], template.thoughts.after)
        learned = body[len(given) :].strip()
    return Turn(index, prompt + given, body[len(given) :] + end, len(unmark(learned).encode()))


def _written(template: ChatTemplate, reasoning: str | None, prompt: str, whole: str) -> str:
    """Return what the model has to write behind the prompt.

    It is the difference of the two renderings; thoughts that the template leaves out of what it renders are put in, and
    so is the end of those that the prompt begins.
    """
    form = template.thoughts
    if reasoning and template.closes_thoughts:
        raise TemplateRefusal(CLOSED)
    inserted = reasoning if form.written_by == "prompt" else None
    if whole.startswith(prompt):
        rest = whole[len(prompt) :]
        return rest if inserted is None else form.inline(inserted, rest)
    asked = prompt.removesuffix(form.opener)
    if form.opener and asked != prompt and whole.startswith(asked):
        rest = whole[len(asked) :]
        if template.closes_thoughts:
            return rest
        closed = rest.lstrip().startswith(form.after.strip())
        return (inserted or "") + ("" if closed else form.after) + rest
    raise TemplateRefusal("the chat template does not begin this answer as it asks for one")


def _split_end(template: ChatTemplate, message: Message, difference: str) -> tuple[str, str]:
    """Split a turn into its text and its end, which is cut after the end-of-turn token.

    A turn that calls a tool may end in another token than an answer (Llama 3.1: `<|eom_id|>`), and in some formats the
    header of the next message is the end (GLM: `<|user|>`, `<|observation|>`).
    """
    if template.ends_with_next:
        end = template.calls.end if message.get("tool_calls") else template.end
        return difference, end or template.end
    if difference.endswith(template.tail):
        body = difference[: len(difference) - len(template.tail)]
        return body, template.tail[: template.tail.index(template.end) + len(template.end)]
    difference = difference.rstrip()
    for token in template.special:
        if difference.endswith(token):
            return difference[: len(difference) - len(token)], token
    raise TemplateRefusal("the chat template does not end this answer in an end-of-turn token")


# Conversations made ready for their template


Ids = Mapping[str, list[int]]
"""The token ids of each rendered text."""


class Draft(Protocol):
    """A conversation as text, before it is tokenized."""

    @property
    def texts(self) -> list[str]:
        """All that must be tokenized to find what is learned."""


D = TypeVar("D", bound=Draft)


@dataclass(frozen=True)
class Chat:
    """A conversation as its template takes it."""

    messages: list[Message]
    tools: Tools
    keeps_reasoning: bool = False
    """Whether thoughts are read and not learned."""
    marked: bool = False
    """Whether special tokens in it are marked, which are to be plain text."""


def prepare_chats(rows: Sequence[ChatRow], template: ChatTemplate, recipe: Recipe) -> list[Chat | str]:
    """Return each row's conversation, or the reason why it cannot be used."""
    in_text = recipe.data.special_tokens_in_text
    pattern = control_pattern(template.processor, template.text())
    texts = "\0".join(joined_text(row["messages"], row.get("tools")) for row in rows)
    present = pattern if in_text != "allow" and pattern.search(texts) else None
    return [_prepare(row, template, recipe, present) for row in rows]


def _prepare(row: ChatRow, template: ChatTemplate, recipe: Recipe, pattern: re.Pattern[str] | None) -> Chat | str:
    reasoning = row.get("train_reasoning", recipe.data.reasoning)
    messages = template.prepare(row["messages"], reasoning == "drop")
    tools = row.get("tools") or None
    token = find_control_token(pattern, messages, tools) if pattern is not None else None
    if pattern is None or token is None:
        return Chat(messages, tools, reasoning == "keep")
    if recipe.data.special_tokens_in_text == "refuse":
        return f"the conversation holds the special token {token}. {SPELL_OUT}"
    return Chat(mark(messages, pattern), mark(tools, pattern), reasoning == "keep", marked=True)


def encode_drafts(
    drafts: Sequence[D | str], template: ChatTemplate, assemble: Callable[[D, ChatTemplate, Ids], Encoded]
) -> list[Encoded]:
    """Return what `assemble` makes of each draft with the ids of its texts, or the reason why there is nothing."""
    distinct = dict.fromkeys(text for draft in drafts if not isinstance(draft, str) for text in draft.texts)
    marked = [text for text in distinct if is_marked(text)]
    ids = tokenize_distinct(template.processor, [text for text in distinct if not is_marked(text)])
    refused = {}
    for text in marked:
        try:
            ids[text] = encode_marked(template.processor, text)
        except UnwritableTextError as error:
            refused[text] = str(error)

    def encode(draft: D | str) -> Encoded:
        if isinstance(draft, str):
            return draft
        reason = next((refused[text] for text in draft.texts if text in refused), None) if refused else None
        return reason or assemble(draft, template, ids)

    return [encode(draft) for draft in drafts]
