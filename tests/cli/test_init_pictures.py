"""llmtune init on pictures: each form of rows gives a recipe for chat that reads them, with a model for pictures."""

import json

import pytest
from datasets import Dataset, Features, Image, Value
from rich.console import Console
from support.pictures import picture_bytes, save
from support.runs import invoke

from llmtune.data.pictures import row_pictures
from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import iterate_rows
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.model_kind import PROPOSED_MODELS

QUESTIONS = ("What is in the picture?", "Describe it.", "Which thing is this?")
ANSWERS = [f"a dot of kind {number} on grey" for number in range(20)]


def write_table(folder, name, head, questions=False):
    for number in range(20):
        save(folder / f"{number}.png", number)
    cells = [f"{n}.png,{QUESTIONS[n % 3] + ',' if questions else ''}{answer}" for n, answer in enumerate(ANSWERS)]
    (folder / name).write_text("\n".join([head, *cells]) + "\n")


def write_messages(folder):
    write_table(folder, "unused.txt", "")
    (folder / "unused.txt").unlink()
    with (folder / "rows.jsonl").open("w") as file:
        for number, answer in enumerate(ANSWERS):
            parts = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": QUESTIONS[number % 3]}]
            messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_parquet(folder):
    features = Features({"image": Image(), "caption": Value("string")})
    cells = [{"bytes": picture_bytes(number), "path": None} for number in range(20)]
    Dataset.from_dict({"image": cells, "caption": ANSWERS}, features=features).to_parquet(folder / "rows.parquet")


FORMS = {
    "a folder with a table": ("", lambda folder: write_table(folder, "metadata.csv", "file_name,text")),
    "a table": ("rows.csv", lambda folder: write_table(folder, "rows.csv", "image,question,answer", questions=True)),
    "a table with other names": ("rows.csv", lambda folder: write_table(folder, "rows.csv", "shot,note")),
    "messages": ("rows.jsonl", write_messages),
    "parquet": ("rows.parquet", write_parquet),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", FORMS)
def test_rows_with_pictures_get_a_recipe_that_reads_them(form, tmp_path):
    name, write = FORMS[form]
    (folder := tmp_path / "pictures").mkdir()
    write(folder)
    done = invoke("init", str(folder / name), "--out", "dots.yaml")
    assert done.exit_code == 0, done.stderr
    recipe = load_recipe("dots.yaml").recipe
    assert recipe.task == "chat"
    assert recipe.model.name in [model for _, model in PROPOSED_MODELS["image-text"].hub]
    assert recipe.data.max_length >= 1280
    assert [gate.partition(" > ")[2] for gate in recipe.evaluate.gates] == ["base", "blind"]
    assert invoke("recipes", "check", "dots.yaml").exit_code == 0
    rows = prepare_rows(recipe, tmp_path / "rows", Console(quiet=True))
    pairs = [row for split in rows.files for _, row in iterate_rows(rows, split)]
    assert [len(row_pictures(row)) for row in pairs] == [1] * 20
    assert {row["messages"][-1]["content"] for row in pairs} == {*ANSWERS}
