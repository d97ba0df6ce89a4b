"""`recipes check` reads the rows as `prepare` does, and refuses the same ones in the same words."""

from pathlib import Path

import pytest
from support.families import build_bert
from support.runs import invoke, write_recipe

CLASSES = "text,label,team\n" + "".join(f"words about number {i},{'AB'[i % 2]},{'xy'[i % 2]}\n" for i in range(1200))


@pytest.mark.parametrize("command", [["recipes", "check"], ["prepare"]], ids=" ".join)
@pytest.mark.parametrize(
    ("rows", "sections", "code", "words"),
    [
        (CLASSES, {"evaluate": {"slices": ["taem"]}}, 3, "Did you mean 'team'?"),
        (CLASSES.replace(",B,", ",A,"), {}, 3, "all rows have the label A"),
        (CLASSES.replace(",A,", ',"1,5",').replace(",B,", ',"2,5",'), {}, 3, "set classify.kind: regression"),
        (CLASSES, {"classify": {"kind": "regression"}, "evaluate": {"metrics": ["accuracy"]}}, 2, "'regression'"),
        (CLASSES, {"classify": {"labels": ["A", "C"]}}, 3, "600 of 1,200 rows"),
        (CLASSES, {"data": {"split_by": "same"}}, 3, "no value to split by"),
        (CLASSES, {"data": {"split_by": "team", "deduplicate": "none", "validation": 0.1}}, 3, "are too few for"),
        (CLASSES.replace(",A,", ",,"), {}, 3, "no label"),
        ("text,label\na,A\na,A\na,B\n", {}, 3, "too few"),
    ],
)
def test_check_refuses_the_rows_that_prepare_refuses(
    here: Path, command: list[str], rows: str, sections: dict, code: int, words: str
) -> None:
    (here / "rows.csv").write_text(rows)
    plain: dict = {"task": "classify", "generation": None, "evaluate": {"metrics": None}}
    merged = {**plain, **sections, "evaluate": {"metrics": None} | sections.get("evaluate", {})}
    write_recipe(here / "mine.yaml", build_bert(here / "bert"), "rows.csv", **merged)
    found = invoke(*command, "mine.yaml")
    assert (found.exit_code, words in found.stderr) == (code, True), found.stderr


@pytest.mark.parametrize("command", [["recipes", "check"], ["prepare"]], ids=" ".join)
@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ("number\n1\n2\n", "no column for the passages"),
        ("passage,number\n,1\n,2\nsome,3\n", "2 of 3 passages of data.corpus"),
        ("", "the corpus has no passages"),
    ],
)
def test_check_refuses_the_corpus_that_prepare_refuses(here: Path, command: list[str], corpus: str, words: str) -> None:
    lines = [f"Where is number {i}?,It is at {i}.\n" for i in range(40)]
    (here / "pairs.csv").write_text("".join(["query,passage\n", *lines]))
    (here / "corpus.csv").write_text(corpus)
    more: dict = {"task": "embed", "evaluate": None, "generation": None, "data": {"corpus": "corpus.csv"}}
    write_recipe(here / "mine.yaml", build_bert(here / "bert"), "pairs.csv", **more)
    found = invoke(*command, "mine.yaml")
    assert (found.exit_code, words in found.stderr) == (3, True), found.stderr
