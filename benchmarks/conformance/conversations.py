"""Conversations rendered by hand as Qwen and Llama 3 write them, and the ways in which tools learn them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from conformance.reference import Gradient, Piece, Reference, Text

Part = Literal["prompt", "header", "answer", "end", "after", "border", "picture"]
"""`header` is the line break before an answer, `after` the one after its end; `border` is around a picture."""
Turn = tuple[str, str]
"""A role and a text."""
Ways = Mapping[str, frozenset[Part]]
RIGHT: Ways = {
    "the answers and their ends": frozenset({"answer", "end"}),
    "the answers, their ends, and the line break after": frozenset({"answer", "end", "after"}),
    "the answers, their ends, and the line breaks around": frozenset({"header", "answer", "end", "after"}),
}
WHOLE: Ways = {"the whole text": frozenset({"prompt", "header", "answer", "end", "after"})}
ENDLESS: Ways = {"the answers without their ends": frozenset({"answer"})}
ALL: Ways = {**RIGHT, **WHOLE}
"""What is right in a case that is not about masks."""


def row(*turns: Turn) -> dict[str, Any]:
    """Return a row of `messages`."""
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def qwen(*turns: Turn, learn: frozenset[Part] = RIGHT["the answers and their ends"]) -> list[Piece]:
    """Write a conversation as Qwen 2.5 and 3 do; the first turn is the system message."""
    text: list[Piece] = []
    for role, words in turns:
        text += [(f"<|im_start|>{role}", "prompt" in learn)]
        if role == "assistant":
            text += [("\n", "header" in learn), (words, "answer" in learn)]
            text += [("<|im_end|>", "end" in learn), ("\n", "after" in learn)]
        else:
            text += [(f"\n{words}<|im_end|>\n", "prompt" in learn)]
    return text


def llama(*turns: Turn, learn: frozenset[Part] = RIGHT["the answers and their ends"]) -> list[Piece]:
    """Write a conversation as Llama 3 does."""
    text: list[Piece] = [("<|begin_of_text|>", False)]
    for role, words in turns:
        header = f"<|start_header_id|>{role}<|end_header_id|>"
        answer = role == "assistant"
        text += [(header, "prompt" in learn), ("\n\n", ("header" if answer else "prompt") in learn)]
        text += [(words, ("answer" if answer else "prompt") in learn)]
        text += [("<|eot_id|>", ("end" if answer else "prompt") in learn)]
    return text


def learns(write: Any, conversations: Sequence[Sequence[Turn]], ways: Ways, name: str = "{}") -> dict[str, Gradient]:
    """Return, for each way, the gradient of the token mean over all conversations; `name` has {} for the way."""
    return {
        name.format(way): gradient_of([write(*turns, learn=learn) for turns in conversations])
        for way, learn in ways.items()
    }


def gradient_of(texts: Sequence[Text]) -> Gradient:
    return lambda reference: reference.gradient(texts)


def mean_of_means(write: Any, conversations: Sequence[Sequence[Turn]], ways: Ways, groups: int) -> dict[str, Gradient]:
    """Return the gradients if each of `groups` micro-batches is averaged before the step is."""

    def gradient(learn: frozenset[Part]) -> Gradient:
        return lambda reference: reference.mean_of_means([write(*t, learn=learn) for t in conversations], groups)

    return {f"the mean of {groups} means: {way}": gradient(learn) for way, learn in ways.items()}


def last_only(write: Any, turns: Sequence[Turn], ways: Ways) -> dict[str, Gradient]:
    """Return the gradients if only the last answer is learned."""

    def gradient(learn: frozenset[Part]) -> Gradient:
        def of(reference: Reference) -> Any:
            before = [(text, False) for text, _ in write(*turns[:-1], learn=learn)]
            return reference.gradient([[*before, *write(*turns, learn=learn)[len(before) :]]])

        return of

    return {f"only the last answer: {way}": gradient(learn) for way, learn in ways.items()}
