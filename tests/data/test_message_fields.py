"""Thoughts in rows, in all formats."""

import pytest

from llmtune.data.chat_rows import canonical_messages, chat_from_messages
from llmtune.data.rejected_rows import RowError
from llmtune.data.row_kind import near_text
from llmtune.data.task_rows import preference_from_pair

QUESTION = {"role": "user", "content": "two and two?"}
HARMONY = "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant<|channel|>final<|message|>Four."


def answer_of(**message):
    return canonical_messages([QUESTION, {"role": "assistant", **message}])["messages"][-1]


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": "Add.", "content": "Four."},
        {"reasoning": "Add.", "content": "Four."},
        {"thinking": " Add.\n", "content": "Four."},
        {"content": "<think>\nAdd.\n</think>\n\nFour."},
        {"content": "<think>Add.</think>Four.", "reasoning_content": "Add."},
        {"content": [{"type": "thinking", "thinking": "Add."}, {"type": "text", "text": "Four."}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Add."}]}, "Four."]},
        {"content": HARMONY},
        {"content": f"<|start|>assistant{HARMONY}<|return|>"},
    ],
)
def test_thoughts_are_read_from_every_place_in_a_row(message):
    assert answer_of(**message) == {"role": "assistant", "content": "Four.", "reasoning": "Add."}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "Four.", "reasoning_content": ""}, {"content": "Four."}),
        ({"content": "Four.", "reasoning_content": None}, {"content": "Four."}),
        ({"content": "<think>\n\n</think>\n\nFour."}, {"content": "Four.", "reasoning": ""}),
        ({"content": "Write <think>a</think>."}, {"content": "Write <think>a</think>."}),
        ({"content": "<|channel|>final<|message|>Four.<|return|>"}, {"content": "Four."}),
        ({"content": "<|channel|>odd<|message|>Four."}, {"content": "<|channel|>odd<|message|>Four."}),
    ],
)
def test_text_that_only_resembles_thoughts_stays_text(message, expected):
    assert answer_of(**message) == {"role": "assistant", **expected}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": "<think>Add.</think>Four.", "reasoning_content": "Guess."}, "thoughts twice"),
        ({"content": "Four.", "thinking": 3}, "wrong type"),
        ({"content": "<think>Add.</think>"}, "empty content"),
    ],
)
def test_unreadable_thoughts_make_a_bad_row(message, reason):
    with pytest.raises(RowError) as caught:
        answer_of(**message)
    assert caught.value.reason == reason


def test_only_answers_may_have_thoughts():
    with pytest.raises(RowError, match="only answers may have thoughts"):
        canonical_messages([{**QUESTION, "reasoning": "Hm."}, {"role": "assistant", "content": "Four."}])


def test_a_row_may_override_the_treatment_of_its_thoughts():
    row = {"messages": [QUESTION, {"role": "assistant", "content": "Four."}]}
    assert chat_from_messages({**row, "train_reasoning": "keep"})["train_reasoning"] == "keep"
    with pytest.raises(RowError, match=r"'train_reasoning' is 'kep'.*keep"):
        chat_from_messages({**row, "train_reasoning": "kep"})


def test_thoughts_do_not_make_rows_near_duplicates():
    one, other = (
        canonical_messages([QUESTION, {"role": "assistant", "content": "Four.", "reasoning": text}])
        for text in ("Add.", "Guess.")
    )
    assert near_text(one) != near_text(other)


def test_the_thoughts_of_a_preferred_answer_stay_with_it():
    chosen = {"role": "assistant", "content": "Four.", "reasoning_content": "Add."}
    row = preference_from_pair({"prompt": [QUESTION], "chosen": [chosen], "rejected": "Five."})
    assert row["chosen"] == "<think>\nAdd.\n</think>\n\nFour."
