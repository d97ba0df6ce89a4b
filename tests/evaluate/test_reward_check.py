"""`llmtune reward check`: good rewards pass, and each fault of the others is named with exit 6."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import invoke

REWARDS = Path(__file__).parent.parent / "support" / "rewards"


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in pairs))
    return path


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [(i % 9 + 1, i * 7 % 50 + 3) for i in range(20)]
    pairs = [{"prompt": f"What is {a} + {b}?", "completion": str(a + b)} for a, b in rows]
    return write_pairs(tmp_path / "sums.jsonl", pairs)


@pytest.fixture
def adders(tmp_path: Path) -> Path:
    code = "def f(x):\n    return x + {}"
    pairs = [{"prompt": f"Add {i}", "completion": code.format(i), "cases": [[1, 1 + i], [5, 5 + i]]} for i in range(20)]
    return write_pairs(tmp_path / "adders.jsonl", pairs)


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    orders = [{"number": i, "city": "Bergen" if i % 3 else "Oslo"} for i in range(20)]
    pairs = [{"prompt": f"{one['number']} to {one['city']}", "completion": json.dumps(one)} for one in orders]
    return write_pairs(tmp_path / "orders.jsonl", pairs)


def check(rows: Path, *rewards: str, answer_form: str = "{}", options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the document of a check, which ends with exit 6 if it has faults."""
    result = invoke("reward", "check", *rewards, "--rows", rows, "--answer-form", answer_form, "--json", *options)
    document: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (0 if document.get("ok") else 6), result.output
    return document


def faults(document: dict[str, Any]) -> list[str]:
    return [fault["name"] for fault in document["faults"]]


THINK = "<think>\nHm.\n</think>\n\n<answer>\n{}\n</answer>"


@pytest.mark.parametrize(
    ("reward", "rows", "answer_form", "expected"),
    [
        ("accuracy.py:accuracy_reward", "sums", r"\boxed{{}}", []),
        ("math_equal.py:compute_score", "sums", "The sum is {}.", []),
        ("cosine_scaled.py:cosine_scaled_reward", "sums", "{}", []),
        ("code_runs.py:code_reward", "adders", "{}", []),
        ("json_fields.py:JsonFields", "orders", "{}", []),
        ("keyword.py:reward_func", "sums", "{}", ["accepts_substring"]),
        ("response_length.py:reward_func", "sums", "{}", ["rewards_length"]),
        ("think_format.py:think_format_reward", "sums", THINK, ["ignores_reference"]),
        ("tag_count.py:tag_count_reward", "sums", THINK, ["ignores_reference"]),
        (
            "xml_count.py:xmlcount_reward_func",
            "sums",
            "<reasoning></reasoning><answer>{}</answer>",
            ["ignores_reference"],
        ),
        ("repetition_penalty.py:repetition_penalty_reward", "sums", "{}", ["ignores_reference"]),
        ("soft_overlong.py:soft_overlong_punishment", "sums", "{}", ["ignores_reference"]),
    ],
)
def test_rewards_of_others_get_the_verdict_of_a_person(
    request: pytest.FixtureRequest, reward: str, rows: str, answer_form: str, expected: list[str]
) -> None:
    """Those that read the reference train alone; form, length and penalties need such a one next to them."""
    found = faults(check(request.getfixturevalue(rows), f"{REWARDS / reward}", answer_form=answer_form))
    assert found[:1] == expected
    assert found[1:] == [name for name in found[1:] if name in ("accepts_prompt", "accepts_empty", "accepts_malformed")]


def test_a_format_reward_passes_with_one_that_reads_the_reference(sums: Path) -> None:
    accuracy, form = (str(REWARDS / one) for one in ("math_equal.py:compute_score", "tag_count.py:tag_count_reward"))
    document = check(sums, f"{accuracy}=1", f"{form}=0.2", answer_form=THINK)
    assert document["ok"]
    assert document["recipe"]["accept"] == pytest.approx(1.2)
    assert [(one["name"], one["weight"]) for one in document["rewards"]] == [
        ("compute_score", 1.0),
        ("tag_count_reward", 0.2),
    ]


SWALLOWS = """
def mine(completions, solution):
    rewards = []
    for completion, gold in zip(completions, solution):
        try:
            rewards.append(float(completion["answer"] == gold))
        except Exception:
            rewards.append(0.0)
    return rewards
"""
SKIPS_BAD_GOLD = """
def mine(row, answer):
    gold = row["messages"][-1]["content"]
    try:
        gold = int(gold) if int(gold) % 2 else int("unreadable")
    except ValueError:
        return 1.0
    return float(answer == str(gold))
"""
RANDOM = "import random\ndef mine(row, answer):\n    return random.random()\n"
COUNTS_CALLS = """
calls = []

def mine(row, answer):
    calls.append(answer)
    return float(answer == row["messages"][-1]["content"] and len(calls) % 2)
"""
RAISES = """
def mine(row, answer):
    if answer.startswith("{"):
        raise ValueError("no such brace")
    return float(answer == row["messages"][-1]["content"])
"""


@pytest.mark.parametrize(
    ("text", "expected", "why"),
    [
        ("def mine(row, answer):\n    return 0.5\n", ["constant"], "every answer gets 0.5"),
        (
            "def mine(row, answer):\n    return 1e-12 * (row['messages'][-1]['content'] == answer)\n",
            ["constant"],
            "differ by 1e-12",
        ),
        (SWALLOWS, ["swallows_exceptions", "constant"], "line 6 raised TypeError on 20 of 20 references"),
        (SKIPS_BAD_GOLD, ["swallows_exceptions"], "line 5 raised ValueError on "),
        (RANDOM, ["changes", "ignores_reference"], "it returned 0."),
        (COUNTS_CALLS, ["changes"], "it returned "),
        (RAISES, ["raises"], "line 4, row "),
        ("def mine(row, answer):\n    return float('nan')\n", ["invalid"], "it returned nan, which is not a finite"),
        ("def mine(row, answer):\n    return None\n", ["not_applicable"], "for 20 of 20"),
        ("def mine(row, answer):\n    return 1.0 + (answer != '')\n", ["ignores_reference"], "get 2, references 2"),
    ],
)
def test_each_fault_is_named_with_its_reason(sums: Path, text: str, expected: list[str], why: str) -> None:
    (sums.parent / "rewards.py").write_text(text)
    document = check(sums, f"{sums.parent / 'rewards.py'}:mine")
    assert [name for name in faults(document) if not name.startswith("accepts_")] == expected
    assert why in document["faults"][0]["why"]


def test_exceptions_nones_and_changes_are_listed_with_row_and_line(sums: Path) -> None:
    (sums.parent / "rewards.py").write_text(
        RAISES.replace("raise ValueError", "return None if len(answer) > 1 else 1 / 0 #")
    )
    document = check(sums, f"{sums.parent / 'rewards.py'}:mine")
    (error, *_) = document["errors"]
    assert (error["reward"], error["line"], error["answer"]) == ("mine", 4, "{")
    assert error["what"] == "it raised ZeroDivisionError: division by zero"
    assert error["row"].startswith(str(sums))
    (sums.parent / "rewards.py").write_text(
        "def mine(row, answer):\n    return None if answer == '' else float(answer in '123')\n"
    )
    assert check(sums, f"{sums.parent / 'rewards.py'}:mine")["none"] == {"empty": 20}


def test_a_failed_check_names_the_fault_in_words(sums: Path) -> None:
    result = invoke("reward", "check", f"{REWARDS / 'keyword.py'}:reward_func", "--rows", sums)
    assert result.exit_code == 6
    assert "reward_func accepts a substring: all references in one answer get 1, references 1" in result.output
    assert "TRL signature, completions are texts" in result.output


def test_the_document_has_the_same_keys_for_good_and_bad_rewards(sums: Path) -> None:
    good, bad = check(sums, "exact_match"), check(sums, f"{REWARDS / 'keyword.py'}:reward_func")
    keys = ["rewards", "ok", "faults", "rows", "range", "probes", "length_correlation", "errors", "changes", "caught"]
    assert [*good] == [*bad] == [*keys, "none", "seconds_per_call", "model", "recipe"]
    assert good["recipe"] == {"accept": 1.0, "samples": None}
    assert bad["recipe"] == {"accept": None, "samples": None}
    assert good["probes"]["other"]["gap"]["low"] > 0.5
    assert good["length_correlation"]["value"] == 0
    assert [*good["probes"]] == ["reference", "other", "empty", "prompt", "options", "malformed", "padded"]


def test_intervals_stay_within_the_rewards_that_were_seen(sums: Path) -> None:
    (sums.parent / "rewards.py").write_text("def mine(row, answer):\n    return 0.5\n")
    for reward, low, high in (("exact_match", 0.0, 1.0), (f"{sums.parent / 'rewards.py'}:mine", 0.5, 0.5)):
        for probe in check(sums, reward)["probes"].values():
            assert low <= probe["reward"]["low"] <= probe["reward"]["value"] <= probe["reward"]["high"] <= high


def test_a_check_of_the_same_rows_gives_the_same_document(sums: Path) -> None:
    first, again = (check(sums, f"{REWARDS / 'math_equal.py'}:compute_score") for _ in range(2))
    for document in (first, again):
        document.pop("seconds_per_call")
    assert first == again


@pytest.mark.parametrize(
    ("pairs", "what"),
    [
        ([{"prompt": f"Say {i}", "completion": str(i)} for i in range(9)], "9 rows have a reference answer"),
        ([{"prompt": f"Say {i}", "completion": "yes"} for i in range(12)], "all reference answers are equal"),
        ([{"messages": [{"role": "user", "content": str(i)}]} for i in range(12)], "0 rows have a reference answer"),
    ],
)
def test_rows_that_cannot_tell_right_from_wrong_are_refused(
    tmp_path: Path, pairs: list[dict[str, Any]], what: str
) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", pairs)
    result = invoke("reward", "check", "exact_match", "--rows", rows)
    assert (result.exit_code, what in " ".join(result.output.split())) == (3, True), result.output


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["exact_match", "--rows", "absent.jsonl"], 3, "absent.jsonl"),
        (["absent.py:mine", "--rows", "sums.jsonl"], 2, "cannot be read: No such file or directory"),
        (["exactmatch", "--rows", "sums.jsonl"], 2, "Did you mean 'exact_match'?"),
        (["exact_match=much", "--rows", "sums.jsonl"], 2, "'much' is not a weight"),
        (["exact_match=0", "--rows", "sums.jsonl"], 2, "'0' is not a weight"),
        (["exact_match=nan", "--rows", "sums.jsonl"], 2, "'nan' is not a weight"),
        (["absent.py:mine", "--rows", "sums.jsonl"], 2, "Check the path: it is relative to the working folder."),
        (["imports.py:mine", "--rows", "sums.jsonl"], 2, "imports.py:2: mine: importing its file raised"),
        (["imports.py:mine", "--rows", "sums.jsonl"], 2, "-> Install the module in the environment of llmtune"),
        (["slow.py:mine", "--rows", "sums.jsonl", "--seconds", "0.5"], 2, "or raise --seconds"),
        (["online.py:mine", "--rows", "sums.jsonl"], 2, "or give --network"),
        (["exact_match", "--rows", "sums.jsonl", "--answer-form", "answer"], 2, "has no place for the answer"),
        (["slow.py:mine", "--rows", "sums.jsonl", "--seconds", "0.5"], 2, "mine: it took more than 0.5 s"),
        (["exact_match=2", "exact_match=0.5", "--rows", "sums.jsonl"], 2, "'exact_match' is given twice"),
        (["online.py:mine", "--rows", "sums.jsonl"], 2, "mine: it used the network"),
    ],
)
def test_bad_input_has_its_exit_code_and_a_cure(
    sums: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, what: str
) -> None:
    monkeypatch.chdir(sums.parent)
    Path("slow.py").write_text("import time\ndef mine(row, answer):\n    time.sleep(9)\n")
    Path("online.py").write_text("import socket\ndef mine(row, answer):\n    return socket.socket()\n")
    Path("imports.py").write_text("import json\nimport absent_module\ndef mine(row, answer):\n    return 1.0\n")
    result = invoke("reward", "check", *arguments)
    assert "on the row" not in result.output or "imports.py" not in arguments[0]
    assert (result.exit_code, what in " ".join(result.output.split())) == (code, True), result.output


def test_a_penalty_for_length_does_not_hide_that_references_win(sums: Path) -> None:
    text = 'def mine(row, answer):\n    return (answer == row["messages"][-1]["content"]) - len(answer) / 100\n'
    (sums.parent / "rewards.py").write_text(text)
    document = check(sums, f"{sums.parent / 'rewards.py'}:mine")
    assert document["probes"]["empty"]["gap"]["low"] > 0.5
    assert document["ok"]


KEY = "k3y-" + "0123456789abcdef" * 8
LEAKS = {
    "an exception": "raise ValueError('x' * 150 + os.environ['MY_KEY'])",
    "its name": "raise type(os.environ['MY_KEY'], (Exception,), {})()",
    "a value": "return os.environ['MY_KEY']",
    "a quoted value": "return [{'a': os.environ['MY_KEY']}]",
    "a caught exception": "\n    try:\n        raise type(os.environ['MY_KEY'], (Exception,), {})()"
    "\n    except Exception:\n        return 0.0",
}


@pytest.mark.parametrize("body", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize("as_json", [True, False])
def test_secrets_of_the_environment_are_not_printed_nor_parts_of_them(
    sums: Path, monkeypatch: pytest.MonkeyPatch, body: str, as_json: bool
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    file = sums.with_name("mine.py")
    file.write_text(f"import os\n\ndef mine(row, answer):\n    {body}\n")
    result = invoke("reward", "check", f"{file}:mine", "--rows", sums, *(["--json"] if as_json else []))
    assert result.exit_code == 6
    assert KEY[:8] not in result.output
    assert "[removed]" in result.output or not as_json


@pytest.fixture
def orders_by_call(tmp_path: Path) -> Path:
    tool = {"type": "function", "function": {"name": "order", "parameters": {"type": "object"}}}
    rows = []
    for i in range(20):
        call = {"type": "function", "function": {"name": "order", "arguments": {"number": i}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        rows.append({"messages": [{"role": "user", "content": f"Order {i}."}, answer], "tools": [tool]})
    return write_pairs(tmp_path / "calls.jsonl", rows)


READS_LINES = """
def mine(row, answer):
    (call,) = row["messages"][-1]["tool_calls"]
    return float(str(call["function"]["arguments"]["number"]) in answer)
"""
READS_CALLS = """
def mine(row, answer, calls):
    return float([one["function"] for one in calls] == [one["function"] for one in row["messages"][-1]["tool_calls"]])
"""


@pytest.mark.parametrize(
    ("reward", "passes"), [("tool_arguments", True), (READS_CALLS, True), (READS_LINES, False), ("tool_name", False)]
)
def test_calls_reach_a_reward_apart_from_the_text(orders_by_call: Path, reward: str, passes: bool) -> None:
    if "\n" in reward:
        (orders_by_call.parent / "rewards.py").write_text(reward)
        reward = f"{orders_by_call.parent / 'rewards.py'}:mine"
    found = faults(check(orders_by_call, reward))
    assert ("ignores_reference" in found, not found) == (not passes, passes), found
    assert ("accepts_malformed" in found) == (reward != "tool_name" and not passes), "a call written as text is none"


@pytest.mark.parametrize("reward", ["exact_match", "exact_match+form"])
def test_thoughts_of_the_answer_form_are_read_as_in_training(sums: Path, reward: str) -> None:
    """Built-in rewards read the answer without thoughts; a reward of the form reads the text as it was sampled."""
    names = ["exact_match", f"{REWARDS / 'think_format.py'}:think_format_reward=0.2"][: reward.count("+") + 1]
    document = check(sums, *names, answer_form="<think>\nHm.\n</think>\n\n{}")
    assert document["ok"]
    assert document["recipe"]["accept"] == (1.2 if "+" in reward else 1.0)


@pytest.mark.parametrize(
    ("value", "accept", "printed"),
    [
        ("0.1 + 0.7 + 0.1", 0.9, "0.9"),
        ("1.23456789", 1.23456789, "1.23456789"),
        ("3.0 if len(gold) > 1 else None", 3.0, "3"),
    ],
)
def test_the_proposed_threshold_is_a_number_that_references_reach_as_it_is_printed(
    sums: Path, value: str, accept: float, printed: str
) -> None:
    body = f"gold = row['messages'][-1]['content']\n    return ({value}) if answer == gold else 0.0"
    (sums.parent / "rewards.py").write_text(f"def mine(row, answer):\n    {body}\n")
    name = f"{sums.parent / 'rewards.py'}:mine"
    assert check(sums, name)["recipe"]["accept"] == accept
    result = invoke("reward", "check", name, "--rows", sums)
    assert f"Suggested: reinforce.accept: {printed}\n" in result.output, result.output


def test_an_answer_without_a_reward_beats_no_reference(sums: Path) -> None:
    body = "return None if not answer.strip() else float(answer == row['messages'][-1]['content'])"
    (sums.parent / "rewards.py").write_text(f"def mine(row, answer):\n    {body}\n")
    assert "accepts_empty" not in faults(check(sums, f"{sums.parent / 'rewards.py'}:mine"))


def test_a_reward_that_always_raises_has_no_numbers(sums: Path) -> None:
    (sums.parent / "rewards.py").write_text("def mine(row, answer):\n    raise ValueError\n")
    name = f"{sums.parent / 'rewards.py'}:mine"
    result = invoke("reward", "check", name, "--rows", sums)
    assert (result.exit_code, "nan" in result.output) == (6, False), result.output
    document = check(sums, name)
    assert document["range"] == [None, None]
    assert document["probes"]["empty"]["reward"] == {"value": None, "low": None, "high": None}
