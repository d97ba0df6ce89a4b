"""Metrics of tool calls: whether they are valid, name the right tools and pass the right arguments.

A row has every answer that is generated for it, its own last; its sums add them up. Shapes: N rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from llmtune.data.answer_parser import ParsedAnswer, ToolTurn
from llmtune.data.chat_rows import Tool, ToolCall, read_call
from llmtune.evaluate.metric import Measure, columns, ratio
from llmtune.evaluate.paired_statistics import share_bounds


def calls_tool(turns: Sequence[ToolTurn]) -> bool:
    """Whether the last answer, the row's own, calls a tool: then text metrics do not apply."""
    return bool(turns) and bool(turns[-1].calls)


def is_valid_call(call: ToolCall, tools: Sequence[Tool]) -> bool:
    """Whether a call names one of the tools, with arguments that match its JSON Schema.

    Arguments cannot be validated against a schema that is invalid itself, or that refers to another document.
    """
    name, arguments = read_call(call)
    schemas = schemas_of(tools)
    return name in schemas and fits_schema(arguments, schemas[name])


def fits_schema(value: object, schema: Any) -> bool:
    """Whether a value matches a JSON Schema that can be used."""
    if schema_problem(schema) is not None:
        return False
    try:
        return bool(_validator(schema).is_valid(value))
    except (re.error, RecursionError):  # an invalid pattern; a schema that only refers to itself
        return False


def schemas_of(tools: Sequence[Tool]) -> dict[str, Any]:
    """Return the JSON Schema of each tool's arguments by the tool's name."""
    return {str(tool["function"]["name"]): tool["function"].get("parameters") or {} for tool in tools}


def schema_problem(schema: Any) -> str | None:
    """Return why a JSON Schema cannot be used to check arguments; None if it can."""
    try:
        return _problem_of(json.dumps(schema))
    except RecursionError:
        return "nested too deeply"


@cache
def _problem_of(text: str) -> str | None:
    schema: Any = json.loads(text)
    if not isinstance(schema, dict | bool):
        return "not an object"
    try:
        _validator(schema).check_schema(schema)
        resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
        for reference in _references(schema):
            resolver.lookup(reference)
    except jsonschema.SchemaError as error:
        return str(error.message)
    except Unresolvable as error:
        return f"{error.ref!r} cannot be resolved"
    return None


def _validator(schema: Any) -> Any:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, registry=Registry())


def _references(schema: object) -> Iterator[str]:
    """Yield the references in a schema."""
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        yield schema["$ref"]
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _references(part)


def uncheckable_tools(turns: Iterable[ToolTurn]) -> dict[str, str]:
    """Return the tools whose calls cannot be checked, each with the error in its schema."""
    wrong: dict[str, str] = {}
    for turn in turns:
        for name, schema in schemas_of(turn.tools).items():
            if name not in wrong and (problem := schema_problem(schema)) is not None:
                wrong[name] = problem
    return wrong


def is_same_value(one: object, other: object) -> bool:
    """Whether two JSON values are equal: 1 equals 1.0 but not true, and the order of keys does not matter."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same_value(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same_value, one, other))
    return one == other


def score_valid(answer: ParsedAnswer, turn: ToolTurn) -> float | None:
    """1 for at least one call, all readable and valid; None if the tool to call has no valid schema."""
    calls, schemas = answer.tool_calls, schemas_of(turn.tools)
    if any(schema_problem(schemas.get(read_call(call)[0], {})) is not None for call in turn.calls):
        return None
    return float(not answer.error and bool(calls) and all(is_valid_call(call, turn.tools) for call in calls))


def score_names(answer: ParsedAnswer, turn: ToolTurn) -> float:
    """1 if the same tools are called, equally often, in any order."""
    given, expected = (Counter(read_call(call)[0] for call in calls) for calls in (answer.tool_calls, turn.calls))
    return float(given == expected)


def score_arguments(answer: ParsedAnswer, turn: ToolTurn) -> float:
    """1 if the calls equal those of the reference, in any order."""
    left = [[*read_call(call)] for call in answer.tool_calls]
    for expected in ([*read_call(call)] for call in turn.calls):
        equal = next((i for i, call in enumerate(left) if is_same_value(call, expected)), None)
        if equal is None:
            return 0.0
        del left[equal]
    return float(not left)


def score_argument_values(answer: ParsedAnswer, turn: ToolTurn) -> float:
    """F1 of the arguments, by name and value; 1 if neither side has any and the names agree.

    The calls of a tool are paired with those of the reference so that most arguments agree.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # late: takes time

    equal = np.zeros((len(turn.calls), len(answer.tool_calls)))
    for i, expected in enumerate(turn.calls):
        for j, call in enumerate(answer.tool_calls):
            equal[i, j] = count_equal_arguments(expected, call)
    right = float(equal[linear_sum_assignment(equal, maximize=True)].sum())
    total = sum(len(read_call(call)[1]) for call in (*answer.tool_calls, *turn.calls))
    return 2 * right / total if total else score_names(answer, turn)


def count_equal_arguments(one: ToolCall, other: ToolCall) -> int:
    """Count the arguments that two calls of one tool share, values included."""
    (tool, given), (expected_tool, expected) = read_call(one), read_call(other)
    same = [name for name, value in expected.items() if name in given and is_same_value(given[name], value)]
    return len(same) if tool == expected_tool else 0


def score_silence(answer: ParsedAnswer, turn: ToolTurn) -> float:
    """1 if nothing is called, and no unreadable text looks like a call."""
    return float(not answer.tool_calls and not answer.error)


CallScorer = Callable[[ParsedAnswer, ToolTurn], float | None]
CALLING = "answers of rows with tools whose reference calls one, each after its recorded turns"
TOOL_SCORES: Mapping[str, tuple[CallScorer, bool, str]] = {
    "tool_call_valid": (score_valid, True, f"share with calls, all of them valid by JSON Schema; {CALLING}"),
    "tool_name": (score_names, True, f"share that call the same tools, in any order; {CALLING}"),
    "tool_arguments": (score_arguments, True, f"share whose calls equal the reference's by value; {CALLING}"),
    "tool_arguments_f1": (score_argument_values, True, f"F1 of argument values, mean; {CALLING}"),
    "no_call": (score_silence, False, "share without a call; answers of rows with tools whose reference calls none"),
}
"""By metric: the score of one answer, whether it covers references with calls, and a description."""


def measure_tools(
    metric: str, answers: Mapping[int, Sequence[ParsedAnswer]], turns: Mapping[int, Sequence[ToolTurn]]
) -> Measure:
    """Build a metric of `TOOL_SCORES` from all answers of each row, both given by row index."""
    score, calling, signature = TOOL_SCORES[metric]
    sums: dict[int, tuple[float, int]] = {}
    for row, row_turns in turns.items():
        pairs = zip(answers.get(row, ()), row_turns, strict=row in answers)
        asked_for = [score(answer, turn) for answer, turn in pairs if bool(turn.calls) == calling]
        scores = [value for value in asked_for if value is not None]
        if scores:
            sums[row] = (sum(scores), len(scores))
    right, asked_N = np.asarray([*sums.values()], dtype=np.float64).reshape(-1, 2).T
    alone = metric != "tool_arguments_f1" and bool((asked_N == 1).all())
    sums_N2, at = columns(right, asked_N), tuple(sums)
    return Measure(metric, sums_N2, ratio, right_wrong=alone, signature=signature, at=at, bounds=share_bounds)
