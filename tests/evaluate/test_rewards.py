"""Rewards: built-in ones equal the metrics; own ones may have the signature of llmtune, TRL, ms-swift or verl."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.templates import family_tokenizer, recipe_for
from trl.rewards import format_rewards, think_format_reward

from llmtune.data.answer_parser import ParsedAnswer, ToolTurn, parse_answer, read_written
from llmtune.data.chat_rows import write_answer
from llmtune.data.chat_template import read_template
from llmtune.errors import RecipeError
from llmtune.evaluate.generation import answer_reader
from llmtune.evaluate.rewards import (
    RESERVED,
    REWARDS,
    RewardError,
    RewardPair,
    find_lack,
    list_rewards,
    read_rewards,
    reward_answers,
    reward_files,
    weigh_rewards,
)
from llmtune.evaluate.text_metrics import TEXT_MEASURES
from llmtune.evaluate.tool_metrics import measure_tools
from llmtune.recipe.reinforce_section import ReinforceSection
from llmtune.recipe.task_facts import TOOL_METRICS
from llmtune.records import Row


def sum_row(a: int, b: int, **columns: object) -> Row:
    messages = [{"role": "user", "content": f"{a} + {b}?"}, {"role": "assistant", "content": str(a + b)}]
    return {"messages": messages, **columns}


PAIRS: list[RewardPair] = [
    (sum_row(1, 2), read_written("3")),
    (sum_row(2, 2), read_written("5")),
    (sum_row(4, 5), read_written(" 9 ")),
]
TOOL = {"type": "function", "function": {"name": "set_timer", "parameters": {"type": "object"}}}


def write_rewards(folder: Path, text: str) -> Path:
    path = folder / "rewards.py"
    path.write_text(text)
    return path


def values_of(folder: Path, text: str, pairs: list[RewardPair] = PAIRS, name: str = "mine") -> list[float | None]:
    """Return the values of the reward `mine` in a file with this text."""
    (reward,) = read_rewards({f"{write_rewards(folder, text)}:{name}": 1.0})
    return [one[name] for one in reward_answers([reward], pairs, seconds=20)]


OURS = "def mine(row, answer):\n    return float(answer.strip() == row['messages'][-1]['content'])\n"
TRL_TEXTS = """
def mine(completions, solution, **kwargs):
    return [float(c.strip() == s) for c, s in zip(completions, solution)]
"""
TRL_MESSAGES = """
def text_of(completion):
    return completion[0]["content"]

def mine(prompts, completions, answer, **kwargs):
    assert [turn["role"] for turn in prompts[0]] == ["user"]
    return [float(text_of(c).strip() == a) for c, a in zip(completions, answer)]
"""
SWIFT = """
class mine:
    def __init__(self, args=None, **kwargs):
        self.calls = 0

    def __call__(self, completions, solution, **kwargs):
        return [1.0 if c.strip() == s else 0.0 for c, s in zip(completions, solution)]
"""
VERL = """
def mine(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0 if solution_str.strip() == ground_truth else 0.0
"""


@pytest.mark.parametrize(
    ("text", "signature"),
    [
        (OURS, "row signature"),
        (TRL_TEXTS, "TRL signature, completions are texts"),
        (TRL_MESSAGES, "TRL signature, completions are messages"),
        (SWIFT, "ms-swift signature, completions are texts"),
        (VERL, "verl signature"),
    ],
)
def test_a_reward_is_called_in_the_signature_that_it_was_written_in(tmp_path: Path, text: str, signature: str) -> None:
    (reward,) = read_rewards({f"{write_rewards(tmp_path, text)}:mine": 2.0})
    assert (reward.name, reward.weight, reward.signature) == ("mine", 2.0, signature)
    assert reward_answers([reward], PAIRS, seconds=20) == [{"mine": 1.0}, {"mine": 0.0}, {"mine": 1.0}]


def test_columns_of_the_rows_reach_a_reward_and_come_before_the_reference(tmp_path: Path) -> None:
    pairs: list[RewardPair] = [(sum_row(1, 2, solution="seven", level=4), read_written("3"))]
    text = "def mine(completions, level, solution, **columns):\n    assert solution == ['seven']\n    return level\n"
    assert values_of(tmp_path, text, pairs) == [4.0]
    named = "def mine(completions, level):\n    return level\n"
    assert values_of(tmp_path, named, pairs) == [4.0], "without **columns it gets those that it names"


def test_a_column_that_the_rows_lack_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"mine takes `difficulty`, and the rows have no such column"):
        values_of(tmp_path, "def mine(completions, difficulty, **columns):\n    return difficulty\n")


def test_none_is_not_zero(tmp_path: Path) -> None:
    text = "def mine(completions, **columns):\n    return [None if c == '5' else 0.5 for c in completions]\n"
    assert values_of(tmp_path, text) == [0.5, None, 0.5]
    rewards = read_rewards({f"{tmp_path / 'rewards.py'}:mine": 2.0, "exact_match": 3.0})
    assert [weigh_rewards(rewards, one) for one in reward_answers(rewards, PAIRS, seconds=20)] == [4.0, 0.0, 4.0]
    assert weigh_rewards(rewards[:1], {"mine": None}) is None


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        (
            "def mine(row, answer):\n    return 1 / (len(answer) - 1) if answer == '5' else 1.0\n",
            "ZeroDivisionError",
            2,
        ),
        ("def mine(row, answer):\n    return float('nan') if answer == '5' else 1.0\n", "it returned nan", None),
        ("def mine(completions):\n    return [1.0, 2.0] if '5' in completions else [1.0]\n", "not a list of one", None),
        ("import socket\ndef mine(row, answer):\n    return 1.0 if answer != '5' else socket.socket()\n", "network", 3),
    ],
)
def test_a_failure_names_reward_row_and_line(tmp_path: Path, text: str, what: str, line: int | None) -> None:
    (reward,) = read_rewards({f"{write_rewards(tmp_path, text)}:mine": 1.0})
    with pytest.raises(RewardError) as raised:
        reward_answers([reward], PAIRS, seconds=20, origins=["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"])
    (problem,) = raised.value.problems
    assert what in problem.what
    assert problem.what.startswith("mine: ")
    assert problem.what.endswith("on the row rows.jsonl:2")
    assert problem.where == (f"{tmp_path / 'rewards.py'}:{line}" if line else str(tmp_path / "rewards.py"))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("def other(row, answer): ...\n", "no function 'mine'"),
        ("def mine(answer): ...\n", "mine cannot be called as a reward"),
        ("async def mine(completions): ...\n", "mine is async, which is not supported"),
        ("class mine:\n    pass\n", "mine is a class without __call__"),
        ("class mine:\n    def __call__(self, row, answer): ...\n", "mine cannot be called as a reward"),
        (
            "class mine:\n    def __init__(self, model): ...\n    def __call__(self, completions): ...\n",
            "needs arguments",
        ),
        ("def mine(row, answer:\n", "not Python"),
    ],
)
def test_a_file_without_such_a_reward_is_refused_without_an_import(tmp_path: Path, text: str, what: str) -> None:
    path = write_rewards(tmp_path, f"{text}raise SystemExit\n" if "answer:" not in text else text)
    with pytest.raises(RecipeError, match=what):
        read_rewards({f"{path}:mine": 1.0})


def test_all_problems_of_a_recipe_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        read_rewards({"exactmatch": 1.0, f"{tmp_path / 'absent.py'}:mine": 1.0})
    assert [problem.what for problem in raised.value.problems] == [
        "unknown reward 'exactmatch'",
        "cannot be read: No such file or directory",
    ]
    assert "Did you mean 'exact_match'?" in str(raised.value)


def test_two_rewards_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(OURS)
    stated = {f"{tmp_path / name}:mine": 1.0 for name in ("one.py", "two.py")}
    with pytest.raises(RecipeError, match="two rewards are named 'mine'"):
        read_rewards(stated)
    assert reward_files([*stated, "exact_match"]) == [str(tmp_path / "one.py"), str(tmp_path / "two.py")]


@pytest.mark.parametrize("name", RESERVED)
@pytest.mark.parametrize("place", ["rewards", "audit"])
def test_a_reward_with_the_name_of_another_measure_is_refused_with_the_reserved_names(
    tmp_path: Path, name: str, place: str
) -> None:
    stated = f"{write_rewards(tmp_path, OURS.replace('mine', name))}:{name}"
    section = {"rewards": {"exact_match": 1.0}, "audit": stated} if place == "audit" else {"rewards": {stated: 1.0}}
    with pytest.raises(RecipeError, match=f"'{name}' is a measure of llmtune's own") as raised:
        list_rewards(ReinforceSection.model_validate(section))
    (problem,) = raised.value.problems
    assert problem.where == f"reinforce.{place}"
    assert all(one in (problem.fix or "") for one in RESERVED)


def builtin(name: str, row: Row, answer: str | ParsedAnswer) -> float | None:
    return REWARDS[name]([(row, read_written(answer) if isinstance(answer, str) else answer)])[0]


def test_text_rewards_equal_the_metrics_row_by_row() -> None:
    rewards = read_rewards({"exact_match": 1.0, "rougeL": 0.5, "chrf": 0.01})
    values = reward_answers(rewards, PAIRS)
    assert [one["exact_match"] for one in values] == [1, 0, 1]
    assert [one["rougeL"] for one in values] == [1, 0, 1]
    assert values[0]["chrf"] == pytest.approx(100)
    prompt = {"messages": [{"role": "user", "content": "Hello"}]}
    values = reward_answers(rewards, [(prompt, read_written("x")), PAIRS[0]])
    assert values[0] == {"exact_match": None, "rougeL": None, "chrf": None}


def json_row(reference: object, **columns: Any) -> Row:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": json.dumps(reference)}]
    return {"messages": messages, **columns}


NOT_STANDARD = [f'{{"city": "Oslo", "days": {number}, "tags": []}}' for number in ("NaN", "-Infinity", "1e999")]


def test_json_rewards_read_schema_and_fields() -> None:
    row = json_row({"city": "Bergen", "days": 2, "tags": ["a"]})
    assert builtin("json_schema", row, '{"city": "Oslo", "days": 1.5, "tags": []}') == 1
    for wrong in (
        *NOT_STANDARD,
        '{"city": "Oslo"}',
        '{"city": 1, "days": 1, "tags": []}',
        "Oslo",
        "null",
        "",
        '{"city": "Oslo", ',
    ):
        assert builtin("json_schema", row, wrong) == 0, wrong
    stated = json_row({"city": "Bergen"}, json_schema={"type": "object", "required": ["land"]})
    assert [builtin("json_schema", stated, text) for text in ('{"city": "Bergen"}', '{"land": 1}')] == [0, 1]
    assert builtin("json_fields", row, '{"city": "Bergen", "days": 3, "tags": ["a"]}') == pytest.approx(2 / 3)
    assert builtin("json_fields", row, "Bergen") == 0
    assert [builtin(name, PAIRS[0][0], "3") for name in ("json_schema", "json_fields")] == [None, None]


def test_rows_with_tools_are_scored_by_their_calls() -> None:
    call = {"type": "function", "function": {"name": "set_timer", "arguments": {"minutes": 5, "label": "tea"}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row: Row = {"messages": messages, "tools": [TOOL]}
    right, half, other = (
        read_written("", [{"type": "function", "function": {"name": "set_timer", "arguments": one}}])
        for one in ({"minutes": 5, "label": "tea"}, {"minutes": 5}, {})
    )
    assert [builtin("json_schema", row, answer) for answer in (right, half, "tea")] == [1, 1, 0]
    assert [builtin("tool_arguments", row, answer) for answer in (right, half, other)] == [1, 0, 0]
    assert builtin("json_fields", row, half) == pytest.approx(2 / 3)
    bare = f"set_timer({json.dumps(call['function']['arguments'])})"
    assert {builtin(name, row, bare) for name in ("json_schema", "json_fields", "tool_arguments")} == {0}
    assert builtin("exact_match", row, bare) is None, "text metrics do not apply to calls"


def test_checking_the_rewards_of_a_recipe_does_not_import_transformers() -> None:
    code = "import sys, llmtune.evaluate.rewards; assert not {'transformers', 'torch'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


CALL: Any = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
ASKS: Row = {"messages": [{"role": "user", "content": "?"}], "tools": [WEATHER]}
CALLS: Row = {**ASKS, "messages": [*ASKS["messages"], {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
ARGUMENTS = ('{"city": "Oslo", "days": 2}', '{"city": "Oslo"}', '{"city": 1}', "{}", '{"days": NaN, "city": "Oslo"}')
BARE = (
    "{name}({arguments})",
    "`{name}({arguments})`",
    "[{name}({arguments})]",
    '{{"name": "{name}", "arguments": {arguments}}}',
    "Call {name} with {arguments}.",
)
MARKED = '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
FORMS = (
    *BARE,
    MARKED,
    f"Wait. {MARKED}",
    f"{MARKED}\nDone.",
    f"{MARKED}\n{MARKED}",
    MARKED[:-9],
    MARKED[:-15],
    "{name}",
)


def write_calls() -> dict[str, bool]:
    """Return 200 answers, and whether a client can read a call in each."""
    named = [(name, arguments) for name in ("weather", "clock") for arguments in ARGUMENTS]
    texts = {form.format(name=name, arguments=one): MARKED in form for form in FORMS for name, one in named}
    return texts | {f"<think>\n{text}\n</think>\n\n{text}": marked for text, marked in texts.items()}


def test_rewards_and_metrics_of_one_name_agree_however_a_call_is_written() -> None:
    tokenizer, recipe = family_tokenizer("qwen-2.5"), recipe_for()
    read, template, turn = answer_reader(tokenizer, recipe), read_template(tokenizer, recipe), ToolTurn(ASKS, [CALL])
    answers, seen = write_calls(), set[float | None]()
    assert len(answers) > 200
    for text, marked in answers.items():
        sampled = read(tokenizer(f"{text}<|im_end|>")["input_ids"], [WEATHER])
        generated = parse_answer(f"{text}<|im_end|>", template, [WEATHER])
        for name in TOOL_METRICS[:4]:
            metric = measure_tools(name, {0: [generated]}, {0: [turn]}).value
            assert builtin(name, CALLS, sampled) == metric, text
            assert marked or metric == 0, text
            seen.add(metric)
        assert builtin("json_schema", CALLS, sampled) == builtin("tool_call_valid", CALLS, sampled)
    assert {0, 1} < seen


@pytest.mark.parametrize("name", ["exact_match", "chrf", "rougeL"])
def test_rewards_of_texts_count_an_unwanted_call_as_their_metrics_do(name: str) -> None:
    row = {"messages": [*CALLS["messages"][:-1], {"role": "assistant", "content": "It rains."}]}
    answer = read_written("It rains.", [CALL])
    measure = TEXT_MEASURES[name]([write_answer(answer.text, answer.tool_calls)], ["It rains."])
    assert measure.formula is not None
    assert (
        builtin(name, row, answer)
        == measure.formula(measure.sums_NK)[0]
        < builtin(name, row, read_written("It rains."))
    )


PARTS = """
def by_row(row, answer, calls, *, content, thoughts, truncated):
    assert (answer, content, thoughts) == ("<think>hm</think> four", "four", "hm"), (answer, content)
    return calls[0]["function"]["arguments"]["days"] + 10 * truncated

def by_trl(completions, calls, thoughts, truncated):
    (message,) = completions[0]
    assert message == {"role": "assistant", "content": "<think>hm</think> four", "tool_calls": calls[0]}
    return by_row(None, message["content"], calls[0], content="four", thoughts=thoughts[0], truncated=truncated[0]),

class by_swift:
    def __call__(self, completions, calls, **columns):
        assert completions == ["<think>hm</think> four"]
        return [calls[0][0]["function"]["arguments"]["days"] + 10 * columns["truncated"][0]]

def by_verl(data_source, solution_str, ground_truth, calls, truncated, extra_info=None):
    return calls[0]["function"]["arguments"]["days"] + 10 * truncated
"""


@pytest.mark.parametrize("name", ["by_row", "by_trl", "by_swift", "by_verl"])
def test_an_own_reward_gets_the_text_as_sampled_and_each_part_apart(tmp_path: Path, name: str) -> None:
    answer = read_written("<think>hm</think> four", [CALL])
    pairs = [(CALLS, answer), (CALLS, replace(answer, complete=False))]
    assert values_of(tmp_path, PARTS, pairs, name) == [2.0, 12.0]


def test_a_column_of_the_rows_comes_before_a_part_of_the_answer(tmp_path: Path) -> None:
    text = "def mine(completions, calls):\n    return calls\n"
    assert values_of(tmp_path, text, [(sum_row(1, 2, calls=7), read_written("3"))]) == [7.0]


THOUGHTS = [
    "<think>\nhm\n</think>\n\nfour<|im_end|>",
    " <think>\nhm\n</think>\nfour",
    "<think>\nhm",
    "<think>hm<think></think>four<|im_end|>",
    "\n\nfour <|im_end|>",
    "<|im_start|><think></think>four<|im_end|>",
]


def test_a_reward_of_trl_gives_the_same_on_the_same_samples() -> None:
    tokenizer = family_tokenizer("qwen-3")
    read = answer_reader(tokenizer, recipe_for())
    ids = [tokenizer(text)["input_ids"] for text in THOUGHTS]
    contents = tokenizer.batch_decode(ids, skip_special_tokens=True)  # as `GRPOTrainer` does
    expected = think_format_reward([[{"role": "assistant", "content": content}] for content in contents])
    assert {*expected} == {0.0, 1.0}
    rewards = read_rewards({f"{format_rewards.__file__}:think_format_reward": 1.0})
    pairs: list[RewardPair] = [(PAIRS[0][0], read(one, None)) for one in ids]
    assert [one["think_format_reward"] for one in reward_answers(rewards, pairs, seconds=20)] == expected
    assert [answer.sampled for _, answer in pairs] == contents


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ("{", "its json_schema is no JSON Schema: not an object"),
        ('{"type": 5}', "its json_schema is no JSON Schema: 5 is not"),
        ({"$ref": "https://example.org/schema"}, "cannot be resolved"),
        ('{"type": "object"}', None),
        ({}, None),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_with_its_row(schema: object, why: str | None) -> None:
    (reward,) = read_rewards({"json_schema": 1.0})
    problem = find_lack(reward, "rows.jsonl:3", json_row({"x": 1}, json_schema=schema))
    assert (problem is None) == (why is None)
    if problem is not None:
        assert problem.where == "rows.jsonl:3"
        assert why in problem.what
        assert builtin("json_schema", json_row({"x": 1}, json_schema=schema), "{}") == 0
