"""Null keys added by Arrow are removed from rows: a call has only the arguments that its author wrote."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from support.rows import chat, make_recipe, prepare, read_file, rows_of, write_jsonl
from support.templates import HERMES, tokenizer_with

from llmtune.data.arrow_rows import drop_filled
from llmtune.data.data_report import describe_examples
from llmtune.data.examples import encode_rows
from llmtune.data.hub_datasets import as_files_hold_it
from llmtune.tasks.registry import get_task


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def turns(question, *calls):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "", "tool_calls": [*calls]}]


TOOLS = [
    tool("add", a={"type": "integer"}, b={"type": "integer", "minimum": 0}),
    tool("weather", city={"type": "string", "enum": ["Rome", "Bern"]}),
    tool("now"),
]
ROWS = [
    {"messages": turns("add", call("add", {"a": 1, "b": 2})), "tools": TOOLS[:1]},
    {
        "messages": turns("both", call("weather", {"city": "Bern", "at": {"hour": 3}}), call("now", {})),
        "tools": TOOLS,
    },
    {"messages": turns("weather", call("weather", {"city": "Rome", "at": {"day": [1, None]}})), "tools": TOOLS[1:]},
]


def write_parquet(folder):
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return [row for _, row in read_file(folder / "rows.parquet", "rows.parquet", "parquet")]


def read_hub(rows):
    rows, plain = as_files_hold_it(rows)
    return [plain(row) for row in rows]


def write_hub(folder):
    return read_hub(Dataset.from_list(ROWS))


def write_streamed(folder):
    return read_hub(Dataset.from_list(ROWS).to_iterable_dataset())


def write_by_datasets(folder):
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return [row for _, row in read_file(folder / "rows.parquet", "rows.parquet", "parquet")]


@pytest.mark.parametrize("read", [write_parquet, write_hub, write_streamed, write_by_datasets])
def test_rows_from_arrow_have_only_the_keys_that_were_written(tmp_path, read):
    assert read(tmp_path) == ROWS


def test_a_parquet_row_trains_like_the_same_json_lines_row(tmp_path):
    write_parquet(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    from_parquet, from_lines = (prepare(tmp_path, f"rows.{kind}", out=kind) for kind in ("parquet", "jsonl"))
    assert rows_of(from_parquet) == rows_of(from_lines)
    assert from_parquet.content_hash == from_lines.content_hash
    (turn,) = get_task("chat").tool_turns(rows_of(from_parquet)[0], make_recipe(tmp_path, "rows.parquet"))
    assert turn.calls[0]["function"]["arguments"] == {"a": 1, "b": 2}
    assert turn.tools == TOOLS[:1]


def test_an_authors_null_stays_in_json_lines_and_in_json_text(tmp_path):
    rows = [{"messages": turns("q", call("add", {"a": 1, "city": None})), "tools": TOOLS[:1]}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tmp_path, "rows.jsonl")
    assert rows_of(prepared)[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "city": None}
    assert prepared.filled == 0
    texts = [{"messages": turns("q", call("add", json.dumps({"a": 1, "city": None}))), "tools": json.dumps(TOOLS)}]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "texts.parquet")
    prepared = prepare(tmp_path, "texts.parquet", out="texts")
    assert rows_of(prepared)[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "city": None}
    assert prepared.filled == 1, "the question's tool_calls"


def test_an_authors_null_stays_in_a_json_column_of_a_data_set(tmp_path):
    rows = [{"messages": turns("q", call("add", {"a": 1, "city": None}))}, {"messages": chat("q")["messages"]}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    made = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    assert "Json" in str(made.features)
    assert read_hub(made) == rows


def test_columns_and_items_of_lists_keep_their_nulls():
    row = {"label": None, "answers": {"text": ["a", None], "start": None}, "turns": [{"a": None, "b": [{}]}, None]}
    kept = drop_filled(row)
    assert kept == {"label": None, "answers": {"text": ["a", None]}, "turns": [{"b": [{}]}, None]}
    assert kept.filled == 2


def test_a_file_of_the_datasets_library_has_no_key_that_arrow_added():
    files = {"audio": {"bytes": None, "path": "a.wav"}, "images": [{"bytes": b"1", "path": None}]}
    kept = drop_filled({**files, "turns": [{"part": {"bytes": b"1", "path": None, "text": None}}]})
    assert kept == {
        "audio": {"path": "a.wav"},
        "images": [{"bytes": b"1"}],
        "turns": [{"part": {"bytes": b"1"}}],
    }
    assert kept.filled == 2, "of the part, which has another key"


def test_the_data_report_counts_the_keys_that_were_dropped(tmp_path, console):
    write_parquet(tmp_path)
    filled = str(pq.read_table(tmp_path / "rows.parquet").to_pylist()).count(": None")
    prepared = prepare(tmp_path, "rows.parquet", max_length=4096)
    assert prepared.filled == filled > 20
    recipe, task, tokenizer = make_recipe(tmp_path, "rows.parquet"), get_task("chat"), tokenizer_with(HERMES)
    examples = encode_rows(prepared, task, tokenizer, recipe, tmp_path / "examples", console)
    facts = describe_examples(prepared, examples, tokenizer, console, task, recipe)
    assert facts["filled"] == filled
    assert f"{filled} empty keys dropped" in console.file.getvalue()
