"""The user's own metrics, `FILE.py:FUNCTION`: checked without importing them, and run in a process of their own."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rich.console import Console

from llmtune.data.row_kind import hash_row
from llmtune.data.row_store import iterate_full_rows, iterate_rows
from llmtune.display.console import spinner
from llmtune.display.number_format import score
from llmtune.errors import Problem, RecipeError, describe_end, nearest
from llmtune.evaluate.metric import Measure, measure_means, measure_shares
from llmtune.evaluate.metric_info import better_side
from llmtune.evaluate.per_row_scores import name_rows
from llmtune.evaluate.suites import Suite
from llmtune.evaluate.suites.own_metric_process import BLOCKED, RAISED
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.schema import Recipe
from llmtune.recipe.secrets import hide_environment, redact
from llmtune.recipe.task_facts import answer_kind
from llmtune.recipe.user_files import read_text_file
from llmtune.records import Json, Row, Rows
from llmtune.store.atomic_files import hash_file, plain
from llmtune.store.bounded_process import run_bounded
from llmtune.store.processes import once
from llmtune.store.resource_limits import LARGEST_NUMBER, TOOK_LONGER

if TYPE_CHECKING:
    from llmtune.evaluate.evaluated_task import EvaluatedTask

KEY = "evaluate.metrics"
SHARE = re.compile(r"(?:typing\.|t\.)?Annotated\[float, 0(?:\.0)?, 1(?:\.0)?\]")
TYPES = "bool, float, or Annotated[float, 0, 1] for numbers from 0 to 1"
NO_RANGE = (
    "no range stated, so its intervals use the one that the rows show: annotate Annotated[float, 0, 1] if it fits"
)
GRACE_SECONDS = 5.0
"""Time after the limit for a metric to end, before its process is killed: code in C does not see the limit."""
MOST_ERROR_BYTES, MOST_VALUE_BYTES, MOST_OBSERVED_BYTES = 2**16, 64, 2**11
"""Limits of an error, a value and the observations of a call, as the process of a metric writes them."""
REWARD_KINDS = ("reward", "rewards")
"""Kinds of values that may be None; `rewards` are in a list of one."""
INTO_PIPE = "into the pipe of its values; print to stdout or stderr instead"
Kind = Literal["bool", "share", "number"]
LIMIT_KEYS = ("raise evaluate.metric_seconds", "set evaluate.metric_network: true")
"""How a recipe raises the limits of time and network."""
MOST_TRIED = 200
"""Reference answers to try before training."""
Pair = tuple[Row, object]
"""A test row, and an answer to it."""


@dataclass(frozen=True)
class OwnMetric:
    """One function in a file of the user."""

    name: str
    file: Path
    kind: Kind
    summary: str
    """The first line of its docstring."""

    @property
    def signature(self) -> str:
        """Describe how it is computed; metrics from different versions of a file are not compared."""
        return f"{self.summary or self.name} ({self.file.name}, sha256 {hash_file(self.file)[:12]})"


@dataclass(frozen=True)
class Failure:
    """Why a metric could not be computed: on which of the pairs, and in which line of the file, if known."""

    what: str
    pair: int | None
    line: int | None


def read_metric(stated: str) -> OwnMetric:
    """Read the definition of one metric; parses the file and does not import it.

    Raises RecipeError if the file is missing or not Python, or has no such function of two parameters with a type.
    """
    file, _, name = stated.rpartition(":")
    nodes = parse_functions(file, KEY)
    functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        raise no_function(name, functions, file, KEY)
    node, where = functions[name], f"{file}:{functions[name].lineno}"
    least, most = count_parameters(node.args)
    if not least <= 2 <= most:
        fix = f"Write it as: def {name}(row: dict, answer: str) -> bool."
        raise RecipeError.of(f"{name} cannot be called with a row and an answer", where, fix)
    returned, kind = read_kind(node)
    if kind is None:
        what = f"{name} is annotated to return {returned}" if returned else f"{name} does not state what it returns"
        raise RecipeError.of(what, where, f"Annotate it with one of: {TYPES}.")
    summary = redact((ast.get_docstring(node) or "").strip().split("\n")[0])
    return OwnMetric(name, Path(file), kind, summary)


def parse_functions(file: str, key: str) -> list[ast.stmt]:
    """Return the top-level statements of a file of the user's. Raises RecipeError."""
    try:
        return ast.parse(read_text_file(Path(file)), file).body
    except OSError as error:
        place = "the recipe file, and with --set to the working folder" if "." in key else "the working folder"
        fix = f"Check the path: it is relative to {place}."
        raise RecipeError.of(f"cannot be read: {error.strerror}", f"{key}: {file}", fix) from None
    except (RecursionError, MemoryError) as error:  # the latter from the stack of Python's parser
        raise RecipeError.of(f"nested too deep: {error}", file, "Split its expressions into smaller ones.") from None
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise RecipeError.of(f"not Python: {error}", f"{file}:{line}" if line else file, "Correct the file.") from None


def no_function(name: str, names: Iterable[str], file: str, key: str) -> RecipeError:
    """Return the error for a function that the file lacks."""
    fix = f"{nearest(name, [*names])} Its functions: {', '.join(names) or 'none'}.".strip()
    return RecipeError(Problem(f"no function {name!r} in {file}", key, fix))


def read_kind(node: ast.FunctionDef) -> tuple[str, Kind | None]:
    """Return the annotation of a function's value, and the kind of metric that it states."""
    returned = "a type nested too deep" if node.returns else ""
    with suppress(RecursionError):
        returned = ast.unparse(node.returns).strip("'") if node.returns else ""  # an annotation may be quoted
    kind: Kind | None = "bool" if returned == "bool" else "number" if returned in ("float", "int") else None
    return returned, "share" if SHARE.fullmatch(returned) else kind


def count_parameters(given: ast.arguments) -> tuple[int, int]:
    """Return how many arguments a function needs at least and takes at most; keywords without default are too many."""
    positional = len(given.posonlyargs) + len(given.args)
    needed = positional - len(given.defaults) + 3 * sum(default is None for default in given.kw_defaults)
    return needed, positional + (2 if given.vararg else 0)


def list_own_metrics(section: EvaluateSection) -> list[OwnMetric]:
    """Read all metrics of the user's own; raises one RecipeError with all their problems."""
    metrics, problems = [], list[Problem]()
    for stated in section.own_metrics.values():
        try:
            metrics.append(read_metric(stated))
        except RecipeError as error:
            problems += error.problems
    RecipeError.collect(problems)
    return metrics


def run_metric(metric: OwnMetric, pairs: Sequence[Pair], section: EvaluateSection) -> list[float] | Failure:
    """Compute one metric on pairs in its own process, each call with its own copy of the row."""
    request = Json(file=str(metric.file), function=metric.name, kind=metric.kind)
    request |= {"seconds": section.metric_seconds, "network": section.metric_network}
    outcomes = run_calls(request, [(pair, {}) for pair in pairs])
    return outcomes if isinstance(outcomes, Failure) else [float(one["value"]) for one in outcomes]


def run_calls(request: Json, calls: Sequence[tuple[Sequence[object], Mapping[str, object]]]) -> list[Json] | Failure:
    """Call a function in its own process with arguments and keywords; return one line of its output per call."""
    words = [sys.executable, "-P", "-B", "-m", "llmtune.evaluate.suites.own_metric_process", json.dumps(request)]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # the order of sets must not change scores
    most_bytes = MOST_ERROR_BYTES + (MOST_OBSERVED_BYTES if "observe" in request else MOST_VALUE_BYTES) * len(calls)
    with tempfile.TemporaryFile() as given:
        given.writelines(json.dumps(plain(call)).encode() + b"\n" for call in calls)
        given.seek(0)
        done = run_bounded(words, given, request["seconds"] + GRACE_SECONDS, most_bytes, environment)
    ended = f"its process {describe_end(done.status or 0)}"
    if not done.in_time:
        ended = f"{TOOK_LONGER} {request['seconds']:g} s"
    elif done.status is None:
        ended = f"it wrote more than {most_bytes:,} bytes {INTO_PIPE}"
    return read_outcomes(done.output, len(calls), ended, request)


def read_outcomes(written: bytes, count: int, ended: str, request: Json) -> list[Json] | Failure:
    """Read the lines of the process: one for each of `count` calls, or those before its error."""
    outcomes: list[Json] = []
    for line in written.split(b"\n")[:-1]:
        try:
            match json.loads(line):
                case {"value": float() | int() | None as value} as outcome if len(outcomes) < count and (
                    request["kind"] in REWARD_KINDS if value is None else abs(value) <= LARGEST_NUMBER
                ):
                    outcomes.append(outcome)
                    continue
                case {"error": str() as error, "line": int() | None as number, "loaded": False}:
                    return Failure(error.replace(RAISED, "importing its file raised", 1), None, number)
                case {"error": str() as error, "line": int() | None as number}:
                    return Failure(error, len(outcomes) if len(outcomes) < count else None, number)
        except (ValueError, OverflowError, RecursionError):
            pass
        what = f"it wrote {hide_environment(repr(line))[:40]} {INTO_PIPE}"
        return Failure(what, len(outcomes) if len(outcomes) < count else None, None)
    return outcomes if len(outcomes) == count else Failure(ended, len(outcomes), None)


class OwnFunction(Protocol):
    """A metric or a reward of the user's own."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def file(self) -> Path | None: ...  # noqa: D102


def describe_failure(
    metric: OwnFunction, failure: Failure, origins: Sequence[str], limits: tuple[str, str] = LIMIT_KEYS
) -> Problem:
    """Return the problem of a function that failed: its line, the row, and what to do; `limits` raise the limits."""
    where = f"{metric.file}:{failure.line}" if failure.line else str(metric.file)
    row = f", on the row {origins[failure.pair]}" if failure.pair is not None and origins else ""
    fix = "Correct the function."
    if failure.what.startswith(TOOK_LONGER):
        fix = f"Make it faster, or {limits[0]}."
    if "was killed by" in failure.what:
        fix = "Run the command again. If it happens again, free memory, or correct the function."
    if failure.what == BLOCKED:
        fix = f"Remove the access, or {limits[1]}."
    if "ModuleNotFoundError" in failure.what:
        fix = "Install the module in the environment of llmtune, or remove its import."
    return Problem(f"{metric.name}: {failure.what}{row}", where, fix)


def read_full_rows(rows: Rows, split: str, numbers: Set[int]) -> Iterator[Row]:
    """Yield the rows with these numbers as own metrics get them: with answers and kept columns."""
    yield from (row for number, (_, row) in enumerate(iterate_full_rows(rows, split)) if number in numbers)


def label_scores(prediction: object, recipe: Recipe) -> object:
    """Return a classifier's prediction with its scores by class name; any other prediction unchanged."""
    labels = recipe.classes if answer_kind(recipe.task) == "labels" else ()
    if not labels or not isinstance(prediction, dict) or len(prediction.get("scores", ())) != len(labels):
        return prediction
    return {**prediction, "scores": dict(zip(labels, prediction["scores"], strict=True))}


def measure_own(
    recipe: Recipe,
    rows: Sequence[Row],
    origins: Sequence[str],
    answers: Mapping[int, object],
    problems: dict[str, Problem],
    console: Console,
) -> dict[str, Measure]:
    """Compute the user's own metrics from answers by row index, in rank 0; add those that fail to `problems`."""
    measured, section = dict[str, Measure](), recipe.evaluate
    if not section.own_metrics or not answers:
        return measured
    pairs = [(rows[i], label_scores(answer, recipe)) for i, answer in answers.items()]
    for name, stated in section.own_metrics.items():
        if name in problems:
            continue
        try:
            metric = read_metric(stated)
        except RecipeError as error:  # the file was there before training
            problems[name] = error.problems[0]
            continue
        with spinner(console, f"{name}: {len(pairs):,} answers"):
            values = once(partial(_run_plain, metric, pairs, section))
        if isinstance(values, dict):
            problems[name] = describe_failure(metric, Failure(**values), [origins[i] for i in answers])
            continue
        names = name_rows([hash_row(row).hex() for row, _ in pairs]) if section.slices else ()
        measured[name] = replace(measure_values(metric, values), at=tuple(answers), names=names)
    return measured


def measure_values(metric: OwnMetric, values: Sequence[float]) -> Measure:
    """Build the measure of one metric; one that states no range gets it from its rows."""
    if metric.kind == "number":
        return measure_means(metric.name, values, f"{metric.signature}; {NO_RANGE}")
    return replace(measure_shares(metric.name, values, metric.signature), right_wrong=metric.kind == "bool")


def _run_plain(metric: OwnMetric, pairs: Sequence[Pair], section: EvaluateSection) -> Any:
    return plain(run_metric(metric, pairs, section))


class OwnMetricSuite(Suite):
    """The user's own metrics, which `inference.compute_metrics` measures with those of the task."""

    key = "own_metrics"

    @classmethod
    def read(cls, recipe: Recipe) -> None:
        """Import their files, each in a process of its own; raises RecipeError for bad ones."""
        results = ((metric, run_metric(metric, [], recipe.evaluate)) for metric in list_own_metrics(recipe.evaluate))
        failed = [(metric, result) for metric, result in results if isinstance(result, Failure)]
        RecipeError.collect(describe_failure(metric, failure, ()) for metric, failure in failed)

    @classmethod
    def try_out(cls, recipe: Recipe, task: EvaluatedTask, rows: Rows, console: Console) -> None:
        """Compute them on reference answers of the test rows, and print them: no model is needed.

        Raises RecipeError for metrics that fail.
        """
        problems, first = dict[str, Problem](), [*islice(iterate_rows(rows, "test"), MOST_TRIED)]
        answers = {i: reference_answer(task, row, recipe) for i, (_, row) in enumerate(first)}
        answers = {i: answer for i, answer in answers.items() if answer}
        origins, full = [origin for origin, _ in first], [*read_full_rows(rows, "test", {*range(len(first))})]
        for name, one in measure_own(recipe, full, origins, answers, problems, console).items():
            what = f"{name} is {score(one.value)} on the reference answers of {len(answers)} test rows"
            lower = " (lower is better)" if better_side(name) < 0 else ""
            console.print(f"{KEY}: {what}{lower}", highlight=False, markup=False)
        RecipeError.collect(problems.values())


def reference_answer(task: EvaluatedTask, row: Row, recipe: Recipe) -> object | None:
    """Return the answer of a perfect model in the form that own metrics get, or None if it is not known."""
    reference, kind = task.reference(row), answer_kind(task.name)
    is_answer = kind == "tags" or (kind == "text" and isinstance(reference, str))
    return task.as_prediction(reference, recipe) or (reference if is_answer else None)
