"""Passages without queries: those of `data.corpus`, and of files that are to be ranked or turned into vectors."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.data.column_mapping import PASSAGE_NAMES, has_columns, rename
from llmtune.data.hub_datasets import dataset_name
from llmtune.data.object_store import is_remote
from llmtune.data.rejected_rows import RowError, passage_text, too_many_bad
from llmtune.data.row_hash import row_json
from llmtune.data.row_text import text_key
from llmtune.data.sources import Input, local_input, open_sources
from llmtune.errors import DataError, LlmtuneError, Problem
from llmtune.recipe.data_section import DataSection
from llmtune.store.atomic_files import atomic_file

if TYPE_CHECKING:
    from rich.console import Console

CORPUS = "corpus.jsonl"
"""File with a passage of `data.corpus` per line, next to the prepared rows."""
SHOWN = 20
TRIED_PASSAGES = 1000
"""How many passages of each file a check reads."""


def read_passages(file: Path) -> list[str]:
    """Return the passages of a file: its lines if it is a text, else the column `passage` (or a usual name for it).

    Raises DataError if the file has no passages, or cannot be read.
    """
    passages = []
    for origin, passage in iterate_passages(local_input(file), {}):
        if isinstance(passage, RowError):
            raise DataError.of(f"{passage.reason} ({passage.detail})", origin)
        passages.append(passage)
    if not passages:
        raise DataError.of("it has no passages", str(file), "Give a text file with a passage per line.")
    return passages


def save_corpus(data: DataSection, folder: Path, console: Console) -> str:
    """Write the different passages of `data.corpus` into `folder`; return their hash, or nothing without a corpus.

    Raises DataError for sources that cannot be read, and if more passages are bad than `data.max_dropped` allows.
    """
    if not data.corpus:
        (folder / CORPUS).unlink(missing_ok=True)
        return ""
    seen, taken = set[bytes](), Counter[int]()
    digest, bad, total = hashlib.sha256(), list[Problem](), 0
    with atomic_file(folder / CORPUS) as partial, partial.open("w", encoding="utf-8") as file:
        for one in open_sources(data.corpus, "data.corpus"):
            for origin, passage in iterate_passages(one, one.source.columns or data.columns):
                if one.source.limit is not None and taken[one.number] >= one.source.limit:
                    break
                total += 1
                if isinstance(passage, RowError):
                    bad.append(Problem(f"{passage.reason} ({passage.detail})", origin))
                    continue
                taken[one.number] += 1
                if (key := hashlib.blake2b(text_key(passage).encode(), digest_size=16).digest()) not in seen:
                    seen.add(key)
                    digest.update(key)
                    file.write(json.dumps(passage, ensure_ascii=False) + "\n")
    if not seen:
        raise _no_passages()
    if len(bad) > data.max_dropped * total:
        looked = f"{len(bad):,} of {total:,} passages of data.corpus"
        raise DataError(too_many_bad(looked, len(bad) / total, data.max_dropped), *bad[:SHOWN])
    from rich.markup import escape  # late: `recipes check` does not need it

    left_out = f"; {len(bad):,} left out ({escape(bad[0].what)}: {escape(bad[0].where or '')})" if bad else ""
    console.print(f"corpus: {len(seen):,} different passages of {total:,}{left_out}", highlight=False)
    return digest.hexdigest()


def _no_passages() -> LlmtuneError:
    return DataError.of("the corpus has no passages", "data.corpus", "Give a text file with a passage per line.")


def try_corpus(data: DataSection) -> None:
    """Refuse passages that `save_corpus` would refuse, judging by the first of each local file."""
    local = [one for one in data.corpus or () if not (dataset_name(one) or is_remote(one.path))]
    bad, total, whole = list[Problem](), 0, True
    for one in open_sources(local, "data.corpus"):
        tried = list(islice(iterate_passages(one, one.source.columns or data.columns), TRIED_PASSAGES + 1))
        whole &= len(tried) <= TRIED_PASSAGES
        total += len(tried)
        bad += [
            Problem(f"{passage.reason} ({passage.detail})", origin)
            for origin, passage in tried
            if isinstance(passage, RowError)
        ]
    share = len(bad) / max(total, 1)
    if local and total == 0 and len(local) == len(data.corpus or ()):
        raise _no_passages()
    if total and (share == 1 or (whole and share > data.max_dropped)):
        looked = f"{len(bad):,} of {total:,} passages of data.corpus"
        raise DataError(too_many_bad(looked, share, data.max_dropped), *bad[:SHOWN])


def load_corpus(folder: Path) -> list[str]:
    """Return the passages that `save_corpus` wrote into `folder`; empty without a corpus."""
    path = folder / CORPUS
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:  # `splitlines` would split at U+2028 and U+0085 too
        return [json.loads(line) for line in file]


def iterate_passages(one: Input, columns: Mapping[str, str]) -> Iterator[tuple[str, str | RowError]]:
    """Yield each passage of an input with its origin, or why a row has none.

    Raises DataError if no column has the passages.
    """
    for origin, row in one.raw_rows():
        if isinstance(row, RowError):
            yield origin, row
        elif one.container == "text":
            yield from ((origin, line.strip()) for line in str(row["text"]).splitlines() if line.strip())
        else:
            column = columns.get("passage")
            if column is None or not (one.source.columns or has_columns(row, column)):
                column = find_column(list(row), one.name)
            try:
                titled = column == "text" and row.get("title")
                passage = passage_text(row if titled else rename(row, {"passage": column}).get("passage"))
                row_json({"passage": passage})  # raises for half of a surrogate pair
                yield origin, passage
            except RowError as error:
                yield origin, error


def find_column(header: Sequence[str], name: str) -> str:
    """Return the column with the passages, by its usual names. Raises DataError if there is none, or several."""
    columns = [column for column in header if column.strip().casefold() in PASSAGE_NAMES]
    if "passage" not in header and len(columns) != 1:
        fix = "Name the column passage, or give a text file with a passage per line."
        raise DataError.of(f"no column for the passages; found {', '.join(header) or 'none'}", name, fix)
    return "passage" if "passage" in header else columns[0]
