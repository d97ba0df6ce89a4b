"""Reads all inputs into the spool, and keeps account of every row that is bad."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

from llmtune.data.column_mapping import rename
from llmtune.data.file_readers import MAX_ROW_BYTES, NOT_UTF8
from llmtune.data.rejected_rows import Add, RowError, listed
from llmtune.data.row_formats import parse_row
from llmtune.data.row_hash import hash_content, to_json
from llmtune.data.row_store import HashedRow, Spool
from llmtune.data.sources import Detected, encoding_hint
from llmtune.errors import DataError, Problem, nearest
from llmtune.recipe.data_section import DataSection
from llmtune.records import SPLITS

SHOWN = 20


@dataclass
class Account:
    """How many rows were read, how many were bad by reason, and the first of those."""

    list_file: Path
    add_line: Add
    """Adds a line to `list_file`."""
    rows_in: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first: list[Problem] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    """Columns of rows that may be tested, where some are asked for."""
    hints: list[Problem] = field(default_factory=list)
    """What may be behind many bad rows at once."""

    def add_bad(self, origin: str, error: RowError) -> None:
        """Count a bad row and put it into the list."""
        self.bad[f"bad: {error.reason}"] += 1
        what = f"{error.reason}: {error.detail}" if error.detail else error.reason
        if len(self.first) < SHOWN:
            self.first.append(Problem(what, origin))
        self.add_line({"origin": origin, "reason": error.reason, "detail": error.detail})

    def problems(self) -> list[Problem]:
        """Return what may be behind the bad rows, the first of them, and where to find the others."""
        more = self.bad.total() - len(self.first)
        tail = [Problem(f"and {more:,} more bad rows", str(self.list_file))] if more else []
        return [*self.hints, *self.first, *tail]


@contextmanager
def show_progress(console: Console, amount: ProgressColumn | None = None) -> Iterator[Progress]:
    """Draw bars, of bytes if nothing else is given, where a person looks on."""
    columns = (TextColumn("{task.description}"), BarColumn(), amount or DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def read_inputs(
    inputs: Sequence[Detected],
    data: DataSection,
    task: str,
    spool: Spool,
    list_file: Path,
    console: Console,
    columns: Mapping[str, str] | None = None,
) -> Account:
    """Read, check and parse every row into `spool`.

    Args:
        inputs: What to read.
        data: The recipe's section, for `split_by` and `max_dropped`.
        task: Whose canonical rows are made.
        spool: Takes the good rows; open.
        list_file: Gets all bad rows; removed if there are none.
        console: Shows the progress.
        columns: Columns to keep beside each row, each with the key that names it.

    Raises:
        DataError: A file cannot be read to its end, the share of bad rows is above `max_dropped`, or no row that may
            be tested has one of `columns`.
    """
    problems: list[Problem] = []
    taken: Counter[int] = Counter()
    with show_progress(console) as progress, listed(list_file) as add_line:
        account = Account(list_file, add_line)
        bar = progress.add_task("read rows", total=sum(one.input.size for one in inputs))
        for one in inputs:
            try:
                _read_input(one, data, task, spool, account, taken, progress, bar, tuple(columns or ()))
            except DataError as error:
                problems += error.problems
    if account.bad[f"bad: {NOT_UTF8}"]:
        account.hints += [problem for one in inputs if (problem := encoding_hint(one.input))]
    if problems:
        raise DataError(*problems, *account.problems())
    _check_share(account, data.max_dropped)
    check_columns(columns or {}, tuple(account.columns))
    return account


def check_columns(required: Mapping[str, str], columns: Sequence[str]) -> None:
    """Refuse `required` columns (by name, the key) that are not among `columns`. Raises DataError, for all at once."""
    DataError.collect(
        Problem(
            f"no test row has a column {name!r}",
            key,
            f"{nearest(name, columns)} The columns are: {', '.join(columns) or '(none)'}.".strip(),
        )
        for name, key in required.items()
        if name not in columns
    )


def _read_input(
    detected: Detected,
    data: DataSection,
    task: str,
    spool: Spool,
    account: Account,
    taken: Counter[int],
    progress: Progress,
    bar: TaskID,
    kept_columns: Sequence[str],
) -> None:
    one = detected.input
    limit = one.source.limit
    split = -1 if one.split is None else SPLITS.index(one.split)
    columns = detected.columns
    tested = bool(kept_columns) and (one.split == "test" or (one.split is None and not isinstance(data.test, tuple)))
    for origin, value in one.raw_rows(lambda count: progress.advance(bar, count)):
        if limit is not None and taken[one.number] >= limit:
            return
        account.rows_in += 1
        if isinstance(value, RowError):
            account.add_bad(origin, value)
            continue
        try:
            raw = rename(value, columns)
            row = parse_row(raw, detected.row_format, task, one.path.parent if one.path else None)
            text = to_json(row)
            if len(text) > MAX_ROW_BYTES:
                raise RowError("too large", f"the row has {len(text) / 2**20:.0f} MiB of text")
            content = hash_content(row)
            group = _group(raw, data.split_by, required=split < 0) or int.from_bytes(content[8:], "big")
        except RowError as error:
            account.add_bad(origin, error)
            continue
        except RecursionError:
            account.add_bad(origin, RowError("nested too deeply", "lists and objects lie hundreds deep in it"))
            continue
        taken[one.number] += 1
        kept = None
        if tested:
            account.columns.update(dict.fromkeys(raw))
            kept = json.dumps({name: raw[name] for name in kept_columns if name in raw}, default=str)
        text_hash = xxhash.xxh3_64_intdigest(text.encode())
        spool.add(HashedRow(origin, text, kept, content, text_hash, group, one.number, split))


def _group(raw: Mapping[str, object], split_by: str | None, required: bool) -> int | None:
    """Hash the value that decides the split; None where that is the row's own content."""
    if split_by is None:
        return None
    value = raw.get(split_by)
    if value is None:
        if required:
            raise RowError("no value to split by", f"{split_by!r} (data.split_by) is missing or null")
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))


def _check_share(account: Account, allowed: float) -> None:
    bad = account.bad.total()
    if account.rows_in and bad / account.rows_in <= allowed and bad < account.rows_in:
        return
    share = bad / max(account.rows_in, 1)
    what = f"{bad:,} of {account.rows_in:,} rows are bad: {share:.1%}, and data.max_dropped allows {allowed:.1%}"
    allow = f", or set data.max_dropped: {math.ceil(100 * share) / 100}" if share < 1 else ""
    fix = f"Fix them{allow}. All of them: {account.list_file}"
    raise DataError(Problem(what, fix=fix), *account.problems())
