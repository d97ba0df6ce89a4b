"""Rewards of answers: metrics of one answer, and the user's own functions, also written for TRL, ms-swift or verl."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llmtune.data.answer_parser import ParsedAnswer, ToolTurn
from llmtune.data.chat_rows import ToolCall, write_answer
from llmtune.data.conversation_texts import split_reference
from llmtune.data.row_kind import MESSAGES
from llmtune.errors import Problem, RecipeError, nearest
from llmtune.evaluate.suites.own_metrics import (
    LIMIT_KEYS,
    Failure,
    count_parameters,
    describe_failure,
    no_function,
    parse_functions,
    run_calls,
)
from llmtune.evaluate.text_metrics import ROUGE_METRICS, TEXT_MEASURES
from llmtune.recipe.evaluate_section import is_own_metric, metric_name
from llmtune.recipe.reinforce_section import ReinforceSection
from llmtune.recipe.task_facts import TOOL_METRICS
from llmtune.records import Json, Row
from llmtune.store.atomic_files import hash_file

KEY, AUDIT_KEY = "reinforce.rewards", "reinforce.audit"
RESERVED = ("reward", "answer_tokens", "repeats_prompt")
"""Measures of samples that the report shows next to the rewards."""
SECONDS = 300.0
Form = Literal["row", "TRL", "ms-swift", "verl"]
SIGNATURES = {
    "row": "def {name}(row: dict, answer: str) -> float, and calls, content, thoughts or truncated after them",
    "TRL": "def {name}(completions, **columns)",
    "ms-swift": "class {name} with __call__(self, completions, **columns)",
    "verl": "def {name}(data_source, solution_str, ground_truth, extra_info=None)",
}
REFERENCE_NAMES = ("solution", "answer", "ground_truth", "reference", "target", "label", "expected", "gold")
"""Parameters that get the reference answer, unless the rows have a column of that name."""
ANSWER_PARTS = ("calls", "content", "thoughts", "truncated")
"""Parameters that get a part of the answer, unless the rows have a column of that name."""
RewardPair = tuple[Row, ParsedAnswer]
"""A row, with its reference answer as the last message if it has one, and an answer to it."""


class RewardError(RecipeError):
    """A reward failed on an answer; the message names the reward, the row and the line of the file."""


@dataclass(frozen=True)
class Reward:
    """One reward of a recipe: a metric, or a function of the user's own if it has a file."""

    stated: str
    weight: float
    file: Path | None = None
    form: Form = "row"
    parameters: tuple[str, ...] = ()
    """Names of the parameters of the user's function."""
    required: tuple[str, ...] = ()
    """Those without a default."""
    takes_all: bool = False
    """Whether it has `**columns`, so it gets all of them."""
    reads_messages: bool = False
    """Whether it gets completions as messages, as TRL passes those of conversations, or as texts."""

    @property
    def name(self) -> str:
        """The name of the metric or function."""
        return metric_name(self.stated)

    @property
    def signature(self) -> str:
        """How it is called."""
        if self.file is None:
            return "built in"
        completions = ", completions are messages" if self.reads_messages else ", completions are texts"
        return f"{self.form} signature{completions if 'completions' in self.parameters else ''}"


def read_rewards(stated: Mapping[str, float], key: str = KEY, audit: str | None = None) -> list[Reward]:
    """Read rewards, given with their weights, and an audit; parses the files of the user's own without importing them.

    Raises one RecipeError with the problems of all.
    """
    rewards, problems = list[Reward](), list[Problem]()
    places = dict.fromkeys(stated, key) | ({audit: AUDIT_KEY} if audit else {})
    for name, place in places.items():
        try:
            rewards.append(read_reward(name, stated.get(name, 1.0), place))
        except RecipeError as error:
            problems += error.problems
    names = [reward.name for reward in rewards]
    for number, (name, reward) in enumerate(zip(names, rewards, strict=True)):
        if name in names[:number]:
            problems.append(Problem(f"two rewards are named {name!r}", places[reward.stated], "Rename one of them."))
        if name in RESERVED:
            fix = f"Rename the function. Reserved: {', '.join(RESERVED)}."
            problems.append(Problem(f"{name!r} is a measure of llmtune's own", places[reward.stated], fix))
    RecipeError.collect(problems)
    return rewards


def list_rewards(section: ReinforceSection) -> tuple[list[Reward], list[Reward]]:
    """Return the rewards of a section, and its audit, which no sum has. Raises as `read_rewards` does."""
    read, count = read_rewards(section.rewards, audit=section.audit), len(section.rewards)
    return read[:count], read[count:]


def reward_files(stated: Iterable[str]) -> list[str]:
    """Return the files of the user's own rewards, to be hashed."""
    return sorted({one.rpartition(":")[0] for one in stated if is_own_metric(one)})


def hash_reward_files(stated: Iterable[str]) -> dict[str, str]:
    """Hash the files of the user's own rewards; missing ones are reported elsewhere."""
    return {file: hash_file(Path(file)) for file in reward_files(stated) if Path(file).is_file()}


def read_reward(stated: str, weight: float, key: str = KEY) -> Reward:
    """Read one reward. Raises RecipeError."""
    if not is_own_metric(stated):
        if stated not in REWARDS:
            fix = f"{nearest(stated, [*REWARDS])} Use one of {', '.join(REWARDS)}, or your own: FILE.py:FUNCTION."
            raise RecipeError.of(f"unknown reward {stated!r}", key, fix.strip())
        return Reward(stated, weight)
    file, _, name = stated.rpartition(":")
    nodes = {node.name: node for node in parse_functions(file, key) if isinstance(node, Definition)}
    if name not in nodes:
        raise no_function(name, nodes, file, key)
    node, where, is_class = nodes[name], f"{file}:{nodes[name].lineno}", isinstance(nodes[name], ast.ClassDef)
    methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)} if is_class else {}
    called = methods.get("__call__") if isinstance(node, ast.ClassDef) else node
    signatures = "; ".join(SIGNATURES.values()).format_map({"name": name})
    fix = f"Write it as one of: {signatures}."
    if not isinstance(called, ast.FunctionDef):
        what = "is a class without __call__" if is_class else "is async, which is not supported"
        raise RecipeError.of(f"{name} {what}", where, fix)
    if "__init__" in methods and count_parameters(methods["__init__"].args)[0] > 1:
        raise RecipeError.of(f"{name}() needs arguments", where, "Give the parameters of __init__ defaults.")
    given = called.args
    positional = [*given.posonlyargs, *given.args][is_class:]
    needed = positional[: len(positional) - len(given.defaults)]
    needed += [one for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
    parameters = tuple(one.arg for one in (*positional, *given.kwonlyargs))
    form: Form = "ms-swift" if is_class else "TRL" if "completions" in parameters else "verl"
    if not {"completions", "solution_str"} & {*parameters}:
        others = {one.arg for one in needed} - {*parameters[:2], *ANSWER_PARTS}
        if is_class or others or count_parameters(given)[1] < 2:
            raise RecipeError.of(f"{name} cannot be called as a reward", where, fix)
        form = "row"
    required, reads_messages = tuple(one.arg for one in needed), form == "TRL" and mentions_content(node, nodes)
    return Reward(stated, weight, Path(file), form, parameters, required, given.kwarg is not None, reads_messages)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def mentions_content(node: ast.AST, others: Mapping[str, ast.AST]) -> bool:
    """Whether a function, or one of its file that it names, has the text "content": a key of messages."""
    pending, seen = [node], set[str]()
    while pending:
        for part in ast.walk(pending.pop()):
            if isinstance(part, ast.Constant) and part.value == "content":
                return True
            if isinstance(part, ast.Name) and part.id in others and part.id not in seen:
                seen.add(part.id)
                pending.append(others[part.id])
    return False


# Scores


def reward_answers(
    rewards: Sequence[Reward],
    pairs: Sequence[RewardPair],
    *,
    seconds: float = SECONDS,
    network: bool = False,
    origins: Sequence[str] = (),
    limits: tuple[str, str] = LIMIT_KEYS,
) -> list[dict[str, float | None]]:
    """Return the value of each reward for each answer; None where a reward does not apply.

    Args:
        rewards: The rewards; the user's own run in a process for each, with a time limit of `seconds`.
        pairs: Rows and answers.
        seconds: For all answers together.
        network: Whether the user's own may use it.
        origins: Where each pair's row is from, for errors.
        limits: How to raise the limits of time and network, for errors.

    Raises:
        RewardError: A reward failed.
    """
    values = dict[str, Sequence[float | None]]()
    for reward in rewards:
        outcomes = call_reward(reward, pairs, seconds=seconds, network=network)
        if isinstance(outcomes, Failure):
            raise RewardError(describe_failure(reward, outcomes, origins, limits))
        values[reward.name] = [one["value"] for one in outcomes]
    return [{name: column[i] for name, column in values.items()} for i in range(len(pairs))]


NEEDS_REFERENCE = frozenset({"exact_match", *ROUGE_METRICS, "chrf", "json_schema", "json_fields"})
"""Built-in rewards that compare with the reference answer; `json_schema` only without a column of that name."""


def find_lack(reward: Reward, origin: str, row: Row) -> Problem | None:
    """Return why a reward cannot rate answers to a row: it has no reference answer, or a column is missing."""
    if reward.file is None:
        schema = read_schema(row) if reward.name == "json_schema" else None
        if schema is not None:
            from llmtune.evaluate.tool_metrics import schema_problem  # late: jsonschema takes time

            why = schema_problem(schema)
            return Problem(f"its json_schema is no JSON Schema: {why}", origin, "Correct the column.") if why else None
        if reward.name not in NEEDS_REFERENCE or split_reference(row)[1] is not None:
            return None
        fix = "Add the right answer as the last message, or use a reward that needs none, such as your own."
        return Problem(f"the reward {reward.name} needs a reference answer, and the row has none", origin, fix)
    try:
        make_call(reward, row, ParsedAnswer(""))
    except RewardError as error:
        problem = error.problems[0]
        return Problem(f"{problem.what}: {problem.where}", origin, problem.fix)
    return None


def weigh_rewards(rewards: Sequence[Reward], values: Mapping[str, float | None]) -> float | None:
    """Return the weighted sum of an answer's rewards that apply; None if none does."""
    weighted = [reward.weight * value for reward in rewards if (value := values[reward.name]) is not None]
    return sum(weighted) if weighted else None


def call_reward(
    reward: Reward, pairs: Sequence[RewardPair], *, seconds: float, network: bool, observe: str | None = None
) -> list[Json] | Failure:
    """Return the outcome of each call: its value, and with `observe` what `observe_call` adds."""
    if reward.file is None:
        return [{"value": value} for value in REWARDS[reward.name](pairs)]
    kind = "rewards" if reward.form in ("TRL", "ms-swift") else "reward"
    request = Json(file=str(reward.file), function=reward.name, kind=kind, seconds=seconds, network=network)
    request |= {"observe": observe} if observe else {}
    return run_calls(request, [make_call(reward, *pair) for pair in pairs])


def make_call(reward: Reward, row: Row, answer: ParsedAnswer) -> tuple[Sequence[object], Mapping[str, object]]:
    """Return the arguments and keywords of the call for one answer. Raises RewardError if the row lacks a column."""
    calls, text = list(answer.tool_calls), answer.sampled
    values = (calls, answer.text, answer.reasoning or "", not answer.complete)
    columns: dict[str, Any] = dict(zip(ANSWER_PARTS, values, strict=True))
    if reward.form == "row":
        return (row, text), {name: columns[name] for name in reward.parameters[2:] if name in columns}
    prompt, reference, _ = split_reference(row)
    columns |= {} if reference is None else dict.fromkeys(REFERENCE_NAMES, reference)
    columns |= {name: value for name, value in row.items() if name != "messages"}
    if reward.form == "verl":
        columns = {"data_source": "", "extra_info": {}, **columns, "solution_str": text}
    else:
        message = {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}
        completion: object = [message] if reward.reads_messages else text
        question: object = prompt["messages"] if reward.reads_messages else MESSAGES.prompt_text(prompt)
        columns = {**{name: [value] for name, value in columns.items()}, "completions": [completion]}
        columns["prompts"] = [question]
    if missing := [name for name in reward.required if name not in columns]:
        what = f"{reward.name} takes `{missing[0]}`, and the rows have no such column"
        fix = f"Rename the parameter; {', '.join(REFERENCE_NAMES[:3])} ... get the reference answer, if rows have one."
        raise RewardError.of(what, str(reward.file), fix)
    return (), {name: value for name, value in columns.items() if reward.takes_all or name in reward.parameters}


# Built-in rewards


def score_texts(pairs: Sequence[RewardPair], metric: str) -> list[float | None]:
    """Return a metric of `TEXT_MEASURES` for each answer; None without a reference, or if it calls a tool."""
    references = [None if called_turn(row) else split_reference(row)[1] for row, _ in pairs]
    numbers = [i for i, reference in enumerate(references) if reference is not None]
    values: list[float | None] = [None] * len(pairs)
    if not numbers:
        return values
    answers = [write_answer(pairs[i][1].text, pairs[i][1].tool_calls) for i in numbers]
    measure = TEXT_MEASURES[metric](answers, [references[i] or "" for i in numbers])
    assert measure.formula is not None
    for i, value in zip(numbers, measure.formula(measure.sums_NK).tolist(), strict=True):
        values[i] = value
    return values


def score_calls(pairs: Sequence[RewardPair], metric: str) -> list[float | None]:
    """Return a metric of `TOOL_SCORES` for each answer; None for rows whose reference calls no tool."""
    from llmtune.evaluate.tool_metrics import TOOL_SCORES  # late: jsonschema takes time

    score = TOOL_SCORES[metric][0]
    return [score(answer, turn) if (turn := called_turn(row)) else None for row, answer in pairs]


def called_turn(row: Row) -> ToolTurn | None:
    """Return the last turn of a row whose reference calls a tool; None for other rows."""
    prompt, _, calls = split_reference(row)
    return ToolTurn(prompt, calls) if prompt.get("tools") and calls else None


def score_schemas(pairs: Sequence[RewardPair]) -> list[float | None]:
    """Return 1 for answers that are JSON of the row's schema: its column `json_schema`, else the reference's shape.

    For references that call tools it is `tool_call_valid`.
    """
    from llmtune.evaluate.tool_metrics import fits_schema  # late: jsonschema takes time

    values = score_calls(pairs, "tool_call_valid")
    for i, (row, answer) in enumerate(pairs):
        reference, schema = parse_json(split_reference(row)[1] or ""), read_schema(row)
        if values[i] is None and (schema or isinstance(reference, dict | list)):
            given = parse_json(write_answer(answer.text, answer.tool_calls))
            values[i] = float(given is not NO_JSON and fits_schema(given, schema or schema_of_shape(reference)))
    return values


def read_schema(row: Row) -> Any:
    """Return the row's column `json_schema`, whose text may be JSON; None without one."""
    stated = row.get("json_schema") or None
    read = parse_json(stated) if isinstance(stated, str) else stated
    return stated if read is NO_JSON else read


def score_fields(pairs: Sequence[RewardPair]) -> list[float | None]:
    """Return the F1 of the fields that an answer, a JSON object, shares with the reference, by name and value.

    For references that call tools it is `tool_arguments_f1`.
    """
    from llmtune.evaluate.tool_metrics import score_argument_values  # late: jsonschema takes time

    values = score_calls(pairs, "tool_arguments_f1")
    for i, (row, answer) in enumerate(pairs):
        given = parse_json(write_answer(answer.text, answer.tool_calls))
        reference = parse_json(split_reference(row)[1] or "")
        if values[i] is None and isinstance(reference, dict):
            calls = (make_tool_call("", given),) if isinstance(given, dict) else ()
            turn = ToolTurn(row, [make_tool_call("", reference)])
            values[i] = score_argument_values(ParsedAnswer("", tool_calls=calls), turn)
    return values


NO_JSON = object()


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; `NO_JSON` for any other text, also with NaN or a number beyond all floats."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
        return value
    except (ValueError, RecursionError):
        return NO_JSON


def make_tool_call(name: str, arguments: Any) -> ToolCall:
    """Return a call in the form of a row's."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def schema_of_shape(value: Any) -> Json:
    """Return the JSON Schema of values with the same keys and types."""
    if isinstance(value, dict):
        properties = {key: schema_of_shape(item) for key, item in value.items()}
        return {"type": "object", "properties": properties, "required": [*value], "additionalProperties": False}
    if isinstance(value, list):
        return {"type": "array", **({"items": {"anyOf": [*map(schema_of_shape, value)]}} if value else {})}
    names = {bool: "boolean", int: "number", float: "number", str: "string", type(None): "null"}
    return {"type": names[type(value)]}


REWARDS: Mapping[str, Callable[[Sequence[RewardPair]], Sequence[float | None]]] = {
    **{metric: partial(score_texts, metric=metric) for metric in ("exact_match", *ROUGE_METRICS, "chrf")},
    **{metric: partial(score_calls, metric=metric) for metric in TOOL_METRICS if metric != "no_call"},
    "json_schema": score_schemas,
    "json_fields": score_fields,
}
"""Built-in rewards by name."""
