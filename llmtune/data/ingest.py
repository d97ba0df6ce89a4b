"""Reads all inputs into the spool, on all cores, and records every bad row."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from llmtune.data.arrow_rows import ArrowRow
from llmtune.data.class_spelling import NameChange, note_tidied, rename_classes
from llmtune.data.column_mapping import name_columns, rename
from llmtune.data.file_readers import MAX_ROW_BYTES, NOT_UTF8, JsonLine, LazyRow
from llmtune.data.pictures import row_pictures
from llmtune.data.rejected_rows import RowError, parse_cell, too_many_bad
from llmtune.data.row_formats import parse_row
from llmtune.data.row_hash import BATCH_BYTES, BATCH_ROWS, HashedRow, plain_value, row_json, write_columns
from llmtune.data.row_kind import hash_row
from llmtune.data.sources import Detected, encoding_hint
from llmtune.data.worker_pool import WorkerPool
from llmtune.errors import DataError, Problem, nearest
from llmtune.recipe.data_section import DataSection
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import SPLITS, Advance, Json
from llmtune.store.atomic_files import atomic_file

if TYPE_CHECKING:
    from rich.console import Console

    from llmtune.data.row_store import Spool

SHOWN = 20
TRIED_ROWS = 5000
"""How many rows of each input a check reads."""
_Parsed = tuple[int, tuple[str, HashedRow | RowError, tuple[str, ...]]]
"""A row's position in its input, its origin, the row, and its column names if it may be a test row."""


@dataclass
class IngestState:
    """Progress of reading, the number of bad rows by reason, and the first of them."""

    list_file: Path
    """The list of all bad rows, written at the end."""
    spooled_list: Path
    """The list of the bad rows found so far."""
    rows_in: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first: list[Problem] = field(default_factory=list)
    unreadable: list[Problem] = field(default_factory=list)
    """Errors of files, as opposed to rows."""
    columns: dict[str, None] = field(default_factory=dict)
    """Columns of possible test rows, if `evaluate` requires some."""
    taken: Counter[int] = field(default_factory=Counter)
    """Good rows by source number."""
    filled: int = 0
    """The number of null keys that Arrow added to good rows, and that were dropped."""
    changes: Counter[NameChange] = field(default_factory=Counter)
    """Class names of good rows that were normalised or renamed, with the number of rows."""
    position: tuple[int, int] = (0, 0)
    """The input being read, and how many of its rows were read."""
    hints: list[Problem] = field(default_factory=list)
    """Files in another encoding, which no share of bad rows excuses: only their ASCII rows would be left."""

    @classmethod
    def restore(cls, list_file: Path, spool: Spool) -> IngestState:
        """Resume from the result of `note` when the spool's last shard was completed."""
        account, noted = cls(list_file, spool.folder / list_file.name), spool.noted
        account.spooled_list.touch()
        os.truncate(account.spooled_list, noted.get("listed", 0))
        if noted:
            account.rows_in, account.position = noted["rows_in"], tuple(noted["position"])
            account.filled = noted.get("filled", 0)
            account.bad, account.columns = Counter(noted["bad"]), dict.fromkeys(noted["columns"])
            account.changes = Counter({(why, old, new): rows for why, old, new, rows in noted.get("changes", ())})
            account.taken = Counter({int(number): count for number, count in noted["taken"].items()})
            account.first = [Problem(**problem) for problem in noted["first"]]
            account.unreadable = [Problem(**problem) for problem in noted["unreadable"]]
        return account

    def note(self) -> Json:
        """Return the state that `restore` needs."""
        self._lines.flush()
        os.fsync(self._lines.fileno())
        names = ("rows_in", "filled", "position", "bad", "taken", "first", "unreadable")
        noted = {name: getattr(self, name) for name in names}
        changes = [[*change, rows] for change, rows in self.changes.items()]
        listed = self.spooled_list.stat().st_size
        return {**noted, "columns": [*self.columns], "changes": changes, "listed": listed}

    @contextmanager
    def spooled(self) -> Iterator[None]:
        """Keep the list of bad rows open."""
        with self.spooled_list.open("ab") as self._lines:
            yield

    def add_bad(self, origin: str, error: RowError) -> None:
        """Count a bad row and add it to the list."""
        self.bad[f"bad: {error.reason}"] += 1
        if len(self.first) < SHOWN:
            self.first.append(Problem(f"{error.reason}: {error.detail}" if error.detail else error.reason, origin))
        line = json.dumps({"origin": origin, "reason": error.reason, "detail": error.detail})
        self._lines.write(line.encode() + b"\n")

    def publish(self) -> None:
        """Move the list of all bad rows into place, or delete an old list if there are no bad rows."""
        if self.bad:
            with atomic_file(self.list_file) as partial:
                shutil.copyfile(self.spooled_list, partial)
        else:
            self.list_file.unlink(missing_ok=True)

    def problems(self) -> list[Problem]:
        """Return likely causes of the bad rows, the first bad rows, and the path of their list."""
        more = self.bad.total() - len(self.first)
        tail = [Problem(f"and {more:,} more bad rows", str(self.list_file))] if more else []
        return [*self.hints, *self.first, *tail]


def ingest_rows(
    inputs: Sequence[Detected],
    data: DataSection,
    task: str,
    spool: Spool,
    list_file: Path,
    console: Console,
    columns: Mapping[str, str] | None = None,
    renames: Mapping[str, str] | None = None,
) -> IngestState:
    """Read, check and parse every row into `spool`.

    Args:
        inputs: The inputs to read.
        data: The recipe's section, for `split_by` and `max_dropped`.
        task: The task whose canonical rows are made.
        spool: Stores the good rows; rows already in it are not read again.
        list_file: The list of all bad rows; removed if there are none.
        console: Shows the progress.
        columns: Columns to keep with each row, each with the recipe key that names it.
        renames: The new name of each renamed class (`follow_renames`).

    Raises:
        DataError: A file cannot be read to its end, the share of bad rows exceeds `max_dropped`, or no possible test
            row has one of `columns`.
    """
    from llmtune.display.console import progress_bars  # late: a check draws none

    account = IngestState.restore(list_file, spool)
    if not spool.ended:
        with account.spooled(), progress_bars(console) as progress:
            bar = progress.add_task("read rows", total=sum(one.input.size for one in inputs))
            own_tests, kept = isinstance(data.test, tuple), tuple(columns or ())
            parser = _RowParser(tuple(inputs), task, data.split_by, own_tests, kept, dict(renames or {}))
            _read_rows(parser, account, spool, lambda count: progress.advance(bar, count))
            spool.end(account.note)
    account.publish()
    if account.bad[f"bad: {NOT_UTF8}"]:
        account.hints += [problem for one in inputs if (problem := encoding_hint(one.input))]
    if account.unreadable:
        raise DataError(*dict.fromkeys(account.unreadable), *account.problems())
    _check_share(account, data.max_dropped)
    if account.hints:
        raise DataError(*account.problems())
    check_columns(columns or {}, tuple(account.columns))
    return account


OTHER_FILE = (
    " Rows that are not UTF-8 come from a file in another encoding: keep them in a file of their own, and state its"
    " `encoding`."
)


@dataclass
class TriedRows:
    """The first rows of all inputs, parsed."""

    whole: bool = True
    """Whether the inputs have no other rows."""
    rows_in: int = 0
    good: list[HashedRow] = field(default_factory=list)
    bad: list[tuple[str, RowError]] = field(default_factory=list)
    columns: dict[str, None] = field(default_factory=dict)
    """Columns of possible test rows, if `evaluate` requires some."""

    @property
    def different(self) -> int:
        """The number of rows with different content, or of their groups if there are fewer."""
        return min(len({row.content for row in self.good}), len({row.group for row in self.good}))


def try_rows(
    inputs: Sequence[Detected],
    data: DataSection,
    task: str,
    columns: Mapping[str, str] | None = None,
    renames: Mapping[str, str] | None = None,
) -> TriedRows:
    """Refuse rows that `ingest_rows` would refuse with the same arguments, judging by the first rows of each input.

    Raises:
        DataError: too many rows are bad, or all of the first rows of longer inputs; a file cannot be read, or has
            another encoding; or no possible test row has one of `columns`.
    """
    columns, tried = columns or {}, TriedRows()
    own_tests = isinstance(data.test, tuple)
    parser = _RowParser(tuple(inputs), task, data.split_by, own_tests, tuple(columns), renames or {})
    for number, one in enumerate(inputs):
        most = min(one.input.source.limit or TRIED_ROWS, TRIED_ROWS)
        rows = list(islice(one.input.lazy_rows(lambda count: None), most + 1))
        tried.whole &= len(rows) <= most
        for _, (origin, row, names) in parser(_InputBatch(number, 0, rows[:most], 0))[1]:
            tried.rows_in += 1
            tried.columns.update(dict.fromkeys(names))
            if isinstance(row, HashedRow):
                tried.good.append(row)
            else:
                tried.bad.append((origin, row))
    hints = [hint for one in inputs if (hint := encoding_hint(one.input))] if _lack_utf8(tried.bad) else []
    share = len(tried.bad) / max(tried.rows_in, 1)
    if not hints and share < 1 and (share <= data.max_dropped or not tried.whole):
        if tried.columns:
            check_columns(columns, tuple(tried.columns))
        return tried
    looked = f"{len(tried.bad):,} of {tried.rows_in:,} rows" if tried.whole else f"the first {len(tried.bad):,} rows"
    more = OTHER_FILE if _lack_utf8(tried.bad) else ""
    problems = hints or [too_many_bad(looked, share, data.max_dropped, more)]
    raise DataError(*problems, *(Problem(str(error), origin) for origin, error in tried.bad[:SHOWN]))


def _lack_utf8(bad: Sequence[tuple[str, RowError]]) -> bool:
    return any(error.reason == NOT_UTF8 for _, error in bad)


def check_columns(required: Mapping[str, str], columns: Sequence[str]) -> None:
    """Refuse `required` columns (name to key) that are missing in `columns`. Raises one DataError for all of them."""
    DataError.collect(
        Problem(
            f"no test row has a column {name!r}",
            key,
            f"{nearest(name, columns)} The columns are: {', '.join(columns) or '(none)'}.".strip(),
        )
        for name, key in required.items()
        if name not in columns
    )


class _InputBatch(NamedTuple):
    """Consecutive rows of one input."""

    input: int
    first: int
    """The number of the input's rows before these."""
    rows: list[LazyRow]
    bytes: int


def _read_rows(parser: _RowParser, account: IngestState, spool: Spool, advance: Advance) -> None:
    """Resume reading at the account's position."""
    limits = [one.input.source.limit for one in parser.inputs]
    # The hub does not report sizes in bytes.
    total = sum(one.input.size if one.input.path else sys.maxsize for one in parser.inputs)
    batches = _read_batches(parser.inputs, account, advance)
    for number, parsed in WorkerPool(parser, worth_seconds=2.0).map(batches, lambda batch: batch.bytes, total):
        limit, source = limits[number], parser.inputs[number].input.number
        for place, (origin, row, names) in parsed:
            if limit is not None and account.taken[source] >= limit:
                break
            account.position = number, place
            account.rows_in += 1
            if isinstance(row, RowError):
                account.add_bad(origin, row)
            else:
                account.taken[source] += 1
                account.filled += row.filled
                account.changes.update(row.changes)
                account.columns.update(dict.fromkeys(names))
                spool.add(row, account.note)


def _read_batches(
    inputs: Sequence[Detected], account: IngestState, advance: Callable[[int], object]
) -> Iterator[_InputBatch]:
    """Yield the rows after the account's position. An error in a file ends it and goes into the account."""
    read = 0

    def count(size: int) -> None:
        nonlocal read
        read += size
        advance(size)

    begin, skipped = account.position
    for number, detected in enumerate(inputs[begin:], begin):
        first, limit, source = skipped if number == begin else 0, detected.input.source.limit, detected.input.number
        rows: list[LazyRow] = []
        try:
            for row in islice(detected.input.lazy_rows(count), first, None):
                rows.append(row)
                room = BATCH_ROWS if limit is None else min(BATCH_ROWS, limit - account.taken[source])
                if len(rows) >= room or read >= BATCH_BYTES:
                    yield _InputBatch(number, first, rows, read)
                    first, rows, read = first + len(rows), [], 0
                    if limit is not None and account.taken[source] >= limit:
                        break
        except DataError as error:
            account.unreadable += error.problems
        if rows:
            yield _InputBatch(number, first, rows, read)
            read = 0


@dataclass(frozen=True)
class _RowParser:
    """Checks, parses and hashes a batch of rows; runs in every process."""

    inputs: tuple[Detected, ...]
    task: str
    split_by: str | None
    has_tests: bool
    """Whether the test split has its own sources."""
    kept_columns: tuple[str, ...]
    renames: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, batch: _InputBatch) -> tuple[int, list[_Parsed]]:
        """Return the number of the input, and each row or its error."""
        detected = self.inputs[batch.input]
        split = detected.input.split
        tested = bool(self.kept_columns) and (split == "test" or (split is None and not self.has_tests))
        return batch.input, [
            (place, self._parse(origin, value.parse() if isinstance(value, JsonLine) else value, detected, tested))
            for place, (origin, value) in enumerate(batch.rows, batch.first + 1)
        ]

    def _parse(
        self, origin: str, value: dict[str, object] | RowError, detected: Detected, tested: bool
    ) -> tuple[str, HashedRow | RowError, tuple[str, ...]]:
        """Return a row's origin, the row or its error, and its column names if it may be a test row."""
        one = detected.input
        split = -1 if one.split is None else SPLITS.index(one.split)
        if isinstance(value, RowError):
            return origin, value, ()
        try:
            raw = rename(value, detected.columns, detected.roles)
            changes = dict[NameChange, None]()
            written = parse_row(raw, detected.row_format, self.task, one.folder, note_tidied(changes))
            row = rename_classes(written, self.renames, changes)
            text = row_json(row)
            if len(text) > MAX_ROW_BYTES:
                raise RowError("too large", f"the row has {len(text) / 2**20:.0f} MiB of text")
            content = hash_row(row)
            drawn = content if row is written else hash_row(written)  # a renamed row stays in its split
            values = raw if self.split_by in raw else row
            shown = "".join(sorted(picture["content"] for picture in row_pictures(row)))  # stays on one side
            drawn = xxhash.xxh3_128_digest(shown.encode()) if shown else drawn
            group = _split_group(values, self.split_by, required=split < 0) or int.from_bytes(drawn[8:], "big")
        except RowError as error:
            return origin, name_columns(error, detected.columns), ()
        except RecursionError:
            return origin, RowError("nested too deeply", "lists and objects are nested hundreds deep"), ()
        kept, every = None, TASK_FACTS[self.task].rates_answers
        if tested or every:
            labels = {detected.columns.get(name, name): row[name] for name in detected.row_format.labels if name in row}
            others = (name for name in raw if every and name not in detected.row_format.columns)
            cells, names = {**raw, **labels}, dict.fromkeys((*self.kept_columns, *others))
            kept = write_columns({name: cells[name] for name in names if name in raw})
        text_hash = xxhash.xxh3_64_intdigest(text.encode())
        filled = value.filled if isinstance(value, ArrowRow) else 0
        hashed = HashedRow(origin, text, kept, content, text_hash, group, one.number, split, filled, tuple(changes))
        return origin, hashed, tuple(raw) if tested else ()


def _split_group(raw: Mapping[str, object], split_by: str | None, required: bool) -> int | None:
    """Hash the value that decides the split; None if the row's content decides it."""
    if split_by is None:
        return None
    text = plain_value(parse_cell(raw.get(split_by)))
    if not text:
        if required:
            raise RowError("no value to split by", f"{split_by!r} (data.split_by) is missing, null or blank")
        return None
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))


def _check_share(account: IngestState, allowed: float) -> None:
    bad = account.bad.total()
    if account.rows_in and bad / account.rows_in <= allowed and bad < account.rows_in:
        return
    looked, share = f"{bad:,} of {account.rows_in:,} rows", bad / max(account.rows_in, 1)
    other = OTHER_FILE if account.bad[f"bad: {NOT_UTF8}"] and not account.hints else ""
    more = f"{other} All of them: {account.list_file}"
    raise DataError(too_many_bad(looked, share, allowed, more), *account.problems())
