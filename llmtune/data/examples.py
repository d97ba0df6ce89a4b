"""Encoded rows on disk: written a batch at a time as rows are encoded, read through a memory map."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmtune import __version__
from llmtune.data.overlong import TOO_LONG
from llmtune.data.preparation import iterate_texts
from llmtune.data.rejected_rows import Add, listed
from llmtune.data.task_interface import TaskInterface
from llmtune.errors import DataError, Problem
from llmtune.recipe import TASK_FACTS
from llmtune.records import Example, Examples, ModelRef, Row, Rows
from llmtune.store.atomic_files import explained, hash_value, read_json, write_json
from llmtune.store.run_lock import package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

BATCH_ROWS = 512
BATCH_RECORDINGS = 32
"""Half a minute at 16 kHz is a megabyte."""
BATCH_CHARACTERS = 1_000_000  # what the tokenizer holds at once: its offsets take 50 times the text
SHOWN = 20
RECORD = "examples.json"
LEFT_OUT = "left_out.jsonl"
AGAIN = "Run the recipe again: what is missing is made again."
LISTS = {
    "input_ids": np.int32,
    "spans": np.int32,
    "target_ids": np.int32,
    "target_spans": np.int32,
    "third_ids": np.int32,
    "values": np.float32,
    "audio": np.int16,
}
"""Columns of lists, by the names of `Example`."""
FIRST = ("input_ids", "spans")
NUMBERS = ("target_bytes", "supervised", "tokens", "reach")
SCHEMA = pa.schema(
    {
        **{name: pa.list_(pa.from_numpy_dtype(kind)) for name, kind in LISTS.items()},
        **{name: pa.int32() for name in (*NUMBERS, "row")},
    }
)


@dataclass
class _Tally:
    """What is counted while rows are encoded."""

    counts: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    supervised: dict[str, int] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)
    reach: dict[str, int] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    long_rows: list[Problem] = field(default_factory=list)
    """The first rows that are too long."""
    bad_rows: list[Problem] = field(default_factory=list)
    """The first rows that cannot be used for another reason."""
    digest: Any = field(default_factory=hashlib.sha256)

    def begin(self, side: str) -> None:
        for counted in (self.counts, self.tokens, self.supervised, self.longest, self.reach):
            counted[side] = 0

    def add(self, side: str, batch: Any) -> None:
        """Count examples as `record_batch` returns them; the hash is over columns, which are few, not over rows."""
        self.digest.update(f"{side} {batch.num_rows}\n".encode())
        for column in batch.columns:
            parts = (column.offsets, column.values) if pa.types.is_list(column.type) else (column,)
            for part in parts:
                self.digest.update(part.to_numpy())
        costs, reaches = batch.column("tokens").to_numpy(), batch.column("reach").to_numpy()
        self.counts[side] += batch.num_rows
        self.tokens[side] += int(costs.sum(dtype=np.int64))
        self.supervised[side] += int(batch.column("supervised").to_numpy().sum(dtype=np.int64))
        self.longest[side] = max(self.longest[side], int(costs.max()))
        self.reach[side] = max(self.reach[side], int(reaches.max()))


def encode_rows(
    rows: Rows, task: TaskInterface, processor: PreTrainedTokenizerBase, recipe: Recipe, folder: Path, console: Console
) -> Examples:
    """Encode all rows into one Arrow file a side in `folder`; `examples.json` beside them is written last.

    Rows that cannot be encoded are left out, counted by reason in `Examples.dropped` and listed one by one, with file
    and line, in `left_out.jsonl` beside `folder`. A row that `data.on_overlong` splits makes several examples with the
    same `row`.

    Raises:
        DataError: a row is longer than `data.max_length` and `data.on_overlong` is error; more rows than
            `data.max_dropped` allows are bad; or a side is left without a row.
        EnvironmentProblem: the chat template cannot be split into turns; the disk is full; the folder is read-only.
    """
    tally = _Tally()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
        with _progress(console) as progress, listed(folder.parent / LEFT_OUT) as left_out:
            bar = progress.add_task("encode", total=sum(rows.counts.values()))
            for side in rows.files:
                with _written(folder / f"{side}.arrow") as write:
                    tally.begin(side)
                    for first, batch in _batches(iterate_texts(rows, side)):
                        results = task.encode([row for _, row in batch], processor, recipe)
                        kept = _sort_out(tally, first, batch, results, left_out)
                        if kept:
                            made = record_batch(kept)
                            tally.add(side, made)
                            write(made)
                        progress.advance(bar, len(batch))
        _refuse(tally, rows, recipe, folder.parent / LEFT_OUT)
        examples = _examples(tally, rows, folder)
        _save(examples)
    return examples


def load_examples(folder: Path) -> Examples:
    """Read what `encode_rows` left in `folder`, wherever the folder stands now.

    Raises:
        DataError: there are no examples, or they were damaged.
    """
    record = read_json(folder / RECORD)
    if record is None:
        raise DataError.of("no encoded examples here", str(folder), AGAIN)
    files = {side: folder / name for side, name in record.pop("files").items()}
    missing = [Problem("missing", str(path), AGAIN) for path in files.values() if not path.is_file()]
    DataError.collect(missing)
    return Examples(folder=folder, files=files, **record)


class ExampleReader:
    """The examples of one side in random access; nothing but the tokens asked for is read into memory."""

    def __init__(self, examples: Examples, side: str) -> None:
        with pa.memory_map(str(examples.files[side])) as source:
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]
        self.lengths = self._column("tokens")
        """int32 [n]: what each example costs, in tokens."""
        self.supervised = self._column("supervised")
        """int32 [n]: predictions that each example is learned from."""
        self.rows = self._column("row")
        """int32 [n]: the row of `Rows` that each example comes from."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        batch, offset = self._batches[number], index - self._starts[number]
        lists: dict[str, Any] = {name: np.from_dlpack(batch.column(name)[offset].values) for name in LISTS}
        numbers = {name: batch.column(name)[offset].as_py() for name in NUMBERS}
        return Example(
            **{
                name: part if name == "audio" else part.tolist()
                for name, part in lists.items()
                if name in FIRST or len(part)
            },
            target_bytes=numbers["target_bytes"],
            counted=numbers["supervised"],
            cost=numbers["tokens"],
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def _column(self, name: str) -> npt.NDArray[np.int32]:
        # By DLPack, because `to_numpy` imports pandas, which a training has no other use for.
        parts = [np.from_dlpack(batch.column(name)) for batch in self._batches]
        return np.concatenate([np.empty(0, dtype=np.int32), *parts]).astype(np.int32)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _batches(texts: Iterator[tuple[str, str]]) -> Iterator[tuple[int, list[tuple[str, Row]]]]:
    """Yield the number of the first row, and rows up to a count and a size that keep memory flat.

    The last batch has two rows where there are two: what is learned from an answer that is another row's needs one.
    """
    first, characters = 0, 0
    batch: list[tuple[str, Row]] = []
    ahead = next(texts, None)
    while ahead is not None:
        (origin, text), ahead = ahead, next(texts, None)
        row: Row = json.loads(text)
        batch.append((origin, row))
        characters += len(text)
        most = BATCH_RECORDINGS if "audio" in row else BATCH_ROWS
        if (len(batch) >= most or characters > BATCH_CHARACTERS) and ahead is not None:
            kept = batch[:-1] if len(batch) > 1 else batch
            yield first, kept
            first, batch, characters = first + len(kept), batch[len(kept) :], 0
    if batch:
        yield first, batch


@contextmanager
def _written(path: Path) -> Iterator[Callable[[Any], None]]:
    """Give a function that appends record batches to an Arrow file, which has its name only once it is whole."""
    partial = path.with_suffix(".partial")
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as file:
            yield file.write_batch
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def record_batch(examples: Sequence[tuple[int, Example]]) -> Any:
    """Return examples, each with the number of its row, as they stand in the file."""
    lists = [_lists([getattr(example, name) for _, example in examples], kind) for name, kind in LISTS.items()]
    numbers = [[getattr(example, name) for _, example in examples] for name in NUMBERS]
    numbers.append([row for row, _ in examples])
    columns = [*lists, *(pa.array(np.asarray(column, dtype=np.int32)) for column in numbers)]
    return pa.record_batch(columns, schema=SCHEMA)


def _lists(parts: Sequence[Any], kind: Any) -> Any:
    """Put lists of numbers end to end, as Arrow keeps a column of lists."""
    borders = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([len(part) for part in parts], out=borders[1:])
    if any(isinstance(part, np.ndarray) for part in parts):
        values = np.concatenate([np.asarray(part, dtype=kind) for part in parts])
    else:
        values = np.fromiter(chain.from_iterable(parts), dtype=kind, count=int(borders[-1]))
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(values))


def _sort_out(
    tally: _Tally, first: int, batch: Sequence[tuple[str, Row]], results: Sequence[list[Example] | str], left_out: Add
) -> list[tuple[int, Example]]:
    """Return the examples with the numbers of their rows; count and list the rows that were refused."""
    kept = []
    for number, ((origin, _), result) in enumerate(zip(batch, results, strict=True), start=first):
        if not isinstance(result, str):
            kept += [(number, example) for example in result]
            continue
        left_out({"where": origin, "reason": result})
        too_long = result.startswith(TOO_LONG)
        tally.dropped[TOO_LONG if too_long else result] += 1  # counted without the length, which differs
        shown = tally.long_rows if too_long else tally.bad_rows
        if len(shown) < SHOWN:
            shown.append(Problem(result, origin))
    return kept


def _refuse(tally: _Tally, rows: Rows, recipe: Recipe, list_file: Path) -> None:
    """Raise if what was left out is more than the recipe allows."""
    too_long = tally.dropped[TOO_LONG]
    _refuse_long(tally, too_long, recipe, list_file)
    _refuse_bad(tally, too_long, rows, recipe, list_file)
    empty = [side for side, count in tally.counts.items() if not count and (rows.counts[side] or side == "train")]
    fix = f"Give more rows, or raise data.max_length. All that were left out: {list_file}."
    DataError.collect(Problem(f"no row is left for {side}", fix=fix) for side in empty)


def _refuse_long(tally: _Tally, too_long: int, recipe: Recipe, list_file: Path) -> None:
    if too_long and recipe.data.on_overlong == "error":
        what = f"{too_long:,} of the rows have more tokens than data.max_length = {recipe.data.max_length}"
        if recipe.task == "speech":
            what += ", or last longer than speech.window_seconds"
        ways = [way for way in TASK_FACTS[recipe.task].overlong if way != "error"]
        fix = f"Raise data.max_length, or set data.on_overlong to {' or '.join(ways)}. All of them: {list_file}."
        raise DataError(Problem(what, fix=fix), *tally.long_rows)


def _refuse_bad(tally: _Tally, too_long: int, rows: Rows, recipe: Recipe, list_file: Path) -> None:
    """Count what this half left out, and what the first half called bad, against `data.max_dropped`."""
    counted = sum(tally.dropped.values()) - (too_long if recipe.data.on_overlong == "drop" else 0)
    bad = counted + sum(count for reason, count in rows.dropped.items() if reason.startswith("bad"))
    allowed = recipe.data.max_dropped
    if counted and bad > allowed * rows.rows_in:
        what = f"{bad:,} of {rows.rows_in:,} rows cannot be used: {bad / max(rows.rows_in, 1):.1%}"
        what += f", and data.max_dropped allows {allowed:.1%}"
        fix = f"Mend them, or raise data.max_dropped. All of them: {list_file}."
        shown = [*tally.bad_rows, *(tally.long_rows if recipe.data.on_overlong != "drop" else [])]
        raise DataError(Problem(what, fix=fix), *shown[:SHOWN])


def _examples(tally: _Tally, rows: Rows, folder: Path) -> Examples:
    return Examples(
        folder=folder,
        files={side: folder / f"{side}.arrow" for side in rows.files},
        counts=tally.counts,
        tokens=tally.tokens,
        supervised=tally.supervised,
        longest=tally.longest,
        dropped=dict(sorted((+tally.dropped).items())),
        content_hash=tally.digest.hexdigest(),
        reach=tally.reach,
    )


def _save(examples: Examples) -> None:
    record = {
        "files": {side: path.name for side, path in examples.files.items()},
        "counts": examples.counts,
        "tokens": examples.tokens,
        "supervised": examples.supervised,
        "longest": examples.longest,
        "reach": examples.reach,
        "dropped": examples.dropped,
        "content_hash": examples.content_hash,
    }
    write_json(examples.folder / RECORD, record)


def examples_inputs(recipe: Recipe, rows: Rows, model: ModelRef, processor: PreTrainedTokenizerBase) -> str:
    """Hash what examples depend on: the rows, the tokenizer, the template and the task's own section."""
    about = recipe.model.model_dump(mode="json", include={"chat_template_kwargs", "add_tokens"})
    settings = recipe.data.model_dump(mode="json", include={"max_length", "on_overlong", "train_on", "max_dropped"})
    settings |= {"section": recipe.task_section()}
    versions = package_versions(("transformers", "tokenizers"))
    contents = [rows.content_hash, model.content_hash, hash_value(processor.chat_template)]
    return hash_value([__version__, versions, contents, about, settings, recipe.task])
