"""Tagged words in a text: aligned to tokens, learned, measured as in seqeval."""

import pytest
import torch
from support import families, pairs
from support.pairs import quiet
from support.variants import TOKEN_CLASSIFY, predict
from transformers import AutoConfig

from llmtune.data.row_store import load_rows
from llmtune.errors import DataError
from llmtune.pipeline import run_pipeline
from llmtune.plan import open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.run_models import Models
from llmtune.store.run_request import RunRequest
from llmtune.tasks import token_classify
from llmtune.tasks.registry import get_task

COLOURS = ("red", "green", "blue")
THINGS = ("cat", "dog", "bird", "fish", "fox", "house", "river", "stone")


def tagged(thing, colour, number):
    tokens = ["The", "quick", thing, "is", colour, f"({number})", "."]
    return {"tokens": tokens, "tags": ["O", "B-THING", "I-THING", "O", "B-COLOUR", "O", "O"]}


ROWS = [tagged(thing, colour, number) for thing in THINGS for colour in COLOURS for number in (1, 23, 456)]


def run_recipe(*about, **sections):
    return pairs.run_recipe(*about, "token-classify", generation={"max_new_tokens": None}, **sections)


def recipe_of(*about, **sections):
    return pairs.recipe_of(*about, "token-classify", generation={"max_new_tokens": None}, **sections)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, built):
    """The folder of a run, and its report."""
    folder = tmp_path_factory.mktemp("finished")
    sections = {"data": {"max_length": 64}, "adapter": {"method": "full"}}
    sections["train"] = {"num_train_epochs": 3, "learning_rate": 5e-3}
    sections["evaluate"] = {"metrics": ["loss", "f1", "precision", "recall", "accuracy"]}
    return folder / "run", run_recipe(folder, built("bert"), ROWS, **sections)


def test_the_data_report_counts_entities_by_type_and_split(finished):
    _, report = finished
    sides = report["data"]["kept"]
    assert sum(sides.values()) == len(ROWS)
    assert report["data"]["classes"] == {"COLOUR": sides, "THING": sides}


def test_a_tuned_model_is_a_base_with_a_trained_head_for_the_same_types(finished, tmp_path):
    run, report = finished
    sections = {"data": {"max_length": 64}, "train": {"num_train_epochs": None, "max_steps": 1, "learning_rate": 1e-9}}
    again = run_recipe(tmp_path, run / "weights", ROWS, **sections)
    assert again["evaluation"]["baseline"] is None
    assert again["evaluation"]["base"]["f1"] == pytest.approx(report["evaluation"]["tuned"]["f1"])
    other = [{**row, "tags": [tag.replace("THING", "BEING") for tag in row["tags"]]} for row in ROWS]
    again = run_recipe(tmp_path / "other", run / "weights", other, **sections)
    assert again["evaluation"]["baseline"] == "the most frequent tag (O) on every word"


def test_an_overlong_text_gets_a_tag_for_each_word(finished):
    run, _ = finished
    context = open_finished(run, quiet(), True)
    processor = context.plan.processor
    words = ROWS[0]["tokens"] * 64
    with Models(context).tuned() as model, torch.no_grad():
        (said, dropped) = predict(
            TOKEN_CLASSIFY,
            model,
            [{"tokens": words, "tags": []}, {"tokens": ["\N{ZERO WIDTH SPACE}"], "tags": []}],
            processor,
            context.plan.recipe,
        )
        (huge,) = predict(TOKEN_CLASSIFY, model, [{"tokens": ["1" * 999], "tags": []}], processor, context.plan.recipe)
    assert len(processor(" ".join(words))["input_ids"]) > families.LONGEST
    assert len(said) == len(words)
    assert {"B-THING", "B-COLOUR"} <= set(said[-64:])
    assert dropped == ["O"]
    assert len(huge) == 1


def test_labels_come_from_the_rows_unless_the_recipe_names_them(built, tmp_path):
    recipe = load_recipe(str(recipe_of(tmp_path, built("bert"), ROWS))).recipe
    config = AutoConfig.from_pretrained(built("bert"))
    run_pipeline(load_recipe(str(tmp_path / "recipe.yaml")), RunRequest(out=tmp_path / "run", until="prepare"), quiet())
    rows = load_rows(tmp_path / "run" / "data" / "rows")
    assert token_classify.VARIANTS[0].infer_labels(recipe, rows, config).token_classify.labels == ("COLOUR", "THING")
    named = Recipe.model_validate({**recipe.model_dump(), "token_classify": {"labels": ["THING", "COLOUR", "PLACE"]}})
    assert token_classify.VARIANTS[0].infer_labels(named, rows, config).token_classify.labels == (
        "THING",
        "COLOUR",
        "PLACE",
    )
    config.id2label = dict(enumerate(["O", "B-THING", "I-THING", "B-COLOUR", "I-COLOUR"]))
    assert token_classify.VARIANTS[0].infer_labels(recipe, rows, config).token_classify.labels == (
        "THING",
        "COLOUR",
    )  # the model's order


def test_rows_without_any_entity_are_refused(built, tmp_path):
    rows = [{"tokens": row["tokens"], "tags": ["O"] * 7} for row in ROWS]
    with pytest.raises(DataError, match="no row has an entity"):
        run_recipe(tmp_path, built("bert"), rows)


def test_a_task_formats_its_rows_for_display():
    task, row = get_task("token-classify"), ROWS[0]
    prompt, answer = task.split_answer(row)
    assert prompt == {"tokens": row["tokens"], "tags": []}
    assert answer == "quick cat (THING), red (COLOUR)"
    assert task.split_answer({**row, "tags": ["O"] * 7})[1] == "(none)"
    assert task.reference(row) == row["tags"]
    assert task.make_row({"prompt": "Ada (1815)"}) == {"tokens": ["Ada", "(", "1815", ")"], "tags": []}
    assert task.format_answer(row["tags"], row) == answer
