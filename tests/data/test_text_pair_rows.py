"""Rows of translations and summaries, from every way of writing them to the canonical one."""

import pytest
from support.rows import prepare, read_row, refusal, write_jsonl

from llmtune.errors import DataError

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
def test_a_row_that_cannot_be_learned_from_is_bad_with_its_reason(row, task, reason):
    assert reason in refusal(row, task)


def test_bad_rows_are_named_with_file_and_line(tmp_path):
    rows = [{"source": f"text {i}", "target": f"texte {i}"} for i in range(40)]
    rows[2]["target"] = ""
    del rows[34]["target"]  # behind the rows that the format is told by
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
    maps.append({"translation": {"en": "one", "de": "un"}})  # the same text in another language is no duplicate
    file = write_jsonl(tmp_path / "maps.jsonl", maps)
    assert prepare(tmp_path, str(file), "translate").counts["train"] == 2
    twice = [{"document": "d", "summary": "s"}] * 2
    assert prepare(tmp_path, str(write_jsonl(tmp_path / "twice.jsonl", twice)), "summarize", "two").counts["train"] == 1
