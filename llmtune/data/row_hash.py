"""What a row says: as JSON, as a hash by which rows are equal, and as the text by which they are nearly so."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence

import xxhash

from llmtune.data.chat_rows import Message
from llmtune.data.rejected_rows import RowError
from llmtune.records import Row

_write = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_write_sorted = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode


def to_json(row: Mapping[str, object]) -> str:
    """Write a canonical row as it stands in the Arrow file.

    Raises:
        RowError: The text holds half of a surrogate pair, which is no character and cannot be encoded.
    """
    text = _write(row)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise RowError("not a character", f"{half} is half of a surrogate pair") from None
    return text


def hash_content(row: Mapping[str, object]) -> bytes:
    """Hash what a row says: 16 bytes, equal for rows that differ in Unicode composition or outer white space alone."""
    text = _write_sorted(_stripped(row))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return xxhash.xxh3_128_digest(text.encode())


def _stripped(value: object) -> object:
    """Strip every text in a row but the names of files."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    if isinstance(value, dict):
        return {key: _stripped(item) for key, item in value.items() if not (key == "audio" and "content" in value)}
    return value


def spoken_text(row: Row) -> str:
    """Return what is compared in the search for near duplicates: all that is said, but for the system message.

    A long system message that all rows share would make them all look alike. Questions on one context, and texts of
    different recordings, are no duplicates of one another however much they share: each word is tied to its context.
    """
    if "context" in row:
        return _tag_words(f"{row['question']} {' '.join(answer['text'] for answer in row['answers'])}", row["context"])
    if "audio" in row:
        return _tag_words(row["text"], row["content"])
    if "messages" in row:
        answers = [row[key] for key in ("chosen", "rejected", "answer") if key in row]
        return " ".join([*_message_texts(row["messages"]), *answers])
    if "tokens" in row:
        return " ".join(row["tokens"])
    if "document" in row:
        return f"{row['document']} {row['summary']}"
    if "source" in row:
        return f"{row['source']} {row['target']}"
    if "label" in row:
        return f"{row['text']} {row['pair'] or ''}"
    return f"{row['prompt']} {row['completion']}"


def _tag_words(text: str, context: str) -> str:
    tag = xxhash.xxh3_64_hexdigest(context.encode())[:8]
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
