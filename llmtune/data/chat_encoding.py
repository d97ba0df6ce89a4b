"""Encodes conversations into token ids and supervised spans.

A training text is a list of segments, each supervised or not. Its ids are counted up to each border between segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import cast

from transformers import PreTrainedTokenizerBase

from llmtune.data.chat_drafts import Draft, Drafts, Turn, expand_each
from llmtune.data.chat_messages import UnwritableTextError, encode_marked, is_marked, unmark
from llmtune.data.chat_rows import ChatRow, Message
from llmtune.data.chat_template import (
    ChatTemplate,
    Expand,
    PreparedChat,
    Rendered,
    inline_thoughts,
    prepare_chats,
    read_template,
    refuse_pictures,
    split_answer,
)
from llmtune.data.example import Example, ImageExample
from llmtune.data.overlong import NOTHING, ChatFit, only_last
from llmtune.data.rendering_check import check_marks, find_dropped, find_missing
from llmtune.data.task_interface import Encoded
from llmtune.data.template_facts import TemplateRefusal
from llmtune.data.tokenization import (
    Bordered,
    Segment,
    continue_ids,
    count_shared,
    tokenize_each,
    tokenize_with_borders,
)
from llmtune.recipe.schema import Recipe

FEW_ANSWERS = 12
"""Up to this many answers, each is rendered with everything before it: windows would save nothing."""
FIRST_TURNS = 4
"""How many turns from windows are compared with the complete rendering, in addition to sampled later ones."""


Assemble = Callable[[Draft, ChatTemplate, Bordered], Encoded]


def encode_chat(
    rows: Sequence[ChatRow],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    expand: Expand = refuse_pictures,
) -> list[Encoded]:
    """Return the examples of each conversation, or the reason why it has none; `expand` writes tokens of pictures.

    A conversation usually makes one example. A template may write an earlier answer differently than after its own
    prompt, for example without its thoughts. Then each answer gets its own example, after its own prompt. With
    `data.train_on: all` every token from token 1 on is supervised, except messages with `train: false`.

    Raises:
        EnvironmentProblem: the chat template is missing, or cannot be split into turns.
    """
    template, data = read_template(processor, recipe), recipe.data

    def encode(rows: Sequence[ChatRow]) -> list[Encoded]:
        chats = prepare_chats(rows, template, recipe)
        if data.train_on == "all":
            return _encode_drafts(_draft_whole(rows, chats, template), template, _assemble_whole, expand)
        return _encode_drafts(_draft_turns(rows, chats, template, data.train_on), template, _assemble_turns, expand)

    fit = ChatFit(encode, processor, data.on_overlong, data.max_length)
    encoded = encode(rows)
    return fit.fit([only_last(row) for row in rows] if data.train_on == "last" else rows, encoded)


def _encode_drafts(rows: Sequence[Drafts], template: ChatTemplate, assemble: Assemble, expand: Expand) -> list[Encoded]:
    """Assemble the examples of each row from its tokenized texts, or return the reason why it has none."""
    rows = [expand_each(row, expand) for row in rows]
    plain = [draft for row in rows if not isinstance(row, str) for draft in row if not is_marked(draft.text)]
    borders = [draft.borders for draft in plain]
    ids_and_counts = tokenize_with_borders(template.processor, [draft.text for draft in plain], borders)
    bordered = {id(draft): ids for draft, ids in zip(plain, ids_and_counts, strict=True)}
    encoded: list[Encoded] = []
    for row in rows:
        result: Encoded = row if isinstance(row, str) else []
        for draft in () if isinstance(row, str) else row:
            try:
                parts = assemble(draft, template, bordered.get(id(draft)) or _encode_marked(draft, template))
            except UnwritableTextError as error:
                parts = str(error)
            if isinstance(parts, str):
                result = parts
                break
            if pictures := draft.pictures:
                parts = [ImageExample.of(part, pictures) for part in parts]
            result = [*result, *parts]
        encoded.append(result)
    return encoded


def _encode_marked(draft: Draft, template: ChatTemplate) -> Bordered:
    """Return the ids of a text with marked tokens, and the number of ids before each border."""
    ids = encode_marked(template.processor, draft.text)
    heads = [encode_marked(template.processor, draft.text[:border]) for border in draft.borders]
    return ids, [count_shared(ids, head) for head in heads]


# train_on: assistant


def _draft_turns(
    rows: Sequence[ChatRow], chats: Sequence[PreparedChat | str], template: ChatTemplate, train_on: str
) -> list[Drafts]:
    """Draft texts whose supervised segments are the trained answers."""
    targets: list[tuple[PreparedChat, list[int]] | str] = []
    for row, chat in zip(rows, chats, strict=True):
        answers = _trained_answers(row, train_on)
        targets.append(answers if isinstance(answers, str) else chat if isinstance(chat, str) else (chat, answers))
    cut = iter(cut_turns(template, [one for one in targets if not isinstance(one, str)]))
    return [one if isinstance(one, str) else _join_turns(one[0], next(cut), template) for one in targets]


def _trained_answers(row: ChatRow, train_on: str) -> list[int] | str:
    """Return the indices of the answers to train on, or the reason why there are none."""
    answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" and i > 0]
    if train_on == "last":
        answers = answers[-1:]
    if not answers:
        return f"{NOTHING}: no answer after a question"
    return [i for i in answers if row["messages"][i].get("train", True)] or f"{NOTHING}: every answer says train: false"


def cut_turns(template: ChatTemplate, chats: Sequence[tuple[PreparedChat, Sequence[int]]]) -> list[list[Turn] | str]:
    """Cut the answers at these indices out of each conversation, or return why the template refuses it.

    An answer is the text that the template adds after the prompt for it. Rendering the conversation again for every
    answer would take quadratic time, so a long conversation is first rendered in windows.
    """
    windows = [len(answers) > FEW_ANSWERS and _cut_windows(template, chat, answers) for chat, answers in chats]
    rest = [one for one, turns in zip(chats, windows, strict=True) if not turns]
    cut = _cut_last(template, [(chat, chat.messages[: i + 1], i) for chat, answers in rest for i in answers])
    chat_turns: list[list[Turn] | str] = []
    for (_, answers), turns in zip(chats, windows, strict=True):
        parts: Sequence[Turn | TemplateRefusal] = turns or [next(cut) for _ in answers]
        refusal = next((str(part) for part in parts if isinstance(part, TemplateRefusal)), None)
        chat_turns.append([part for part in parts if isinstance(part, Turn)] if refusal is None else refusal)
    return chat_turns


def _cut_windows(template: ChatTemplate, chat: PreparedChat, answers: Sequence[int]) -> list[Turn] | None:
    """Cut answers out of windows of a conversation; None if the template looks beyond the window.

    A window is the start of the conversation up to its first answer, then one answer and everything up to the next.
    The additions of the windows are joined. Some turns of the result, including the last, are compared with the
    rendering of the conversation.
    """
    steps = [i for i in range(1, answers[-1] + 1) if chat.messages[i]["role"] == "assistant"]
    start = chat.messages[: steps[0]]
    windows = [(chat, [*start, *chat.messages[before : i + 1]], i) for before, i in pairwise([steps[0], *steps])]
    turns = [turn for turn in _cut_last(template, windows) if isinstance(turn, Turn)]
    opener = template.facts.thoughts.opener
    before = turns[0].history.removesuffix(opener) if len(turns) == len(steps) else None
    if before is None or not all(turn.history.startswith(before) for turn in turns):
        return None
    leads = [opener if turn.history.endswith(opener) else "" for turn in turns]
    added = [turn.history[len(before) :].removesuffix(lead) for turn, lead in zip(turns, leads, strict=True)]
    history = before + "".join(added)
    ends = accumulate(map(len, added[1:]), initial=len(before) + len(added[0]))
    learned = {*answers}
    turns = [
        replace(turn, history=history, upto=end, lead=lead + turn.lead)
        for turn, end, lead in zip(turns, ends, leads, strict=True)
        if turn.index in learned
    ]
    checked = list(_checked(turns))
    exact = _cut_last(template, [(chat, chat.messages[: turn.index + 1], turn.index) for turn in checked])
    for turn, other in zip(checked, exact, strict=True):
        if isinstance(other, TemplateRefusal) or (other.prompt, other.answer) != (turn.prompt, turn.answer):
            return None
    return turns


def _checked(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Yield the last turn, the middle one of the turns before it and so on, then all of the first few."""
    k = len(turns) - 1
    while k >= FIRST_TURNS:
        yield turns[k]
        k //= 2
    yield from turns[:FIRST_TURNS]


def _cut_last(
    template: ChatTemplate, cuts: Sequence[tuple[PreparedChat, Sequence[Message], int]]
) -> Iterator[Turn | TemplateRefusal]:
    """Yield the final answer of each list of messages with its index, or the reason why it has none."""
    prompts = template.render_batch([(messages[:-1], chat.tools) for chat, messages, _ in cuts], answer_next=True)
    answered = template.render_batch([(inline_thoughts(template, messages), chat.tools) for chat, messages, _ in cuts])
    for (chat, messages, index), prompt, whole in zip(cuts, prompts, answered, strict=True):
        if isinstance(prompt, TemplateRefusal) or isinstance(whole, TemplateRefusal):
            yield prompt if isinstance(prompt, TemplateRefusal) else cast(TemplateRefusal, whole)
            continue
        try:
            lead, answer, count = split_answer(template.facts, messages[-1], prompt, whole, chat.keeps_reasoning)
            yield Turn(index, answer, count, prompt, len(prompt), lead)
        except TemplateRefusal as refusal:
            yield refusal


def _join_turns(chat: PreparedChat, turns: list[Turn] | str, template: ChatTemplate) -> Drafts:
    """Merge turns whose text is a prefix of a later turn's. All texts of the conversation must be in the result."""
    if isinstance(turns, str):
        return turns
    drafts: list[Draft] = []
    while turns:
        last = turns[-1]
        text = last.prompt + last.answer
        segments: list[Segment] = []
        counts: list[int] = []
        apart: list[Turn] = []
        at = 0
        for turn in turns:
            if turn.start < at or not (turn is last or turn.is_in(text, last)):
                apart.append(turn)
                continue
            segments += [Segment(text[at : turn.start], False), Segment(turn.answer, True)]
            counts.append(turn.answer_bytes)
            at = turn.start + len(turn.answer)
        drafts.append(Draft(chat, last.index + 1, segments, counts))
        turns = apart
    for draft in reversed(drafts):
        messages, last_answer = chat.messages[: draft.messages], draft.messages - 1
        if reason := find_missing(template.facts, messages, chat.tools, draft.text, [last_answer]):
            return reason
    return drafts[::-1]


def _assemble_turns(draft: Draft, template: ChatTemplate, bordered: Bordered) -> Encoded:
    """Find the answers among the tokens; encode an answer separately if its first token would overlap its prompt."""
    ids, counts = bordered
    processor = template.processor
    examples: list[Example] = []
    spans: list[int] = []
    target_bytes = 0
    byte_counts = iter(draft.answer_bytes)
    for segment, (start, end), at in zip(draft.segments, pairwise(counts), draft.borders, strict=False):
        if not segment.learned:
            continue
        answer_bytes = next(byte_counts)
        if start is not None and end is not None:
            if answer_bytes and (reason := find_dropped(template, ids[start:end], segment.text)):
                return reason
            spans += [start, end]
            target_bytes += answer_bytes
            continue
        if start is not None:
            return "the tokenizer joins the end of an answer and the text after it in one token"
        prompt, joins = draft.text[:at], draft.chat.marked or bool(draft.pictures)
        before = [] if joins else tokenize_each(processor, [prompt])[0]
        target = None if joins else continue_ids(processor, before, prompt, segment.text)
        if target is None:
            return "the tokenizer joins the end of the prompt and the start of the answer in one token"
        examples.append(Example([*before, *target], [len(before), len(before) + len(target)], answer_bytes))
    if spans:
        example = Example(ids[: spans[-1]], spans, target_bytes)
        if reason := check_marks(example, draft.chat, draft.messages, template):
            return reason
        examples.append(example)
    return examples


# train_on: all


def _draft_whole(rows: Sequence[ChatRow], chats: Sequence[PreparedChat | str], template: ChatTemplate) -> list[Drafts]:
    """Supervise every message except those with `train: false`."""
    batch = [(inline_thoughts(template, chat.messages), chat.tools) for chat in chats if isinstance(chat, PreparedChat)]
    rendered = iter(template.render_batch(batch))
    return [
        chat if isinstance(chat, str) else _draft_messages(row, chat, template, next(rendered))
        for row, chat in zip(rows, chats, strict=True)
    ]


def _draft_messages(row: ChatRow, chat: PreparedChat, template: ChatTemplate, rendered: Rendered) -> Drafts:
    """Find the unsupervised parts of a rendered conversation."""
    messages = chat.messages
    skipped = [i for i, message in enumerate(row["messages"]) if not message.get("train", True)]
    if len(skipped) == len(messages):
        return f"{NOTHING}: every message says train: false"
    if isinstance(rendered, TemplateRefusal):
        return str(rendered)
    text = rendered.rstrip()
    if messages[-1].get("reasoning_content") and template.facts.thoughts.written_by == "prompt":
        (turns,) = cut_turns(template, [(replace(chat, keeps_reasoning=False), [len(messages) - 1])])
        if isinstance(turns, str):
            return turns
        text = turns[0].prompt + turns[0].answer
    try:
        ranges = [_range_of(i, text, chat, template) for i in skipped]
    except TemplateRefusal as refusal:
        return str(refusal)
    learned = [message for i, message in enumerate(messages) if i not in skipped]
    thoughts = [] if chat.keeps_reasoning else [i for i in range(len(messages)) if i not in skipped]
    if reason := find_missing(template.facts, messages, chat.tools, text, thoughts):
        fix = "; data.train_on: assistant makes an example of each answer" if "the thoughts" in reason else ""
        return reason + fix
    at = 0
    for reasoning in [message.get("reasoning_content") for message in messages if chat.keeps_reasoning]:
        start = text.find(reasoning, at) if reasoning else -1  # the template omits some thoughts
        if reasoning and start >= 0:
            at = start + len(reasoning)
            ranges.append((start, at))
    texts = [message["content"].strip() for message in learned]
    texts += [message.get("reasoning_content", "") for message in learned if not chat.keeps_reasoning]
    return [Draft(chat, len(messages), _without(text, ranges), [sum(len(unmark(part).encode()) for part in texts)])]


def _without(text: str, ranges: Sequence[tuple[int, int]]) -> list[Segment]:
    """Split a text into supervised segments and the given unsupervised ranges."""
    segments: list[Segment] = []
    at = 0
    for start, end in sorted(ranges):
        if end > at:
            segments += [Segment(text[at : max(at, start)], True), Segment(text[max(at, start) : end], False)]
            at = end
    return [*segments, Segment(text[at:], True)]


def _assemble_whole(draft: Draft, template: ChatTemplate, bordered: Bordered) -> Encoded:
    ids, counts = bordered
    learned = [False] * len(ids)
    for segment, (start, end) in zip(draft.segments, pairwise(counts), strict=True):
        if start is None or end is None:
            return "the tokenizer merges supervised and unsupervised text in one token"
        learned[start:end] = [segment.learned] * (end - start)
    learned[:1] = [False]
    spans = [i for i in range(len(ids) + 1) if (i < len(ids) and learned[i]) != (i > 0 and learned[i - 1])]
    if not spans:
        return f"{NOTHING}: every trained message is inside the range of one with train: false"
    return [Example(ids[: spans[-1]], spans, draft.answer_bytes[0])]


def _range_of(index: int, text: str, chat: PreparedChat, template: ChatTemplate) -> tuple[int, int]:
    """Return the range of a message in the rendered conversation, by comparing renderings."""
    before = template.render(chat.messages[:index], chat.tools) if index else ""
    after = template.render(chat.messages[: index + 1], chat.tools)[: len(text)]
    if not (text.startswith(before) and text.startswith(after)):
        raise TemplateRefusal("the position of the message with train: false in the chat template's text is ambiguous")
    return len(before), len(after)
