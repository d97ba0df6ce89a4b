"""Encoded rows on disk: written in batches during encoding, read through a memory map."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any, NotRequired, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.progress import MofNCompleteColumn
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from llmtune import __version__
from llmtune.data.arrow_columns import number_column
from llmtune.data.example import Example, list_columns
from llmtune.data.overlong import TOO_LONG, Lost
from llmtune.data.rejected_rows import listed, too_many_bad
from llmtune.data.rendering_check import check_tools
from llmtune.data.row_store import AGAIN, iterate_texts, open_arrow
from llmtune.data.task_interface import EncodeRows, TaskInterface
from llmtune.data.tokenization import UNKNOWN, find_unknown, refused_token
from llmtune.data.worker_pool import WorkerPool
from llmtune.display.console import progress_bars
from llmtune.errors import DataError, EnvironmentProblem, Problem
from llmtune.recipe.data_section import ENCODING_KEYS
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Examples, ModelRef, Rows
from llmtune.store.atomic_files import explained, hash_value, write_json
from llmtune.store.json_shapes import Counts, read_record
from llmtune.store.run_lock import package_versions

BATCH_ROWS = 512
BATCH_RECORDINGS = 32
"""Half a minute at 16 kHz takes a megabyte."""
BATCH_CHARACTERS = 1_000_000  # per tokenizer call: its offsets take 50 times the text
BATCH_RENDERED = 20_000_000
"""Characters of rendered templates per batch, about a second: each answer is rendered with everything before it."""
SHOWN = 20
RECORD = "examples.json"
COUNTED = ("counts", "tokens", "supervised", "longest", "reach")
LEFT_OUT = "left_out.jsonl"
Numbers = npt.NDArray[np.int32 | np.float32 | np.int16]
NUMBERS = ("target_bytes", "supervised", "tokens", "reach")


def example_schema(kind: type[Example]) -> pa.Schema:
    """Return the columns of the files with examples of this type."""
    lists = {name: pa.list_(pa.from_numpy_dtype(number)) for name, number in list_columns(kind).items()}
    return pa.schema(lists | {name: pa.int32() for name in (*NUMBERS, "row")})


@dataclass(frozen=True)
class _RowBatch:
    """Rows that are encoded together."""

    split: str
    first: int
    """The number of its first row within the split."""
    rows: list[tuple[str, str]]
    """Origin and JSON of each row."""


@dataclass(frozen=True)
class _EncodedBatch:
    split: str
    rows: int
    examples: pa.RecordBatch | None
    """None if no row could be used."""
    refused: list[tuple[str, str]]
    """Origin and reason of each row that could not be used."""
    lost: Counter[str]
    """What truncated rows lost."""


@dataclass(frozen=True)
class _BatchEncoder:
    """Encodes a batch; pickled for the workers."""

    encode: EncodeRows
    kind: type[Example]
    processor: PreTrainedTokenizerBase
    recipe: Recipe

    def __call__(self, batch: _RowBatch) -> _EncodedBatch:
        results = self.encode([json.loads(text) for _, text in batch.rows], self.processor, self.recipe)
        unknown = refused_token(self.processor, self.recipe)
        kept: list[tuple[int, Example]] = []
        refused: list[tuple[str, str]] = []
        lost: Counter[str] = Counter()
        for number, ((origin, text), result) in enumerate(zip(batch.rows, results, strict=True), batch.first):
            reason = result if isinstance(result, str) else None
            if reason is None and unknown is not None:
                reason = find_unknown(cast(list[Example], result), unknown, text, self.processor)
            if reason is not None:
                refused.append((origin, reason))
                continue
            for example in cast(list[Example], result):
                kept.append((number, example))
                if example.lost is not None:
                    lost.update({"rows": 1, **Lost(*example.lost)._asdict()})
        examples = record_batch(kept, self.kind) if kept else None
        return _EncodedBatch(batch.split, len(batch.rows), examples, refused, lost)


@dataclass
class _Tally:
    """Counts collected while rows are encoded."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    supervised: Counter[str] = field(default_factory=Counter)
    longest: Counter[str] = field(default_factory=Counter)
    reach: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    long_rows: list[Problem] = field(default_factory=list)
    """The first rows that are too long."""
    bad_rows: list[Problem] = field(default_factory=list)
    """The first rows that cannot be used for another reason."""
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, split: str, batch: pa.RecordBatch) -> None:
        """Count examples from `record_batch`. The hash covers columns, not rows, because columns are few."""
        self.digest.update(f"{split} {batch.num_rows}\n".encode())
        for column in batch.columns:
            parts = (column.offsets, column.values) if pa.types.is_list(column.type) else (column,)
            for part in parts:
                self.digest.update(part.to_numpy())
        costs, reaches = batch.column("tokens").to_numpy(), batch.column("reach").to_numpy()
        self.counts[split] += batch.num_rows
        self.tokens[split] += int(costs.sum(dtype=np.int64))
        self.supervised[split] += int(batch.column("supervised").to_numpy().sum(dtype=np.int64))
        self.longest[split] = max(self.longest[split], int(costs.max()))
        self.reach[split] = max(self.reach[split], int(reaches.max()))

    def refuse(self, origin: str, reason: str) -> None:
        """Count a row that was left out, under its reason without the part that differs from row to row."""
        too_long = reason.startswith(TOO_LONG)
        self.dropped[next((kind for kind in (TOO_LONG, UNKNOWN) if reason.startswith(kind)), reason)] += 1
        shown = self.long_rows if too_long else self.bad_rows
        if len(shown) < SHOWN:
            shown.append(Problem(reason, origin))


def encode_rows(
    rows: Rows,
    task: TaskInterface,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    folder: Path,
    console: Console,
    pool: Callable[..., WorkerPool[_RowBatch, _EncodedBatch]] = WorkerPool,
) -> Examples:
    """Encode all rows into one Arrow file a split in `folder`; `examples.json` next to them is written last.

    Rows that cannot be encoded are counted by reason in `Examples.dropped` and listed with file and line in
    `left_out.jsonl` next to `folder`. A row that `data.on_overlong` splits makes several examples with the same `row`.
    All cores are used if that saves time; the output does not depend on their number.

    Raises:
        DataError: a row is longer than `data.max_length` and `data.on_overlong` is error; more rows are bad than
            `data.max_dropped` allows; or a split has no rows left.
        EnvironmentProblem: the chat template cannot be split into turns, or omits tools that many rows have; the disk
            is full; the folder is read-only.
    """
    check_tools(rows, processor, recipe)
    tally, total = _Tally(), sum(rows.counts.values())
    settings = (
        [processor.chat_template, recipe.model.image_pixels] if recipe.model.image_pixels else processor.chat_template
    )
    tally.digest.update(hash_value(settings).encode())  # they make the prompts of evaluation too
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
        with progress_bars(console, MofNCompleteColumn()) as progress, listed(folder.parent / LEFT_OUT) as left_out:
            bar = progress.add_task("encode", total=total)
            batches = (batch for split in rows.files for batch in _batches(split, iterate_texts(rows, split)))
            encoder = _BatchEncoder(task.row_encoder(), task.example_type, processor, recipe)
            encoded = pool(encoder).map(batches, lambda b: len(b.rows), total)
            for split, results in groupby(encoded, key=lambda result: result.split):
                sink = pa.OSFile(str(folder / f"{split}.arrow"), "wb")
                with sink, pa.ipc.new_file(sink, example_schema(task.example_type)) as file:
                    for result in results:
                        for origin, reason in result.refused:
                            left_out({"where": origin, "reason": reason})
                            tally.refuse(origin, reason)
                        tally.lost.update(result.lost)
                        if result.examples is not None:
                            tally.add(split, result.examples)
                            file.write_batch(result.examples)
                        progress.advance(bar, result.rows)
        _check_left_out(tally, rows, recipe, folder.parent / LEFT_OUT)
        counted = {name: {split: getattr(tally, name)[split] for split in rows.files} for name in COUNTED}
        record = {
            "files": {split: f"{split}.arrow" for split in rows.files},
            **counted,
            "dropped": dict(sorted((+tally.dropped).items())),
            "lost": dict(tally.lost),
            "content_hash": tally.digest.hexdigest(),
        }
        write_json(folder / RECORD, record)
    return load_examples(folder)


class ExamplesRecord(TypedDict):
    """The contents of examples.json, by split."""

    files: dict[str, str]
    counts: Counts
    tokens: Counts
    supervised: Counts
    longest: Counts
    dropped: Counts
    content_hash: str
    reach: NotRequired[Counts]
    lost: NotRequired[Counts]


def load_examples(folder: Path) -> Examples:
    """Read the output of `encode_rows` from `folder`, which may have been moved.

    Raises:
        DataError: `folder` has no examples.
        EnvironmentProblem: the record is damaged.
    """
    record = read_record(folder / RECORD, ExamplesRecord, fix=AGAIN)
    if record is None:
        raise DataError.of("no encoded examples here", str(folder), AGAIN)
    files = {split: folder / name for split, name in record["files"].items()}
    missing = [Problem("missing", str(path), AGAIN) for path in files.values() if not path.is_file()]
    DataError.collect(missing)
    counted = {name: record[name] for name in ExamplesRecord.__annotations__ if name in record and name != "files"}
    return Examples(folder=folder, files=files, **counted)


def row_lengths(examples: Examples) -> npt.NDArray[np.int32]:
    """Return the cost of each training example, in tokens."""
    return ExampleReader(examples, "train").lengths


class ExampleReader:
    """Random access to the examples of one split; reads only the requested tokens into memory."""

    def __init__(self, examples: Examples, split: str, kind: type[Example] = Example) -> None:
        """Read them as `kind`, the task's `example_type`; by default without the task's own columns."""
        self._kind, columns = kind, list_columns(kind)
        with open_arrow(examples.files[split]) as reader:
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            if not {*example_schema(kind).names} <= {*reader.schema.names}:
                raise EnvironmentProblem.of("written by another version of llmtune", str(examples.files[split]), AGAIN)
        parts = [(name, batch.column(name)) for batch in self._batches for name in columns]
        self._filled = dict.fromkeys(name for name, column in parts if len(column.flatten()))
        """List columns that at least one example fills."""
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]
        self.lengths = self._column("tokens")
        """int32 [n]: the cost of each example, in tokens."""
        self.supervised = self._column("supervised")
        """int32 [n]: the number of supervised predictions of each example."""
        self.rows = self._column("row")
        """int32 [n]: the row of `Rows` that each example comes from."""

    @cached_property
    def pictures(self) -> npt.NDArray[np.int32]:
        """int32 [n]: the number of pictures of each example."""
        if "pictures" not in self._filled:
            return np.zeros(len(self), dtype=np.int32)
        columns = [batch.column("pictures") for batch in self._batches]
        texts = (np.from_dlpack(column[i].values).tobytes() for column in columns for i in range(len(column)))
        return np.array([text.count(b'"content": ') for text in texts], dtype=np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._starts, index) - 1
        batch, offset = self._batches[number], index - self._starts[number]
        lists = {name: np.from_dlpack(batch.column(name)[offset].values) for name in self._filled}
        target_bytes, counted, cost = (batch.column(name)[offset].as_py() for name in NUMBERS[:3])
        columns: dict[str, Any] = {"input_ids": [], "spans": []}
        columns |= {name: part if part.itemsize < 4 else part.tolist() for name, part in lists.items() if len(part)}
        return self._kind(**columns, target_bytes=target_bytes, counted=counted, cost=cost)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def _column(self, name: str) -> npt.NDArray[np.int32]:
        # Use DLPack: `to_numpy` imports pandas, which training does not need otherwise.
        parts = [np.from_dlpack(batch.column(name)) for batch in self._batches]
        return np.concatenate([np.empty(0, dtype=np.int32), *parts]).astype(np.int32)


def _batches(split: str, texts: Iterator[tuple[str, str]]) -> Iterator[_RowBatch]:
    """Cut the rows of a split into batches whose count and size limits keep memory flat.

    The last batch has two rows if possible: KTO pairs an answer with another row's prompt.
    """
    first, characters, rendered = 0, 0, 0
    batch: list[tuple[str, str]] = []
    ahead = next(texts, None)
    most = BATCH_RECORDINGS if ahead is not None and "audio" in json.loads(ahead[1]) else BATCH_ROWS
    while ahead is not None:
        row, ahead = ahead, next(texts, None)
        batch.append(row)
        characters += len(row[1])
        rendered += len(row[1]) * row[1].count('"role"')
        full = len(batch) >= most or characters > BATCH_CHARACTERS or rendered > BATCH_RENDERED
        if full and ahead is not None:
            kept = batch[:-1] if len(batch) > 1 else batch
            yield _RowBatch(split, first, kept)
            first, batch, characters, rendered = first + len(kept), batch[len(kept) :], 0, 0
    if batch:
        yield _RowBatch(split, first, batch)


def record_batch(examples: Sequence[tuple[int, Example]], kind: type[Example] = Example) -> pa.RecordBatch:
    """Return examples of a type, each with the number of its row, in the file's form."""
    formats = list_columns(kind).items()
    lists = [_lists([getattr(example, name) for _, example in examples], number) for name, number in formats]
    numbers = [[getattr(example, name) for _, example in examples] for name in NUMBERS]
    numbers.append([row for row, _ in examples])
    columns = [*lists, *(number_column(np.asarray(column, dtype=np.int32)) for column in numbers)]
    return pa.record_batch(columns, schema=example_schema(kind))


def _lists(parts: Sequence[Sequence[float] | Numbers], kind: type[np.generic]) -> pa.ListArray:
    """Join lists of numbers into one Arrow list column."""
    borders = np.zeros(len(parts) + 1, dtype=np.int32)
    np.cumsum([len(part) for part in parts], out=borders[1:])
    if any(isinstance(part, np.ndarray) for part in parts):
        values = np.concatenate([np.asarray(part, dtype=kind) for part in parts])
    else:
        values = np.fromiter(chain.from_iterable(parts), dtype=kind, count=int(borders[-1]))
    return pa.ListArray.from_arrays(number_column(borders), number_column(values))


def _check_left_out(tally: _Tally, rows: Rows, recipe: Recipe, list_file: Path) -> None:
    """Raise if more was left out than the recipe allows."""
    too_long = tally.dropped[TOO_LONG]
    _refuse_long(tally, too_long, recipe, list_file)
    _refuse_bad(tally, too_long, rows, recipe, list_file)
    empty = [split for split in rows.files if not tally.counts[split] and (rows.counts[split] or split == "train")]
    fix = f"Give more rows, or raise data.max_length. All rows that were left out: {list_file}."
    DataError.collect(Problem(f"no row is left for {split}", fix=fix) for split in empty)


def _refuse_long(tally: _Tally, too_long: int, recipe: Recipe, list_file: Path) -> None:
    if too_long and recipe.data.on_overlong == "error":
        what = f"{too_long:,} of the rows have more tokens than data.max_length = {recipe.data.max_length}"
        if TASK_FACTS[recipe.task].takes_audio:
            what += ", or last longer than speech.window_seconds"
        ways = [way for way in TASK_FACTS[recipe.task].overlong if way != "error"]
        fix = f"Raise data.max_length, or set data.on_overlong to {' or '.join(ways)}. All of them: {list_file}."
        raise DataError(Problem(what, fix=fix), *tally.long_rows)


def _refuse_bad(tally: _Tally, too_long: int, rows: Rows, recipe: Recipe, list_file: Path) -> None:
    """Check the bad rows of preparation and encoding together against `data.max_dropped`."""
    counted = sum(tally.dropped.values()) - (too_long if recipe.data.on_overlong == "drop" else 0)
    bad = counted + sum(count for reason, count in rows.dropped.items() if reason.startswith("bad"))
    allowed = recipe.data.max_dropped
    if counted and bad > allowed * rows.rows_in:
        looked, share = f"{bad:,} of {rows.rows_in:,} rows", bad / max(rows.rows_in, 1)
        problem = too_many_bad(looked, share, allowed, f" All of them: {list_file}.")
        shown = [*tally.bad_rows, *(tally.long_rows if recipe.data.on_overlong != "drop" else [])]
        raise DataError(problem, *shown[:SHOWN])


def examples_inputs(
    recipe: Recipe, rows: Rows, model: ModelRef, processor: PreTrainedTokenizerBase, kind: type[Example]
) -> str:
    """Hash the inputs of examples: the rows, the tokenizer, the template, the task's section, and the columns."""
    model_settings = recipe.model.model_dump(
        mode="json", include={"chat_template_kwargs", "add_tokens", "image_pixels"}
    )
    settings = recipe.data.model_dump(mode="json", include={"max_dropped", *ENCODING_KEYS})
    settings |= {"section": recipe.task_section()}
    versions = package_versions(("transformers", "tokenizers"))
    contents = [rows.content_hash, model.content_hash, hash_value(processor.chat_template)]
    return hash_value(
        [__version__, example_schema(kind).names, versions, contents, model_settings, settings, recipe.task]
    )
