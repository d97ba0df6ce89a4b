"""Questions with a few answers, as they are read."""

from __future__ import annotations

from collections import Counter

import pytest

from llmtune.errors import DataError
from llmtune.evaluate.multiple_choice import read_questions

GOOD = '{"question": "a?", "choices": ["x", "y"], "answer": "y"}'


def test_the_questions_that_come_with_llmtune_have_no_pattern():
    questions = read_questions(("own",))
    assert len(questions) == len({question.question for question in questions}) == 100
    assert Counter(question.right for question in questions) == {0: 25, 1: 25, 2: 25, 3: 25}
    assert set(Counter(question.topic for question in questions).values()) == {10}
    right = [len(question.choices[question.right]) for question in questions]
    wrong = [len(one) for question in questions for i, one in enumerate(question.choices) if i != question.right]
    assert all(len(question.choices) == 4 for question in questions)
    assert sum(right) / len(right) == pytest.approx(sum(wrong) / len(wrong), rel=0.05)


BAD_QUESTIONS = [
    ("{", "Invalid JSON"),
    ("[1]", "Input should be an object"),
    ('{"question": "a?", "choices": ["x"], "answer": 0}', "choices: Tuple should have at least 2 items"),
    ('{"question": "a?", "choices": ["x", "x"], "answer": 0}', "two choices are equal"),
    ('{"question": "a?", "choices": ["x", 5], "answer": 0}', "choices.1: Input should be a valid string"),
    ('{"question": "a?", "choices": ["x", " "], "answer": 0}', "choices.1: there is no text"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": 2}', "'answer' is 2; name a choice"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": true}', "answer.int: Input should be a valid integer"),
    ('{"question": "a?", "choices": ["x", "y"]}', "answer: Field required"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": "z"}', "'answer' is 'z'; name a choice"),
    ('{"question": " ", "choices": ["x", "y"], "answer": 0}', "question: String should have at least 1 character"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": 0, "topic": 3}', "topic: Input should be a valid string"),
    ('{"question": "a?", "choices": ["x", "y"], "answer": 0, "label": 0}', "label: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("line", "told"), BAD_QUESTIONS)
def test_a_line_that_is_no_question_is_named(tmp_path, line, told):
    (tmp_path / "q.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError, match=r"q\.jsonl:3") as found:
        read_questions((str(tmp_path / "q.jsonl"),))
    assert told in str(found.value)


def test_questions_that_cannot_be_read_are_told_all_at_once(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\n\xe9")
    with pytest.raises(DataError) as found:
        read_questions([str(tmp_path / name) for name in ("latin.jsonl", "empty.txt", "missing.jsonl")])
    told = str(found.value)
    assert "latin.jsonl:2" in told
    assert "there is no question in it" in told
    assert "missing.jsonl: there is no such file" in told
