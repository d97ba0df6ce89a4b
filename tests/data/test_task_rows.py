"""Rows of questions, tagged words, translations and summaries, in real formats."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rows import prepare, read_row, refusal, write_jsonl

from llmtune.data.row_formats import FORMATS, detect_format, parse_row
from llmtune.data.task_rows import find_words
from llmtune.errors import DataError

CONTEXT = "The sky is blue. A cat has four legs."
QA = {"question": "How many legs has a cat?", "context": CONTEXT}
FOUR = {"text": "four", "start": 27}


def canonical(row, task, name):
    assert detect_format([row], task, {}, None, "file").name == name
    return parse_row(row, FORMATS[name], task)


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["four", "four legs"], "answer_start": [27, 27]},
        {"text": ["four", "four legs"]},
        {"text": ["four", "four legs"], "answer_start": None},
        [{"text": "four", "answer_start": 27}, {"text": "four legs", "start": 27}],
        json.dumps({"text": ["four", "four legs"], "answer_start": [27, 27]}),
    ],
)
def test_answers_are_read_in_all_squad_forms(answers):
    row = canonical({**QA, "answers": answers}, "qa", "squad")
    assert row == {**QA, "answers": [FOUR, {"text": "four legs", "start": 27}]}


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, {"text": []}, []])
def test_a_question_without_an_answer_has_an_empty_list(answers):
    assert canonical({**QA, "answers": answers}, "qa", "squad") == {**QA, "answers": []}


@pytest.mark.parametrize(("answer", "answers"), [("four", [FOUR]), ("", []), (None, [])])
def test_a_single_answer_is_found_in_the_context(answer, answers):
    assert canonical({**QA, "answer": answer}, "qa", "question-answer") == {**QA, "answers": answers}


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"text": ["five"], "answer_start": [27]}, "'five' is not in it at character 27"),
        ({"text": ["four"], "answer_start": [26]}, "'four' is not in it at character 26"),
        ({"text": ["four"], "answer_start": [-10]}, "answer not in the context"),
        ({"text": ["four"], "answer_start": [True]}, "'answer_start' is"),
        ({"text": ["four"], "answer_start": ["27"]}, "'answer_start' is"),
        ({"text": ["four", "blue"], "answer_start": [27]}, "2 answers and 1 starts"),
        ({"text": [" "], "answer_start": [3]}, "a question without one has an empty list"),
        ({"text": [4], "answer_start": [3]}, "an answer"),
        ({"text": "four"}, "'answers' must be {text: [...], answer_start: [...]}"),
        (["four"], "it must be {text, answer_start}"),
        ("four", "'answers' must be {text: [...], answer_start: [...]}"),
        (None, "'answers' must be"),
    ],
)
def test_bad_answers_give_a_reason(answers, said):
    assert said in refusal({**QA, "answers": answers}, "qa")


def test_questions_and_contexts_are_required():
    assert "'question'" in refusal({**QA, "question": " ", "answer": "four"}, "qa")
    assert "'context'" in refusal({**QA, "context": None, "answer": "four"}, "qa")
    assert "'five' is not in it" in refusal({**QA, "answer": "five"}, "qa")


TAGS = ["B-PERSON", "I-PERSON", "O"]
TOKENS = ["Ada", "Lovelace", "wrote"]


@pytest.mark.parametrize("row", [{"tokens": TOKENS, "tags": TAGS}, {"tokens": json.dumps(TOKENS), "tags": str(TAGS)}])
def test_tokens_and_tags_are_read_as_lists_or_as_text_in_a_cell(row):
    row["tags"] = row["tags"].replace("'", '"') if isinstance(row["tags"], str) else row["tags"]
    assert canonical(row, "token-classify", "tokens-tags") == {"tokens": TOKENS, "tags": TAGS}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["I-A", "I-A", "O", "I-A"], ["B-A", "I-A", "O", "B-A"]),  # IOB1: an entity begins with I-
        (["I-A", "B-A", "I-A"], ["B-A", "B-A", "I-A"]),  # and with B- if it touches another one
        (["I-A", "I-B"], ["B-A", "B-B"]),
        (["B-A", "I-B", "I-B"], ["B-A", "B-B", "I-B"]),
        (["B-A", "I-A", "B-A", "O"], ["B-A", "I-A", "B-A", "O"]),
        (["B-a-b", "I-a-b"], ["B-a-b", "I-a-b"]),
    ],
)
def test_iob1_becomes_iob2(first, second):
    row = {"tokens": ["w"] * len(first), "tags": first}
    assert canonical(row, "token-classify", "tokens-tags")["tags"] == second


@pytest.mark.parametrize(
    ("tokens", "tags", "said"),
    [
        (TOKENS, TAGS[:2], "3 tokens and 2 tags"),
        ([], [], "no tokens"),
        (["Ada", " ", "wrote"], TAGS, "token 2 is empty"),
        (["Ada", 7, "wrote"], TAGS, "'tokens'"),
        (TOKENS, [1, 2, 0], "tag 1 is 1; tags are O, B-NAME and I-NAME; numbers need their names"),
        (TOKENS, ["B-A", "S-A", "O"], "tag 2 is 'S-A'"),
        (TOKENS, ["B-A", "I-", "O"], "tag 2 is 'I-'"),
        ("Ada Lovelace wrote", TAGS, "must be lists of texts"),
        (TOKENS, None, "must be lists of texts"),
    ],
)
def test_bad_tags_give_a_reason_and_a_fix(tokens, tags, said):
    assert said in refusal({"tokens": tokens, "tags": tags}, "token-classify")


def test_spans_become_tags_of_words():
    text = "Ada Lovelace, born in London."
    spans = [{"start": 0, "end": 12, "label": "PERSON"}, {"start": 22, "end": 28, "label": "PLACE"}]
    assert canonical({"text": text, "spans": spans}, "token-classify", "text-spans") == {
        "tokens": ["Ada", "Lovelace", ",", "born", "in", "London", "."],
        "tags": ["B-PERSON", "I-PERSON", "O", "O", "O", "B-PLACE", "O"],
    }
    assert canonical({"text": text, "spans": []}, "token-classify", "text-spans")["tags"] == ["O"] * 7


def test_adjacent_spans_are_two_entities():
    spans = [{"start": 0, "end": 1, "label": "N"}, {"start": 1, "end": 2, "label": "N"}]
    assert canonical({"text": "!?", "spans": spans}, "token-classify", "text-spans")["tags"] == ["B-N", "B-N"]


@pytest.mark.parametrize(
    ("span", "said"),
    [
        ({"start": 0, "end": 6, "label": "P"}, "'Ada Lo' does not begin and end at word boundaries"),
        ({"start": 3, "end": 4, "label": "P"}, "' ' does not begin and end at word boundaries"),
        ({"start": 0, "end": 99, "label": "P"}, "characters 0 to 99 of 12"),
        ({"start": 4, "end": 4, "label": "P"}, "characters 4 to 4 of 12"),
        ({"start": "0", "end": 3, "label": "P"}, "characters 0 to 3 of 12"),
        ({"start": 0, "end": 3}, "a span must be {start, end, label}"),
        ({"start": 0, "end": 3, "label": None}, "'label'"),
        ({"start": 0, "end": 3, "label": " "}, "'label'"),
    ],
)
def test_bad_spans_give_a_reason(span, said):
    assert said in refusal({"text": "Ada Lovelace", "spans": [span]}, "token-classify")


def test_overlapping_spans_and_spans_outside_a_list_are_refused():
    spans = [{"start": 0, "end": 12, "label": "P"}, {"start": 4, "end": 12, "label": "P"}]
    assert "'Lovelace' is marked twice" in refusal({"text": "Ada Lovelace", "spans": spans}, "token-classify")
    assert "'spans' must be a list" in refusal({"text": "Ada", "spans": "none"}, "token-classify")


def test_words_keep_their_accents_and_vowel_signs():
    for text in ("नमस्ते", "cafe\u0301", "می\u200cروم", "snake_case", "Straße"):
        assert find_words(text) == [(0, len(text))]
    assert [("can't (1.5)")[a:b] for a, b in find_words("can't (1.5)")] == ["can", "'", "t", "(", "1", ".", "5", ")"]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_words_cover_all_of_a_text_except_spaces(text):
    words = find_words(text)
    assert "".join(text[start:end] for start, end in words) == "".join(text.split())
    assert all(start < end for start, end in words)
    assert all(before[1] <= after[0] for before, after in pairwise(words))


# Translations and summaries

PAIR = {"source": "one", "target": "un"}


def test_a_translation_is_read_with_and_without_its_languages():
    assert read_row(PAIR, "translate") == {**PAIR, "source_language": None, "target_language": None}
    named = {**PAIR, "source_language": " eng_Latn ", "target_language": "fra_Latn"}
    assert read_row(named, "translate") == {**named, "source_language": "eng_Latn"}
    assert read_row({**named, "target_language": ""}, "translate")["target_language"] is None


def test_a_map_of_two_languages_goes_from_the_first_to_the_second():
    row = read_row({"translation": {"en": "one", "fr": "un"}, "id": "7"}, "translate")
    assert row == {**PAIR, "source_language": None, "target_language": None, "languages": ["en", "fr"]}


@pytest.mark.parametrize(
    ("row", "task", "reason"),
    [
        ({"source": "one", "target": ""}, "translate", "no answer: 'target' is empty"),
        ({"source": "one", "target": None}, "translate", "no answer: 'target' is empty"),
        ({"source": " \n", "target": "un"}, "translate", "empty content: 'source' is empty"),
        ({"source": ["one"], "target": "un"}, "translate", "'source'"),
        ({**PAIR, "source_language": 7}, "translate", "'source_language'"),
        ({"translation": {"en": "one"}}, "translate", "'translation' must be two texts"),
        ({"translation": {"en": "one", "fr": "un", "de": "eins"}}, "translate", "'translation' must be two texts"),
        ({"translation": ["one", "un"]}, "translate", "'translation' must be two texts"),
        ({"translation": {"en": "one", "fr": ""}}, "translate", "no answer: 'target' is empty"),
        ({"document": "a long text", "summary": "  "}, "summarize", "no answer: 'summary' is empty"),
        ({"document": None, "summary": "short"}, "summarize", "empty content: 'document' is empty"),
        ({"document": {"text": "a"}, "summary": "short"}, "summarize", "'document'"),
    ],
)
def test_an_unusable_row_is_bad_with_a_reason(row, task, reason):
    assert reason in refusal(row, task)


def test_bad_rows_are_named_with_file_and_line(tmp_path):
    rows = [{"source": f"text {i}", "target": f"texte {i}"} for i in range(40)]
    rows[2]["target"] = ""
    del rows[34]["target"]  # after the rows that decide the format
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, str(file), "translate", max_dropped=0)
    text = str(caught.value)
    assert f"{file}:3: no answer: 'target' is empty" in text
    assert f"{file}:35: missing column: source-target rows need 'target'" in text
    assert caught.value.exit_code == 3
    kept = prepare(tmp_path, str(file), "translate", max_dropped=0.5)
    assert (kept.rows_in, kept.counts["train"], sum(kept.dropped.values())) == (40, 38, 2)


def test_equal_rows_of_both_tasks_are_duplicates(tmp_path):
    maps = [{"translation": {"en": "one", "fr": "un"}}, {"translation": {"en": "one ", "fr": "un"}}]
    maps.append({"translation": {"en": "one", "de": "un"}})  # the same text in another language is not a duplicate
    file = write_jsonl(tmp_path / "maps.jsonl", maps)
    assert prepare(tmp_path, str(file), "translate").counts["train"] == 2
    twice = [{"document": "d", "summary": "s"}] * 2
    assert prepare(tmp_path, str(write_jsonl(tmp_path / "twice.jsonl", twice)), "summarize", "two").counts["train"] == 1
