"""Rows of tasks that rate answers by rewards: answers are optional, and columns that no format reads are kept."""

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from support.rows import chat, make_recipe, prepare, read_row, refusal, write_jsonl

from llmtune.data.conversation_texts import conversation_input, conversation_questions, without_last_answer
from llmtune.data.preparation import prepare_rows
from llmtune.data.row_kind import kind_of_row
from llmtune.data.row_store import iterate_full_rows, read_rows
from llmtune.evaluate.reward_check import read_checked_rows

QUESTION = {"role": "user", "content": "2 + 3?"}
ANSWER = {"role": "assistant", "content": "5"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION]},
        {"messages": json.dumps([QUESTION])},
        {"conversations": [{"from": "human", "value": "2 + 3?"}]},
        {"prompt": "2 + 3?"},
        {"prompt": [QUESTION]},
        {"prompt": "2 + 3?", "completion": ""},
        {"question": "2 + 3?", "answer_number": 5},
    ],
)
def test_rewarded_rows_need_no_answer(row: dict):
    if "question" in row:
        row = {"prompt": row["question"], **row}
    assert read_row(row, "reinforce")["messages"] == [QUESTION]


def test_rewarded_rows_keep_an_answer_that_they_have():
    for row in (chat("2 + 3?", "5"), {"prompt": "2 + 3?", "completion": "5"}, {"prompt": "2 + 3?", "answer": "5"}):
        rows = read_row({**row, "completion": row["answer"]} if "answer" in row else row, "reinforce")
        assert rows["messages"] == [QUESTION, ANSWER]


def test_conversations_of_several_turns_may_end_with_a_question():
    row = read_row({"messages": [QUESTION, ANSWER, {"role": "user", "content": "And 4?"}]}, "reinforce")
    assert [one["role"] for one in row["messages"]] == ["user", "assistant", "user"]
    assert without_last_answer(row) == row
    assert kind_of_row(row).answer(row) == ""
    assert conversation_input(row)[0] == "And 4?"
    assert conversation_questions(row) == []


def test_rows_without_a_question_are_refused():
    assert "no assistant answer" in refusal({"messages": [{"role": "system", "content": "Be brief."}]}, "reinforce")
    assert "empty content" in refusal({"prompt": " "}, "reinforce", "prompt")


def test_other_tasks_still_need_answers():
    assert "no assistant answer" in refusal({"messages": [QUESTION]})


def test_rewarded_rows_keep_their_other_columns_in_all_splits(tmp_path: Path):
    rows = [{"prompt": f"What is {i} + {i}?", "answer_number": 2 * i} for i in range(40)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    made = prepare(tmp_path, str(file), "reinforce", validation=0.2, test=0.2)
    for split in ("train", "validation", "test"):
        full = [row for _, row in iterate_full_rows(made, split)]
        assert full, split
        for row in full:
            assert (
                row["messages"][0]["content"] == f"What is {row['answer_number'] // 2} + {row['answer_number'] // 2}?"
            )
        assert read_rows(made, split, [0], full=True) == full[:1]
    assert "answer_number" not in read_rows(made, "train", [0])[0]
    changed = write_jsonl(tmp_path / "rows.jsonl", [{**row, "answer_number": 0} for row in rows])
    recipe = make_recipe(tmp_path, str(changed), "reinforce", validation=0.2, test=0.2)
    again = prepare_rows(recipe, tmp_path / "again", Console(quiet=True))
    assert again.content_hash == made.content_hash
    assert again.columns_hash != made.columns_hash


def test_other_tasks_do_not_keep_columns(tmp_path: Path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{**chat(f"{i}?"), "answer_number": i} for i in range(10)])
    assert prepare(tmp_path, str(file)).columns_hash == ""


def test_typed_columns_of_parquet_have_one_form_in_training_and_in_the_check_of_rewards(tmp_path: Path):
    day = datetime(2026, 3, 4, 5, 6)
    cells = {"at": day, "day": day.date(), "hour": day.time(), "price": Decimal("12.50"), "key": b"\x00\xff", "n": 2}
    written = {"at": "2026-03-04 05:06:00", "day": "2026-03-04", "hour": "05:06:00", "price": "12.50", "key": "AP8="}
    rows = [{"prompt": f"{i}?", "completion": str(i), **cells} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    trained = next(row for _, row in iterate_full_rows(prepare(tmp_path, "rows.parquet", "reinforce"), "train"))
    (_, checked), *_ = read_checked_rows(str(tmp_path / "rows.parquet"), 0)
    for row in (trained, checked):
        assert {name: row[name] for name in cells} == {**written, "n": 2}
