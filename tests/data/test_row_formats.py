import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rows import chat, read_row, refusal

from llmtune.data.column_mapping import rename, unused_keys
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_formats import FORMATS, detect_format, parse_row
from llmtune.data.row_hash import hash_content, row_json
from llmtune.data.row_kind import near_text
from llmtune.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FILLED = TEXT.filter(lambda text: text.strip())
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def detected(rows, task="chat", columns=None, forced=None):
    try:
        return detect_format(rows, task, columns or {}, forced, "file").name
    except DataError as error:
        return str(error)


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "task", "name"),
    [
        (chat("q"), "chat", "messages"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "chat", "sharegpt"),
        ({"instruction": "i", "input": "", "output": "o", "text": "all of it"}, "chat", "alpaca"),
        ({"instruction": "i", "output": "o"}, "completion", "alpaca"),
        ({"prompt": "p", "completion": "c"}, "completion", "prompt-completion"),
        ({"text": "t", "url": "u"}, "completion", "text"),
    ],
)
def test_a_format_is_detected_by_its_columns(row, task, name):
    assert detected([row] * 3, task) == name


def test_ambiguous_unknown_and_mixed_rows_are_reported_with_columns_and_a_fix():
    both = {"prompt": "p", "completion": "c", "messages": []}
    assert "fit messages and prompt-completion" in detected([both])
    assert "format: messages" in detected([both])
    assert detected([both], forced="prompt-completion") == "prompt-completion"
    unknown = detected([{"ticket": "q", "solved": "a"}])
    assert "'ticket', 'solved'" in unknown
    assert "sharegpt" in unknown
    assert "columns:" in unknown
    assert "row 1 is messages, row 2 prompt-completion" in detected([chat("q"), {"prompt": "p", "completion": "c"}])


def test_rows_of_another_task_are_refused_by_name():
    assert "text rows, which task: chat cannot use" in detected([{"text": "t"}])
    assert "messages rows, which task: completion cannot use" in detected([chat("q")], "completion")
    assert "format: text cannot be used by task: chat" in detected([{"text": "t"}], forced="text")
    summary = {"document": "d", "summary": "s"}
    assert "document-summary rows, which task: translate cannot use" in detected([summary], "translate")


def test_columns_map_any_names_and_mistakes_are_reported():
    row = {"question": "q", "answer": "a", "prompt": "something else"}
    columns = {"prompt": "question", "completion": "answer"}
    assert detected([row], columns=columns) == "prompt-completion"
    assert read_row(rename(row, columns), name="prompt-completion") == chat("q", "a")
    assert "column 'questoin' not found" in detected([row], columns={"prompt": "questoin"})
    assert "Did you mean 'question'?" in detected([row], columns={"prompt": "questoin"})
    assert "Did you mean 'prompt'?" in detected([row], columns={"promt": "question"})


def test_sharegpt_becomes_messages():
    row = {
        "system": "be kind",
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains."},
        ],
        "tools": json.dumps([TOOL["function"]]),
    }
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    assert read_row(row) == {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ],
        "tools": [TOOL],
    }


def test_openai_tool_calls_get_their_arguments_as_an_object():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": "hi", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
            {"role": "assistant", "content": [{"type": "text", "text": "It "}, {"type": "text", "text": "rains."}]},
        ],
        "tools": [TOOL],
    }
    got = read_row(row)["messages"]
    assert [message["role"] for message in got] == ["system", "user", "assistant", "tool", "assistant"]
    assert got[1]["name"] == "ann"
    assert got[2]["tool_calls"][0] == {**call, "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    assert got[2]["train"] is False
    assert got[3]["tool_call_id"] == "c1"
    assert got[4]["content"] == "It rains."


def test_parts_may_contain_thoughts_text_and_calls_in_llama_factorys_format():
    def says(role, *parts, weight):
        content = [{"type": kind, "value": value} for kind, value in parts]
        return {"role": role, "content": content, "loss_weight": weight}

    call = '{"name": "weather", "arguments": {"city": "Bern"}}'
    answers = ("reasoning", "Look it up."), ("tool_call", call)
    row = {
        "messages": [
            says("user", ("text", "hi"), weight=0.0),
            says("assistant", *answers, weight=1.0),
            says("tool", ("text", "rain"), weight=0.0),
            says("assistant", ("text", "It rains."), weight=1.0),
        ],
        "tools": json.dumps([TOOL]),
    }
    asked, called, result, answer = read_row(row)["messages"]
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    assert (asked["content"], result["content"], answer["content"]) == ("hi", "rain", "It rains.")
    assert (called["reasoning"], called["content"], called["train"]) == ("Look it up.", "", True)
    assert called["tool_calls"] == [{"type": "function", "function": function}]
    assert unused_keys(row, FORMATS["messages"].columns, {}) == []


@pytest.mark.parametrize(("column", "mark"), [("audios", "<audio>"), ("video", "<video>"), ("videos", "<video>")])
def test_a_row_with_text_around_a_video_or_recording_is_refused(column, mark):
    row = chat(f"{mark}What is this?") | {column: ["cat.jpg"]}
    assert f"{mark} refers to the column '{column}'" in refusal(row)
    assert read_row(row | {column: []}) == chat(f"{mark}What is this?")
    assert read_row(chat("What is this?") | {column: ["cat.jpg"]}) == chat("What is this?")


def test_null_keys_added_by_parquet_do_not_count():
    row = {"messages": [{"role": "user", "content": "q", "tool_calls": None, "name": None, "train": None},
                        {"role": "assistant", "content": "yes", "tool_calls": None}], "tools": None}  # fmt: skip
    assert read_row(row) == chat("q")


def test_alpaca_gives_the_same_turns_in_chat_and_the_same_text_in_completion():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["hi", "hello"]]}
    assert read_row(row) == turns(("user", "hi"), ("assistant", "hello"), ("user", "Add.\n\n1 2"), ("assistant", "3"))
    row = {"instruction": "Add.", "input": "", "output": "3", "system": "S"}
    assert read_row(row, "completion") == {"prompt": "S\n\nAdd.\n\n", "completion": "3"}


def test_prompt_and_completion_may_be_messages_and_only_the_completion_is_supervised():
    earlier = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    row = {"prompt": earlier, "completion": [{"role": "assistant", "content": "d"}]}
    got = read_row(row)["messages"]
    assert [message.get("train") for message in got] == [False, False, False, None]


def test_completion_rows_keep_their_text_unchanged():
    assert read_row({"prompt": "", "completion": " x\n"}, "completion") == {"prompt": "", "completion": " x\n"}
    assert read_row({"text": " x\n"}, "completion") == {"prompt": "", "completion": " x\n"}


def calls(stated):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": stated}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no messages: the list of messages is empty"),
        ({"messages": "hello"}, "wrong type: messages is text, but not JSON"),
        ({"messages": 3}, "wrong type: 'messages' is a number"),
        ({"messages": ["hi"]}, "wrong type: message 1 is text"),
        (turns(("usr", "q"), ("assistant", "a")), "unknown role: message 1: 'usr' is none of .* Did you mean 'user'"),
        ({"messages": [{"content": "q"}]}, "unknown role: message 1 has no 'role'"),
        (turns((3, "q")), "wrong type: message 1: 'role' is a number"),
        (turns(("user", " \n"), ("assistant", "a")), r"empty content: message 1 \(user\) has no content"),
        (turns(("user", "q"), ("assistant", "")), r"empty content: message 2 \(assistant\) has no content"),
        (turns(("user", "q"), ("assistant", None)), r"empty content: message 2"),
        (turns(("user", 5), ("assistant", "a")), "wrong type: message 1: 'content' is a number"),
        (turns(("user", "q")), "no assistant answer"),
        (turns(("user", "q"), ("assistant", "a"), ("user", "q")), "does not end with an answer: the last .* from user"),
        (turns(("system", "s"), ("developer", "s"), ("user", "q"), ("assistant", "a")), "two system messages"),
        (turns(("user", "q"), ("system", "s"), ("assistant", "a")), "system message not first: it is message 2"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]},
         "no assistant answer: every assistant message says train: false"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": "no"}]},
         "wrong type: message 2: 'train' is 'no'; it must be true or false"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 2}]},
         "wrong type: message 2: 'weight' is 2; it must be 0 or 1"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss_weight": 0.5}]},
         "wrong type: message 2: 'loss_weight' is 0.5; it must be 0 or 1"),
        ({"conversations": [{"from": "human", "value": 5}]}, "wrong type: message 1: 'value' is a number"),
        (turns(("user", [{"type": "video", "path": "x"}]), ("assistant", "a")),
         "content that is not text: message 1: a part of type 'video'"),
        (turns(("user", [{"type": "text", "text": 3}]), ("assistant", "a")), "wrong type: message 1: 'text' of a part"),
        ({**chat("q"), "tools": [{"description": "x"}]}, "malformed tool: tool 1 has no function with a 'name'"),
        ({"messages": [{"role": "user", "content": "q"},
                       {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "wrong type: message 2: the arguments of 'f' is text, but not JSON"),
        (calls({"f": {}}), r"wrong type: message 2: 'tool_calls' is .*; it must be a list"),
        (calls([{"function": {}}]), "malformed tool call: message 2: a tool call needs a function with a 'name'"),
        (calls([{"function": {"name": "f", "arguments": [1]}}]), "malformed tool call: .*: the arguments of 'f'"),
        ({**chat("q"), "tools": {"name": "f"}}, "wrong type: 'tools' is .*; it must be a list"),
        ({"conversations": [{"from": "martian", "value": "q"}]}, "unknown role: message 1: 'martian'"),
        ({"instruction": "", "output": "o"}, "empty content: 'instruction' is empty"),
        ({"instruction": "i", "output": None}, "no answer: 'output' is empty"),
        ({"prompt": "p", "completion": " "}, "no answer: 'completion' is empty"),
        ({"prompt": "p", "completion": 7}, "wrong type: 'completion' is a number; it must be text"),
        (chat("half \ud83d"), r"not a character: \\ud83d is half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_bad_row_gives_its_reason(row, reason):
    with pytest.raises(RowError, match=reason):
        row_json(read_row(row))


def test_a_row_of_another_format_further_down_is_named():
    assert refusal({"prompt": "p", "completion": "c"}, name="messages").endswith(
        "it looks like a prompt-completion row"
    )


@given(FILLED, FILLED)
def test_any_text_survives_a_round_trip(question, answer):
    row = read_row(chat(question, answer))
    assert json.loads(row_json(row)) == chat(question, answer)
    assert "\n" not in row_json(row)


KEYS = [
    "role",
    "content",
    "from",
    "value",
    "type",
    "text",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "train",
    "weight",
]
VALUES = st.none() | st.booleans() | st.integers() | TEXT | st.sampled_from(["user", "assistant", "system", "{}", "[]"])
NESTED = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(NESTED, st.sampled_from(sorted(FORMATS)))
def test_any_json_gives_a_canonical_row_or_a_reason(value, name):
    form = FORMATS[name]
    for task in ("chat", "completion"):
        if form.parser(task):
            row = dict.fromkeys((*form.required, *form.optional), value)
            try:
                got = parse_row(row, form, task)
            except RowError:
                continue
            assert json.loads(row_json(got)) == got


@given(FILLED, FILLED)
def test_equal_content_has_an_equal_hash_for_any_composition_and_outer_space(question, answer):
    one = hash_content(chat(question, answer))
    assert (
        hash_content(chat(f" {unicodedata.normalize('NFD', question)}\n", unicodedata.normalize("NFC", answer))) == one
    )
    assert hash_content(chat(question, answer + "x")) != one
    assert len(one) == 16


def test_system_messages_do_not_count_when_texts_are_compared():
    row = turns(("system", "a long text that all rows share"), ("user", "q"), ("assistant", "a"))
    assert near_text(row).text == "q a"


def test_two_columns_of_numbers_get_a_suggested_mapping() -> None:
    assert "columns: {prompt: YOUR_COLUMN, completion: YOUR_COLUMN}" in detected([{"x1": 1, "x2": 2}])
