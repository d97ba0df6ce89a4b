"""Rows of a text and what is made of it: translations, summaries, and answers that one is preferred of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from llmtune.data.chat_rows import answer_text, canonical_messages
from llmtune.data.message_fields import ROLES
from llmtune.data.rejected_rows import RowError, describe, nonempty_text, text_of
from llmtune.records import Row

THUMBS = {
    **dict.fromkeys(("true", "1", "1.0", "up", "yes", "good", "\N{THUMBS UP SIGN}"), True),
    **dict.fromkeys(("false", "0", "0.0", "down", "no", "bad", "\N{THUMBS DOWN SIGN}"), False),
}
"""How a thumb may be written where a file has no truth values."""
TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):")
"""Begins a turn in a conversation that is written as one text, as Anthropic's HH-RLHF has it."""


class TranslateRow(TypedDict):
    """Two texts with their languages, if the row names them."""

    source: str
    target: str
    source_language: str | None
    target_language: str | None
    languages: NotRequired[Sequence[str]]
    """What the data set calls the languages of source and target."""


class SummarizeRow(TypedDict):
    """A text and its summary."""

    document: str
    summary: str


def translation_from_pair(row: Mapping[str, object]) -> TranslateRow:
    """Read `source`, `target` and the languages of this row, if they are there."""
    return {
        "source": nonempty_text(row, "source"),
        "target": nonempty_text(row, "target"),
        "source_language": _language(row, "source_language"),
        "target_language": _language(row, "target_language"),
    }


def translation_from_map(row: Mapping[str, object]) -> TranslateRow:
    """Read `translation`, texts by language code in the order from source to target, as the hub's sets have it.

    What the set calls its languages is not always what a model calls them: a recipe may say it otherwise.
    """
    texts = row["translation"]
    if not isinstance(texts, dict) or len(texts) != 2:
        raise RowError("wrong type", "'translation' must be two texts by language, the source first")
    (source, text), (target, translation) = texts.items()
    pair = {"source": text, "target": translation}
    return {
        "source": nonempty_text(pair, "source"),
        "target": nonempty_text(pair, "target"),
        "source_language": None,
        "target_language": None,
        "languages": [source, target],
    }


def _language(row: Mapping[str, object], column: str) -> str | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    return text_of(value, f"'{column}'").strip() or None


def summary_from_pair(row: Mapping[str, object]) -> SummarizeRow:
    """Read `document` and `summary`."""
    return {"document": nonempty_text(row, "document"), "summary": nonempty_text(row, "summary")}


def preference_from_pair(row: Mapping[str, object]) -> Row:
    """Read `prompt`, `chosen` and `rejected`: texts, or lists of messages that may begin with the prompt.

    Without a `prompt` the messages that both answers share are the prompt.
    """
    return _pair(_turns(row.get("prompt")), row)


def preference_from_conversation(row: Mapping[str, object]) -> Row:
    """Read `conversations` as the prompt, with `chosen` and `rejected` as the message that follows."""
    turns = _turns(row["conversations"])
    if not isinstance(turns, list):
        raise RowError("wrong type", f"'conversations' is {describe(turns)}; it must be a list of messages")
    return _pair(turns, row)


def thumb_from_pair(row: Mapping[str, object]) -> Row:
    """Read `prompt`, `completion` and `label`: whether the answer is good."""
    prompt, answer = _split(_turns(row["prompt"]), row, "completion")
    return {**prompt, "answer": answer, "good": _thumb(row["label"])}


def thumb_from_conversation(row: Mapping[str, object]) -> Row:
    """Read `messages` that end in the answer, and `label`."""
    if not isinstance(_turns(row["messages"]), list):
        raise RowError("wrong type", f"'messages' is {describe(row['messages'])}; it must be a list of messages")
    prompt, answer = _split(None, row, "messages")
    return {**prompt, "answer": answer, "good": _thumb(row["label"])}


def _turns(value: object) -> object:
    """Read messages that stand in one text, as JSON or as a transcript; any other text is left as it is."""
    if not isinstance(value, str):
        return value
    before, *turns = TRANSCRIPT.split(value.lstrip())
    if not before and len(turns) > 2 and turns[0] == "Human":
        return [{"role": who, "content": text.strip()} for who, text in zip(turns[::2], turns[1::2], strict=True)]
    if value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    turns = parsed if isinstance(parsed, list) else [parsed]
    return parsed if turns and all(isinstance(turn, dict) and _role(turn) for turn in turns) else value


def _role(turn: object) -> str:
    """Return the role of a message as templates know it; empty where it has none."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return ROLES.get(role.strip().lower(), role) if isinstance(role, str) else ""


def _content(turn: object) -> object:
    return turn.get("content", turn.get("value")) if isinstance(turn, dict) else None


def _pair(prompt: object, row: Mapping[str, object]) -> Row:
    """Return a row of two answers to `prompt`: a text, messages, or None where both columns hold it."""
    (conversation, chosen), (other, rejected) = (_split(prompt, row, column) for column in ("chosen", "rejected"))
    if conversation != other:
        raise RowError("two prompts", "'chosen' and 'rejected' differ before their last message")
    if chosen.strip() == rejected.strip():
        raise RowError("chosen equals rejected", "both answers are the same: there is nothing to prefer")
    return {**conversation, "chosen": chosen, "rejected": rejected}


def _split(prompt: object, row: Mapping[str, object], column: str) -> tuple[Row, str]:
    """Return the conversation up to the answer in `column`, as a canonical row, and the answer."""
    turns = _join(prompt, _turns(row[column]), row, column)
    text = _content(turns[-1])
    if isinstance(turns[-1], dict) and not turns[-1].get("tool_calls") and (text is None or not str(text).strip()):
        raise RowError("no answer", f"'{column}' is empty")
    try:
        whole = canonical_messages(turns, row.get("tools"), row.get("system"))
    except RowError as error:
        raise RowError(error.reason, f"'{column}': {error.detail}") from None
    *before_answer, answer = whole["messages"]
    if not before_answer or before_answer[-1]["role"] not in ("user", "tool"):
        before = f"the {before_answer[-1]['role']}'s message" if before_answer else "nothing"
        raise RowError("no question", f"before the answer in '{column}' stands {before}, and no question")
    if "tool_calls" in answer:
        raise RowError("a tool call as answer", f"'{column}' calls a tool; only texts can be preferred so far")
    unmarked = [{key: value for key, value in message.items() if key != "train"} for message in before_answer]
    return {**whole, "messages": unmarked}, answer_text(answer)


def _join(prompt: object, answer: object, row: Mapping[str, object], column: str) -> list[object]:
    """Return the whole conversation: the prompt, unless the messages in `column` begin with it, and those messages."""
    if not isinstance(answer, list):
        if prompt is None:
            raise RowError(
                "missing column", f"'prompt' is missing, and '{column}' is no list of messages that holds it"
            )
        if isinstance(answer, dict):
            turn = answer if _role(answer) else {"role": "assistant", **answer}
        else:
            turn = {"role": "assistant", "content": nonempty_text(row, column)}
        return [*_asked(prompt), turn]
    if not answer:
        raise RowError("no answer", f"'{column}' is an empty list")
    nothing = prompt is None or (isinstance(prompt, str) and not prompt.strip())
    if nothing or _holds(answer, prompt):
        return answer
    if _role(answer[0]) in ("system", "user"):
        raise RowError("two prompts", f"'{column}' begins with another prompt than 'prompt'")
    return [*_asked(prompt), *answer]


def _asked(prompt: object) -> list[object]:
    return (
        prompt
        if isinstance(prompt, list)
        else [{"role": "user", "content": nonempty_text({"prompt": prompt}, "prompt")}]
    )


def _holds(turns: list[object], prompt: object) -> bool:
    """Whether a conversation begins with a prompt of messages, or asks a prompt of one text somewhere."""
    if isinstance(prompt, list):
        first, expected = turns[: len(prompt)], prompt
        return [(_role(turn), _content(turn)) for turn in first] == [(_role(turn), _content(turn)) for turn in expected]
    questions = [_content(turn) for turn in turns if _role(turn) == "user"]
    return isinstance(prompt, str) and prompt.strip() in [text.strip() for text in questions if isinstance(text, str)]


def _thumb(value: object) -> bool:
    thumb = THUMBS.get(str(value).strip().lower())
    if thumb is None:
        raise RowError("no thumb", f"'label' is {value!r}; it must be true or false, 1 or 0, up or down, good or bad")
    return thumb
