import pytest

from llmtune.errors import DataError
from llmtune.evaluate.suites.swapped_rows import AnswerKind, read_swaps

OWN = read_swaps(["own"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("He said that SHE was the queen.", "She said that HE was the king."),
        ("my mother-in-law, a woman's woman", "my father-in-law, a man's man"),
        ("Ladies and gentlemen", "Gentlemen and ladies"),
        ("the sheet of the human manager", "the sheet of the human manager"),
        ("he's here; I saw him", "she's here; I saw her"),
        ("that is hers", "that is his"),
    ],
)
def test_complete_words_are_swapped_in_their_case(before, after):
    assert OWN.swap(before) == after


@pytest.mark.parametrize("text", ["I know her.", "It is his.", "Mr Smith", "dad and mum"])
def test_a_word_with_several_partners_stays_and_is_reported(text):
    row, words = OWN.swap_row({"text": f"The woman: {text}", "pair": None})
    ambiguous = [word for word in words if OWN.is_ambiguous(word)]
    assert ambiguous
    assert all(word in row["text"] for word in ambiguous)


def test_every_shipped_unambiguous_word_swaps_back():
    for word, partners in OWN.partners.items():
        for partner in partners:
            assert word in OWN.partners[partner]
        if len(partners) == 1:
            assert OWN.swap(word) == partners[0]


def test_an_answer_that_names_the_group_must_name_the_other_one():
    assert OWN.is_swapped("The woman is a nurse.", "The man is a nurse.")
    assert not OWN.is_swapped("The woman is a nurse.", "The woman is a nurse.")
    assert not OWN.is_swapped("The woman is a nurse.", "The man is a doctor.")
    assert OWN.is_swapped("(a nurse?)", "(a nurse?)")
    assert OWN.is_swapped("It is her book", "It is his book")
    assert OWN.is_swapped("I saw her", "I saw him")
    assert not OWN.is_swapped("I saw her", "I saw it")


def test_all_texts_of_a_row_are_swapped():
    chat = {
        "messages": [
            {"role": "system", "content": "You serve men."},
            {"role": "user", "content": [{"type": "text", "text": "Is he here?"}, {"type": "image"}]},
            {"role": "assistant", "content": None},
        ],
        "tools": [{"name": "he"}],
    }
    row, words = OWN.swap_row(chat)
    assert row["messages"][0]["content"] == "You serve women."
    assert row["messages"][1]["content"][0]["text"] == "Is she here?"
    assert row["tools"] == chat["tools"]
    assert words == ["men", "he"]
    assert OWN.swap_row({"tokens": ["He", "sings"], "tags": []})[0]["tokens"] == ["She", "sings"]
    facts = {"question": "Who is he?", "context": "The king.", "answers": None}
    assert OWN.swap_row(facts)[0] == {"question": "Who is she?", "context": "The queen.", "answers": None}


def has_changed(before, after, labels=(), tolerance=0.0):
    return AnswerKind(OWN, tolerance, labels).differ(before, after)


def test_the_kind_of_answer_decides_what_counts_as_a_change():
    assert has_changed("yes", "no")
    assert not has_changed(" The king ", "The queen")
    assert has_changed({"label": "a", "scores": []}, {"label": "b", "scores": []}, ("a", "b"))
    assert not has_changed({"label": "male"}, {"label": "female"}, ("male", "female"))
    assert has_changed({"label": "male"}, {"label": "male"}, ("male", "female"))
    assert not has_changed({"label": "male"}, {"label": "male"}, ("male", "other"))
    assert not has_changed({"label": ["a", "b"]}, {"label": ["b", "a"]}, ("a", "b"))
    assert has_changed({"label": ["a"]}, {"label": []}, ("a", "b"))
    assert not has_changed({"label": 1.0}, {"label": 1.1}, tolerance=0.2)
    assert has_changed({"label": 1.0}, {"label": 1.3}, tolerance=0.2)
    assert has_changed(["O", "B-PER"], ["O", "O"])
    assert not has_changed({"text": "a king", "start": 1}, {"text": "a queen", "start": 1})
    assert has_changed({"chosen": -1.0, "rejected": -2.0}, {"chosen": -3.0, "rejected": -2.0})
    assert not has_changed({"chosen": -1.0, "rejected": -2.0}, {"chosen": -1.5, "rejected": -2.0})


def test_custom_word_pairs_are_read_and_combined_with_others(tmp_path):
    (tmp_path / "words.csv").write_text("young,old\n\nAnna, Ahmed\nher,him\n")
    found = read_swaps([str(tmp_path / "words.csv")])
    assert found.swap("The OLD man and Anna") == "The YOUNG man and Ahmed"
    assert found.swap("her") == "him"
    assert read_swaps(["own", str(tmp_path / "words.csv")]).is_ambiguous("her")
    assert read_swaps(["own", str(tmp_path / "words.csv")]).swap("old king") == "young queen"


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        (b"a,b\nalone\nc,d,e\nx, X\n", "words.csv:2", "not two different words: 'alone'"),
        (b"\xe9,b\n", "words.csv:1", "not UTF-8"),
    ],
)
def test_unusable_words_are_an_error_with_their_lines(tmp_path, content, where, what):
    file = tmp_path / "words.csv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        read_swaps([str(file)])
    assert str(caught.value.problems[0].where).endswith(where)
    assert len(caught.value.problems) == (3 if b"alone" in content else 1)
