"""Rows of the tasks with tags, answers in a context, translations, summaries and preferences."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from llmtune.data.chat_rows import answer_as_text, canonical_messages
from llmtune.data.message_fields import ROLES
from llmtune.data.rejected_rows import RowError, json_kind, nonempty_text, parse_cell, text_of
from llmtune.data.row_text import NearText, RowInput, join_plain, plain_form
from llmtune.recipe.class_names import OUTSIDE
from llmtune.records import Row

TAG = re.compile(r"O|[BI]-\S.*")
JOINERS = "_\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


class TokenClassifyRow(TypedDict):
    """Words, each with a tag; a prompt has no tags."""

    tokens: list[str]
    tags: list[str]


class AnswerSpan(TypedDict):
    """A stretch of the context."""

    text: str
    start: int | None
    """Its first character in the context; None for a generated answer."""


class QaRow(TypedDict):
    """A question about a context."""

    question: str
    context: str
    answers: list[AnswerSpan] | None
    """All correct answers; empty if the context has none; None if they were removed."""


def tagged_tokens(row: Mapping[str, object]) -> TokenClassifyRow:
    """Read `tokens` and `tags`, which have the same length."""
    tokens, tags = parse_cell(row["tokens"]), parse_cell(row["tags"])
    if not isinstance(tokens, list) or not isinstance(tags, list):
        raise RowError("wrong type", "'tokens' and 'tags' must be lists of texts")
    if len(tokens) != len(tags):
        raise RowError("tags do not fit", f"{len(tokens)} tokens and {len(tags)} tags")
    if not tokens:
        raise RowError("empty content", "no tokens")
    words = [text_of(token, "'tokens'") for token in tokens]
    if blank := next((i for i, word in enumerate(words, 1) if not word.strip()), None):
        raise RowError("empty content", f"token {blank} is empty")
    return {"tokens": words, "tags": _checked_tags(tags)}


def _checked_tags(tags: Sequence[object]) -> list[str]:
    """Return tags in IOB2: an entity begins with `B-`. An `I-` that begins an entity (IOB1) becomes `B-`."""
    fixed: list[str] = []
    for number, tag in enumerate(tags, 1):
        if not isinstance(tag, str) or not TAG.fullmatch(tag):
            fix = "tags are O, B-NAME and I-NAME; numbers need their names (a hub data set with ClassLabel has them)"
            raise RowError("not a tag", f"tag {number} is {tag!r}; {fix}")
        before = fixed[-1] if fixed else OUTSIDE
        fixed.append(f"B-{tag[2:]}" if tag.startswith("I-") and before[2:] != tag[2:] else tag)
    return fixed


def tagged_spans(row: Mapping[str, object]) -> TokenClassifyRow:
    """Read `text` and `spans`, each `{start, end, label}` in characters; `find_words` splits the words."""
    text, spans = nonempty_text(row, "text"), parse_cell(row["spans"])
    if not isinstance(spans, list):
        raise RowError("wrong type", "'spans' must be a list of {start, end, label}")
    words = find_words(text)
    tags = [OUTSIDE] * len(words)
    for span in spans:
        start, end, label = _span(span, text)
        inside = [i for i, (left, right) in enumerate(words) if left >= start and right <= end]
        cut = any(left < end and right > start and i not in inside for i, (left, right) in enumerate(words))
        if not inside or cut:
            raise RowError("span within a word", f"{text[start:end]!r} does not begin and end at word boundaries")
        if any(tags[i] != OUTSIDE for i in inside):
            raise RowError("spans overlap", f"{text[start:end]!r} is marked twice")
        for i in inside:
            tags[i] = f"{'B' if i == inside[0] else 'I'}-{label}"
    return {"tokens": [text[left:right] for left, right in words], "tags": tags}


def find_words(text: str) -> list[tuple[int, int]]:
    """Return the ranges of words in a text: consecutive letters and digits with accents, or one other character."""
    words: list[tuple[int, int]] = []
    for at, sign in enumerate(text):
        if sign.isspace():
            continue
        joined = bool(words) and words[-1][1] == at and _in_word(sign) and _in_word(text[at - 1])
        words.append((words.pop()[0], at + 1) if joined else (at, at + 1))
    return words


def _in_word(sign: str) -> bool:
    """Whether a character continues a word; combining vowel signs and accents (category M) count as letters."""
    return sign in JOINERS or unicodedata.category(sign)[0] in "LNM"


def _span(span: object, text: str) -> tuple[int, int, str]:
    if not isinstance(span, dict) or not {"start", "end", "label"} <= span.keys():
        raise RowError("wrong type", "a span must be {start, end, label}")
    start, end = span["start"], span["end"]
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(text)):
        raise RowError("span outside the text", f"characters {start} to {end} of {len(text)}")
    return start, end, nonempty_text(span, "label")


def question_squad(row: Mapping[str, object]) -> QaRow:
    """Read `question`, `context` and SQuAD's `answers`: texts and their starts; no texts mean no answer."""
    answers = parse_cell(row["answers"])
    if isinstance(answers, list):
        pairs = [(_answer_part(answer, "text"), _answer_part(answer, "answer_start", "start")) for answer in answers]
    elif isinstance(answers, dict) and isinstance(answers.get("text"), list):
        starts = answers.get("answer_start") or [None] * len(answers["text"])
        if len(starts) != len(answers["text"]):
            raise RowError("wrong type", f"{len(answers['text'])} answers and {len(starts)} starts")
        pairs = list(zip(answers["text"], starts, strict=True))
    else:
        raise RowError("wrong type", "'answers' must be {text: [...], answer_start: [...]}")
    return _question(row, pairs)


def question_answer(row: Mapping[str, object]) -> QaRow:
    """Read `question`, `context` and `answer`, a text in the context; empty or null means no answer."""
    answer = row["answer"]
    return _question(row, [] if answer is None or answer == "" else [(answer, None)])


def _answer_part(answer: object, *names: str) -> object:
    if not isinstance(answer, dict):
        raise RowError("wrong type", f"an answer is {json_kind(answer)}; it must be {{text, answer_start}}")
    return next((answer[name] for name in names if name in answer), None)


def _question(row: Mapping[str, object], pairs: Sequence[tuple[object, object]]) -> QaRow:
    context = nonempty_text(row, "context")
    answers: list[AnswerSpan] = []
    for value, start in pairs:
        text = text_of(value, "an answer")
        if not text.strip():
            raise RowError("no answer", "an answer is an empty text; a question without one has an empty list")
        offset = context.find(text) if start is None else start
        if not isinstance(offset, int) or isinstance(offset, bool):
            raise RowError("wrong type", f"'answer_start' is {json_kind(offset)}")
        if offset < 0 or context[offset : offset + len(text)] != text:
            there = "" if start is None else f" at character {start}"
            raise RowError("answer not in the context", f"{text[:60]!r} is not in it{there}")
        answers.append({"text": text, "start": offset})
    return {"question": nonempty_text(row, "question"), "context": context, "answers": answers}


# Translations and summaries, and answers with preferences


THUMBS = {
    **dict.fromkeys(("true", "1", "1.0", "up", "yes", "good", "\N{THUMBS UP SIGN}"), True),
    **dict.fromkeys(("false", "0", "0.0", "down", "no", "bad", "\N{THUMBS DOWN SIGN}"), False),
}
"""Accepted spellings of a thumb in files without booleans."""
TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):")
"""Begins a turn in a conversation written as one text, as in Anthropic's HH-RLHF."""


class TranslateRow(TypedDict):
    """Two texts with their languages, if the row names them."""

    source: str
    target: str
    source_language: str | None
    target_language: str | None
    languages: NotRequired[Sequence[str]]
    """The data set's names for the languages of source and target."""


class SummarizeRow(TypedDict):
    """A text and its summary."""

    document: str
    summary: str


def translation_from_pair(row: Mapping[str, object]) -> TranslateRow:
    """Read `source`, `target` and this row's languages, if given."""
    return {
        "source": nonempty_text(row, "source"),
        "target": nonempty_text(row, "target"),
        "source_language": _language(row, "source_language"),
        "target_language": _language(row, "target_language"),
    }


def translation_from_map(row: Mapping[str, object]) -> TranslateRow:
    """Read `translation`: texts by language code, source first, as in data sets on the hub.

    The data set's language codes may differ from the model's; the recipe can override them.
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

    Without a `prompt` the messages that both answers share are the prompt. OpenAI's `input` is an object with the
    prompt's `messages` and `tools`.
    """
    prompt = parse_cell(row.get("prompt"))
    if isinstance(prompt, Mapping) and "messages" in prompt:
        row = {**row, "prompt": prompt["messages"], "tools": row.get("tools") or prompt.get("tools")}
    return _pair(_turns(row.get("prompt")), row)


def preference_from_conversation(row: Mapping[str, object]) -> Row:
    """Read `conversations` as the prompt, with `chosen` and `rejected` as the message that follows."""
    turns = _turns(row["conversations"])
    if not isinstance(turns, list):
        raise RowError("wrong type", f"'conversations' is {json_kind(turns)}; it must be a list of messages")
    return _pair(turns, row)


def thumb_from_pair(row: Mapping[str, object]) -> Row:
    """Read `prompt`, `completion` and `label`: whether the answer is good."""
    prompt, answer = _split(_turns(row["prompt"]), row, "completion")
    return {**prompt, "answer": answer, "good": _thumb(row["label"])}


def thumb_from_conversation(row: Mapping[str, object]) -> Row:
    """Read `messages` that end in the answer, and `label`."""
    if not isinstance(_turns(row["messages"]), list):
        raise RowError("wrong type", f"'messages' is {json_kind(row['messages'])}; it must be a list of messages")
    prompt, answer = _split(None, row, "messages")
    return {**prompt, "answer": answer, "good": _thumb(row["label"])}


def _turns(value: object) -> object:
    """Read messages from one text, either JSON or a transcript; return any other text unchanged."""
    if not isinstance(value, str):
        return value
    before, *turns = TRANSCRIPT.split(value.lstrip())
    if not before and len(turns) > 2 and turns[0] == "Human":
        return [{"role": who, "content": text.strip()} for who, text in zip(turns[::2], turns[1::2], strict=True)]
    parsed = parse_cell(value)
    turns = parsed if isinstance(parsed, list) else [parsed]
    return parsed if turns and all(isinstance(turn, dict) and _role(turn) for turn in turns) else value


def _role(turn: object) -> str:
    """Return the role of a message in the templates' terms; empty if it has none."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return ROLES.get(role.strip().lower(), role) if isinstance(role, str) else ""


def _content(turn: object) -> object:
    return turn.get("content", turn.get("value")) if isinstance(turn, dict) else None


def _pair(prompt: object, row: Mapping[str, object]) -> Row:
    """Return a row with two answers to `prompt`: text, messages, or None if both columns contain the prompt."""
    (conversation, chosen), (other, rejected) = (_split(prompt, row, column) for column in ("chosen", "rejected"))
    if conversation != other:
        raise RowError("two prompts", "'chosen' and 'rejected' differ before their last message")
    if chosen.strip() == rejected.strip():
        raise RowError("chosen equals rejected", "both answers are the same")
    return {**conversation, "chosen": chosen, "rejected": rejected}


def _split(prompt: object, row: Mapping[str, object], column: str) -> tuple[Row, str]:
    """Return the answer in `column`, and the conversation before it as a canonical row."""
    turns = _whole_conversation(prompt, _turns(row[column]), row, column)
    text = _content(turns[-1])
    if isinstance(turns[-1], dict) and not turns[-1].get("tool_calls") and (text is None or not str(text).strip()):
        raise RowError("no answer", f"'{column}' is empty")
    try:
        whole = canonical_messages(turns, row.get("tools"), row.get("system"))
        if any("images" in message for message in whole["messages"]):
            raise RowError("content that is not text", "preferences with pictures cannot be learned so far")
    except RowError as error:
        raise RowError(error.reason, f"'{column}': {error.detail}") from None
    *before_answer, answer = whole["messages"]
    if not before_answer or before_answer[-1]["role"] not in ("user", "tool"):
        before = f"the {before_answer[-1]['role']}'s message" if before_answer else "nothing"
        raise RowError("no question", f"the answer in '{column}' follows {before}, not a question")
    if "tool_calls" in answer:
        raise RowError("a tool call as answer", f"'{column}' calls a tool; only texts can be preferred so far")
    unmarked = [{key: value for key, value in message.items() if key != "train"} for message in before_answer]
    return {**whole, "messages": unmarked}, answer_as_text(answer)


def _whole_conversation(prompt: object, answer: object, row: Mapping[str, object], column: str) -> list[object]:
    """Return the complete conversation: the messages in `column`, after the prompt unless they begin with it."""
    if not isinstance(answer, list):
        if prompt is None:
            raise RowError(
                "missing column", f"'prompt' is missing, and '{column}' is not a list of messages that contains it"
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
    """Whether a conversation begins with a prompt of messages, or contains a prompt of one text."""
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


def near_tags(row: Row) -> NearText:
    """Return the words; the tags of entities must be equal."""
    return NearText(" ".join(row["tokens"]), "", join_plain(tag for tag in row.get("tags") or () if tag != OUTSIDE))


def near_question(row: Row) -> NearText:
    """Return the question; context and answers must be equal."""
    return NearText(row["question"], row["context"], join_plain(answer["text"] for answer in row["answers"]))


def translation_input(row: Row) -> RowInput:
    """Return the source; the languages must be equal."""
    names = [row.get(f"{side}_language") for side in ("source", "target")]
    context = json.dumps([names, row.get("languages")])
    return RowInput(row["source"], lambda: context, lambda: plain_form(row["target"]))
