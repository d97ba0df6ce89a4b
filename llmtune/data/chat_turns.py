"""The answers of a conversation: the text before each, and the text that is learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import cast

from llmtune.data.answer_format import shared_start
from llmtune.data.chat_rows import ChatRow, Message
from llmtune.data.chat_template import SPELL_OUT, ChatTemplate, Rendered, TemplateRefusal, Tools
from llmtune.data.control_tokens import control_pattern, find_control_token, is_marked, joined_text, mark, unmark
from llmtune.recipe.schema import Recipe

CLOSED = (
    "the prompt closes the thoughts before the answer begins, and this answer has some: "
    "set data.reasoning: drop, or model.chat_template_kwargs so that the template lets the model think"
)
FEW_ANSWERS = 12
"""Up to so many answers, each is rendered after all that is before it: windows would save nothing."""
FIRST_TURNS = 4
"""So many turns that windows gave are compared with the conversation's own, next to those further on."""


@dataclass(frozen=True)
class Segment:
    """A part of a training text, and whether it is learned."""

    text: str
    learned: bool = False
    answer_bytes: int = 0
    """Bytes of the message in it, without what the template writes around the message."""


@dataclass(frozen=True)
class Chat:
    """A conversation as its template takes it."""

    messages: list[Message]
    tools: Tools = None
    keeps_reasoning: bool = False
    """Whether thoughts are read and not learned."""
    marked: bool = False
    """Whether special tokens in it are marked, which are to be plain text."""


@dataclass(frozen=True)
class Turn:
    """An answer, and its place after all that is before it."""

    index: int
    answer: Segment
    """It ends with an end-of-turn token."""
    history: str
    """A text that begins with what is before the answer; the turns of a long conversation share it."""
    upto: int
    """How many characters of it are before the answer."""
    lead: str
    """What the prompt has after them: `<think>`, or thoughts that are not learned."""

    @property
    def prompt(self) -> str:
        """All that is before the answer."""
        return self.history[: self.upto] + self.lead

    @property
    def text(self) -> str:
        """The answer after all that is before it."""
        return self.prompt + self.answer.text

    @property
    def start(self) -> int:
        """Characters before the answer."""
        return self.upto + len(self.lead)

    def is_in(self, text: str, last: Turn) -> bool:
        """Whether the text of the turn `last` begins with this turn's."""
        same = text.startswith(self.lead + self.answer.text, self.upto)
        return same and (self.history is last.history or text.startswith(self.history[: self.upto]))


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


def cut_turns(template: ChatTemplate, chats: Sequence[tuple[Chat, Sequence[int]]]) -> list[list[Turn] | str]:
    """Cut the answers with these numbers out of each conversation, or say why the template refuses one.

    An answer is what the template writes for the conversation up to it, after the prompt for it. Rendering all of that
    for every answer would take the square of the time, so a long conversation is rendered in windows first.
    """
    found: dict[int, list[Turn] | str] = {}
    for k, (chat, answers) in enumerate(chats):
        if len(answers) > FEW_ANSWERS and (turns := _cut_windows(template, chat, answers)) is not None:
            found[k] = turns
    rest = [(k, chat, answers) for k, (chat, answers) in enumerate(chats) if k not in found]
    rendered = iter(_render(template, [(chat, chat.messages[: i + 1]) for _, chat, answers in rest for i in answers]))
    for k, chat, answers in rest:
        pairs = [next(rendered) for _ in answers]
        try:
            found[k] = [_cut(template, chat, chat.messages, i, pair) for i, pair in zip(answers, pairs, strict=True)]
        except TemplateRefusal as refusal:
            found[k] = str(refusal)
    return [found[k] for k in range(len(chats))]


def _cut_windows(template: ChatTemplate, chat: Chat, answers: Sequence[int]) -> list[Turn] | None:
    """Cut answers out of windows of a conversation; None where the template looks further than a window shows.

    A window is the start of the conversation up to its first answer, then an answer and all up to the next. What the
    windows add is put together. Some turns of the result, the last one included, have to be what the template writes
    for the conversation itself.
    """
    steps = [i for i in range(1, answers[-1] + 1) if chat.messages[i]["role"] == "assistant"]
    start = chat.messages[: steps[0]]
    windows = [[*start, *chat.messages[before : i + 1]] for before, i in pairwise([steps[0], *steps])]
    rendered = _render(template, [(chat, window) for window in windows])
    opener = template.facts.thoughts.opener
    prompts = [prompt for prompt, _ in rendered if isinstance(prompt, str)]
    before = prompts[0].removesuffix(opener) if len(prompts) == len(steps) else None
    if before is None or not all(prompt.startswith(before) for prompt in prompts):
        return None
    leads = [opener if prompt.endswith(opener) else "" for prompt in prompts]
    added = [prompt[len(before) : len(prompt) - len(lead)] for prompt, lead in zip(prompts, leads, strict=True)]
    history = before + "".join(added)
    ends = list(accumulate(map(len, added), initial=len(before)))[1:]
    learned = {*answers}
    turns = []
    try:
        for i, window, pair, end, lead in zip(steps, windows, rendered, ends, leads, strict=True):
            if i in learned:
                turn = _cut(template, chat, window, len(window) - 1, pair)
                turns.append(Turn(i, turn.answer, history, end, lead + turn.lead))
        checked = list(_checked(turns))
        exact = _render(template, [(chat, chat.messages[: turn.index + 1]) for turn in checked])
        for turn, pair in zip(checked, exact, strict=True):
            other = _cut(template, chat, chat.messages, turn.index, pair)
            if (other.prompt, other.answer) != (turn.prompt, turn.answer):
                return None
    except TemplateRefusal:
        return None
    return turns


def _checked(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Yield the last turn, the one in the middle before it and so on, and all of the first few."""
    k = len(turns) - 1
    while k >= FIRST_TURNS:
        yield turns[k]
        k //= 2
    yield from turns[:FIRST_TURNS]


def _render(template: ChatTemplate, asked: Sequence[tuple[Chat, Sequence[Message]]]) -> list[tuple[Rendered, Rendered]]:
    """Render messages without their last, ready for an answer, and with it."""
    prompts = template.render_batch([(messages[:-1], chat.tools) for chat, messages in asked], answer_next=True)
    answered = [(with_answer(template, messages, len(messages) - 1), chat.tools) for chat, messages in asked]
    return list(zip(prompts, template.render_batch(answered), strict=True))


def _cut(
    template: ChatTemplate, chat: Chat, messages: Sequence[Message], index: int, rendered: tuple[Rendered, Rendered]
) -> Turn:
    prompt, whole = rendered
    if isinstance(prompt, TemplateRefusal):
        raise prompt
    if isinstance(whole, TemplateRefusal):
        raise whole
    lead, answer = split_turn(template, messages[index], prompt, whole, chat.keeps_reasoning)
    return Turn(index, answer, prompt, len(prompt), lead)


def cut_turn(template: ChatTemplate, chat: Chat, index: int) -> Turn:
    """Cut the answer `index` out of a conversation.

    Raises:
        TemplateRefusal: the template does not take the messages, or this turn cannot be told from what is before it.
    """
    (rendered,) = _render(template, [(chat, chat.messages[: index + 1])])
    return _cut(template, chat, chat.messages, index, rendered)


def with_answer(template: ChatTemplate, messages: Sequence[Message], index: int) -> Sequence[Message]:
    """Return the messages up to the answer `index`, its thoughts where the template takes them from."""
    answer = messages[index]
    reasoning = answer.get("reasoning_content")
    if reasoning is None or template.facts.thoughts.written_by != "content":
        return messages[: index + 1]
    inline = {**answer, "content": template.facts.thoughts.inline(reasoning, answer["content"])}
    del inline["reasoning_content"]
    return [*messages[:index], cast(Message, inline)]


def split_turn(
    template: ChatTemplate, message: Message, prompt: str, whole: str, keep_reasoning: bool
) -> tuple[str, Segment]:
    """Return what of an answer is read, and what is learned, from the renderings up to it (`prompt`) and with it.

    With `keep_reasoning` its thoughts are read; else all of it is learned.

    Raises:
        TemplateRefusal: this turn cannot be told from what is before it.
    """
    if not prompt:
        raise TemplateRefusal("an answer has nothing before it")
    reasoning = message.get("reasoning_content")
    body, end = _split_end(template, message, _written(template, reasoning, prompt, whole))
    content = message["content"].strip()
    if not content and not message.get("tool_calls"):
        raise TemplateRefusal("an answer is empty")
    if template.facts.end in content and not is_marked(content):
        raise TemplateRefusal(f"an answer contains the end-of-turn token {template.facts.end}")
    learned = content if content and content in body and not reasoning else body.strip()
    given = ""
    if reasoning and reasoning not in body:
        raise TemplateRefusal("the chat template leaves out the thoughts of this answer")
    if reasoning and keep_reasoning:
        thought_end = body.index(reasoning) + len(reasoning)
        given = body[:thought_end] + shared_start(body[thought_end:], template.facts.thoughts.after)
        learned = body[len(given) :].strip()
    return given, Segment(body[len(given) :] + end, True, len(unmark(learned).encode()))


def _written(template: ChatTemplate, reasoning: str | None, prompt: str, whole: str) -> str:
    """Return what the model has to write behind the prompt.

    It is the difference of the two renderings; thoughts that the template leaves out of what it renders are put in, and
    so is the end of those that the prompt begins.
    """
    form = template.facts.thoughts
    if reasoning and template.facts.closes_thoughts:
        raise TemplateRefusal(CLOSED)
    inserted = reasoning if form.written_by == "prompt" else None
    if whole.startswith(prompt):
        rest = whole[len(prompt) :]
        return rest if inserted is None else form.inline(inserted, rest)
    asked = prompt.removesuffix(form.opener)
    if form.opener and asked != prompt and whole.startswith(asked):
        rest = whole[len(asked) :]
        if template.facts.closes_thoughts:
            return rest
        closed = rest.lstrip().startswith(form.after.strip())
        return (inserted or "") + ("" if closed else form.after) + rest
    raise TemplateRefusal("the chat template does not begin this answer as it asks for one")


def _split_end(template: ChatTemplate, message: Message, difference: str) -> tuple[str, str]:
    """Split a turn into its text and its end, which is cut after the end-of-turn token.

    A turn that calls a tool may end in another token than an answer (Llama 3.1: `<|eom_id|>`), and in some formats the
    header of the next message is the end (GLM: `<|user|>`, `<|observation|>`).
    """
    if template.facts.ends_with_next:
        end = template.facts.calls.end if message.get("tool_calls") else template.facts.end
        return difference, end or template.facts.end
    if difference.endswith(template.facts.tail):
        body = difference[: len(difference) - len(template.facts.tail)]
        return body, template.facts.tail[: template.facts.tail.index(template.facts.end) + len(template.facts.end)]
    difference = difference.rstrip()
    for token in template.facts.special:
        if difference.endswith(token):
            return difference[: len(difference) - len(token)], token
    raise TemplateRefusal("the chat template does not end this answer in an end-of-turn token")
