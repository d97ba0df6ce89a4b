"""Retrieval sets in BEIR's layout: queries, passages and judgements in files of their own, joined into rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtune.data.rejected_rows import RowError, passage_text
from llmtune.data.sources import local_input
from llmtune.errors import DataError, nearest
from llmtune.recipe.data_section import DATA_ENDINGS, data_ending
from llmtune.records import SPLITS, Json

CORPUS_NAMES = ("corpus", "passages", "documents", "collection")
"""Names, without the ending, of a file with all passages."""
IDS = ("_id", "id", "doc_id", "docid", "query_id", "qid")
JUDGED = {
    "query": ("query-id", "query_id", "qid", "query"),
    "passage": ("corpus-id", "corpus_id", "doc-id", "doc_id", "docid", "passage_id", "pid"),
    "score": ("score", "relevance", "label", "rel"),
}
"""Usual columns of a file of judgements."""
SPLIT_NAMES = {"train": "train", "dev": "validation", "valid": "validation", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class RetrievalSet:
    """The files of a retrieval set."""

    queries: Path
    corpus: Path
    judgements: Mapping[str, Path]
    """By split; the first has the training rows."""


def find_retrieval_set(folder: Path) -> RetrievalSet | None:
    """Return the files of a retrieval set in a folder; None if it has another layout."""
    queries, corpus = find_data_file(folder, ("queries",)), find_corpus(folder)
    files = [file for file in sorted((folder / "qrels").glob("*")) if data_ending(file) in DATA_ENDINGS]
    files = files or ([one] if (one := find_data_file(folder, ("qrels",))) else [])
    if queries is None or corpus is None or not files:
        return None
    named = {SPLIT_NAMES.get(_stem(file), ""): file for file in files}
    splits = [split for split in SPLITS if split in named]
    first, *others = splits or [""]
    return RetrievalSet(queries, corpus, {"train": named[first], **{split: named[split] for split in others}})


def find_corpus(folder: Path, besides: Collection[Path] = ()) -> Path | None:
    """Return the file with all passages in a folder, by its usual names, `besides` other files; None without one."""
    corpus = find_data_file(folder, CORPUS_NAMES)
    return None if corpus is None or corpus.resolve() in {file.resolve() for file in besides} else corpus


def find_data_file(folder: Path, stems: Collection[str]) -> Path | None:
    """Return the data file in a folder with one of these names before its ending."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((one for one in files if _stem(one) in stems and data_ending(one) in DATA_ENDINGS), None)


def _stem(file: Path) -> str:
    return file.name.split(".")[0].casefold()


def join_rows(files: RetrievalSet, split: str) -> Iterator[Json]:
    """Yield a row per judged query: `query`, relevant passages, and `negatives` if some passages are judged irrelevant.

    Raises DataError if a file lacks a column, or if no judgement has both its query and its passage.
    """
    judged = defaultdict[str, dict[str, float]](dict)
    for row in _rows(files.judgements[split]):
        query, passage, score = (_cell(row, names, files.judgements[split]) for names in JUDGED.values())
        judged[str(query)][str(passage)] = _number(score, files.judgements[split])
    passages = dict(_texts(files.corpus, {passage for scores in judged.values() for passage in scores}))
    queries = dict(_texts(files.queries, judged.keys()))
    has_negatives = any(score <= 0 for scores in judged.values() for score in scores.values())
    rows = 0
    for query, scores in judged.items():
        texts = {0: list[str](), 1: list[str]()}
        for passage, score in scores.items():
            if passage in passages:
                texts[score > 0].append(passages[passage])
        if query in queries and texts[1]:
            rows += 1
            yield {"query": queries[query], "passage": texts[1]} | ({"negatives": texts[0]} if has_negatives else {})
    if not rows:
        what = f"no judgement has its query in {files.queries.name} and a relevant passage in {files.corpus.name}"
        raise DataError.of(what, str(files.judgements[split]), "Check that the files have the same ids.")


def _rows(file: Path) -> Iterator[Mapping[str, object]]:
    for origin, row in local_input(file).raw_rows():
        if isinstance(row, RowError):
            raise DataError.of(str(row), origin, "Correct the row.")
        yield row


def _texts(file: Path, ids: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the texts with these ids; a title is joined as in the rows of a corpus."""
    for row in _rows(file):
        if (key := str(_cell(row, IDS, file))) in ids:
            yield key, passage_text({**row, "text": _cell(row, ("text", "query", "contents"), file)})


def _cell(row: Mapping[str, object], names: Collection[str], file: Path) -> object:
    name = next((name for name in names if name in row), None)
    if name is None:
        fix = f"Name it one of {', '.join(names)}.{nearest(next(iter(names)), [*row])}"
        raise DataError.of(f"a column is missing; found {', '.join(row)}", str(file), fix)
    return row[name]


def _number(value: object, file: Path) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError.of(f"the score {value!r} is no number", str(file), "Write 1 for a relevant passage.") from None
