"""Answer every row of a file with a finished run's model: `llmtune generate RUN --input FILE --output FILE`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from rich.progress import MofNCompleteColumn

from llmtune.data.chat_rows import open_conversation
from llmtune.data.column_mapping import name_columns, rename, used_columns, with_aliases
from llmtune.data.encoding_guess import guess_encoding
from llmtune.data.pictures import IMAGE, read_pictures
from llmtune.data.rejected_rows import RawRow, RowError
from llmtune.data.row_formats import COLUMNS, CONVERSATIONS, FORMATS
from llmtune.data.row_kind import kind_of_task
from llmtune.data.sources import local_input
from llmtune.display.console import progress_bars
from llmtune.errors import DataError, RecipeError
from llmtune.evaluate.generation import answer_reader, generate_completions
from llmtune.model.device import pick_device
from llmtune.recipe.data_section import BINARY
from llmtune.records import Json, Prompt, Row
from llmtune.serve.finished_run import FinishedRun
from llmtune.serve.served_model import Predicted, ServedModel
from llmtune.store.processes import rank, world_size
from llmtune.tasks.base import AnyTask
from llmtune.train.distributed import join_processes

INPUT_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "question", "query", "text", "source", "document"),
    "audio": ("audio", "file_name"),
    "image": ("images", "image"),
    "answer": ("completion", "answer", "output"),
    "passages": ("passages", "passage"),
}
"""Possible columns of a task input, by our names; of any other input, its own name."""
AT_ONCE = 512
"""Number of rows answered before their lines are written."""


def answer_file(
    run: FinishedRun, rows: Path, output: Path | None, *, base: bool, max_new_tokens: int | None
) -> tuple[int, int]:
    """Answer the rows of a file and write a JSON line for each: its columns, `answer`, and what goes with a choice.

    A model that chooses adds `scores`, and what `evaluate.decide`, `sets` and `out_of_scope` ask for.

    If the file has a column `answer`, it is written as `reference`. Columns are read as in training: by the recipe's
    mapping, and by their usual names. Returns the number of answered and of unreadable rows; the latter have an
    `error` instead of an answer.

    An `output` that ends in .npy gets a vector per row, float32 [rows, D]: the query's, or else the first passage's;
    unreadable rows are NaN. Of several processes, which share the rows, the first one writes.

    Raises:
        RecipeError: the file lacks an input of the task, or the model cannot answer such inputs.
        DataError: the file cannot be read, or none of its rows.
    """
    join_processes(pick_device())
    raw = _read_raw_rows(rows, run)
    header = list(dict.fromkeys(name for _, row in raw if not isinstance(row, RowError) for name in row))
    if not header:
        raise DataError.of("no row can be read", str(rows))
    stated = run.recipe.data.train[0].columns or run.recipe.data.columns
    mapping = {ours: theirs for ours, theirs in stated.items() if used_columns({ours: theirs}, header) <= set(header)}
    columns = with_aliases(mapping, COLUMNS, header, kind_of_task(run.recipe.task).aliases)
    input_columns = _columns_of(run.task, [*columns, *header], str(rows))
    read = partial(_read_prompt, run, columns, input_columns, rows.parent)
    served = run.load(dict.fromkeys(input_columns, "text"), base=base, max_new_tokens=max_new_tokens)
    vectors: list[list[float] | None] | None = [] if output is not None and output.suffix == ".npy" else None
    if vectors is not None and run.task.model_kind.answer_column != "vectors":
        raise RecipeError.of(f"task {run.task.name} makes no vectors", str(output), "Write to a file in .jsonl.")
    answered = 0
    with ExitStack() as stack:
        lines = Path(os.devnull) if rank() else None if vectors is not None else output
        file = stack.enter_context(lines.open("w", encoding="utf-8")) if lines else sys.stdout
        progress = stack.enter_context(progress_bars(run.console, MofNCompleteColumn()))
        bar = progress.add_task("rows", total=len(raw))
        for first in range(0, len(raw), AT_ONCE):
            batch = raw[first : first + AT_ONCE]
            given = [row if isinstance(row, RowError) else read(row) for _, row in batch]
            usable = [one for one in given if not isinstance(one, RowError)]
            recipe = served.recipe.model_copy(update={"seed": served.recipe.seed + first})  # other draws per part
            answers = _answer_rows(replace(served, recipe=recipe), usable, partial(progress.advance, bar))
            for (origin, row), one in zip(batch, given, strict=True):
                answer = {"error": f"{origin}: {one}"} if isinstance(one, RowError) else next(answers)
                answered += "error" not in answer
                if vectors is not None:
                    answer_vectors = answer.get("vectors")
                    vectors.append(next(iter(answer_vectors.values())) if isinstance(answer_vectors, dict) else None)
                    continue
                line = answer if isinstance(row, RowError) else _own_columns(row) | answer
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            progress.update(bar, completed=first + len(batch))
    if vectors is not None and output is not None and rank() == 0:
        _save_vectors(output, vectors)
    if not answered:
        raise DataError.of("no row could be answered: the output has the reason for each", str(rows))
    return answered, len(raw) - answered


def _save_vectors(output: Path, vectors: Sequence[list[float] | None]) -> None:
    width = next((len(one) for one in vectors if one is not None), 0)
    np.save(output, np.asarray([one or [np.nan] * width for one in vectors], dtype=np.float32))


def _read_raw_rows(rows: Path, run: FinishedRun) -> list[RawRow]:
    source = local_input(rows)
    if source.container not in BINARY and (encoding := guess_encoding(rows)):
        run.console.print(f"{rows} is read as {encoding}", markup=False, highlight=False)
        source = replace(source, source=source.source.model_copy(update={"encoding": encoding}))
    if source.container == "text" and run.task.model_kind.answer_column == "vectors":
        fix = "Give JSON lines or CSV with a column query or passage."
        raise RecipeError.of("a text file does not say whether its texts are queries or passages", str(rows), fix)
    return list(source.raw_rows())


def _own_columns(row: Mapping[str, object]) -> dict[str, object]:
    """Return the columns of a row, with its own `answer` renamed to `reference`."""
    return {"reference" if name == "answer" and "reference" not in row else name: value for name, value in row.items()}


def _columns_of(task: AnyTask, names: Sequence[str], where: str) -> dict[str, str]:
    """Return the column of each input in the file; raises RecipeError if a required one is missing."""
    usual = {name: INPUT_COLUMNS.get(name, (name,)) for name in task.inputs}
    if task.is_conversational and task.free_prompt:
        usual["prompt"] = (*CONVERSATIONS, *usual["prompt"])
    columns = {name: next((one for one in usual[name] if one in names), None) for name in task.inputs}
    for name, required in task.inputs.items():
        if required and columns[name] is None:
            what = f"no column for the {name}; found {', '.join(names)}"
            raise RecipeError.of(what, where, f"Name the column one of: {', '.join(usual[name])}.")
    return {name: column for name, column in columns.items() if column is not None}


def _read_prompt(
    run: FinishedRun,
    columns: Mapping[str, str],
    input_columns: Mapping[str, str],
    folder: Path,
    row: Mapping[str, object],
) -> Row | RowError:
    """Return the prompt of a row, or the reason why it has none."""
    try:
        named = rename(row, columns, dict[str, Sequence[str]](run.recipe.data.roles.items()))
        prompt = _read_training_row(named, input_columns, folder, run.task)
        return _read_inputs(named, input_columns, folder, run.task) if prompt is None else prompt
    except RowError as error:
        return name_columns(error, columns)


def _read_training_row(
    named: Mapping[str, object], input_columns: Mapping[str, str], folder: Path, task: AnyTask
) -> Row | None:
    """Return the prompt of a conversation, a picture, or an instruction with its input; None for rows of other forms.

    Paths of pictures are relative to `folder`.
    """
    column, alpaca = input_columns.get("prompt", ""), FORMATS["alpaca"].parser(task.name)
    if column == "instruction" and alpaca:
        prompt = cast(Row, task.split_answer(alpaca({**named, "output": "-"}))[0])
        read_pictures(prompt.get("messages", ()), folder)
        return prompt
    value, images = named.get(column), named.get(input_columns.get("image", "images"))
    if not (task.is_conversational and task.free_prompt):
        return None
    if not (column in CONVERSATIONS or isinstance(value, list)):
        if images in (None, "", []):
            return None
        value = [{"role": "user", "content": str(value or "").strip() or IMAGE}]
    read = partial(open_conversation, folder=folder, reads_pictures=task.model_kind.takes_images)
    return dict(read(value, named.get("tools", named.get("functions")), named.get("system"), images))


def _read_inputs(named: Mapping[str, object], input_columns: Mapping[str, str], folder: Path, task: AnyTask) -> Row:
    given = {name: value for name, column in input_columns.items() if (value := named.get(column)) is not None}
    if input_columns.get("passages") == "passage" and isinstance(given.get("passages"), str):
        given["passages"] = [given["passages"]]  # a passage may have several lines
    inputs = {name: json.dumps(value) if isinstance(value, list) else str(value) for name, value in given.items()}
    if "audio" in inputs:
        inputs["audio"] = str(folder / str(inputs["audio"]))
    for name, column in input_columns.items():
        is_empty = given.get(name) in (None, []) or not inputs[name].strip()
        if is_empty and (task.inputs[name] or name == "prompt"):
            raise RowError("empty content", f"{column!r} is empty")
    return cast(Row, task.make_row(inputs))


def _answer_rows(
    served: ServedModel, rows: Sequence[Row], advance: Callable[[int], None]
) -> Iterator[dict[str, object]]:
    """Yield the answer to each prompt, computed in batches; `advance` gets the number of finished rows."""
    task, recipe = served.task, served.recipe
    if task.predicts and not task.free_prompt:
        cuts = [_check_length(served, row) for row in rows]
        predictions = iter(
            _predict(served, [row for row, cut in zip(rows, cuts, strict=True) if not isinstance(cut, str)])
        )
        for cut in cuts:
            predicted = cut if isinstance(cut, str) else next(predictions)
            if isinstance(predicted, str):
                yield {"error": predicted}
                continue
            value = predicted.value
            of_classes = {"scores": one} if (one := next(iter(predicted.probabilities), None)) else {}
            shown = value if task.model_kind.answer_column == "vectors" else task.format_prediction(value)
            answer_fields = {key: cast(Json, value)[key] for key in task.answer_keys}
            truncated = {"truncated": True} if cut else {}
            yield {task.model_kind.answer_column: shown, **answer_fields, **of_classes, **predicted.scores, **truncated}
        return
    prompts = [_make_prompt(served, row) for row in rows]
    read = answer_reader(served.processor, recipe)
    room = (served.context or 1 << 60) - (recipe.generation.max_new_tokens if task.free_prompt else 0)
    fitting = [prompt for prompt in prompts if not isinstance(prompt, str) and len(prompt) <= room]
    outputs = iter(
        generate_completions(served.model, fitting, served.processor, recipe, device=served.device, advance=advance)
    )
    for prompt, chosen in zip(prompts, served.choose(rows), strict=True):
        if isinstance(prompt, str):
            yield {"error": prompt}
            continue
        if len(prompt) > room:
            yield {"error": f"the prompt has {len(prompt)} tokens, but the model's context has room for {room}"}
            continue
        parsed = read(next(outputs).token_ids, None)
        thoughts = {"reasoning": parsed.reasoning} if parsed.reasoning else {}
        yield {"answer": parsed.text, **thoughts, **chosen}


def _predict(served: ServedModel, rows: Sequence[Row]) -> list[Predicted | str]:
    """Predict from rows; a row that cannot be read gets the reason, and the others a prediction."""
    try:
        return [*served.predict(rows)]
    except DataError as error:
        if world_size() > 1:
            raise
        if len(rows) == 1:
            return [error.problems[0].what]
        half = len(rows) // 2
        return [*_predict(served, rows[:half]), *_predict(served, rows[half:])]


def _make_prompt(served: ServedModel, row: Row) -> Prompt | str:
    """Return the prompt of a row, or why its chat template refuses it."""
    try:
        return served.task.prompt(row, served.processor, served.recipe)
    except DataError as error:
        return error.problems[0].what


def _check_length(served: ServedModel, row: Row) -> bool | str:
    """Return whether a row is cut, or the reason why it is refused."""
    try:
        return served.check_length(row)
    except DataError as error:
        return error.problems[0].what
