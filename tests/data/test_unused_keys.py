"""Every column and every key of an object in a cell is read, or named as not used."""

import json

import pytest

from llmtune.data.column_mapping import unused_keys
from llmtune.data.row_formats import FORMATS

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ASKED = {"messages": [{"role": "user", "content": "q"}], "tools": [TOOL], "parallel_tool_calls": True}
PAIR = {"preferred_output": [{"role": "assistant", "content": "a"}], "non_preferred_output": [{"role": "assistant"}]}
NAME = "name (in a message, unless the chat template writes it)"


def unused(name, row, **columns):
    return unused_keys(row, FORMATS[name].columns, columns)


def says(message):
    return unused("messages", {"messages": [{"role": "user", **message}]})


def test_columns_and_keys_of_messages_are_named():
    row = {"messages": [{"role": "user", "content": "q", "id": 7}], "source": "x"}
    assert unused("messages", row) == ["source", "id (in a message)"]
    assert unused("messages", {"messages": json.dumps(row["messages"])}) == ["id (in a message)"]
    assert says({"content": "q", "text": "t", "train": True, "weight": 0}) == [
        "text (in a message)",
        "weight (in a message)",
    ]
    assert says({"content": "q", "name": "ann"}) == says({"content": None, "text": "q", "name": "ann"}) == [NAME]
    assert unused("messages", {"messages": [{"role": "tool", "content": "r", "name": "f", "tool_call_id": "c"}]}) == []


def test_keys_of_parts_and_calls_are_named():
    picture = {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}
    thought = {"type": "thinking", "thinking": "t", "signature": "s"}
    assert says({"content": [picture, thought]}) == ["detail (in a picture)", "signature (in a part)"]
    assert says({"content": [{"type": "input_image", "image_url": "a.png", "detail": "low"}]}) == ["detail (in a part)"]
    call = {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": {"x": 1}}}
    assert says({"tool_calls": [call]}) == ["index (in a tool call)"]
    assert unused("messages", {"messages": [], "tools": [{**TOOL, "cache": 1}]}) == ["cache (in a tool)"]
    assert says({"content": '[{"x": 1}]'}) == []


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_messages_of_a_preference_are_searched_in_every_column(column):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", column: [{"role": "user", "content": "q", "id": 7}]}
    assert unused("chosen-rejected", row) == ["id (in a message)"]


def test_a_nested_column_that_is_not_mapped_is_named_next_to_one_that_is():
    row = {"input": ASKED, "meta": {"a": 1, "b": 2}, **PAIR}
    columns = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
    nested = unused("chosen-rejected", row, prompt="input.messages", **columns)
    assert nested == ["input.tools", "input.parallel_tool_calls", "meta"]
    assert unused("chosen-rejected", row, prompt="input", **columns) == ["meta", "parallel_tool_calls (in a prompt)"]


OBJECTS = {
    "id (in an answer)": ("squad", {"answers": {"text": ["a"], "answer_start": [0], "id": [7]}}),
    "aid (in an answer)": ("squad", {"answers": [{"text": "a", "start": 0, "aid": 7}]}),
    "score (in a span)": ("text-spans", {"spans": [{"start": 0, "end": 1, "label": "X", "score": 1}]}),
    "url (in a passage)": ("query-judged-passages", {"judged_passages": {"text": ["p"], "label": [1], "url": ["u"]}}),
    "docid (in a passage)": ("query-passages", {"passages": [{"text": "p", "title": "t", "docid": 3}]}),
    "caption (in a picture)": ("messages", {"messages": [], "images": [{"bytes": b"x", "caption": "c"}]}),
    "id (in a message)": ("prompt-completion", {"prompt": [{"role": "user", "content": "q", "id": 7}]}),
}


@pytest.mark.parametrize("named", OBJECTS)
def test_keys_of_other_objects_are_named(named):
    assert unused(*OBJECTS[named]) == [named]
