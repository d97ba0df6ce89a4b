"""`llmtune init`: read rows and write a recipe that fits them and this machine."""

from __future__ import annotations

import glob
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AsJson
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.cli.recipes import migrate_file
from llmtune.errors import DataError, LlmtuneError, Problem, RecipeError, nearest, refuse_repeated
from llmtune.store.atomic_files import explained

if TYPE_CHECKING:
    from rich.console import Console

    from llmtune.data.file_survey import Reading, Survey
    from llmtune.data.retrieval_layout import RetrievalSet

SCHEMA = "recipe.schema.json"
SHOWN_FOLDERS = 5


@handled
def init(
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Your rows: a file (CSV, JSON lines ...), a folder, a glob.")
    ] = None,
    data_option: Annotated[str | None, typer.Option("--data", help="The same as DATA.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="The task to learn (default: by the columns).")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--columns", metavar="OURS=THEIRS", help="Map a column, such as prompt=Question; may be repeated."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base model (default: one that fits).")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The recipe (default: named after the data).")] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Another tool's configuration, as for `recipes migrate`."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing, and accept all proposals.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe for your rows: task, columns, lengths and a model that fits this machine."""
    from llmtune.cli.proposal import propose_recipe
    from llmtune.data.file_survey import list_readings, survey_files
    from llmtune.recipe.task_facts import RETRIEVAL_TASKS, TASK_FACTS
    from llmtune.recipe.undecided import UNDECIDED

    if task is not None and task not in TASK_FACTS:
        fix = f"{nearest(task, list(TASK_FACTS))} Tasks: {', '.join(TASK_FACTS)}.".strip()
        raise RecipeError.of(f"unknown task '{task}'", "--task", fix)
    if from_ is not None:
        migrate_file(from_, out, task=task, as_json=as_json)
        return
    path, asks = data or data_option or _only_file(), not yes and not as_json and sys.stdin.isatty()
    target, console, mapped = _target(path, out), stderr_console(), _mapped(columns or [])
    retrieval, splits = _join_files(path, target, console) if task in (None, *RETRIEVAL_TASKS) else (None, {})
    task = RETRIEVAL_TASKS[0] if retrieval and task is None else task
    survey = survey_files(str(splits["train"]) if splits else path)
    if not (readings := list_readings(survey, task, mapped)):
        raise _unread(survey, task, mapped)
    reading = _choose(readings, asks, console)
    _refuse_lost(survey, reading)
    _print_survey(survey, reading, readings, console)
    if asks and len(reading.candidates) > 1:
        reading = _choose_label(survey, reading, mapped, console)
    corpus = retrieval.corpus if retrieval else None
    text, model, note = propose_recipe(survey, reading, target, model, splits, corpus)
    if note:
        console.print(f"model: {model}  # {note}", markup=False, highlight=False, soft_wrap=True)
    provisional = _stand_in(reading, text)
    is_ready = _write_recipe(target, text, provisional, console)
    if as_json:
        details = {"columns": reading.columns, "roles": reading.roles, "undecided": [*provisional], "ready": is_ready}
        counted = [{"column": one.column, "classes": dict(one.counts.most_common())} for one in reading.candidates]
        print_json({"recipe": str(target), "task": reading.task, "model": model, **details, "candidates": counted})
        return
    typer.echo(f"wrote {target} (task {reading.task}, model {model}) and {SCHEMA}")
    fix = "" if is_ready else f"fix the problems above, in the rows or in {target}; then "
    choose = f"choose {', '.join(provisional)} in {target}, marked {UNDECIDED}; then " if provisional else ""
    typer.echo(f"next: {fix}{choose}llmtune run {target}")


def _stand_in(reading: Reading, text: str) -> dict[str, object]:
    """Return a value for each key that the recipe leaves open, to try its rows."""
    from llmtune.recipe.undecided import UNDECIDED

    label = {"data.columns.label": reading.candidates[0].column} if len(reading.candidates) > 1 else {}
    rewards = {"reinforce.rewards": {"tool_call_valid": 1.0}} if f"rewards: {UNDECIDED}" in text else {}
    return {**label, **rewards}  # this reward needs no reference answer


def _join_files(path: str, target: Path, console: Console) -> tuple[RetrievalSet | None, dict[str, Path]]:
    """Return the retrieval set in a folder, if it is one, and the files with its joined rows by split."""
    from llmtune.cli.proposal import write_joined_rows
    from llmtune.data.retrieval_layout import find_retrieval_set

    retrieval = find_retrieval_set(Path(path))
    splits = write_joined_rows(retrieval, target) if retrieval else {}
    if splits:
        names = ", ".join(map(str, splits.values()))
        console.print(f"{path}: wrote queries with their passages into {names}", markup=False, highlight=False)
    return retrieval, splits


def _write_recipe(target: Path, text: str, provisional: Mapping[str, object], console: Console) -> bool:
    """Write the recipe and its schema, and report problems of its rows; open values count as `provisional`.

    Return whether the rows can be prepared.
    """
    from llmtune.launch.recipe_check import check_recipe, try_recipe_rows
    from llmtune.recipe.loader import load_recipe
    from llmtune.recipe.schema import json_schema

    with explained(target):
        target.write_text(text, encoding="utf-8")
        target.with_name(SCHEMA).write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    loaded = load_recipe(target, [f"{key}={json.dumps(value)}" for key, value in provisional.items()])
    try:
        for note in try_recipe_rows(loaded, check_recipe(loaded)):
            console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    except LlmtuneError as error:
        console.print(f"{target} needs a look before it runs:\n{error}", style="yellow", markup=False, highlight=False)
        return False
    return True


def _target(path: str, out: Path | None) -> Path:
    """Return the recipe's path; raises RecipeError if the rows are missing or would include the recipe."""
    rows = Path(path)
    if rows.exists() and not (rows.is_file() or rows.is_dir()):
        raise RecipeError.of("not a regular file", path, "Copy its rows into a file, and name that file.")
    if not (rows.exists() or glob.has_magic(path)):
        siblings = [entry.name for entry in rows.parent.iterdir()] if rows.parent.is_dir() else []
        raise RecipeError.of("file not found", path, f"Name a file with rows.{nearest(rows.name, siblings)}")
    named = rows if rows.exists() else Path(os.path.dirname(re.split(r"[*?[]", path)[0]))  # for a glob, its folder
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", (named.name or named.resolve().name).split(".")[0]).strip(".-_")
    target = out or Path(f"{stem or 'recipe'}.yaml")
    if target.exists():
        raise RecipeError.of("the file exists", str(target), "Choose another name with --out.")
    if rows.is_dir() and target.resolve().is_relative_to(rows.resolve()):
        fix = "Name the files with a glob, such as '*.jsonl', or write the recipe elsewhere with --out."
        raise RecipeError.of(f"the recipe {target} would be among the rows", path, fix)
    return target


def _mapped(columns: list[str]) -> dict[str, str]:
    """Return the mapping from `--columns`; raise RecipeError if an entry is not NAME=COLUMN."""
    pairs = [pair.partition("=") for text in columns for pair in re.split(r",(?=\s*\w+=)", text)]
    for ours, sign, theirs in pairs:
        if not (ours.strip() and sign and theirs.strip()):
            raise RecipeError.of(
                f"{ours!r} is not a mapping", "--columns", "Write OURS=THEIRS, such as prompt=Question."
            )
    refuse_repeated([ours.strip() for ours, _, _ in pairs], "--columns")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def _unread(survey: Survey, task: str | None, columns: Mapping[str, str]) -> LlmtuneError:
    from llmtune.data.file_survey import CELLS, HEADER, RATED, refusals
    from llmtune.data.row_formats import reads_rows
    from llmtune.recipe.task_facts import RETRIEVAL_TASKS, TASK_FACTS

    if task in RETRIEVAL_TASKS and len(survey.columns) == 1 and not columns:
        what = f"task: {task} needs queries, and these rows have only texts"
        fix = "Give rows with query and passage: what users type, and its answer. These texts may be data.corpus."
        return DataError.of(what, survey.path, fix)
    reasons = "\n    ".join(refusals(survey, task, columns))
    if survey.bad.get(CELLS):
        fix = HEADER
    elif reasons:
        fix = f"The first row is bad:\n    {reasons}"
        fix += (
            "\n    Prompts without answers are for --task reinforce."
            if reads_rows(survey.first, RATED[0], columns)
            else ""
        )
    elif task is None:
        fix = f"Name a task with --task ({', '.join(TASK_FACTS)}), or --columns OURS=THEIRS, such as prompt=Question."
    else:
        names = ",".join(f"{ours}=YOUR_COLUMN" for ours in TASK_FACTS[task].columns or ("messages",))
        fix = f"Map them: --columns {names}."
    reader = "no task reads" if task is None else f"task: {task} does not read"
    return DataError.of(f"{reader} these rows; their columns are {', '.join(survey.columns)}", survey.path, fix)


def _refuse_lost(survey: Survey, reading: Reading) -> None:
    """Raise DataError for files without a readable row: a recipe should not name them."""
    from llmtune.recipe.yaml_writer import written_path

    if len(survey.files) > 1:
        fix = f"Name the files with rows for {reading.task}, such as '*.csv', or put this one elsewhere."
        DataError.collect(
            Problem(f"no row can be read as {reading.task}: {why}", written_path(str(file)), fix)
            for file, why in reading.lost.items()
        )


def _only_file() -> str:
    """Return the only file in the working folder that may contain rows; raises RecipeError otherwise."""
    from llmtune.recipe.data_section import DATA_ENDINGS, data_ending

    names = sorted(entry.name for entry in Path.cwd().iterdir() if data_ending(entry) in {*DATA_ENDINGS} - {".md"})
    files = [name for name in names if name != SCHEMA]
    if len(files) != 1:
        listing = f"; here are {', '.join(files)}" if files else ""
        raise RecipeError.of(f"no file given{listing}", "llmtune init", "Write: llmtune init FILE")
    return files[0]


def _choose(readings: list[Reading], asks: bool, console: Console) -> Reading:
    """Return the likeliest reading, or the user's choice."""
    if not asks or len(readings) == 1:
        return readings[0]
    names = [reading.task for reading in readings]
    return readings[names.index(_ask_name(f"task ({', '.join(names)})", names, console))]


def _ask_name(question: str, names: Sequence[str], console: Console) -> str:
    """Return the name that the user types; Enter takes the first."""
    from rich.markup import escape

    while (answer := console.input(escape(f"{question} [{names[0]}]: ")).strip() or names[0]) not in names:
        console.print(f"unknown: {answer!r}", markup=False)
    return answer


def _choose_label(survey: Survey, reading: Reading, columns: Mapping[str, str], console: Console) -> Reading:
    """Return the reading with the column that the user names as the label."""
    from llmtune.data.file_survey import list_readings

    names = [one.column for one in reading.candidates]
    answer = _ask_name(f"Which column is the label? {', '.join(names)}", names, console)
    (chosen,) = list_readings(survey, reading.task, {**columns, "label": answer})
    others = ", ".join(str(one) for one in reading.candidates if one.column != answer)
    console.print(f"  label is {answer!r}; not used: {others}", markup=False, highlight=False)
    return chosen


def _print_survey(survey: Survey, reading: Reading, readings: list[Reading], console: Console) -> None:
    """Print the findings for the user to check."""
    from llmtune.cli.proposal import list_renames
    from llmtune.data.excel_sheets import list_sheets
    from llmtune.data.file_survey import suspicions
    from llmtune.recipe.class_names import SAME_WAY, show_name
    from llmtune.recipe.data_section import DATA_ENDINGS, data_ending

    renames = list_renames(reading)
    count = f"{len(reading.rows) + sum(reading.bad.values()):,}" + ("" if survey.whole else " and more")
    files = f"{len(survey.files):,} files, " if len(survey.files) > 1 else ""
    summary = f"{files}{count} rows, {survey.encodings}; columns {', '.join(survey.columns)}"
    console.print(f"{survey.path}: {summary}", markup=False)
    for file in [file for file in survey.files if DATA_ENDINGS.get(data_ending(file)) == "excel"]:
        sheets = ", ".join(map(repr, list_sheets(file)))
        if sheets.count("'") > 2:
            note = f"the first sheet of {sheets} is read. For another one: train: {{path: {file.name}, config: SHEET}}"
            console.print(f"  {note}", markup=False, highlight=False)
    notes = [(number, f"cannot be read ({reason})") for reason, number in reading.bad.items()]
    for number, what in (*notes, (reading.copies, "are copies of others")):
        if number:
            console.print(f"  {number:,} rows {what}", style="yellow", highlight=False)
    for suspicion in suspicions(("", row) for row in reading.rows):
        if any(show_name(old) in suspicion for old in renames):
            suspicion = suspicion.replace(SAME_WAY, "The recipe renames them.")
        console.print(f"  {suspicion}", style="yellow", markup=False, highlight=False)
    folders = sorted({file.parent.name for file in survey.files})
    if len(folders) > 1 and survey.columns == ["text"]:
        note = f"the files are in {len(folders)} folders ({', '.join(folders[:SHOWN_FOLDERS])})"
        fix = "If these are classes, write a table with the columns text and label: folder names are not read."
        console.print(f"  {note}. {fix}", style="yellow", markup=False, highlight=False)
    others = [one.task for one in readings if one is not reading]
    more = f" (also possible: {', '.join(f'--task {name}' for name in others)})" if others else ""
    console.print(f"task: {reading.task}{more}", highlight=False)
    for ours, theirs in reading.columns.items():
        shown = str(reading.candidates[0]) if ours == "label" and reading.candidates else repr(theirs)
        if ours != "label" or len(reading.candidates) < 2:
            console.print(f"  {ours} is {shown}", markup=False, highlight=False)
    if len(reading.candidates) > 1:
        console.print("  label may be any of:", highlight=False)
        for one in reading.candidates:
            console.print(f"    {one}", markup=False, highlight=False)
    for role, names in reading.roles.items():
        console.print(f"  the {role} is {' or '.join(map(repr, names))}", markup=False, highlight=False)


COMMANDS: dict[str, Callable[..., None]] = {"init": init}
