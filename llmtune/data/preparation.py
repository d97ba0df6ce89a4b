"""Step 1, first half: from the recipe's sources to checked, deduplicated, split rows in one Arrow file a split.

Near duplicates are looked for if `deduplicate: near` asks for it, in a split and across splits; rows that are equal
across splits are dropped whatever it says.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.markup import escape

from llmtune import __version__
from llmtune.data.deduplication import KEPT, drop_equal, drop_near
from llmtune.data.ingest import Account, read_inputs, show_progress
from llmtune.data.row_store import RECORD, RowWriter, iterate_rows, save_rows
from llmtune.data.sources import hash_sources, resolve_inputs
from llmtune.data.splits import TRAIN, assign_splits, count_copies, drop_shared_groups
from llmtune.data.spool import Index, Spool
from llmtune.data.suspect_rows import suspicions
from llmtune.errors import DataError, Problem
from llmtune.recipe.data_section import ENCODING_KEYS, DataSection
from llmtune.recipe.schema import Recipe
from llmtune.records import SPLITS, Rows
from llmtune.store.atomic_files import explained, hash_value

BAD_ROWS = "bad_rows.jsonl"
SPOOL = ".spool"


def prepare_rows(recipe: Recipe, folder: Path, console: Console, inputs: str | None = None) -> Rows:
    """Read, check, deduplicate and split the recipe's data into `folder`.

    What is kept depends on the rows, not on the order of files. Memory grows by less than 100 bytes a row, whatever the
    rows' length and however many are near one another. Splits keep the order of the sources. What was read and compared
    stands in `.spool` beside the folder until all is done, so that the same preparation goes on there if it is killed;
    all cores are used where that pays.

    Args:
        recipe: Its `data`, `task` and the columns that `evaluate` names are used; paths are absolute.
        folder: Gets `SIDE.rows.arrow` and `rows.json`. If rows are bad, `bad_rows.jsonl` beside it lists all of them.
        console: Shows progress, bad rows and what was left out.
        inputs: What `rows_inputs` returns for the recipe, if it is known.

    Raises:
        DataError: Missing or unreadable files, unknown formats, too many bad rows, a split without rows: all at once.
        EnvironmentProblem: The folder cannot be written, or the hub not be reached.
    """
    data, task = recipe.data, recipe.task
    detected = resolve_inputs(data, task)
    used = {data.split_by, *recipe.evaluate.columns}
    if unused := dict.fromkeys(name for one in detected for name in one.unused if name not in used):
        console.print(f"not used: {escape(', '.join(unused))}", style="dim")
    renamed = {ours: theirs for one in detected for ours, theirs in one.columns.items()}
    if renamed:
        listing = ", ".join(f"{ours} is {theirs!r}" for ours, theirs in renamed.items())
        console.print(f"columns: {escape(listing)}", highlight=False)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)  # it must not outlive the files that it describes
        names = [one.input.name for one in detected]  # as seen from the folder that the run is started in
        spool = Spool(folder.parent / SPOOL, hash_value([inputs or rows_inputs(recipe), names]))
        if len(spool):
            console.print(f"goes on behind {len(spool):,} rows that were read before", highlight=False)
        try:
            with spool:
                columns = recipe.evaluate.columns
                account = read_inputs(detected, data, task, spool, folder.parent / BAD_ROWS, console, columns)
                index = spool.index()
                split_N, reason_N, notes = _decide(index, data, spool, console)
                copies_N = count_copies(index, split_N, _weights(data))
                reason_N[(reason_N == KEPT) & (copies_N == 0)] = "left out by weight"
                copies_N[reason_N != KEPT] = 0
                _check_splits(data, split_N, copies_N, reason_N)
                grouped = data.split_by is not None
                rows = _write(folder, spool, index, split_N, copies_N, account, reason_N, tuple(columns), grouped)
        except DataError:
            spool.remove()
            raise
        spool.remove()
    _print_summary(rows, account, notes, console)
    read = (pair for split in rows.files for pair in iterate_rows(rows, split))
    for suspicion in suspicions(read) if not console.quiet else ():
        console.print(f"  {escape(suspicion)}", style="yellow", highlight=False, soft_wrap=True)
    return rows


def _decide(
    index: Index, data: DataSection, spool: Spool, console: Console
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.object_], list[str]]:
    """Give each row its split and, if it is dropped, the reason."""
    shares = {split: share for split in SPLITS[1:] if isinstance(share := getattr(data, split), float | int)}
    split_N, notes = assign_splits(index, shares.get("validation", 0.0), shares.get("test", 0.0))
    reason_N = drop_equal(index, split_N, data.deduplicate)
    if data.split_by is not None:
        drop_shared_groups(index, split_N, reason_N, data.split_by)
    if data.deduplicate == "near":
        with show_progress(console) as progress:
            bar = progress.add_task("look for near duplicates", total=3 * spool.size)

            def rows() -> Iterator[tuple[int, pa.Array]]:
                for first, batch in spool.batches():
                    progress.advance(bar, batch.nbytes)
                    yield first, batch.column("row")

            (keys := spool.folder / "keys").mkdir(exist_ok=True)
            drop_near(index, split_N, reason_N, rows, keys)
    return split_N, reason_N, notes


def _weights(data: DataSection) -> list[float]:
    return [
        source.weight
        for split in SPLITS
        for source in (getattr(data, split) if isinstance(getattr(data, split), tuple) else ())
    ]


def _check_splits(
    data: DataSection,
    split_N: npt.NDArray[np.int8],
    copies_N: npt.NDArray[np.int64],
    reason_N: npt.NDArray[np.object_],
) -> None:
    """Refuse a split that was asked for and has no row left."""
    problems = []
    for split, name in enumerate(SPLITS):
        required = split == TRAIN or isinstance(getattr(data, name), tuple) or getattr(data, name) > 0
        if required and not copies_N[split_N == split].any():
            lost = Counter(reason_N[split_N == split].tolist())
            why = ", ".join(f"{count} {reason}" for reason, count in lost.most_common()) or "none was read"
            fix = "Give more rows, or set `deduplicate: exact` if rows that look alike are meant."
            problems.append(Problem(f"no row is left for {name}: {why}", f"data.{name}", fix))
    DataError.collect(problems)


def _write(
    folder: Path,
    spool: Spool,
    index: Index,
    split_N: npt.NDArray[np.int8],
    copies_N: npt.NDArray[np.int64],
    account: Account,
    reason_N: npt.NDArray[np.object_],
    columns: tuple[str, ...],
    grouped: bool,
) -> Rows:
    counts = {name: int(copies_N[split_N == split].sum()) for split, name in enumerate(SPLITS)}
    files = {name: folder / f"{name}.rows.arrow" for name in SPLITS if counts[name]}
    writers = {name: RowWriter(path, grouped) for name, path in files.items()}
    for first, batch in spool.batches():
        here = slice(first, first + batch.num_rows)
        for split, name in enumerate(SPLITS):
            taken = np.repeat(np.arange(batch.num_rows), np.where(split_N[here] == split, copies_N[here], 0))
            if len(taken):
                writers[name].add(batch.take(pa.array(taken)), index.content[here][taken], index.group[here][taken])
    digest = hashlib.sha256()
    for name in SPLITS:
        if name in writers:
            digest.update(f"{name} {writers[name].close()}\n".encode())
        else:
            (folder / f"{name}.rows.arrow").unlink(missing_ok=True)
    dropped = Counter(account.bad)
    dropped.update(reason for reason in reason_N.tolist() if reason != KEPT)
    columns_hash = writers["test"].columns_hash if "test" in writers else ""
    left_out = dict(sorted(dropped.items()))
    content = digest.hexdigest()
    rows = Rows(folder, files, counts, account.rows_in, left_out, content, columns, columns_hash, account.filled)
    save_rows(rows)
    return rows


def _print_summary(rows: Rows, account: Account, notes: Sequence[str], console: Console) -> None:
    kept = ", ".join(f"{name} {count:,}" for name, count in rows.counts.items() if count)
    console.print(f"{rows.rows_in:,} rows read; {kept}")
    for reason, count in rows.dropped.items():
        console.print(f"  {count:,} left out: {escape(reason)}")
    for problem in account.problems():
        console.print(f"  {escape(str(problem))}", style="yellow", highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"  {escape(note)}")


def rows_inputs(recipe: Recipe) -> str:
    """Hash what rows depend on: the data section, the files behind it, and the task."""
    settings = recipe.data.model_dump(mode="json", exclude={"packing", *ENCODING_KEYS})
    if recipe.evaluate.columns:  # kept beside the rows
        settings["slices"] = tuple(recipe.evaluate.columns)
    if recipe.data.split_by is not None:
        settings["groups"] = "kept"  # rows that were prepared without their groups are prepared again
    return hash_value([__version__, recipe.task, settings, hash_sources(recipe.data, recipe.task)])
