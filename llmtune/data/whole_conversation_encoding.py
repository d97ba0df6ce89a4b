"""Conversations into token ids of which all are learned, but for messages that say otherwise (`train_on: all`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.data.chat_template import ChatTemplate, Message, TemplateRefusal, Tools, clean
from llmtune.data.overlong import NOTHING, Encoded
from llmtune.data.token_cache import Reading, read_ids
from llmtune.records import Example, Row

if TYPE_CHECKING:
    from llmtune.recipe import Recipe


@dataclass(frozen=True)
class _Draft:
    """A conversation as text, and where the messages stand that are not learned."""

    text: str
    borders: tuple[tuple[int, int], ...]
    learned_bytes: int

    @property
    def texts(self) -> list[str]:
        """All that has to be read as tokens to find those messages."""
        return [self.text, *(self.text[:place] for border in self.borders for place in border)]


def learn_whole(rows: Sequence[Row], template: ChatTemplate, recipe: Recipe) -> list[Encoded]:
    """Supervise every token of a conversation from token 1, but not messages with `train: false`."""
    cleaned = [clean(row["messages"]) for row in rows]
    plain = [k for k, row in enumerate(rows) if not row.get("tools")]
    rendered = dict(zip(plain, template.render_all([cleaned[k] for k in plain]), strict=True))
    drafts = [_draft(row, cleaned[k], template, rendered.get(k)) for k, row in enumerate(rows)]
    texts = list(dict.fromkeys(text for draft in drafts if isinstance(draft, _Draft) for text in draft.texts))
    ids = read_ids(template.processor, texts)
    return [draft if isinstance(draft, str) else _assemble(draft, ids) for draft in drafts]


def _draft(
    row: Row, messages: list[Message], template: ChatTemplate, rendered: str | TemplateRefusal | None
) -> _Draft | str:
    """Render a conversation, unless that is at hand, and find the messages that are not learned."""
    tools = row.get("tools") or None
    skipped = [i for i, message in enumerate(row["messages"]) if not message.get("train", True)]
    if len(skipped) == len(messages):
        return f"{NOTHING}: every message says train: false"
    if isinstance(rendered, TemplateRefusal):
        return str(rendered)
    try:
        text = (template.render(messages, tools) if rendered is None else rendered).rstrip()
        borders = tuple(_range_of(i, text, messages, tools, template) for i in skipped)
    except TemplateRefusal as refusal:
        return str(refusal)
    heard = [message["content"] for i, message in enumerate(messages) if i not in skipped]
    return _Draft(text, borders, sum(len(content.strip().encode()) for content in heard))


def _assemble(draft: _Draft, read: dict[str, Reading]) -> Encoded:
    ids = read[draft.text][0]
    learned = [False, *[True] * (len(ids) - 1)]
    for start, end in draft.borders:
        first, last = read[draft.text[:start]][0], read[draft.text[:end]][0]
        if ids[: len(first)] != first or ids[: len(last)] != last:
            return "the tokenizer joins a message with train: false and its neighbour in one token"
        learned[len(first) : len(last)] = [False] * (len(last) - len(first))
    spans = [i for i in range(len(ids) + 1) if (i < len(ids) and learned[i]) != (i > 0 and learned[i - 1])]
    if not spans:
        return f"{NOTHING}: what does not say train: false stands inside what does"
    return [Example(ids[: spans[-1]].tolist(), spans, draft.learned_bytes)]


def _range_of(index: int, text: str, messages: list[Message], tools: Tools, template: ChatTemplate) -> tuple[int, int]:
    """Return where a message stands in the rendered conversation, by difference."""
    before = template.render(messages[:index], tools) if index else ""
    after = template.render(messages[: index + 1], tools)[: len(text)]
    if not (text.startswith(before) and text.startswith(after)):
        raise TemplateRefusal("the chat template does not say where the message with train: false stands")
    return len(before), len(after)
