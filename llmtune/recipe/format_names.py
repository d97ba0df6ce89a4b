"""Names of row formats and columns in a recipe, by kind of rows. Imports no library."""

from __future__ import annotations

from collections.abc import Mapping

WITH_ROLES = ("messages", "sharegpt", "prompt-completion", "conversation-pair", "conversation-thumb", "chosen-rejected")
"""Formats whose rows may contain messages."""
PROMPT_ALONE = "prompt"
"""The further format of `messages` rows for tasks whose rows need no answer."""
ROW_KINDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "sharegpt", "alpaca", "prompt-completion", "image-answer"),
    "pairs": ("prompt-completion", "alpaca", "text"),
    "translation": ("source-target", "translation"),
    "summary": ("document-summary",),
    "question": ("squad", "question-answer"),
    "labelled": ("text-label",),
    "tags": ("tokens-tags", "text-spans"),
    "audio": ("audio-text", "audio-folder"),
    "preference": ("chosen-rejected", "conversation-pair", "answer-thumb", "conversation-thumb"),
    "retrieval": ("query-passage", "text-label"),
    "ranking": (
        *("query-passage-relevance", "query-passages", "query-passage-negatives", "query-passage"),
        "query-judged-passages",
    ),
}
"""Kinds of rows (`llmtune.data.row_kind`), each with its row formats: values of a source's `format`."""
COLUMNS = (
    *("answer", "answers", "audio", "chosen", "completion", "context", "conversations", "document", "file_name"),
    *(
        "functions",
        "history",
        "image",
        "images",
        "input",
        "instruction",
        "judged_passages",
        "label",
        "messages",
        "negatives",
        "output",
    ),
    *("pair", "passage", "passages", "prompt", "query", "question", "rejected", "relevance", "relevances", "score"),
    *("source", "source_language", "spans", "summary", "system", "tags", "target", "target_language"),
    *("text", "tokens", "tools", "train_reasoning", "translation"),
)
"""Names of row columns: the allowed keys of a source's `columns`."""
ROW_FORMATS = (*dict.fromkeys(name for formats in ROW_KINDS.values() for name in formats), PROMPT_ALONE)
"""Every row format once."""
