"""Names of classes: their usual form, names that differ only by case, renames."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.data.row_kind import earlier_forms, names_in, rename_row
from llmtune.recipe.class_names import find_cycle, follow_renames, show_name, similar_names, tidy_name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Konto", "Konto"),
        (" Konto\t", "Konto"),
        ("\u00a0Konto\u3000", "Konto"),
        ("\ufeffKonto", "Konto"),
        ("Kon\u00adto\u200b", "Konto"),
        ("Konto\u200d", "Konto"),
        ("Neue \u00a0 Rechnung", "Neue Rechnung"),
        ("Sto\u0308rung", "Störung"),
        ("\u200eחשבון\u200f", "חשבון"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\u200b \ufeff", ""),
    ],
)
def test_a_class_name_has_one_form(written, name):
    assert tidy_name(written) == name


@given(st.text())
def test_the_usual_form_of_a_name_is_its_own_usual_form(text):
    assert tidy_name(tidy_name(text)) == tidy_name(text)


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["Konto", "konto", "KONTO", "Login"], [["KONTO", "Konto", "konto"]]),
        (["\uff2bonto", "Konto"], [["Konto", "\uff2bonto"]]),
        (["Straße", "STRASSE"], [["STRASSE", "Straße"]]),
        (["می\u200cخواهم", "میخواهم"], [["میخواهم", "می\u200cخواهم"]]),
        (["Konto", "Konten", "Konto 2"], []),
    ],
)
def test_names_that_differ_only_by_case_width_or_joiners_are_similar(names, groups):
    assert similar_names(names) == groups
    assert similar_names(names, distinct=names) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Störung", "'Störung'"),
        ("Konto\u200b", r"'Konto\u200b'"),
        ("\u00a0Konto", r"'\xa0Konto'"),
        ("Sto\u0308rung", r"'Sto\u0308rung'"),
        ("\uff2bonto", r"'\uff2bonto'"),
        ("क्षेत्र", "'क्षेत्र'"),
    ],
)
def test_letters_that_nobody_sees_are_shown_as_escapes(name, shown):
    assert show_name(name) == shown


def test_a_chain_of_renames_ends_at_the_last_name_and_applies_once():
    renames = follow_renames({"a": "b", "b": "c", "x": "c"})
    assert renames == {"a": "c", "b": "c", "x": "c"}
    row = {"text": "t", "pair": None, "label": "a"}
    assert rename_row(rename_row(row, renames), renames) == rename_row(row, renames) == {**row, "label": "c"}


@pytest.mark.parametrize(
    ("rename", "circle"),
    [
        ({"a": "b", "b": "a"}, ["a", "b"]),
        ({"a": "a"}, ["a"]),
        ({"x": "a", "a": "b", "b": "a"}, ["a", "b"]),
        ({"a": "b"}, []),
    ],
)
def test_renames_that_go_in_a_circle_are_found(rename, circle):
    assert find_cycle(rename) == circle


@pytest.mark.parametrize(
    ("row", "names", "renamed"),
    [
        ({"label": "old"}, ["old"], {"label": "new"}),
        ({"label": ["old", "b"]}, ["old", "b"], {"label": ["b", "new"]}),
        ({"label": ["new", "old"]}, ["new", "old"], {"label": ["new"]}),
        ({"label": 2.5}, [], {"label": 2.5}),
        ({"tags": ["B-old", "I-old", "O", "B-b"]}, ["old", "b"], {"tags": ["B-new", "I-new", "O", "B-b"]}),
        ({"messages": []}, [], {"messages": []}),
    ],
)
def test_labels_lists_and_tags_are_renamed(row, names, renamed):
    assert names_in(row) == names
    assert rename_row(row, {"old": "new"}) == renamed


def test_a_row_has_an_earlier_form_for_each_earlier_name_of_its_class():
    renames = {"a": "c", "b": "c"}
    assert [form["label"] for form in earlier_forms({"label": "c"}, renames)] == ["a", "b"]
    assert [form["tags"] for form in earlier_forms({"tags": ["B-c", "O"]}, renames)] == [["B-a", "O"], ["B-b", "O"]]
    assert list(earlier_forms({"label": "d"}, renames)) == []
