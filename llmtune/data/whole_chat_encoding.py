"""Conversations of which everything is learned (`data.train_on: all`), but for messages that say `train: false`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.data.chat_rows import ChatRow, Message
from llmtune.data.chat_template import ChatTemplate, Rendered, TemplateRefusal, Tools
from llmtune.data.chat_turns import cut_turn, with_answer
from llmtune.data.control_tokens import unmark
from llmtune.data.overlong import NOTHING, Encoded
from llmtune.data.prepared_chats import Chat, Ids, encode_drafts, prepare_chats
from llmtune.data.rendering_check import RenderingCheck
from llmtune.records import Example

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe


@dataclass(frozen=True)
class _WholeDraft:
    """A conversation as text, and where the messages stand that are not learned."""

    text: str
    borders: tuple[tuple[int, int], ...]
    target_bytes: int

    @property
    def texts(self) -> list[str]:
        """The whole, and what is before and up to the end of each of those messages."""
        return [self.text, *(self.text[:offset] for border in self.borders for offset in border)]


def encode_whole(rows: Sequence[ChatRow], template: ChatTemplate, recipe: Recipe) -> list[Encoded]:
    """Supervise every token of a conversation from token 1, but not messages with `train: false`."""
    chats = prepare_chats(rows, template, recipe)
    plain = {k: chat for k, chat in enumerate(chats) if isinstance(chat, Chat) and not _has_parts(chat)}
    rendered = dict(zip(plain, template.render_batch([chat.messages for chat in plain.values()]), strict=True))
    check = RenderingCheck(template)
    drafts = [
        chat if isinstance(chat, str) else _draft_whole(row, chat, check, rendered.get(k))
        for k, (row, chat) in enumerate(zip(rows, chats, strict=True))
    ]
    return encode_drafts(drafts, template, _assemble_whole)


def _has_parts(chat: Chat) -> bool:
    """Whether there is more in a conversation than texts, so that it is rendered by itself."""
    return bool(chat.tools) or any("reasoning_content" in message for message in chat.messages)


def _draft_whole(row: ChatRow, chat: Chat, check: RenderingCheck, rendered: Rendered | None) -> _WholeDraft | str:
    """Render a conversation, unless that is at hand, and find the parts that are not learned."""
    messages, tools = chat.messages, chat.tools
    skipped = [i for i, message in enumerate(row["messages"]) if not message.get("train", True)]
    if len(skipped) == len(messages):
        return f"{NOTHING}: every message says train: false"
    if isinstance(rendered, TemplateRefusal):
        return str(rendered)

    def write(messages: Sequence[Message], tools: Tools) -> str:
        return _write(check.template, messages, tools)

    learned = [i for i in range(len(messages)) if i not in skipped]
    try:
        text = write(messages, tools) if rendered is None else rendered.rstrip()
        borders = [_range_of(i, text, messages, tools, check.template) for i in skipped]
    except TemplateRefusal as refusal:
        return str(refusal)
    thoughts = [] if chat.keeps_reasoning else learned
    if reason := check.missing(messages, tools, text, thoughts, write):
        fix = "; data.train_on: assistant makes an example of each answer" if "the thoughts" in reason else ""
        return reason + fix
    if chat.keeps_reasoning:
        borders += _thought_ranges(messages, text)
    said = [messages[i]["content"].strip() for i in learned]
    said += [messages[i].get("reasoning_content", "") for i in thoughts]
    return _WholeDraft(text, tuple(sorted(borders)), sum(len(unmark(part).encode()) for part in said))


def _write(template: ChatTemplate, messages: Sequence[Message], tools: Tools) -> str:
    """Render a conversation with the thoughts of its last answer."""
    last = len(messages) - 1
    if messages[last].get("reasoning_content") and template.thoughts.written_by == "prompt":
        turn = cut_turn(template, messages, tools, last)
        return turn.prompt + turn.target
    return template.render(with_answer(template, messages, last), tools).rstrip()


def _thought_ranges(messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
    """Return where thoughts stand in a rendered conversation; those that the template left out stand nowhere."""
    ranges = []
    at = 0
    for reasoning in filter(None, (message.get("reasoning_content") for message in messages)):
        start = text.find(reasoning, at)
        if start >= 0:
            at = start + len(reasoning)
            ranges.append((start, at))
    return ranges


def _assemble_whole(draft: _WholeDraft, template: ChatTemplate, ids_of: Ids) -> Encoded:
    ids = ids_of[draft.text]
    learned = [False, *[True] * (len(ids) - 1)]
    for start, end in draft.borders:
        first, last = ids_of[draft.text[:start]], ids_of[draft.text[:end]]
        if ids[: len(first)] != first or ids[: len(last)] != last:
            return "the tokenizer joins what is not learned and its neighbour in one token"
        learned[len(first) : len(last)] = [False] * (len(last) - len(first))
    spans = [i for i in range(len(ids) + 1) if (i < len(ids) and learned[i]) != (i > 0 and learned[i - 1])]
    if not spans:
        return f"{NOTHING}: what does not say train: false stands inside what does"
    return [Example(ids[: spans[-1]], spans, draft.target_bytes)]


def _range_of(
    index: int, text: str, messages: Sequence[Message], tools: Tools, template: ChatTemplate
) -> tuple[int, int]:
    """Return where a message stands in the rendered conversation, by difference."""
    before = template.render(messages[:index], tools) if index else ""
    after = template.render(messages[: index + 1], tools)[: len(text)]
    if not (text.startswith(before) and text.startswith(after)):
        raise TemplateRefusal("the chat template does not say where the message with train: false stands")
    return len(before), len(after)
