"""Conversations into token ids and supervised spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmtune.data.chat_rows import ChatRow, Message
from llmtune.data.chat_template import ChatTemplate, Rendered, TemplateRefusal, Tools, marks_answers, read_template
from llmtune.data.chat_turns import Chat, Ids, Turn, cut_turn, encode_drafts, prepare_chats, split_turn, with_answer
from llmtune.data.control_tokens import unmark
from llmtune.data.overlong import NOTHING, ChatFit, Encoded
from llmtune.data.rendering_check import RenderingCheck
from llmtune.data.tokenization import continue_ids, cut_start, decode, tokenize
from llmtune.recipe.schema import Recipe
from llmtune.records import Example


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

    chat: Chat
    groups: tuple[_Group, ...]

    @property
    def texts(self) -> list[str]:
        """Whole texts, and what is before and up to the end of each answer."""
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
    encode = encode_whole if recipe.data.train_on == "all" else _encode_turns

    data = recipe.data
    fit = ChatFit(
        encode=lambda rows: encode(rows, template, recipe),
        count_tokens=lambda texts: [len(ids) for ids in tokenize(processor, texts)],
        shorten=lambda text, tokens: cut_start(processor, text, tokens),
        on_overlong=data.on_overlong,
        max_length=data.max_length,
    )
    encoded = encode(rows, template, recipe)
    return fit.fit([_only_last(row) for row in rows] if data.train_on == "last" else rows, encoded)


def _encode_turns(rows: Sequence[ChatRow], template: ChatTemplate, recipe: Recipe) -> list[Encoded]:
    """Supervise the assistant's turns, whatever the lengths."""
    return encode_drafts(_draft_turns(rows, template, recipe), template, _assemble_turns)


def _draft_turns(rows: Sequence[ChatRow], template: ChatTemplate, recipe: Recipe) -> list[_Draft | str]:
    """Cut the answers to learn out of conversations; those without tools are rendered together."""
    trained = [_trained_answers(row, recipe.data.train_on) for row in rows]
    chats = prepare_chats(rows, template, recipe)
    turns = [
        (k, i)
        for k, (answers, chat) in enumerate(zip(trained, chats, strict=True))
        if not isinstance(answers, str) and isinstance(chat, Chat) and not chat.tools
        for i in answers
    ]
    messages = {k: chat.messages for k, chat in enumerate(chats) if isinstance(chat, Chat)}
    prompts = template.render_batch([messages[k][:i] for k, i in turns], answer_next=True)
    wholes = template.render_batch([with_answer(template, messages[k], i) for k, i in turns])
    rendered = dict(zip(turns, zip(prompts, wholes, strict=True), strict=True))
    check = RenderingCheck(template)
    drafts: list[_Draft | str] = []
    for k, (answers, chat) in enumerate(zip(trained, chats, strict=True)):
        if isinstance(answers, str) or isinstance(chat, str):
            drafts.append(answers if isinstance(answers, str) else str(chat))
            continue
        try:
            groups = _group([_cut(template, chat, i, rendered.get((k, i))) for i in answers])
        except TemplateRefusal as refusal:
            drafts.append(str(refusal))
            continue
        drafts.append(_missing(groups, chat, check) or _Draft(chat, groups))
    return drafts


def _missing(groups: Sequence[_Group], chat: Chat, check: RenderingCheck) -> str | None:
    """Return what of a conversation does not show in the texts that it is learned from."""

    def write(messages: Sequence[Message], tools: Tools) -> str:
        turn = cut_turn(check.template, messages, tools, len(messages) - 1)
        return turn.prompt + turn.target

    found = (
        check.missing(chat.messages[: group.messages], chat.tools, group.text, [group.messages - 1], write)
        for group in groups
    )
    return next((reason for reason in found if reason), None)


def _trained_answers(row: ChatRow, train_on: str) -> list[int] | str:
    """Return the numbers of the answers to learn, or why there are none."""
    answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" and i > 0]
    if train_on == "last":
        answers = answers[-1:]
    trained = [i for i in answers if row["messages"][i].get("train", True)]
    if trained:
        return trained
    return f"{NOTHING}: no answer after a question" if not answers else f"{NOTHING}: every answer says train: false"


def _cut(template: ChatTemplate, chat: Chat, index: int, rendered: tuple[Rendered, Rendered] | None) -> Turn:
    """Cut out a turn, whose renderings (or the refusal in place of one) may be at hand."""
    if rendered is None:
        return cut_turn(template, chat.messages, chat.tools, index, chat.keeps_reasoning)
    prompt, whole = rendered
    if isinstance(prompt, TemplateRefusal):
        raise prompt
    if isinstance(whole, TemplateRefusal):
        raise whole
    return split_turn(template, chat.messages, index, prompt, whole, chat.keeps_reasoning)


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
            target = None
            if not draft.chat.marked:
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
    chat = draft.chat
    marked = template.marked if chat.tools is None else marks_answers(template.text(chat.tools))
    if not processor.is_fast or not marked or chat.marked:
        return None
    rendered = processor.apply_chat_template(
        list(with_answer(template, chat.messages, group.messages - 1)),
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
    for token in template.special:
        text = text.replace(token, "")
    return bool(text.strip())


def _only_last(row: ChatRow) -> ChatRow:
    """Mark all answers but the last as not learned, so that this holds in each part of a split row."""
    messages = row["messages"]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return {**row, "messages": [m if i == last else {**m, "train": False} for i, m in enumerate(messages)]}
