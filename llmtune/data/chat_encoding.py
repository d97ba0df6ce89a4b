"""Conversations into token ids and supervised spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.data.chat_rows import ChatRow, Message
from llmtune.data.chat_template import (
    ChatTemplate,
    TemplateRefusal,
    Tools,
    Turn,
    clean,
    cut_turn,
    marks_answers,
    read_template,
    split_turn,
)
from llmtune.data.overlong import NOTHING, Encoded, fit_chat
from llmtune.data.tokenization import continue_ids, cut_start, decode, tokenize_distinct
from llmtune.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

Ids = Mapping[str, list[int]]
"""The token ids of each rendered text."""
Rendered = str | TemplateRefusal


@dataclass(frozen=True)
class _Group:
    """Answers that stand in one text, each behind its own prompt; the text ends with the last of them."""

    text: str
    turns: tuple[Turn, ...]
    messages: int
    """How many messages the text renders."""


@dataclass(frozen=True)
class _Draft:
    """A conversation as texts, before they are tokenized."""

    messages: list[Message]
    tools: Tools
    groups: tuple[_Group, ...]

    @property
    def texts(self) -> list[str]:
        """All that must be tokenized to find where answers begin and end."""
        prefixes = [prefix for group in self.groups for turn in group.turns for prefix in _prefixes(group, turn)]
        return [*(group.text for group in self.groups), *prefixes]


def _prefixes(group: _Group, turn: Turn) -> tuple[str, str]:
    """Return the text up to the start of an answer, and up to its end."""
    return turn.prompt, group.text[: turn.end]


def encode_chat(rows: Sequence[ChatRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return the examples of each conversation, or the reason why it has none.

    Usually a conversation makes one example. Where the template writes earlier answers otherwise than their prompts
    did (it takes their thoughts out, say), each answer gets an example of its own, behind its own prompt.

    Raises:
        EnvironmentProblem: the model has no chat template, or one that cannot be split into turns.
    """
    template = read_template(processor, recipe)
    encode = _encode_whole if recipe.data.train_on == "all" else _encode_turns

    def encode_one(row: ChatRow) -> Encoded:
        return encode([row], template, recipe)[0]

    def shorten(text: str, tokens: int) -> str:
        return cut_start(processor, text, tokens)

    def fit(row: ChatRow, examples: Encoded) -> Encoded:
        if isinstance(examples, str):
            return examples
        if recipe.data.train_on == "last":
            row = _only_last(row)
        data = recipe.data
        return fit_chat(
            row, examples, encode_one, on_overlong=data.on_overlong, max_length=data.max_length, shorten=shorten
        )

    return [fit(row, examples) for row, examples in zip(rows, encode(rows, template, recipe), strict=True)]


# Answers alone (train_on: assistant, last)


def _encode_turns(rows: Sequence[ChatRow], template: ChatTemplate, recipe: Recipe) -> list[Encoded]:
    """Supervise the assistant's turns, whatever the lengths."""
    drafts = _draft_turns(rows, template, recipe.data.train_on)
    texts = [text for draft in drafts if isinstance(draft, _Draft) for text in draft.texts]
    ids = tokenize_distinct(template.processor, texts)
    return [draft if isinstance(draft, str) else _assemble_turns(draft, template, ids) for draft in drafts]


def _draft_turns(rows: Sequence[ChatRow], template: ChatTemplate, train_on: str) -> list[_Draft | str]:
    """Cut the answers to learn out of conversations; those without tools are rendered together."""
    trained = [_trained_answers(row, train_on) for row in rows]
    cleaned = [clean(row["messages"]) for row in rows]
    turns = [
        (k, i)
        for k, answers in enumerate(trained)
        if not isinstance(answers, str) and not rows[k].get("tools")
        for i in answers
    ]
    prompts = template.render_batch([cleaned[k][:i] for k, i in turns], answer_next=True)
    wholes = template.render_batch([cleaned[k][: i + 1] for k, i in turns])
    rendered = dict(zip(turns, zip(prompts, wholes, strict=True), strict=True))
    drafts: list[_Draft | str] = []
    for k, answers in enumerate(trained):
        if isinstance(answers, str):
            drafts.append(answers)
            continue
        tools = rows[k].get("tools") or None
        try:
            cut = [_cut(template, cleaned[k], tools, i, rendered.get((k, i))) for i in answers]
        except TemplateRefusal as refusal:
            drafts.append(str(refusal))
            continue
        drafts.append(_Draft(cleaned[k], tools, _group(cut)))
    return drafts


def _trained_answers(row: ChatRow, train_on: str) -> list[int] | str:
    """Return the numbers of the answers to learn, or why there are none."""
    answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" and i > 0]
    if train_on == "last":
        answers = answers[-1:]
    trained = [i for i in answers if row["messages"][i].get("train", True)]
    if trained:
        return trained
    return f"{NOTHING}: no answer after a question" if not answers else f"{NOTHING}: every answer says train: false"


def _cut(
    template: ChatTemplate,
    messages: list[Message],
    tools: Tools,
    index: int,
    rendered: tuple[Rendered, Rendered] | None,
) -> Turn:
    """Cut out a turn, whose renderings (or the refusal in place of one) may be at hand."""
    if rendered is None:
        return cut_turn(template, messages, tools, index)
    prompt, whole = rendered
    if isinstance(prompt, TemplateRefusal):
        raise prompt
    if isinstance(whole, TemplateRefusal):
        raise whole
    return split_turn(template, messages, index, prompt, whole)


def _group(turns: list[Turn]) -> tuple[_Group, ...]:
    """Join the turns that stand in the same text."""
    groups = []
    while turns:
        text = turns[-1].prompt + turns[-1].target
        inside = tuple(turn for turn in turns if turn is turns[-1] or text.startswith(turn.prompt + turn.target))
        groups.append(_Group(text, inside, turns[-1].index + 1))
        turns = [turn for turn in turns if turn not in inside]
    return tuple(reversed(groups))


def _assemble_turns(draft: _Draft, template: ChatTemplate, ids: Ids) -> Encoded:
    """Find the answers among the tokens; an answer whose first token would reach into its prompt is encoded apart."""
    examples = []
    for group in draft.groups:
        whole = ids[group.text]
        spans: list[int] = []
        target_bytes = 0
        for turn in group.turns:
            before, upto = (ids[prefix] for prefix in _prefixes(group, turn))
            if whole[: len(before)] == before:
                spans += [len(before), len(upto)]
                target_bytes += turn.target_bytes
                continue
            target = continue_ids(template.processor, before, turn.prompt, turn.target)
            if target is None:
                return "the tokenizer joins the end of the prompt and the start of the answer in one token"
            examples.append(Example([*before, *target], [len(before), len(before) + len(target)], turn.target_bytes))
        if spans:
            example = Example(whole[: spans[-1]], spans, target_bytes)
            if reason := _check_marks(example, group, draft, template):
                return reason
            examples.append(example)
    return examples


def _check_marks(example: Example, group: _Group, draft: _Draft, template: ChatTemplate) -> str | None:
    """Compare the spans with the template's own `{% generation %}` marks, if it has them.

    Marks may leave out what is no text of the answer: a header, line breaks, the end-of-turn token.
    """
    processor = template.processor
    marked = template.marked if draft.tools is None else marks_answers(template.text(draft.tools))
    if not processor.is_fast or not marked:
        return None
    rendered = processor.apply_chat_template(
        draft.messages[: group.messages],
        tools=draft.tools,
        chat_template=template.text(draft.tools),
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
    for token in template.special:
        text = text.replace(token, "")
    return bool(text.strip())


def _only_last(row: ChatRow) -> ChatRow:
    """Mark all answers but the last as not learned, so that this holds in each part of a split row."""
    messages = row["messages"]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return {**row, "messages": [m if i == last else {**m, "train": False} for i, m in enumerate(messages)]}


# Everything (train_on: all)


@dataclass(frozen=True)
class _WholeDraft:
    """A conversation as text, and where the messages stand that are not learned."""

    text: str
    borders: tuple[tuple[int, int], ...]
    target_bytes: int

    @property
    def texts(self) -> list[str]:
        """All that must be tokenized to find those messages."""
        return [self.text, *(self.text[:offset] for border in self.borders for offset in border)]


def _encode_whole(rows: Sequence[ChatRow], template: ChatTemplate, recipe: Recipe) -> list[Encoded]:
    """Supervise every token of a conversation from token 1, but not messages with `train: false`."""
    cleaned = [clean(row["messages"]) for row in rows]
    plain = [k for k, row in enumerate(rows) if not row.get("tools")]
    rendered = dict(zip(plain, template.render_batch([cleaned[k] for k in plain]), strict=True))
    drafts = [_draft_whole(row, cleaned[k], template, rendered.get(k)) for k, row in enumerate(rows)]
    texts = [text for draft in drafts if isinstance(draft, _WholeDraft) for text in draft.texts]
    ids = tokenize_distinct(template.processor, texts)
    return [draft if isinstance(draft, str) else _assemble_whole(draft, ids) for draft in drafts]


def _draft_whole(
    row: ChatRow, messages: list[Message], template: ChatTemplate, rendered: Rendered | None
) -> _WholeDraft | str:
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
    learned = [message["content"] for i, message in enumerate(messages) if i not in skipped]
    return _WholeDraft(text, borders, sum(len(content.strip().encode()) for content in learned))


def _assemble_whole(draft: _WholeDraft, ids_of: Ids) -> Encoded:
    ids = ids_of[draft.text]
    learned = [False, *[True] * (len(ids) - 1)]
    for start, end in draft.borders:
        first, last = ids_of[draft.text[:start]], ids_of[draft.text[:end]]
        if ids[: len(first)] != first or ids[: len(last)] != last:
            return "the tokenizer joins a message with train: false and its neighbour in one token"
        learned[len(first) : len(last)] = [False] * (len(last) - len(first))
    spans = [i for i in range(len(ids) + 1) if (i < len(ids) and learned[i]) != (i > 0 and learned[i - 1])]
    if not spans:
        return f"{NOTHING}: what does not say train: false stands inside what does"
    return [Example(ids[: spans[-1]], spans, draft.target_bytes)]


def _range_of(index: int, text: str, messages: list[Message], tools: Tools, template: ChatTemplate) -> tuple[int, int]:
    """Return where a message stands in the rendered conversation, by difference."""
    before = template.render(messages[:index], tools) if index else ""
    after = template.render(messages[: index + 1], tools)[: len(text)]
    if not (text.startswith(before) and text.startswith(after)):
        raise TemplateRefusal("the chat template does not say where the message with train: false stands")
    return len(before), len(after)
