"""Kinds of rows: one record per kind with everything that shared code needs to know of a row's columns.

A task names its kind (`TaskFacts.rows`). A canonical row shows its kind by a column that no other kind has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.data import audio, chat_rows, classify_rows, conversation_texts, search_rows, task_rows
from llmtune.data.column_mapping import ANSWER_NAMES, CHOSEN_NAMES, PASSAGE_NAMES, PICTURES, REJECTED_NAMES, Aliases
from llmtune.data.row_hash import hash_content, plain_label
from llmtune.data.row_text import (
    LEARNED,
    NearText,
    QuestionAnswer,
    RowInput,
    map_texts,
    plain_form,
    tag_words,
    visible_form,
    with_answer,
)
from llmtune.recipe.class_names import OUTSIDE, rename_tag
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Row

RowParser = Callable[[Mapping[str, object]], Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowKind:
    """A kind of canonical rows. Functions take one row."""

    name: str
    columns: tuple[str, ...]
    """Columns of which a row has one, and rows of other kinds have none."""
    parsers: Mapping[str, RowParser]
    """By row format, the parser that makes a canonical row."""
    aliases: Aliases
    near_text: Callable[[Row], NearText]
    """Returns the text for the search for near duplicates."""
    compared_text: Callable[[Row], str]
    """Returns the text for the comparison with training rows, in the order of its parts."""
    row_input: Callable[[Row], RowInput]
    prompt_text: Callable[[Row], str]
    """Returns the prompt for display."""
    answer: Callable[[Row], str] = lambda row: ""
    """Returns the text that a model generates."""
    without_answer: Callable[[Row], Row] = lambda row: {key: "" if key in LEARNED else row[key] for key in row}
    """Returns the row with an empty answer."""
    questions: Callable[[Row], Iterable[QuestionAnswer]] = lambda row: [_split_columns(row)]
    """Returns questions that have one right answer."""
    repeats_prompts: bool = False
    """Whether several rows usually have the same prompt and different answers."""
    conflict: str = "questions with different answers"
    doubts: Callable[[Iterable[classify_rows.Label]], Iterator[tuple[str, str]]] = lambda labels: iter(())
    """Yields a sentence and a fix for each reading of all labels that is probably wrong."""
    label: Callable[[Row], Any] = lambda row: None
    """Returns the class or number of the row."""
    passages: Callable[[Row], Sequence[str]] = lambda row: ()
    """Returns the passages for the row's query."""
    relevances: Callable[[Row], Sequence[float]] = lambda row: ()
    """Returns what the row says about passages: 0 is irrelevant."""
    map_texts: Callable[[Row, Callable[[Any], Any]], Row] = map_texts
    """Returns the row with a function applied to the texts of its input."""
    guessed: int = 0
    """Place among the kinds that values suggest where columns have unknown names; 0 if they never do."""

    @property
    def tasks(self) -> list[str]:
        """The tasks with such rows; `llmtune init` proposes the first."""
        return [name for name, facts in TASK_FACTS.items() if facts.rows == self.name]


def _split_columns(row: Row) -> QuestionAnswer:
    return {k: v for k, v in row.items() if k not in LEARNED}, {k: v for k, v in row.items() if k in LEARNED}


def _tagged_near(near: Callable[[Row], NearText]) -> Callable[[Row], str]:
    """Return a comparison in which each word counts with its context: several passages for a query are usual."""

    def compared(row: Row) -> str:
        text, context, _ = near(row)
        return tag_words(text, context) if context else text

    return compared


# The table, in order of preference for a file that several kinds can read

_CONVERSATION = {
    "prompt": ("question", "query", "input", "inputs", "user", "human", "request", "problem"),
    "completion": ANSWER_NAMES,
    "output": ("response", "answer", "completion"),
    "input": ("context",),
    "system": ("system_prompt", "system_message"),
}
PREFERENCE = RowKind(
    name="preference",
    columns=("chosen", "answer"),
    parsers={
        "conversation-pair": task_rows.preference_from_conversation,
        "chosen-rejected": task_rows.preference_from_pair,
        "answer-thumb": task_rows.thumb_from_pair,
        "conversation-thumb": task_rows.thumb_from_conversation,
    },
    aliases={
        "prompt": ("question", "instruction", "query", "input"),
        "completion": ANSWER_NAMES,
        "chosen": CHOSEN_NAMES,
        "rejected": REJECTED_NAMES,
    },
    near_text=conversation_texts.near_preference,
    compared_text=conversation_texts.compared_conversation,
    row_input=conversation_texts.conversation_input,
    prompt_text=conversation_texts.conversation_prompt,
    questions=conversation_texts.conversation_questions,
    map_texts=conversation_texts.map_conversation,
    repeats_prompts=True,
)
RANKING = RowKind(
    name="ranking",
    columns=("relevances",),
    parsers={
        "query-passage": search_rows.ranked_positive,
        "query-passage-relevance": search_rows.ranked_pair,
        "query-passages": search_rows.ranked_list,
        "query-judged-passages": search_rows.ranked_objects,
        "query-passage-negatives": search_rows.ranked_negatives,
    },
    aliases={
        "query": ("question", "anchor", "search_query"),
        "passage": (*PASSAGE_NAMES, "positive", "positives", "pos", "positive_passages"),
        "relevance": ("label", "score", "relevant", "is_relevant", "rating", "grade"),
        "passages": ("documents", "docs", "texts", "candidates", "answers", "answer"),
        "relevances": ("labels", "scores", "is_selected"),
        "judged_passages": ("passages",),
        "negatives": ("negative", "neg", "hard_negatives", "negative_passages"),
    },
    near_text=search_rows.near_ranking,
    compared_text=_tagged_near(search_rows.near_ranking),
    row_input=search_rows.query_input,
    prompt_text=lambda row: "\n".join([row["query"], *row["passages"]]),
    questions=search_rows.ranking_questions,
    conflict="passages with different relevances for the same query",
    passages=lambda row: row["passages"],
    relevances=lambda row: row["relevances"],
)
TAGS = RowKind(
    name="tags",
    columns=("tokens",),
    parsers={"tokens-tags": task_rows.tagged_tokens, "text-spans": task_rows.tagged_spans},
    aliases={"tokens": ("words",), "tags": ("ner_tags", "labels"), "spans": ("entities",)},
    near_text=task_rows.near_tags,
    compared_text=lambda row: " ".join(row["tokens"]),
    row_input=lambda row: RowInput(task_rows.near_tags(row).text, str, lambda: task_rows.near_tags(row).answer, True),
    prompt_text=lambda row: " ".join(row["tokens"]),
)
AUDIO = RowKind(
    name="audio",
    columns=("audio",),
    parsers={"audio-text": audio.speech_from_columns, "audio-folder": audio.speech_from_folder},
    aliases={
        "audio": ("path", "file", "wav", "recording", "audio_path", "audio_file", "audio_filepath"),
        "file_name": ("filename",),
        "text": ("transcription", "transcript", "sentence", "normalized_text"),
    },
    near_text=lambda row: NearText(row["text"], row["content"]),
    compared_text=lambda row: str(row["text"]),
    row_input=lambda row: RowInput("", lambda: str(row["content"]), str, True),
    prompt_text=lambda row: str(row["audio"]).rsplit("/", 1)[-1],
    repeats_prompts=True,
    guessed=1,
)
QUESTION = RowKind(
    name="question",
    columns=("context",),
    parsers={"squad": task_rows.question_squad, "question-answer": task_rows.question_answer},
    aliases={
        "question": ("query",),
        "context": ("passage", "paragraph", "document", "article", "text"),
        "answer": ("response", "answer_text"),
    },
    near_text=task_rows.near_question,
    compared_text=lambda row: " ".join([row["question"], *(answer["text"] for answer in row["answers"])]),
    row_input=lambda row: RowInput(
        row["question"], lambda: plain_form(row["context"]), lambda: task_rows.near_question(row).answer
    ),
    prompt_text=lambda row: f"{row['question']}\n{row['context']}",
    guessed=2,
)
TRANSLATION = RowKind(
    name="translation",
    columns=("source",),
    parsers={"source-target": task_rows.translation_from_pair, "translation": task_rows.translation_from_map},
    aliases={
        "source": ("src", "source_text", "source_sentence"),
        "target": ("tgt", "target_text", "target_sentence"),
        "source_language": ("source_lang", "src_lang"),
        "target_language": ("target_lang", "tgt_lang"),
    },
    near_text=lambda row: with_answer(row["source"], row["target"]),
    compared_text=lambda row: f"{row['source']} {row['target']}",
    row_input=task_rows.translation_input,
    prompt_text=lambda row: str(row["source"]),
    answer=lambda row: str(row["target"]),
    guessed=3,
)
SUMMARY = RowKind(
    name="summary",
    columns=("document",),
    parsers={"document-summary": task_rows.summary_from_pair},
    aliases={
        "document": ("text", "article", "dialogue", "content", "body", "report", "description"),
        "summary": ("highlights", "abstract", "headline", "tldr"),
    },
    near_text=lambda row: with_answer(row["document"], row["summary"]),
    compared_text=lambda row: f"{row['document']} {row['summary']}",
    row_input=lambda row: RowInput(row["document"], str, lambda: plain_form(row["summary"])),
    prompt_text=lambda row: str(row["document"]),
    answer=lambda row: str(row["summary"]),
)
MESSAGES = RowKind(
    name="messages",
    columns=("messages",),
    parsers={
        "messages": chat_rows.chat_from_messages,
        "sharegpt": chat_rows.chat_from_messages,
        "alpaca": chat_rows.chat_from_alpaca,
        "prompt-completion": chat_rows.chat_from_pair,
        "image-answer": chat_rows.chat_from_picture,
    },
    aliases={**_CONVERSATION, **PICTURES},
    near_text=conversation_texts.near_conversation,
    compared_text=conversation_texts.compared_conversation,
    row_input=conversation_texts.conversation_input,
    prompt_text=conversation_texts.conversation_prompt,
    answer=conversation_texts.last_answer,
    without_answer=conversation_texts.without_last_answer,
    questions=conversation_texts.conversation_questions,
    map_texts=conversation_texts.map_conversation,
    guessed=5,
)
LABELLED = RowKind(
    name="labelled",
    columns=("pair",),
    parsers={"text-label": classify_rows.classified},
    aliases={
        "text": (
            *("sentence", "content", "review", "body", "message", "comment", "tweet", "description", "question"),
            *("premise", "sentence1", "text1", "input", "prompt"),
        ),
        "pair": ("hypothesis", "sentence2", "text2", "text_pair"),
        "label": ("category", "class", "labels", "target", "sentiment", "intent", "topic", "score", "rating", "stars"),
    },
    near_text=classify_rows.near_labelled,
    compared_text=_tagged_near(classify_rows.near_labelled),
    row_input=lambda row: RowInput(
        f"{row['text']} \n {row['pair'] or ''}", str, lambda: classify_rows.near_labelled(row).answer, True
    ),
    prompt_text=lambda row: "\n".join(part for part in (row["text"], row["pair"]) if part),
    doubts=classify_rows.class_doubts,
    label=lambda row: row["label"],
    guessed=4,
)
PAIRS = RowKind(
    name="pairs",
    columns=("completion",),
    parsers={
        "prompt-completion": chat_rows.completion_from_pair,
        "alpaca": chat_rows.completion_from_alpaca,
        "text": chat_rows.completion_from_text,
    },
    aliases={**_CONVERSATION, "text": ("content",)},
    near_text=lambda row: with_answer(row["prompt"], row["completion"]),
    compared_text=lambda row: f"{row['prompt']} {row['completion']}",
    row_input=chat_rows.text_input,
    prompt_text=lambda row: str(row["prompt"]),
    answer=lambda row: str(row["completion"]),
)
RETRIEVAL = RowKind(
    name="retrieval",
    columns=("negatives",),
    parsers={"query-passage": search_rows.embed_from_pair, "text-label": search_rows.embed_from_label},
    aliases={
        "query": ("anchor", "question", "sentence1", "text1"),
        "passage": ("positive", "pos", "positives", "passages", "document", "answer", "sentence2", "text2"),
        "negatives": ("negative", "neg", "hard_negatives", "hard_negative"),
        "score": ("similarity", "similarity_score", "relatedness_score"),
        "text": ("sentence", "content"),
        "label": ("category", "class", "labels"),
    },
    near_text=search_rows.near_retrieval,
    compared_text=_tagged_near(search_rows.near_retrieval),
    row_input=search_rows.retrieval_input,
    prompt_text=lambda row: row["query"] or "",
    label=lambda row: row["label"] if row["score"] is None else row["score"],
    passages=lambda row: row["passages"],
    relevances=lambda row: [1] * len(row["passages"]) + [0] * len(row["negatives"]),
)
KINDS = (PREFERENCE, RANKING, TAGS, AUDIO, QUESTION, TRANSLATION, SUMMARY, MESSAGES, LABELLED, PAIRS, RETRIEVAL)
_BY_NAME = {kind.name: kind for kind in KINDS}
_BY_COLUMN = [(column, kind) for kind in KINDS for column in kind.columns]


def kind_of_task(task: str) -> RowKind:
    """Return the kind of a task's rows."""
    return _BY_NAME[TASK_FACTS[task].rows]


def kind_of_row(row: Row) -> RowKind:
    """Return the kind of a canonical row."""
    return next(kind for column, kind in _BY_COLUMN if column in row)


def near_text(row: Row) -> NearText:
    """Return the text for the near-duplicate search: everything except system messages.

    A long system message shared by all rows would make them all similar. Questions on different contexts, passages
    for different queries (a passage may answer several), and texts of different recordings are never duplicates,
    whatever they share. Nor are rows with other labels, or with other answers where these are short: a pair that is
    almost equal and has two labels teaches the most.
    """
    near = kind_of_row(row).near_text(row)
    return NearText(visible_form(near.text), *near[1:])


def compared_text(row: Row) -> str:
    """Return the text of a row for the comparison with training rows, in the order of its parts.

    If rows are questions about a text, it is the question and its answers: several rows about one text are usual. So
    are several passages for a query and several hypotheses for a premise: each word then counts with its context.
    """
    return kind_of_row(row).compared_text(row)


def row_input(row: Row) -> RowInput:
    """Return the input of a row; of a text without a prompt, the text itself."""
    return kind_of_row(row).row_input(row)


def write_prompt(row: Row) -> str:
    """Return a prompt for display: plain text for a single message, else each message with its role."""
    return kind_of_row(row).prompt_text(row)


def prompt_row(row: Row) -> Row | None:
    """Return a row with an empty answer; None if it has no prompt.

    Also None if several rows about one input are usual, or if the comparison of words ignores answers anyway.
    """
    prompt = kind_of_row(row).without_answer(row)
    ignored = compared_text(prompt) == compared_text(row)
    return None if ignored or not near_text(prompt).text.strip() else prompt


def hash_row(row: Row) -> bytes:
    """Hash a row as `hash_content` does; a CSV file has texts where JSON and Parquet have numbers or true and false."""
    return hash_content({**row, "label": plain_label(row["label"])} if "label" in row else row)


def hash_inputs(row: Row) -> frozenset[bytes]:
    """Hash a row's input; a single question without system message also as the plain prompt of another task."""
    roles = [message["role"] for message in row.get("messages") or () if message["role"] != "assistant"]
    plain = {"context": "", "query": plain_form(row_input(row).query)}
    return frozenset((hash_input(row), *([hash_content(plain)] if roles == ["user"] and not row.get("tools") else ())))


def hash_input(row: Row) -> bytes:
    """Hash the input of a row, for comparison between runs; case, punctuation and white space make no difference."""
    input_parts = row_input(row)
    return hash_content({"context": input_parts.context(), "query": plain_form(input_parts.query)})


def rename_row(row: Row, renames: Mapping[str, str]) -> Row:
    """Return a canonical row with its label, labels or tags renamed; other rows as they are."""
    if isinstance(tags := row.get("tags"), list):
        return {**row, "tags": [rename_tag(tag, renames) for tag in tags]}
    label = row.get("label")
    if isinstance(label, list):
        return {**row, "label": sorted({renames.get(name, name) for name in label})}
    return {**row, "label": renames.get(label, label)} if isinstance(label, str) else row


def names_in(row: Row) -> list[str]:
    """Return the different class names in a canonical row: its label or labels, or its entity types."""
    if isinstance(tags := row.get("tags"), list):
        return list(dict.fromkeys(tag[2:] for tag in tags if tag != OUTSIDE))
    label = row.get("label")
    return [*label] if isinstance(label, list) else [label] if isinstance(label, str) else []


def earlier_forms(row: Row, renames: Mapping[str, str]) -> Iterator[Row]:
    """Yield the row under each earlier name of its classes, one class at a time."""
    for name in names_in(row):
        for old in (old for old, new in renames.items() if new == name):
            yield rename_row(row, {name: old})
