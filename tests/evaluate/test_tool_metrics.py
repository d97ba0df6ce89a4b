"""Tool calls compared with the calls of a row."""

import pytest

from llmtune.data.answer_parser import ParsedAnswer, ToolTurn
from llmtune.evaluate.tool_metrics import is_same_value, is_valid_call, measure_tools, uncheckable_tools
from llmtune.recipe.task_facts import TOOL_METRICS

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock"}},
]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def answer(*calls, text="", error=None):
    return ParsedAnswer(text, tool_calls=calls, error=error)


def turn(*calls):
    return ToolTurn({"messages": [], "tools": TOOLS}, calls)


PARIS, ROME = call("weather", city="Paris", days=2), call("weather", city="Rome")
CASES = [
    # answer, reference, valid, name, arguments, F1 of the arguments
    (answer(PARIS), turn(PARIS), 1, 1, 1, 1),
    (answer(call("weather", days=2.0, city="Paris")), turn(PARIS), 1, 1, 1, 1),
    (answer(call("weather", city="Paris", days=3)), turn(PARIS), 1, 1, 0, 1 / 2),
    (answer(call("weather", city="Paris")), turn(PARIS), 1, 1, 0, 2 / 3),
    (answer(call("weather", days="2")), turn(PARIS), 0, 1, 0, 0),
    (answer(call("wether", city="Paris", days=2)), turn(PARIS), 0, 0, 0, 0),
    (answer(ROME, PARIS), turn(PARIS, ROME), 1, 1, 1, 1),
    (answer(PARIS), turn(PARIS, ROME), 1, 0, 0, 4 / 5),
    (answer(PARIS, call("weather", city="Paris")), turn(call("weather", city="Paris"), PARIS), 1, 1, 1, 1),
    (answer(PARIS, PARIS), turn(PARIS), 1, 0, 0, 4 / 6),
    (answer(call("clock")), turn(call("clock")), 1, 1, 1, 1),
    (answer(text="It rains."), turn(PARIS), 0, 0, 0, 0),
    (answer(text="{", error="no JSON"), turn(PARIS), 0, 0, 0, 0),
]


@pytest.mark.promise("metric", "referee", equal="calls compared by hand", place="tool_call_valid")
@pytest.mark.promise("metric", "referee", equal="calls compared by hand", place="tool_name")
@pytest.mark.promise("metric", "referee", equal="calls compared by hand", place="tool_arguments")
@pytest.mark.promise("metric", "referee", equal="calls compared by hand", place="tool_arguments_f1")
@pytest.mark.parametrize(("given", "asked", "valid", "name", "arguments", "f1"), CASES)
def test_a_call_is_checked_against_its_declaration_and_the_reference(given, asked, valid, name, arguments, f1):
    scores = {metric: measure_tools(metric, {3: [given]}, {3: [asked]}) for metric in TOOL_METRICS}
    values = [scores[metric].value for metric in TOOL_METRICS[:4]]
    assert values == pytest.approx([valid, name, arguments, f1], abs=1e-12)
    assert all(scores[metric].at == (3,) for metric in TOOL_METRICS[:4])
    assert len(scores["no_call"].sums_NK) == 0


@pytest.mark.promise("metric", "referee", equal="calls compared by hand", place="no_call")
def test_no_call_is_correct_if_none_is_wanted():
    answers = {
        0: [answer(text="Hello")],
        1: [answer(PARIS)],
        2: [answer(text="{", error="no JSON")],
        3: [answer(PARIS)],
    }
    turns = {0: [turn()], 1: [turn()], 2: [turn()], 3: [turn(PARIS)]}
    found = measure_tools("no_call", answers, turns)
    assert (found.value, found.at, found.right_wrong) == (1 / 3, (0, 1, 2), True)


def test_the_answers_of_one_row_add_up_and_are_drawn_together():
    answers = {5: [answer(PARIS), answer(ROME)], 6: [answer(PARIS)]}
    turns = {5: [turn(PARIS), turn(PARIS)], 6: [turn(PARIS)]}
    found = measure_tools("tool_arguments", answers, turns)
    assert found.sums_NK.tolist() == [[1, 2], [1, 1]]
    assert found.value == 2 / 3
    assert not found.right_wrong
    assert "recorded turns" in found.signature


@pytest.mark.parametrize(
    ("schema", "arguments", "valid"),
    [
        ({"type": "object", "properties": {"n": {"enum": [1, 2]}}}, {"n": 3}, False),
        ({"type": "object", "additionalProperties": False}, {"n": 3}, False),
        ({"type": "nonsense"}, {"n": 3}, False),
        ({"type": "object", "properties": {"n": {"type": "str"}}}, {"n": 3}, False),
        ({"$ref": "https://example.com/schema.json"}, {"n": 3}, False),
        ({"properties": {"n": {"$ref": "#/$defs/gone"}}}, {"n": 3}, False),
        (5, {"n": 3}, False),
        ({"properties": {"n": {"pattern": "["}}}, {"n": "a"}, False),
        ({"$ref": "#"}, {"n": 3}, False),
        ({"$defs": {"n": {"type": "string"}}, "properties": {"n": {"$ref": "#/$defs/n"}}}, {"n": 3}, False),
        (None, {"n": 3}, True),
    ],
)
def test_arguments_are_checked_by_json_schema_without_the_network(schema, arguments, valid):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert is_valid_call(call("f", **arguments), tools) is valid


def test_only_tool_call_valid_skips_answers_whose_tool_has_no_valid_schema():
    broken = {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "str"}}}}
    tools = [*TOOLS, {"type": "function", "function": broken}]
    calling, other = (ToolTurn({"messages": [], "tools": tools}, [made]) for made in (call("f", n=3), PARIS))
    answers = {0: [answer(call("f", n=3))], 1: [answer(PARIS)], 2: [answer(call("f", n=3))]}
    turns = {0: [calling], 1: [other], 2: [other]}
    found = measure_tools("tool_call_valid", answers, turns)
    assert (found.at, found.value) == ((1, 2), 0.5)
    assert measure_tools("tool_name", answers, turns).at == (0, 1, 2)
    assert uncheckable_tools([calling, other]) == {"f": "'str' is not valid under any of the given schemas"}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        ("1", 1, False),
        ({"a": [1, {"b": None}]}, {"a": [1.0, {"b": None}]}, True),
        ([1, 2], [2, 1], False),
        ({"a": 1}, {"a": 1, "b": None}, False),
    ],
)
def test_values_are_equal_as_in_json(one, other, same):
    assert is_same_value(one, other) is same
