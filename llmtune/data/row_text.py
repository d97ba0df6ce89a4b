"""The texts of a row: all of them for near duplicates, its input for leakage, and their plain forms for comparison."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import xxhash

from llmtune.data.chat_rows import Message
from llmtune.data.row_hash import hash_content
from llmtune.data.search_rows import text_key
from llmtune.records import Row

HIDES = 4
"""From this factor on, the longer text of a pair hides the shorter one. Pairs that share a text 8 times as long as the
other have 80 % of their words in common."""
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
    "\U000e0000-\U000e0fff]"
)
"""Characters without width: joiners, directions, soft hyphens, variation selectors."""
APOSTROPHE = re.compile(r"(?<=\w)['\u2019\u02bc](?=\w)")
MARKDOWN = re.compile(r"^[ \t]*(?:[-+*>][ \t]+|>+)", re.MULTILINE)
"""Signs of lists and quotes that are not punctuation elsewhere; headings, emphasis and code use punctuation."""

SIGNS = re.compile(r"[\d#+>]")
"""ASCII characters that are words, parts of words, or neither, by their neighbours."""
SPACES = str.maketrans(dict.fromkeys("!\"%&'()*,-./:;?@[\\]^_`{|}~", " "))


class NearText(NamedTuple):
    """What the search for near duplicates compares: nearly equal texts, of equal contexts, with equal answers."""

    text: str
    context: str = ""
    answer: str = ""

    @property
    def tag(self) -> str:
        """Everything that must be equal; empty if nothing must."""
        return f"{text_key(self.context)}\n{self.answer}" if self.context or self.answer else ""


class RowInput(NamedTuple):
    """What a model reads of a row, and the answer to it; only rows whose query may match compute the functions."""

    query: str
    context: Callable[[], str]
    """Returns everything before the query; must be equal."""
    answer: Callable[[], str]
    labelled: bool = False
    """Whether rows with nearly equal queries and other answers teach the difference: their answers are labels."""


@cache
def _token() -> re.Pattern[str]:
    """Match a word. Punctuation is no word, except signs between numbers, and after them or after a letter (C#)."""
    kinds = ("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sk")
    marks = "".join(sign for sign in map(chr, range(2**16)) if unicodedata.category(sign) in kinds)
    word = rf"[^\s{re.escape(marks)}|~]+"
    return re.compile(rf"(?<=\d)\s*[-*/.,:^]\s*(?=\d)|(?<=\d)%|(?<!\S)-(?=\d)|{word}(?:(?<=[^\W\d_])#)?")


def plain_words(text: str) -> list[str]:
    """Return the words of a text with their case, without punctuation, Markdown and characters without width."""
    text = text if text.isascii() else INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
    text = APOSTROPHE.sub("", text) if not text.isascii() or "'" in text else text
    if text.isascii() and not SIGNS.search(text):  # most texts, five times as fast
        return text.translate(SPACES).split()
    return [word.strip() for word in _token().findall(MARKDOWN.sub("", text))]


def plain_form(text: str) -> str:
    """Return a text for comparison: its words in one case; a text without words is itself."""
    return " ".join(plain_words(text)).casefold() or text.strip()


def visible_form(text: str) -> str:
    """Return a text in one case and width, without characters without width. `hash_words` ignores punctuation."""
    return text if text.isascii() else INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).casefold()


def near_text(row: Row) -> NearText:
    """Return the text for the near-duplicate search: everything except system messages.

    A long system message shared by all rows would make them all similar. Questions on different contexts, passages
    for different queries (a passage may answer several), and texts of different recordings are never duplicates,
    whatever they share. Nor are rows with other labels, or with other answers where these are short: a pair that is
    almost equal and has two labels teaches the most.
    """
    near = _near_text(row)
    return NearText(visible_form(near.text), *near[1:])


def _near_text(row: Row) -> NearText:
    if "context" in row:
        return NearText(row["question"], row["context"], _joined(answer["text"] for answer in row["answers"]))
    if "relevances" in row:
        return NearText(" ".join(row["passages"]), plain_form(row["query"]), str(row["relevances"]))
    if "negatives" in row:
        return _near_embed(row)
    if "audio" in row:
        return NearText(row["text"], row["content"])
    if "messages" in row:
        return _near_conversation(row)
    if "tokens" in row:
        return NearText(" ".join(row["tokens"]), "", _joined(tag for tag in row.get("tags") or () if tag != "O"))
    if "document" in row:
        return _with_answer(row["document"], row["summary"])
    if "source" in row:
        return _with_answer(row["source"], row["target"])
    if "label" in row:
        return _pair_text(row["text"], row["pair"] or "")._replace(answer=str(row["label"]))
    return _with_answer(row["prompt"], row["completion"])


def _near_embed(row: Row) -> NearText:
    if row["score"] is not None:
        return NearText(" ".join([row["query"], *row["passages"]]), "", str(row["score"]))
    if row["passages"]:
        return NearText(" ".join(row["passages"]), plain_form(row["query"]))
    return NearText(row["query"], "", str(row["label"]))


def _near_conversation(row: Row) -> NearText:
    """Return the text of a conversation; the better of two answers must be the same one, and so must a thumb."""
    if "chosen" in row:
        asked = _with_answer(" ".join(_message_texts(row["messages"])), row["chosen"])
        return asked._replace(text=f"{asked.text} {_tag_words(row['rejected'], 'rejected')}")
    *before, last = row["messages"] or [{"role": "user", "content": ""}]
    if "answer" in row:
        near = _with_answer(" ".join(_message_texts(row["messages"])), row["answer"])
        return near._replace(answer=f"{near.answer} {row['good']}")
    if last["role"] != "assistant" or "tool_calls" in last:
        return NearText(" ".join(_message_texts(row["messages"])))
    return _with_answer(" ".join(_message_texts(before)), " ".join(_message_texts([last])))


def _with_answer(prompt: str, answer: str) -> NearText:
    """Return prompt and answer as one text; an answer that hardly counts in it must be equal."""
    if not answer.strip() or len(prompt.split()) < HIDES * len(answer.split()):
        return NearText(f"{prompt} {answer}")
    return NearText(prompt, "", plain_form(answer))


def _pair_text(one: str, other: str) -> NearText:
    """Return two texts as one; if one of them is so long that the other hardly counts, the other must be equal."""
    short, long = sorted((one, other), key=lambda text: len(text.split()))
    if not short or len(long.split()) < HIDES * len(short.split()):
        return NearText(f"{one} {other}".strip())
    return NearText(long, short)


def compared_text(row: Row) -> str:
    """Return the text of a row for the comparison with training rows, in the order of its parts.

    If rows are questions about a text, it is the question and its answers: several rows about one text are usual. So
    are several passages for a query and several hypotheses for a premise: each word then counts with its context.
    """
    if "context" in row:
        return " ".join([row["question"], *(answer["text"] for answer in row["answers"])])
    if "audio" in row:
        return str(row["text"])
    if "messages" in row:
        return " ".join([*_message_texts(row["messages"]), *(row[key] for key in RATED if key in row)])
    if "label" in row or "relevances" in row or "negatives" in row:
        near = _near_text(row)
        return _tag_words(near.text, near.context) if near.context else near.text
    if "tokens" in row:
        return " ".join(row["tokens"])
    return " ".join(row[key] for key in PARTS if key in row)


RATED = ("chosen", "rejected", "answer")
PARTS = ("document", "summary", "source", "target", "prompt", "completion")


def _tag_words(text: str, context: str) -> str:
    tag = xxhash.xxh3_64_hexdigest(text_key(context).encode())[:8]
    return " ".join(f"{word}{tag}" for word in text.split())


def _message_texts(messages: Sequence[Message]) -> list[str]:
    parts = []
    for message in messages:
        if message["role"] != "system":
            parts += [message["reasoning"]] if "reasoning" in message else []
            parts.append(message["content"])
            if "tool_calls" in message:
                parts.append(json.dumps(message["tool_calls"], ensure_ascii=False))
    return parts


def _joined(texts: Iterable[str]) -> str:
    return "|".join(map(plain_form, texts))


def row_input(row: Row) -> RowInput:
    """Return the input of a row; of a text without a prompt, the text itself."""
    if "context" in row:
        return RowInput(row["question"], lambda: plain_form(row["context"]), lambda: _near_text(row).answer)
    if "audio" in row:
        return RowInput("", lambda: str(row["content"]), str, True)
    if "messages" in row:
        return _conversation_input(row)
    if "relevances" in row or ("negatives" in row and row["passages"] and row["score"] is None):
        return RowInput(row["query"], str, lambda: _joined(row["passages"]))
    if "document" in row:
        return RowInput(row["document"], str, lambda: plain_form(row["summary"]))
    if "source" in row:
        names = [row.get(f"{side}_language") for side in ("source", "target")]
        context = json.dumps([names, row.get("languages")])
        return RowInput(row["source"], lambda: context, lambda: plain_form(row["target"]))
    if "prompt" in row and row["prompt"].strip():
        return RowInput(row["prompt"], str, lambda: plain_form(row["completion"]))
    if "completion" in row:
        return RowInput(row["completion"], str, str)
    query = f"{row['text']} \n {row['pair'] or ''}" if "pair" in row else _near_text(row).text
    return RowInput(query, str, lambda: _near_text(row).answer, True)


def hash_input(row: Row) -> bytes:
    """Hash the input of a row, for comparison between runs; case, punctuation and white space make no difference."""
    found = row_input(row)
    return hash_content({"context": found.context(), "query": plain_form(found.query)})


def _conversation_input(row: Row) -> RowInput:
    """Return the last question of a conversation, with everything before it as context."""
    messages = before = row["messages"]
    rated = next((row[key] for key in RATED if key in row), None)
    if rated is None:
        places = range(len(messages) - 1, -1, -1)
        before = messages[: next((i for i in places if messages[i]["role"] == "assistant"), len(messages))]
    *earlier, last = before or [{"role": "user", "content": ""}]

    def context() -> str:
        parts = [[one["role"], *map(plain_form, [one["content"], *_message_texts([one])])] for one in earlier]
        return json.dumps([*parts, [last["role"], json.dumps(row.get("tools"), sort_keys=True)]])

    def answer() -> str:
        text = rated if rated is not None else " ".join(_message_texts(messages[len(before) :][:1]))
        return f"{plain_form(text)} {row['good']}" if "good" in row else plain_form(text)

    return RowInput(last["content"] or "", context, answer)
