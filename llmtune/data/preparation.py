"""Step 1, first half: turns sources into checked, deduplicated rows in one Arrow file per split.

It also assigns splits and writes test rows to a file. `deduplicate: near` adds a search for near duplicates within and
across splits. Rows that are equal across splits are dropped whatever the setting.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.markup import escape

from llmtune import __version__
from llmtune.data.arrow_columns import number_column, replace_column
from llmtune.data.class_spelling import list_changes, require_one_spelling, warn_of_idle_renames
from llmtune.data.corpus import save_corpus
from llmtune.data.data_notes import name_changes_sentences, warn_of_few_test_rows
from llmtune.data.deduplication import KEPT, drop_equal, drop_near, drop_shared_inputs
from llmtune.data.file_survey import suspicions
from llmtune.data.ingest import IngestState, ingest_rows
from llmtune.data.pictures import IMAGES, absolute_pictures
from llmtune.data.rejected_rows import RowError, find_file, parse_cell
from llmtune.data.row_formats import CONVERSATIONS
from llmtune.data.row_store import RECORD, Index, RowWriter, Spool, iterate_rows, iterate_texts, save_rows
from llmtune.data.sources import Detected, hash_sources, resolve_inputs
from llmtune.data.word_hash import fraction
from llmtune.display.console import progress_bars
from llmtune.errors import DataError, Problem
from llmtune.recipe.data_section import ENCODING_KEYS, DataSection, Source
from llmtune.recipe.format_names import ROW_KINDS
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.yaml_writer import source_line
from llmtune.records import SPLITS, Rows
from llmtune.store.atomic_files import explained, hash_value, read_json, write_text
from llmtune.store.seed_runs import hard_link

TRAIN, VALIDATION, TEST = range(len(SPLITS))
BAD_ROWS = "bad_rows.jsonl"
SPOOL = ".spool"


def has_rows(folder: Path, content_hash: str) -> bool:
    """Return whether a folder has prepared rows with this content."""
    record = read_json(folder / RECORD)
    return isinstance(record, dict) and record.get("content_hash") == content_hash


def prepare_rows(recipe: Recipe, folder: Path, console: Console, inputs: str | None = None) -> Rows:
    """Read, check, deduplicate and split the recipe's data into `folder`.

    The result depends on the rows, not on the order of files. Memory grows by less than 100 bytes per row, whatever
    the rows' length and however many are near each other. Splits keep the order of the sources. Intermediate data is in
    `.spool` next to the folder until the end, so the same preparation resumes after it was killed. All cores are used
    if that saves time.

    Args:
        recipe: Uses `data`, `task` and the columns that `evaluate` names; paths are absolute.
        folder: Gets `SIDE.rows.arrow` and `rows.json`. If rows are bad, `bad_rows.jsonl` next to it lists all of them.
        console: Shows progress, bad rows and how many rows were left out.
        inputs: The result of `rows_inputs` for the recipe, if known.

    Raises:
        DataError: Missing or unreadable files, unknown formats, too many bad rows, an empty split: all in one error.
        EnvironmentProblem: The folder cannot be written, or the hub cannot be reached.
    """
    data, task = recipe.data, recipe.task
    detected = resolve_inputs(data, task)
    idle = (name for one in detected for name in one.unused if name not in (data.split_by, *recipe.evaluate.columns))
    if unused := dict.fromkeys(() if TASK_FACTS[task].rates_answers else idle):
        console.print(f"not used: {escape(', '.join(unused))}", style="dim")
    if renamed := {ours: theirs for one in detected for ours, theirs in one.columns.items()}:
        listing = ", ".join(f"{ours} is {theirs!r}" for ours, theirs in renamed.items())
        console.print(f"columns: {escape(listing)}", highlight=False)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        corpus_hash = save_corpus(data, folder, console)
        (folder / RECORD).unlink(missing_ok=True)  # it must not outlive the files that it describes
        names = [one.input.name for one in detected]  # relative to the folder that the run was started in
        spool = Spool(folder.parent / SPOOL, hash_value([inputs or rows_inputs(recipe), names]))
        if len(spool):
            console.print(f"resuming after {len(spool):,} rows that were already read", highlight=False)
        try:
            with spool:
                columns = recipe.evaluate.columns
                bad = folder.parent / BAD_ROWS
                account = ingest_rows(detected, data, task, spool, bad, console, columns, recipe.renames)
                index = spool.index()
                split_N, reason_N, notes = _decide(index, data, spool, console)
                copies_N = count_copies(index, split_N, _source_weights(data))
                reason_N[(reason_N == KEPT) & (copies_N == 0)] = "left out by weight"
                copies_N[reason_N != KEPT] = 0
                _check_splits(data, split_N, copies_N, reason_N)
                grouped = data.split_by is not None
                rows = _write_rows(folder, spool, index, split_N, copies_N, account, reason_N, tuple(columns), grouped)
                rows = replace(rows, corpus_hash=corpus_hash, class_changes=tuple(list_changes(account.changes)))
                if any(one.row_format.labels for one in detected):
                    notes += _check_class_names(rows, recipe)
                save_rows(rows)
        except DataError:
            spool.remove()
            raise
        spool.remove()
    _print_rows(rows, account, [*notes, *warn_of_few_test_rows(recipe.evaluate.gates, rows.counts)], console)
    read = (pair for split in rows.files for pair in iterate_rows(rows, split))
    for suspicion in suspicions(read) if not console.quiet else ():
        console.print(f"  {escape(suspicion)}", style="yellow", highlight=False, soft_wrap=True)
    return rows


def write_changed(rows: Rows, texts: Mapping[str, Iterable[str]], folder: Path) -> None:
    """Write rows into `folder` with other texts, by split and in order; other files are linked."""
    digest = hashlib.sha256(rows.content_hash.encode())
    files = {split: folder / path.name for split, path in rows.files.items()}
    for path in {*rows.folder.iterdir()} - {rows.files[split] for split in texts}:
        hard_link(str(path), str(folder / path.name))
    for split, changed in texts.items():
        for text in replace_column(rows.files[split], files[split], "row", changed):
            digest.update(text.encode() + b"\n")
    save_rows(replace(rows, folder=folder, files=files, content_hash=digest.hexdigest()))


def _check_class_names(rows: Rows, recipe: Recipe) -> list[str]:
    """Refuse classes in several spellings; return notes on renames without effect."""
    names = require_one_spelling((pair for split in rows.files for pair in iterate_rows(rows, split)), recipe)
    if recipe.evaluate.champion is not None:  # its classes may have the old names
        return []
    return warn_of_idle_renames(recipe.renames, rows.class_changes, (), names)


def _decide(
    index: Index, data: DataSection, spool: Spool, console: Console
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.object_], list[str]]:
    """Assign each row its split and, if it is dropped, the reason."""
    shares = {split: share for split in SPLITS[1:] if isinstance(share := getattr(data, split), float | int)}
    split_N, notes = assign_splits(index, shares.get("validation", 0.0), shares.get("test", 0.0))
    reason_N = drop_equal(index, split_N, data.deduplicate)
    if data.split_by is not None:
        drop_shared_groups(index, split_N, reason_N, data.split_by)
    if data.deduplicate == "near":
        with progress_bars(console) as progress:
            bar = progress.add_task("look for near duplicates", total=3 * spool.size)

            def rows() -> Iterator[tuple[int, pa.Array]]:
                for first, batch in spool.batches():
                    progress.advance(bar, batch.nbytes)
                    yield first, batch.column("row")

            (keys := spool.folder / "keys").mkdir(exist_ok=True)
            (inputs := spool.folder / "inputs").mkdir(exist_ok=True)
            drop_shared_inputs(index, split_N, reason_N, rows, inputs)
            drop_near(index, split_N, reason_N, rows, keys)
    return split_N, reason_N, notes


def _source_weights(data: DataSection) -> list[float]:
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
    """Refuse a requested split that has no rows left."""
    problems = []
    for split, name in enumerate(SPLITS):
        required = split == TRAIN or isinstance(getattr(data, name), tuple) or getattr(data, name) > 0
        if required and not copies_N[split_N == split].any():
            lost = Counter(reason_N[split_N == split].tolist())
            why = ", ".join(f"{count} {reason}" for reason, count in lost.most_common()) or "none was read"
            fix = "Give more rows, or set `deduplicate: exact` if similar rows are intended."
            problems.append(Problem(f"no row is left for {name}: {why}", f"data.{name}", fix))
    DataError.collect(problems)


def _write_rows(
    folder: Path,
    spool: Spool,
    index: Index,
    split_N: npt.NDArray[np.int8],
    copies_N: npt.NDArray[np.int64],
    account: IngestState,
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
                writers[name].add(
                    batch.take(number_column(taken)), index.content[here][taken], index.group[here][taken]
                )
    digest = hashlib.sha256()
    for name in SPLITS:
        if name in writers:
            digest.update(f"{name} {writers[name].close()}\n".encode())
        else:
            (folder / f"{name}.rows.arrow").unlink(missing_ok=True)
    dropped = Counter(account.bad)
    dropped.update(reason for reason in reason_N.tolist() if reason != KEPT)
    kept = {name: one.columns_hash for name, one in writers.items() if one.columns_hash}
    left_out = dict(sorted(dropped.items()))
    content = digest.hexdigest()
    kept_hash = hash_value(kept) if kept else ""
    return Rows(folder, files, counts, account.rows_in, left_out, content, columns, kept_hash, account.filled)


def _print_rows(rows: Rows, account: IngestState, notes: Sequence[str], console: Console) -> None:
    kept = ", ".join(f"{name} {count:,}" for name, count in rows.counts.items() if count)
    console.print(f"{rows.rows_in:,} rows read; {kept}")
    for reason, count in rows.dropped.items():
        console.print(f"  {count:,} left out: {escape(reason)}")
    for sentence in name_changes_sentences(rows.class_changes):
        console.print(f"  {escape(sentence)}", style="yellow", highlight=False, soft_wrap=True)
    for problem in account.problems():
        console.print(f"  {escape(str(problem))}", style="yellow", highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"  {escape(note)}")


def rows_inputs(recipe: Recipe) -> str:
    """Hash the inputs of the rows: the data section, its files, and the task."""
    settings = recipe.data.model_dump(mode="json", exclude={"packing", *ENCODING_KEYS})
    if recipe.evaluate.columns:  # kept with the rows
        settings["slices"] = tuple(recipe.evaluate.columns)
    if recipe.renames:
        settings["renames"] = recipe.renames
    if recipe.data.split_by is not None:
        settings["groups"] = "kept"  # rows prepared without groups must be prepared again
    return hash_value([__version__, recipe.task, settings, hash_sources(recipe.data, recipe.task)])


# Splits: a hash assigns a row to train, validation or test, so it keeps its split when the data grows


def assign_splits(index: Index, validation: float, test: float) -> tuple[npt.NDArray[np.int8], list[str]]:
    """Assign every row its split.

    A group's position in [0, 1) is a hash. Test takes the positions below `test`, validation the next ones. If test has
    its own sources, validation takes the highest positions. A share that rounds to no group, which happens with few
    rows, gets the next group instead.

    Args:
        index: The rows.
        validation: Share of the groups; 0 if not wanted or if validation has its own sources.
        test: The same for test.

    Returns:
        [N] index into SPLITS, and notes for the user.

    Raises:
        DataError: Too few groups for at least one in each split.
    """
    split_N = index.split.copy()
    open_N = split_N < 0
    position_N = fraction(index.group[open_N], salt=1)
    if (split_N == TEST).any():  # a test file from an earlier share has the lowest positions
        position_N = 1 - position_N
    positions = np.unique(position_N)
    requested = [(split, share) for split, share in ((TEST, test), (VALIDATION, validation)) if share > 0]
    if requested and len(positions) < len(requested) + 1:
        raise _too_few(len(positions), requested)
    notes: list[str] = []
    ends: list[int] = []
    first, upto = 0, 0.0
    for split, share in requested:
        upto += share
        last = max(int(np.searchsorted(positions, upto)), first)
        if last == first:
            last = first + 1
            notes.append(f"{SPLITS[split]}: {share:g} of {len(positions)} rows rounds to 0; using 1")
        ends.append(last)
        first = last
    if requested and first >= len(positions):
        raise _too_few(len(positions), requested)
    open_split_N = np.full(len(position_N), TRAIN, dtype=np.int8)
    for (split, _), end in reversed([*zip(requested, ends, strict=True)]):
        open_split_N[position_N < positions[end]] = split
    split_N[open_N] = open_split_N
    return split_N, notes


def _too_few(groups: int, requested: list[tuple[int, float]]) -> DataError:
    names = " and ".join(f"{SPLITS[split]} ({share:g})" for split, share in requested)
    what = f"{groups} different rows (or `split_by` values) are too few for {names} as well as train"
    fix = "Give more rows, give each split its own sources, or set the share to 0. A short text file is one row."
    return DataError(*DataError.of(what, "data.train", fix).problems)


def count_copies(index: Index, split_N: npt.NDArray[np.int8], weights: list[float]) -> npt.NDArray[np.int64]:
    """Return how often each row occurs in its split: a train row by its source's weight, other rows once.

    A weight of 2.3 makes two copies of each row, and a third copy of three tenths of them, chosen by hash.
    """
    weight_N = np.asarray(weights, dtype=np.float64)[index.source]
    whole_N = np.floor(weight_N)
    more_N = fraction(index.content[:, 1], salt=2) < weight_N - whole_N
    return np.where(split_N == TRAIN, whole_N + more_N, 1).astype(np.int64)


def drop_shared_groups(
    index: Index, split_N: npt.NDArray[np.int8], reason_N: npt.NDArray[np.object_], split_by: str
) -> None:
    """Drop rows whose `split_by` value occurs in a source given for test or validation, in place."""
    for split, below in ((TEST, (TRAIN, VALIDATION)), (VALIDATION, (TRAIN,))):
        given = index.group[index.split == split]
        shared = np.isin(index.group, given) & np.isin(split_N, below) & (reason_N == "")
        reason_N[shared] = f"same {split_by} as a {SPLITS[split]} row"


# `prepare --write-test`: the test rows as a JSON Lines file, which does not change when the data grows


KEPT_KEYS = {"path", "config", "split", "revision", "encoding", "weight", "limit"}
"""Keys of a source that locate its rows. All others describe the rows, so they apply to the written file too."""
OPTION = "--write-test"


def write_test_rows(recipe: Recipe, rows: Rows, file: Path, beside: Path) -> str:
    """Write the test rows as their sources have them; return the line that names them in a recipe in `beside`.

    Raises:
        DataError: the test split is empty, or its rows come from sources that are read in different ways.
        EnvironmentProblem: the file cannot be written.
    """
    origins = {origin for origin, _ in iterate_texts(rows, "test")}
    lines: list[str] = []
    settings: dict[str, Source] = {}
    for detected in resolve_inputs(recipe.data, recipe.task):
        row_lines = [
            json.dumps(locate_media(value, detected, file), ensure_ascii=False, default=str)
            for origin, value in detected.input.raw_rows()
            if origin in origins and not isinstance(value, RowError)
        ]
        if row_lines:
            source = Source(
                path=str(file), **detected.input.source.model_dump(exclude=KEPT_KEYS, exclude_defaults=True)
            )
            source = source if source.format == detected.row_format.name else source.model_copy(update={"format": None})
            settings.setdefault(source_line("test", source), source)
            lines += row_lines
    if not lines:
        raise DataError.of("no test rows to write", "data.test", "Set a share, such as data.test: 0.2.")
    if len(settings) > 1:
        what = f"the test rows come from sources that are read in {len(settings)} ways: {'; '.join(settings)}"
        raise DataError.of(what, OPTION, "Write a test file for each of these sources by hand, and list them.")
    with explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(f"{line}\n" for line in lines))
    (source,) = settings.values()
    stated = source.model_dump(exclude_defaults=True).keys() - {"path"}
    path = os.path.relpath(file, beside)
    return source_line("test", source, path=path) if stated else f"test: {path}"


def locate_media(value: Mapping[str, object], detected: Detected, file: Path) -> Mapping[str, object]:
    """Return a row whose recording has a path relative to the folder of `file`, and whose pictures an absolute one."""
    folder = detected.input.folder
    if folder is not None and detected.row_format.name in ROW_KINDS["messages"]:
        images, turns = ([detected.columns.get(one, one) for one in names] for names in (IMAGES, CONVERSATIONS))
        parsed = {key: parse_cell(cell) if key in turns else cell for key, cell in value.items()}
        return dict(absolute_pictures(parsed, folder, images))
    for column in detected.row_format.files:
        ours = detected.columns.get(column, column)
        name = find_file(value.get(ours))
        if folder is not None and name is not None and (folder / name).is_file():
            return {**value, ours: os.path.relpath(folder / name, file.absolute().parent)}
    return value
