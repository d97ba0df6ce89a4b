"""Class names in rows: one form from every file, counted changes, refused variants, renames."""

import io
import json

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from support.rows import write_jsonl

from llmtune.data.preparation import prepare_rows, rows_inputs
from llmtune.data.row_store import iterate_columns, iterate_rows, load_rows
from llmtune.errors import DataError, RecipeError
from llmtune.recipe.loader import load_recipe
from llmtune.records import SPLITS

FORMS = ["Konto", "Konto ", "\u00a0Konto", "\ufeffKonto", "Kon\u200bto"]
WRITERS = {
    "jsonl": lambda path, rows: write_jsonl(path, rows),
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "csv": lambda path, rows: pandas.DataFrame(rows).to_csv(path, index=False, encoding="utf-8-sig"),
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


def prepared(folder, train, task="classify", section="", **data):
    """Prepare rows; return them with the printed text."""
    settings = {"validation": 0, "test": 0, "deduplicate": "none", **data}
    lines = [f"{key}: {json.dumps(value)}" for key, value in {"train": train, **settings}.items()]
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"task: {task}\nmodel: {{name: x/y}}\ndata: {{{', '.join(lines)}}}\n{section}")
    out = Console(file=io.StringIO(), width=400, no_color=True)
    return prepare_rows(load_recipe(recipe).recipe, folder / "out", out), out.file.getvalue()


def labels_of(rows, split="train"):
    return sorted(str(row["label"]) for _, row in iterate_rows(rows, split))


@pytest.mark.parametrize("kind", WRITERS)
def test_blanks_marks_and_composition_of_labels_are_normalised_and_counted_from_every_file(tmp_path, kind):
    rows = [{"label": form, "text": f"text {at}"} for at, form in enumerate([*FORMS, "Sto\u0308rung", "Störung"])]
    WRITERS[kind](tmp_path / f"rows.{kind}", rows)
    made, printed = prepared(tmp_path, f"rows.{kind}")
    assert labels_of(made) == ["Konto"] * len(FORMS) + ["Störung"] * 2
    changes = {(one["from"], one["to"], one["rows"]) for one in made.class_changes}
    assert changes == {*((form, "Konto", 1) for form in FORMS[1:]), ("Sto\u0308rung", "Störung", 1)}
    assert r"5 class names were normalised: 'Konto ' -> 'Konto' (1), 'Kon\u200bto' -> 'Konto' (1)" in printed
    assert load_rows(tmp_path / "out").class_changes == made.class_changes


def test_labels_in_lists_and_in_utf16_are_normalised_too(tmp_path):
    (tmp_path / "rows.csv").write_text('text,label\none,"[""Konto "", ""Login""]"\ntwo,"[""Konto""]"\n', "utf-16")
    made, _ = prepared(tmp_path, {"path": "rows.csv", "encoding": "utf-16"})
    assert labels_of(made) == ["['Konto', 'Login']", "['Konto']"]
    assert [one["rows"] for one in made.class_changes] == [1]


def test_tags_spans_and_classes_of_vectors_are_normalised_too(tmp_path):
    write_jsonl(tmp_path / "tags.jsonl", [{"tokens": ["Ada", "wrote"], "tags": ["B-Perso\u0308n ", "O"]}])
    write_jsonl(tmp_path / "spans.jsonl", [{"text": "Ada", "spans": [{"start": 0, "end": 3, "label": "\u00a0Persön"}]}])
    made, _ = prepared(tmp_path, ["tags.jsonl", "spans.jsonl"], "token-classify")
    assert sorted(row["tags"] for _, row in iterate_rows(made, "train")) == [["B-Persön"], ["B-Persön", "O"]]
    assert len(made.class_changes) == 2
    write_jsonl(tmp_path / "embed.jsonl", [{"text": "a", "label": "Konto "}, {"text": "b", "label": "Konto"}])
    made, _ = prepared(tmp_path, "embed.jsonl", "embed")
    assert labels_of(made) == ["Konto", "Konto"]


def test_a_slice_by_the_label_column_has_the_name_of_the_class(tmp_path):
    rows = [{"text": f"text {at}", "team": form} for at, form in enumerate([*FORMS, "Login"])]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    section = "evaluate: {slices: [team]}\nclassify: {rename: {Login: Zugang}}"
    test = {"path": "rows.jsonl", "columns": {"label": "team"}}
    write_jsonl(tmp_path / "train.jsonl", [{"text": "other", "label": "Konto"}])
    made, _ = prepared(tmp_path, "train.jsonl", section=section, test=test)
    assert sorted(one["team"] for one in iterate_columns(made, "test")) == [*["Konto"] * len(FORMS), "Zugang"]


def test_labels_that_differ_by_case_or_width_are_refused_with_counts_files_and_lines(tmp_path):
    write_jsonl(tmp_path / "one.jsonl", [{"text": f"a {at}", "label": "Konto"} for at in range(3)])
    others = [{"text": "b", "label": "Login"}, {"text": "c", "label": "konto"}, {"text": "d", "label": "\uff2bONTO"}]
    write_jsonl(tmp_path / "two.jsonl", others)
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, ["one.jsonl", "two.jsonl"])
    (problem,) = caught.value.problems
    assert problem.what.startswith(
        "one class in several spellings: 'Konto': 3 rows (one.jsonl 3, first in one.jsonl:1)"
    )
    assert "'konto': 1 row (two.jsonl 1, first in two.jsonl:2)" in problem.what
    assert r'set classify.rename: {konto: Konto, "\uff2bONTO": Konto}' in problem.fix.replace("\uff2b", r"\uff2b")
    assert caught.value.exit_code == 3
    rename = 'classify: {rename: {konto: Konto, "\\uff2bONTO": Konto}}'
    made, printed = prepared(tmp_path, ["one.jsonl", "two.jsonl"], section=rename)
    assert labels_of(made) == ["Konto"] * 5 + ["Login"]
    assert "2 class names were renamed: 'konto' -> 'Konto' (1)" in printed
    assert "3 other rows have the class 'Konto': they are one class now." in printed


@pytest.mark.parametrize(
    ("task", "rows", "fix"),
    [
        ("token-classify", [{"tokens": ["a"], "tags": [tag]} for tag in ("B-ORG", "B-Org")], "token_classify.rename"),
        ("embed", [{"text": "a", "label": "Konto"}, {"text": "b", "label": "konto"}], "the same way in all rows"),
        ("classify", [{"text": "a", "label": ["Konto", "x"]}, {"text": "b", "label": ["konto"]}], "classify.rename"),
    ],
)
def test_tags_lists_and_classes_of_vectors_that_differ_by_case_are_refused(tmp_path, task, rows, fix):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="one class in several spellings") as caught:
        prepared(tmp_path, "rows.jsonl", task)
    assert fix in str(caught.value)


def test_two_spellings_that_the_recipe_lists_are_two_classes(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": "Polish"}, {"text": "b", "label": "polish"}])
    made, _ = prepared(tmp_path, "rows.jsonl", section="classify: {labels: [Polish, polish]}")
    assert labels_of(made) == ["Polish", "polish"]


def test_numbers_with_exponents_are_no_variants(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,1e5\nb,1E5\nc,2.5\n")
    assert labels_of(prepared(tmp_path, "rows.csv")[0]) == ["1E5", "1e5", "2.5"]


def test_a_renamed_row_stays_in_its_split_and_renames_prepare_the_rows_again(tmp_path):
    rows = [{"text": f"text {at}", "label": "old" if at % 2 else "b"} for at in range(60)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    before, _ = prepared(tmp_path, "rows.jsonl", test=0.3)
    split = {row["text"]: name for name in SPLITS for _, row in iterate_rows(before, name)}
    old = rows_inputs(load_recipe(tmp_path / "recipe.yaml").recipe)
    after, _ = prepared(tmp_path, "rows.jsonl", section="classify: {rename: {older: old, old: new}}", test=0.3)
    assert split == {row["text"]: name for name in SPLITS for _, row in iterate_rows(after, name)}
    assert {row["label"] for _, row in iterate_rows(after, "train")} == {"b", "new"}
    assert rows_inputs(load_recipe(tmp_path / "recipe.yaml").recipe) != old


def test_tags_are_renamed_with_their_prefixes(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"tokens": ["New", "York", "is"], "tags": ["B-LOC", "I-LOC", "O"]}])
    made, printed = prepared(tmp_path, "rows.jsonl", "token-classify", "token_classify: {rename: {LOC: PLACE}}")
    assert [row["tags"] for _, row in iterate_rows(made, "train")] == [["B-PLACE", "I-PLACE", "O"]]
    assert "'LOC' -> 'PLACE' (1)" in printed


def test_class_names_in_a_recipe_have_the_form_of_the_rows(tmp_path):
    file = tmp_path / "recipe.yaml"
    names = (
        'labels: ["Konto ", "Sto\\u0308rung"], class_weights: {"\\u00a0Konto": 2.0}, rename: {"a  b": "Konto\\u200b"}'
    )
    file.write_text(f"task: classify\nmodel: {{name: x/y}}\ndata: {{train: rows.jsonl}}\nclassify: {{{names}}}\n")
    section = load_recipe(file).recipe.classify
    assert section.labels == ("Konto", "Störung")
    assert section.class_weights == {"Konto": 2.0}
    assert section.rename == {"a b": "Konto"}


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ("classify: {rename: {a: b, b: a}}", "goes in a circle: 'a' -> 'b' -> 'a'"),
        ("classify: {labels: [a, c], rename: {a: b}}", "has 'a', which 'classify.rename' renames to 'b'"),
        ("classify: {kind: regression, rename: {a: b}}", "'classify.rename' has no effect"),
        ('classify: {rename: {" ": b}}', "a class name needs a visible character"),
        ("classify: {labels: [Konto, 'Konto ']}", "names a label twice"),
    ],
)
def test_renames_that_cannot_be_meant_are_refused(tmp_path, section, what):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"task: classify\nmodel: {{name: x/y}}\ndata: {{train: rows.jsonl}}\n{section}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert what in str(caught.value)


def test_a_recipe_without_renames_keeps_its_fingerprint(tmp_path):
    file = tmp_path / "recipe.yaml"
    text = "task: classify\nmodel: {name: x/y}\ndata: {train: rows.jsonl}\nclassify: {kind: single}\n"
    file.write_text(text)
    assert load_recipe(file).fingerprint.startswith("db771dd3")
    file.write_text(text.replace("single}", "single, rename: {a: b}}"))
    assert not load_recipe(file).fingerprint.startswith("db771dd3")
