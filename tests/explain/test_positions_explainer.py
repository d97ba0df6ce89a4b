from __future__ import annotations

from functools import partial

import pytest
from support.explaining import expect, explain

invoke = partial(explain, "positions")


def rows(text: str) -> list[list[str]]:
    """The cells of all lines."""
    return [line.split() for line in text.splitlines()]


def test_the_four_rows_of_the_textbook_are_printed(tmp_path):
    result = invoke("--text", "I am a robot", "--dimension", 4, "--base", 100, "--out", tmp_path)
    expect(result, 0, "written:", "positions.html", "positions.png", "positions.svg")
    found = rows(result.stdout)
    assert ["0", "I", "0.00", "1.00", "0.00", "1.00"] in found
    assert ["1", "am", "0.84", "0.54", "0.10", "1.00"] in found
    assert ["2", "a", "0.91", "-0.42", "0.20", "0.98"] in found
    assert ["3", "robot", "0.14", "-0.99", "0.30", "0.96"] in found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "  "), ("--text", "empty", "at least one word")),
        (("--dimension", "5"), ("--dimension", "pairs", "even")),
        (("--dimension", "0"), ("--dimension",)),
        (("--dimension", "-2"), ("--dimension",)),
        (("--base", "1"), ("--base", "above 1")),
        (("--base", "nan"), ("--base",)),
        (("--base", "inf"), ("--base",)),
        (("--length", "5000"), ("--length", "5,000", "4,096")),
        (("--length", "4096", "--dimension", "4096"), ("--dimension", "too many")),
        (("--text", "word " * 4097), ("--text", "4,097")),
        (("--text", "a b", "--length", "3"), ("--length", "Omit it")),
        (("--text", "", "--dimension", "3", "--base", "0.5"), ("--text", "--dimension", "--base")),
    ],
)
def test_invalid_encoding_options_are_all_refused_at_once_with_place_and_fix(tmp_path, arguments, words):
    expect(invoke(*arguments, "--out", tmp_path), 2, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_models_own_table_is_shown_with_the_tokens_of_a_text(built, tmp_path):
    result = invoke(built("bert"), "--text", "The sky is blue.", "--out", tmp_path / "out")
    expect(result, 0)
    assert "Learned position table" in result.stdout
    assert ["0", "[CLS]"] in [line[:2] for line in rows(result.stdout)]
    assert "apart by" in result.stdout
    assert "[CLS]" in (tmp_path / "out" / "positions.html").read_text()


def test_each_head_of_t5_has_a_line(built, tmp_path):
    result = invoke(built("t5"), "--out", tmp_path / "out")
    expect(result, 0)
    assert (tmp_path / "out" / "positions.svg").read_text().count(">head ") == 8
    assert "Relative position bias of the encoder" in result.stdout
    assert "Relative position bias of the decoder" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "fox " * 300), ("--text", "256")),
        (("--length", "257"), ("--length", "257", "256")),
        (("--text", ""), ("--text", "empty")),
        (("--dimension", "4"), ("--dimension", "omit the model")),
        (("--base", "100"), ("--base", "omit the model")),
    ],
)
def test_positions_that_a_model_cannot_show_are_refused(built, tmp_path, arguments, words):
    expect(invoke(built("bert"), *arguments, "--out", tmp_path / "out"), 2, *words)
    assert not (tmp_path / "out").exists()
