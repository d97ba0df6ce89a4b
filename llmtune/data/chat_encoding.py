"""Rows into token ids and supervised spans, for chat and for completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.data.chat_template import (
    ChatTemplate,
    Message,
    TemplateRefusal,
    Tools,
    Turn,
    clean,
    cut_turn,
    encode_texts,
    has_marks,
    read_template,
    split_turn,
    tokenize,
)
from llmtune.data.overlong import NOTHING, Encoded, fit_chat, fit_completion
from llmtune.data.token_cache import Ids, Reading, read_ids
from llmtune.data.whole_conversation_encoding import learn_whole
from llmtune.errors import EnvironmentProblem
from llmtune.records import Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


@dataclass(frozen=True)
class _Group:
    """Answers that stand in one text as each is asked for; the text ends with the last of them."""

    text: str
    turns: tuple[Turn, ...]
    shown: int
    """How many messages the text renders."""


@dataclass(frozen=True)
class _Draft:
    """A conversation as texts, before they are tokenized."""

    messages: list[Message]
    tools: Tools
    groups: tuple[_Group, ...]

    @property
    def texts(self) -> list[str]:
        """All that has to be read as tokens to find where answers begin."""
        return [text for group in self.groups for text in (group.text, *(turn.prompt for turn in group.turns))]

    @property
    def ends(self) -> list[str]:
        """What tells, read as tokens, where answers end before the end of their text."""
        turns = ((group.text, turn.end) for group in self.groups for turn in group.turns)
        return [text[:end] for text, end in turns if end < len(text)]


def encode_chat(rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return the examples of each conversation, or the reason why it has none.

    Usually a conversation makes one example. Where the template writes earlier answers otherwise than it asks for them
    (it takes their thoughts out, say), each answer gets an example of its own, as it will be asked for.

    Raises:
        EnvironmentProblem: the model has no chat template, or one that cannot be split into turns.
    """
    template = read_template(processor, recipe)
    learn = learn_whole if recipe.data.train_on == "all" else _learn_turns

    def encode_one(row: Row) -> Encoded:
        return learn([row], template, recipe)[0]

    def fit(row: Row, examples: Encoded) -> Encoded:
        if isinstance(examples, str):
            return examples
        if recipe.data.train_on == "last":
            row = _only_last(row)
        data, shorten = recipe.data, shortener(processor)
        return fit_chat(
            row, examples, encode_one, on_overlong=data.on_overlong, max_length=data.max_length, shorten=shorten
        )

    return [fit(row, examples) for row, examples in zip(rows, learn(rows, template, recipe), strict=True)]


def encode_completion(rows: Sequence[Row], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Return the examples of each row of `prompt` and `completion`, or the reason why it has none.

    The completion and the end token after it are learned; of plain text (no prompt) everything is, from token 1.
    """
    if processor.eos_token_id is None:
        raise EnvironmentProblem.of("the tokenizer has no end token", str(processor.name_or_path), "Set its eos_token.")
    joint = encode_texts(processor, [row["prompt"] + row["completion"] for row in rows], special=True)
    encodings = getattr(joint, "encodings", None) or [None] * len(rows)
    return [
        _complete(row, ids, encoding, processor, recipe)
        for row, ids, encoding in zip(rows, joint["input_ids"], encodings, strict=True)
    ]


def prompt_ids(prompt: str, processor: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids to complete `prompt` from: with the tokenizer's own start token, without an end token.

    An empty prompt is the start token, or where there is none the end token, as GPT-2 was trained.
    """
    ids = _plain_ends(encode_texts(processor, [prompt], special=True)["input_ids"][0], processor)
    if ids:
        return ids
    return [processor.bos_token_id if processor.bos_token_id is not None else processor.eos_token_id]


# Chat


def _learn_turns(rows: Sequence[Row], template: ChatTemplate, recipe: Recipe) -> list[Encoded]:
    """Supervise the assistant's turns, whatever the lengths."""
    drafts = _draft(rows, template, recipe.data.train_on)
    good = [draft for draft in drafts if not isinstance(draft, str)]
    texts = list(dict.fromkeys(text for draft in good for text in draft.texts))
    ids = read_ids(template.processor, texts, [text for draft in good for text in draft.ends])
    return [draft if isinstance(draft, str) else _assemble(draft, template, ids) for draft in drafts]


def _draft(rows: Sequence[Row], template: ChatTemplate, train_on: str) -> list[_Draft | str]:
    """Cut the answers to learn out of conversations; those that the template reads alike are rendered together."""
    wanted = [_wanted(row, train_on) for row in rows]
    cleaned = [clean(row["messages"]) for row in rows]
    turns = [
        (k, i)
        for k, answers in enumerate(wanted)
        if not isinstance(answers, str) and not rows[k].get("tools")
        for i in answers
    ]
    prompts = template.render_all([cleaned[k][:i] for k, i in turns], answer_next=True)
    wholes = template.render_all([cleaned[k][: i + 1] for k, i in turns])
    rendered = dict(zip(turns, zip(prompts, wholes, strict=True), strict=True))
    drafts: list[_Draft | str] = []
    for k, answers in enumerate(wanted):
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


def _wanted(row: Row, train_on: str) -> list[int] | str:
    """Return the numbers of the answers to learn, or why there are none."""
    answers = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" and i > 0]
    if train_on == "last":
        answers = answers[-1:]
    wanted = [i for i in answers if row["messages"][i].get("train", True)]
    if wanted:
        return wanted
    return f"{NOTHING}: no answer after a question" if not answers else f"{NOTHING}: every answer says train: false"


def _cut(
    template: ChatTemplate, messages: list[Message], tools: Tools, index: int, rendered: tuple[Any, Any] | None
) -> Turn:
    """Cut out a turn, whose renderings (or what is thrown in place of one) may be at hand."""
    if rendered is None:
        return cut_turn(template, messages, tools, index)
    for text in rendered:
        if isinstance(text, TemplateRefusal):
            raise text
    return split_turn(template, messages, index, *rendered)


def _group(turns: list[Turn]) -> tuple[_Group, ...]:
    """Join the turns that stand in the same text."""
    groups = []
    while turns:
        text = turns[-1].prompt + turns[-1].target
        inside = tuple(turn for turn in turns if turn is turns[-1] or text.startswith(turn.prompt + turn.target))
        groups.append(_Group(text, inside, turns[-1].index + 1))
        turns = [turn for turn in turns if turn not in inside]
    return tuple(reversed(groups))


def _assemble(draft: _Draft, template: ChatTemplate, ids: dict[str, Reading]) -> Encoded:
    """Find the answers among the tokens; an answer whose first token would reach into its prompt is encoded apart."""
    examples = []
    for group in draft.groups:
        whole, encoding = ids[group.text]
        spans: list[int] = []
        target_bytes = 0
        for turn in group.turns:
            prompt = ids[turn.prompt][0]
            if whole[: len(prompt)] == prompt:
                spans += [len(prompt), _end_of(group, turn, whole, encoding, ids, template)]
                target_bytes += turn.target_bytes
                continue
            apart = _encode_apart(prompt.tolist(), turn, template.processor)
            if apart is None:
                return "the tokenizer joins the end of the prompt and the start of the answer in one token"
            examples.append(apart)
        if spans:
            example = Example(whole[: spans[-1]].tolist(), spans, target_bytes)
            if reason := _check_marks(example, group, draft, template):
                return reason
            examples.append(example)
    return examples


def _end_of(
    group: _Group,
    turn: Turn,
    whole: Ids,
    encoding: Any,
    ids: dict[str, Reading],
    template: ChatTemplate,
) -> int:
    """Return the number of tokens up to the end of a turn."""
    if turn.end == len(group.text):
        return len(whole)
    token = encoding.char_to_token(turn.end - 1) if encoding is not None else None
    if token is not None:
        return int(token) + 1
    text = group.text[: turn.end]
    return len(ids[text][0] if text in ids else tokenize(template.processor, [text])[0])


def _encode_apart(prompt: list[int], turn: Turn, processor: PreTrainedTokenizerBase) -> Example | None:
    """Join the ids of the prompt, as generation sees them, and those of the answer, if together they say the same text.

    Some tokenizers put a space before every text; after a line break they do not.
    """
    target = _continuation(prompt, turn.prompt, turn.target, processor)
    if target is None:
        return None
    ids = [*prompt, *target]
    return Example(ids, [len(prompt), len(ids)], turn.target_bytes)


def _continuation(
    prompt: list[int], prompt_text: str, text: str, processor: PreTrainedTokenizerBase
) -> list[int] | None:
    """Return ids of `text` that go on from `prompt` as if it had been generated; None if there are none."""
    line, alone, after_line, before, both = tokenize(
        processor, ["\n", text, f"\n{text}", prompt_text, prompt_text + text]
    )
    wanted = _added(before, both, processor)
    if wanted is None:
        return None
    candidates = [alone]
    if after_line[: len(line)] == line:
        candidates.append(after_line[len(line) :])
    return next((ids for ids in candidates if _added(prompt, [*prompt, *ids], processor) == wanted), None)


def _added(before: list[int], both: list[int], processor: PreTrainedTokenizerBase) -> str | None:
    """Return the text that ids say beyond the text of those before."""
    start, whole = _decode(before, processor), _decode(both, processor)
    return whole[len(start) :] if whole.startswith(start) else None


def _decode(ids: Sequence[int], processor: PreTrainedTokenizerBase) -> str:
    return str(processor.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _check_marks(example: Example, group: _Group, draft: _Draft, template: ChatTemplate) -> str | None:
    """Hold the spans against the template's own `{% generation %}` marks, if it has them.

    Marks may leave out what is no text of the answer: a header, line breaks, the end-of-turn token.
    """
    processor = template.processor
    marked = template.marked if draft.tools is None else has_marks(template.text(draft.tools))
    if not processor.is_fast or not marked:
        return None
    marked = processor.apply_chat_template(
        draft.messages[: group.shown],
        tools=draft.tools,
        chat_template=template.text(draft.tools),
        return_dict=True,
        return_assistant_tokens_mask=True,
        **template.kwargs,
    )
    marks = marked["assistant_masks"]
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
    text = _decode(ids, template.processor)
    for token in template.special:
        text = text.replace(token, "")
    return bool(text.strip())


def _only_last(row: Row) -> Row:
    """Say of all answers but the last that they are not learned, so that this holds in each part of a split row."""
    messages = row["messages"]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    return {**row, "messages": [m if i == last else {**m, "train": False} for i, m in enumerate(messages)]}


def shortener(processor: PreTrainedTokenizerBase) -> Callable[[str, int], str]:
    """Return a function that cuts at least so many tokens from the start of a text."""

    def shorten(text: str, tokens: int) -> str:
        encoded = encode_texts(processor, [text])
        if not processor.is_fast:
            return _decode(encoded["input_ids"][0][tokens:], processor)
        offsets = encoded.encodings[0].offsets[tokens:]
        return text[offsets[0][0] :].lstrip() if offsets else ""

    return shorten


# Completion


def _complete(row: Row, joint: list[int], encoding: Any, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Encoded:
    """Encode one prompt (may be empty) and its completion."""
    text, completion = row["prompt"], row["completion"]
    if not completion.strip():
        return "the completion is empty" if text else "the text is empty"
    prompt = prompt_ids(text, processor) if text else []
    ids = _plain_ends(joint, processor)
    if ids[: len(prompt)] != prompt:
        target = _continuation(prompt, text, completion, processor)
        if target is None:
            return "the tokenizer joins the end of the prompt and the start of the completion in one token"
        ids, encoding = [*prompt, *target], None
    elif ids != joint[: len(ids)]:
        encoding = None  # its offsets count a start token that was taken away
    starts = int(_starts_with_special(ids, processor))
    first = len(prompt) or 1
    byte_at = _byte_counter(text + completion, ids, encoding, processor)
    learned = len(completion.encode()) if text else byte_at(len(ids)) - byte_at(first)
    if learned <= 0:
        return f"{NOTHING}: the text is a single token or character"
    example = Example([*ids, processor.eos_token_id], [first, len(ids) + 1], learned)
    data = recipe.data
    return fit_completion(
        example, len(prompt), byte_at, on_overlong=data.on_overlong, max_length=data.max_length, start=starts
    )


def _plain_ends(ids: list[int], processor: PreTrainedTokenizerBase) -> list[int]:
    """Take away the end token that some tokenizers add, and a start token that stands there twice."""
    end, start = processor.eos_token_id, processor.bos_token_id
    while ids and ids[-1] == end and len(ids) > 1:
        ids = ids[:-1]
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _starts_with_special(ids: list[int], processor: PreTrainedTokenizerBase) -> bool:
    return bool(ids) and ids[0] == processor.bos_token_id


def _byte_counter(text: str, ids: list[int], encoding: Any, processor: PreTrainedTokenizerBase) -> Callable[[int], int]:
    """Return a function that says how many bytes of `text` the first k tokens hold."""
    shift = 1 if _starts_with_special(ids, processor) else 0

    def by_offset(tokens: int) -> int:
        place = encoding.token_to_chars(min(tokens, len(ids)) - 1) if tokens > 0 else None
        return len(text[: place[1]].encode()) if place else 0

    def by_text(tokens: int) -> int:
        return len(_decode(ids[shift : min(tokens, len(ids))], processor).encode())

    return by_offset if encoding is not None else by_text
