"""Conversations into token ids and supervised spans.

A training text is a list of segments, each learned or not; its ids are counted up to each border between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import cast

from transformers import PreTrainedTokenizerBase

from llmtune.data.chat_rows import ChatRow, Message
from llmtune.data.chat_template import (
    ChatTemplate,
    Rendered,
    TemplateRefusal,
    Tools,
    marks_answers,
    read_template,
)
from llmtune.data.chat_turns import Chat, Segment, Turn, cut_turn, cut_turns, prepare_chats, with_answer
from llmtune.data.control_tokens import UnwritableTextError, encode_marked, is_marked, unmark
from llmtune.data.example import Example
from llmtune.data.overlong import NOTHING, ChatFit, Encoded
from llmtune.data.rendering_check import RenderingCheck
from llmtune.data.tokenization import (
    Bordered,
    continue_ids,
    count_shared,
    cut_start,
    decode,
    tokenize,
    tokenize_with_borders,
)
from llmtune.recipe.schema import Recipe


@dataclass(frozen=True)
class Draft:
    """A training text, before it is tokenized."""

    chat: Chat
    messages: int
    """How many messages of the conversation it renders."""
    segments: Sequence[Segment]

    @cached_property
    def text(self) -> str:
        """All segments, joined."""
        return "".join(segment.text for segment in self.segments)

    @property
    def borders(self) -> list[int]:
        """Where segments begin and end."""
        return list(accumulate((len(segment.text) for segment in self.segments), initial=0))


Drafts = list[Draft] | str
"""The training texts of a conversation, or the reason why it has none."""
Assemble = Callable[[Draft, ChatTemplate, Bordered], Encoded]


def encode_chat(rows: Sequence[ChatRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return the examples of each conversation, or the reason why it has none.

    Usually a conversation makes one example. Where the template writes earlier answers otherwise than their prompts
    did (it takes their thoughts out, say), each answer gets an example of its own, after its own prompt. With
    `data.train_on: all` every token from token 1 on is supervised, but not messages with `train: false`.

    Raises:
        EnvironmentProblem: the model has no chat template, or one that cannot be split into turns.
    """
    template, data = read_template(processor, recipe), recipe.data

    def encode(rows: Sequence[ChatRow]) -> list[Encoded]:
        chats = prepare_chats(rows, template, recipe)
        if data.train_on == "all":
            return _encode(_draft_whole(rows, chats, template), template, _assemble_whole)
        return _encode(_draft_turns(rows, chats, template, data.train_on), template, _assemble_turns)

    fit = ChatFit(
        encode=encode,
        count_tokens=lambda texts: [len(ids) for ids in tokenize(processor, texts)],
        shorten=lambda text, tokens: cut_start(processor, text, tokens),
        on_overlong=data.on_overlong,
        max_length=data.max_length,
    )
    encoded = encode(rows)
    return fit.fit([_only_last(row) for row in rows] if data.train_on == "last" else rows, encoded)


def _only_last(row: ChatRow) -> ChatRow:
    """Mark all answers but the last as not learned, so that this holds in each part of a split row."""
    messages = row["messages"]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return {**row, "messages": [m if i == last else {**m, "train": False} for i, m in enumerate(messages)]}


# What is learned of a conversation: its answers


def _draft_turns(
    rows: Sequence[ChatRow], chats: Sequence[Chat | str], template: ChatTemplate, train_on: str
) -> list[Drafts]:
    """Supervise the answers that are to be learned."""
    asked = [_trained_answers(row, train_on) for row in rows]
    asked = [
        chat if isinstance(chat, str) and not isinstance(answers, str) else answers
        for chat, answers in zip(chats, asked, strict=True)
    ]
    usable = [(chat, answers) for chat, answers in zip(chats, asked, strict=True) if not isinstance(answers, str)]
    cut = iter(cut_turns(template, cast(list[tuple[Chat, list[int]]], usable)))
    check = RenderingCheck(template)
    return [
        answers if isinstance(answers, str) else _draft_answers(cast(Chat, chat), next(cut), check)
        for chat, answers in zip(chats, asked, strict=True)
    ]


def _trained_answers(row: ChatRow, train_on: str) -> list[int] | str:
    """Return the numbers of the answers to learn, or why there are none."""
    answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" and i > 0]
    if train_on == "last":
        answers = answers[-1:]
    trained = [i for i in answers if row["messages"][i].get("train", True)]
    if trained:
        return trained
    return f"{NOTHING}: no answer after a question" if not answers else f"{NOTHING}: every answer says train: false"


def _draft_answers(chat: Chat, turns: list[Turn] | str, check: RenderingCheck) -> Drafts:
    """Join turns to texts, and look that each text has all that the conversation says."""
    if isinstance(turns, str):
        return turns

    def write(messages: Sequence[Message], tools: Tools) -> str:
        return cut_turn(check.template, Chat([*messages], tools), len(messages) - 1).text

    drafts = _join(chat, turns)
    for draft in drafts:
        last = draft.messages - 1
        if reason := check.missing(chat.messages[: last + 1], chat.tools, draft.text, [last], write):
            return reason
    return drafts


def _join(chat: Chat, turns: Sequence[Turn]) -> list[Draft]:
    """Make one text of the turns that are in the text of a later one."""
    drafts: list[Draft] = []
    while turns:
        last = turns[-1]
        text = last.text
        segments: list[Segment] = []
        apart: list[Turn] = []
        at = 0
        for turn in turns:
            if turn.start < at or not (turn is last or turn.is_in(text, last)):
                apart.append(turn)
                continue
            segments += [Segment(text[at : turn.start]), turn.answer]
            at = turn.start + len(turn.answer.text)
        drafts.append(Draft(chat, last.index + 1, segments))
        turns = apart
    return drafts[::-1]


def _assemble_turns(draft: Draft, template: ChatTemplate, bordered: Bordered) -> Encoded:
    """Find the answers among the tokens; an answer whose first token would reach into its prompt is encoded apart."""
    ids, counts = bordered
    processor = template.processor
    examples: list[Example] = []
    spans: list[int] = []
    target_bytes = 0
    for segment, (start, end), at in zip(draft.segments, pairwise(counts), draft.borders, strict=False):
        if not segment.learned:
            continue
        if start is not None and end is not None:
            spans += [start, end]
            target_bytes += segment.answer_bytes
            continue
        if start is not None:
            return "the tokenizer joins the end of an answer and the text after it in one token"
        prompt = draft.text[:at]
        before = [] if draft.chat.marked else tokenize(processor, [prompt])[0]
        target = None if draft.chat.marked else continue_ids(processor, before, prompt, segment.text)
        if target is None:
            return "the tokenizer joins the end of the prompt and the start of the answer in one token"
        examples.append(Example([*before, *target], [len(before), len(before) + len(target)], segment.answer_bytes))
    if spans:
        example = Example(ids[: spans[-1]], spans, target_bytes)
        if reason := _check_marks(example, draft, template):
            return reason
        examples.append(example)
    return examples


def _check_marks(example: Example, draft: Draft, template: ChatTemplate) -> str | None:
    """Compare the spans with the template's own `{% generation %}` marks, if it has them.

    Marks may leave out what is no text of the answer: a header, line breaks, the end-of-turn token.
    """
    processor = template.processor
    chat = draft.chat
    marked = marks_answers(template.text(chat.tools))
    if not processor.is_fast or not marked or chat.marked:
        return None
    rendered = processor.apply_chat_template(
        list(with_answer(template, chat.messages, draft.messages - 1)),
        tools=chat.tools,
        chat_template=template.text(chat.tools),
        return_dict=True,
        return_assistant_tokens_mask=True,
        **template.kwargs,
    )
    marks = rendered["assistant_masks"]
    for start, end in zip(example.spans[::2], example.spans[1::2], strict=True):
        inside = [i for i in range(start, end) if marks[i]]
        left = [*example.input_ids[start : inside[0]], *example.input_ids[inside[-1] + 1 : end]] if inside else []
        before = start
        while before and marks[before - 1]:
            before -= 1
        gaps = not inside or len(inside) != inside[-1] + 1 - inside[0]
        if gaps or _has_text([*left, *example.input_ids[before:start]], template):
            return "the chat template's {% generation %} marks are not where its answers are"
    return None


def _has_text(ids: Sequence[int], template: ChatTemplate) -> bool:
    text = decode(template.processor, ids)
    for token in template.facts.special:
        text = text.replace(token, "")
    return bool(text.strip())


# What is learned of a conversation: everything


def _draft_whole(rows: Sequence[ChatRow], chats: Sequence[Chat | str], template: ChatTemplate) -> list[Drafts]:
    """Supervise every message but those with `train: false`."""
    plain = [chat for chat in chats if isinstance(chat, Chat) and not _has_thoughts(chat)]
    rendered = template.render_batch([(chat.messages, chat.tools) for chat in plain])
    texts = {id(chat): text for chat, text in zip(plain, rendered, strict=True)}
    check = RenderingCheck(template)
    return [
        chat if isinstance(chat, str) else _draft_messages(row, chat, check, texts.get(id(chat)))
        for row, chat in zip(rows, chats, strict=True)
    ]


def _has_thoughts(chat: Chat) -> bool:
    return any("reasoning_content" in message for message in chat.messages)


def _draft_messages(row: ChatRow, chat: Chat, check: RenderingCheck, rendered: Rendered | None) -> Drafts:
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
        ranges = [_range_of(i, text, messages, tools, check.template) for i in skipped]
    except TemplateRefusal as refusal:
        return str(refusal)
    thoughts = [] if chat.keeps_reasoning else learned
    if reason := check.missing(messages, tools, text, thoughts, write):
        fix = "; data.train_on: assistant makes an example of each answer" if "the thoughts" in reason else ""
        return reason + fix
    if chat.keeps_reasoning:
        ranges += _thought_ranges(messages, text)
    said = [messages[i]["content"].strip() for i in learned]
    said += [messages[i].get("reasoning_content", "") for i in thoughts]
    return [Draft(chat, len(messages), _without(text, ranges, sum(len(unmark(part).encode()) for part in said)))]


def _without(text: str, ranges: Sequence[tuple[int, int]], answer_bytes: int) -> list[Segment]:
    """Cut a text into what is learned and the ranges that are not; the first segment counts all bytes."""
    segments: list[Segment] = []
    at = 0
    for start, end in sorted(ranges):
        if end > at:
            segments += [Segment(text[at : max(at, start)], True), Segment(text[max(at, start) : end])]
            at = end
    first, *rest = [*segments, Segment(text[at:], True)]
    return [replace(first, answer_bytes=answer_bytes), *rest]


def _write(template: ChatTemplate, messages: Sequence[Message], tools: Tools) -> str:
    """Render a conversation with the thoughts of its last answer."""
    last = len(messages) - 1
    if messages[last].get("reasoning_content") and template.facts.thoughts.written_by == "prompt":
        return cut_turn(template, Chat([*messages], tools), last).text
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


def _assemble_whole(draft: Draft, template: ChatTemplate, bordered: Bordered) -> Encoded:
    ids, counts = bordered
    learned = [False] * len(ids)
    for segment, (start, end) in zip(draft.segments, pairwise(counts), strict=True):
        if start is None or end is None:
            return "the tokenizer joins what is not learned and its neighbour in one token"
        learned[start:end] = [segment.learned] * (end - start)
    learned[:1] = [False]
    spans = [i for i in range(len(ids) + 1) if (i < len(ids) and learned[i]) != (i > 0 and learned[i - 1])]
    if not spans:
        return f"{NOTHING}: what does not say train: false stands inside what does"
    return [Example(ids[: spans[-1]], spans, draft.segments[0].answer_bytes)]


def _range_of(
    index: int, text: str, messages: Sequence[Message], tools: Tools, template: ChatTemplate
) -> tuple[int, int]:
    """Return where a message stands in the rendered conversation, by difference."""
    before = template.render(messages[:index], tools) if index else ""
    after = template.render(messages[: index + 1], tools)[: len(text)]
    if not (text.startswith(before) and text.startswith(after)):
        raise TemplateRefusal("the chat template does not say where the message with train: false stands")
    return len(before), len(after)


# Token ids


def _encode(rows: Sequence[Drafts], template: ChatTemplate, assemble: Assemble) -> list[Encoded]:
    """Return what `assemble` makes of the texts of each row with their ids, or the reason why there is nothing."""
    drafts = [draft for row in rows if not isinstance(row, str) for draft in row]
    plain = [draft for draft in drafts if not is_marked(draft.text)]
    borders = [draft.borders for draft in plain]
    found = tokenize_with_borders(template.processor, [draft.text for draft in plain], borders)
    bordered = {id(draft): ids for draft, ids in zip(plain, found, strict=True)}
    encoded: list[Encoded] = []
    for row in rows:
        if isinstance(row, str):
            encoded.append(row)
            continue
        examples: list[Example] = []
        for draft in row:
            try:
                parts = assemble(draft, template, bordered.get(id(draft)) or _encode_marked(draft, template))
            except UnwritableTextError as error:
                parts = str(error)
            if isinstance(parts, str):
                encoded.append(parts)
                break
            examples += parts
        else:
            encoded.append(examples)
    return encoded


def _encode_marked(draft: Draft, template: ChatTemplate) -> Bordered:
    """Return the ids of a text with marked tokens, and how many are before each border."""
    ids = encode_marked(template.processor, draft.text)
    heads = [encode_marked(template.processor, draft.text[:border]) for border in draft.borders]
    return ids, [count_shared(ids, head) for head in heads]
