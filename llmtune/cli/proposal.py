"""The recipe that `llmtune init` proposes: its sources, columns and corpus, each with the reason for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from llmtune.data.classify_rows import Label
from llmtune.data.column_mapping import FIELD, JOINT, find, name_words, with_aliases
from llmtune.data.file_survey import Reading, Survey
from llmtune.data.label_candidates import HEADINGS
from llmtune.data.retrieval_layout import RetrievalSet, find_corpus, join_rows
from llmtune.data.row_kind import kind_of_task
from llmtune.errors import DataError, RecipeError
from llmtune.recipe.first_recipe import mines_negatives, propose_model, write_first_recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.undecided import UNDECIDED
from llmtune.recipe.yaml_writer import flow
from llmtune.store.atomic_files import atomic_file, explained
from llmtune.store.machine import likely_device, list_cards, process_memory_limit
from llmtune.tasks.class_labels import REGRESSION_METRICS, infer_kind

SHOWN_CANDIDATES = 8


def write_joined_rows(files: RetrievalSet, target: Path) -> dict[str, Path]:
    """Write the joined rows of each split of a retrieval set next to the recipe; return their files.

    Raises RecipeError if a file exists, DataError for files that cannot be joined.
    """
    written = {split: target.with_name(f"{target.stem}-{split}.jsonl") for split in files.judgements}
    for file in written.values():
        if file.exists():
            raise RecipeError.of("the file exists", str(file), "Choose another name with --out.")
    for split, file in written.items():
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in join_rows(files, split)]
        with explained(file), atomic_file(file) as partial:
            partial.write_text("".join(rows), encoding="utf-8")
    return written


def propose_recipe(
    survey: Survey,
    reading: Reading,
    target: Path,
    model: str | None,
    splits: Mapping[str, Path],
    corpus: Path | None,
) -> tuple[str, str]:
    """Return the recipe's text and its model; `splits` and `corpus` are files of a retrieval set."""
    cuda = likely_device() == "cuda"
    memory = max(card.memory_bytes for card in list_cards()) if cuda else process_memory_limit() / 2
    model = model or propose_model(reading.task, memory)
    sources = _write_sources(survey, target)
    note = "the encodings differ, so each file is a source; add a line for a new file" if len(sources) > 1 else ""
    data = _name_sources("train", sources, note)
    data += [f"{split}: {flow(_relative(file, target))}" for split, file in splits.items() if split != "train"]
    data += [*_name_columns(survey, reading), *_name_corpus(survey, reading, sources, target, corpus)]
    if reading.roles:
        names = {role: names[0] if len(names) == 1 else list(names) for role, names in reading.roles.items()}
        data.append(f"roles: {flow(names)}  # DECIDE: who is who; the model learns what the assistant says")
    text = write_first_recipe(
        target.stem,
        reading.task,
        data,
        reading.rows,
        model=model,
        metrics=_number_metrics(reading),
        unread=sum(reading.bad.values()),
        copies=reading.copies,
        has_test="test" in splits,
    )
    return text, model


def _relative(path: Path | str, target: Path) -> str:
    return os.path.relpath(path, target.parent)


def _write_sources(survey: Survey, target: Path) -> list[str]:
    """Write each source as it is in the recipe."""
    written = [(_relative(one.path, target), one.encoding) for one in survey.sources]
    each = len(written) > 1
    return [
        flow({"path": path, "encoding": encoding} if encoding else {"path": path} if each else path)
        for path, encoding in written
    ]


def _name_sources(key: str, sources: Sequence[str], note: str) -> list[str]:
    comment = f"  # {note}" if note else ""
    if len(sources) == 1:
        return [f"{key}: {sources[0]}{comment}"]
    return [f"{key}:{comment}", *(f"  - {one}" for one in sources)]


def _name_columns(survey: Survey, reading: Reading) -> list[str]:
    """Return the lines of `data.columns`, with a reason for each column that is no single, named one."""
    columns = reading.columns
    notes = dict[str, str]()
    for ours, theirs in columns.items():
        if JOINT in theirs:
            each = "both" if len(FIELD.findall(theirs)) == 2 else "all"
            why = f"joined in this order: {each} differ from row to row; an empty one is left out"
            notes[ours] = f"{why}. Join new texts for the model in the same way"
    if len(reading.candidates) > 1:
        shown = [str(one) for one in reading.candidates[:SHOWN_CANDIDATES]]
        more = len(reading.candidates) - len(shown)
        notes["label"] = f"one of {', '.join(shown)}{f' and {more} more' if more else ''}"
        columns = {**columns, "label": UNDECIDED}
    if TASK_FACTS[reading.task].searches and all(row["passages"] for row in reading.rows):
        columns = _usual_columns(survey, reading)
        if name_words(columns.get("query", "")) & HEADINGS:
            notes["query"] = "titles stand in for queries; queries that users typed teach more"
    if not notes:
        return [f"columns: {flow(columns)}"] if columns else []
    lines = [
        f"{ours}: {flow(theirs)}" + (f"  # {notes[ours]}" if ours in notes else "") for ours, theirs in columns.items()
    ]
    return ["columns:", *(f"  {line}" for line in lines)]


def _usual_columns(survey: Survey, reading: Reading) -> dict[str, str]:
    """Return the columns of query and passage, including those that are read by their usual names."""
    usual = with_aliases(reading.columns, ("query", "passage"), survey.columns, kind_of_task(reading.task).aliases)
    return {ours: theirs for ours, theirs in usual.items() if ours != theirs}


def _name_corpus(
    survey: Survey, reading: Reading, sources: Sequence[str], target: Path, corpus: Path | None
) -> list[str]:
    """Return the lines of `data.corpus`: a file with all passages, or the rows themselves."""
    facts = TASK_FACTS[reading.task]
    searches = facts.searches and all(row["passages"] and row.get("score") is None for row in reading.rows)
    if not searches and not mines_negatives(facts, reading.rows):
        return []
    if corpus := corpus or find_corpus(next(iter(survey.files)).parent, besides=survey.files):
        return _name_sources("corpus", [flow(_relative(corpus, target))], "all passages, as users will search them")
    column = _usual_columns(survey, reading).get("passage", "passage")
    if not searches or any(isinstance(find(row, column), list | dict) for row in survey.rows):
        return []
    note = "test queries search the passages of all rows, not only of the test rows; a file with more is harder"
    return _name_sources("corpus", sources, note)


def _number_metrics(reading: Reading) -> tuple[str, ...] | None:
    """Return the metrics for labels that are numbers on a scale; None otherwise, to keep the task's metrics."""
    if TASK_FACTS[reading.task].answer_kind != "labels":
        return None
    with suppress(DataError):  # labels of several kinds
        labels = cast("list[Label]", [row["label"] for row in reading.rows])
        if infer_kind(labels) == "regression":
            return REGRESSION_METRICS
    return None
