"""A turn of a conversation: the text that an answer is asked for with, and the text of the answer that is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from llmtune.data.answer_format import shared_start
from llmtune.data.chat_rows import Message
from llmtune.data.chat_template import ChatTemplate, TemplateRefusal, Tools
from llmtune.data.control_tokens import is_marked, unmark

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
