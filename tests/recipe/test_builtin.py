import pytest

from llmtune.errors import RecipeError
from llmtune.launch.recipe_check import marks_left
from llmtune.recipe.builtin import find_recipe, list_recipes, new_recipe
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe, json_schema
from llmtune.recipe.section import RecipeSection, descriptions, find_section
from llmtune.recipe.task_facts import TASK_FACTS


def test_shipped_recipes_are_listed_and_pass_the_check():
    shipped = {recipe.name: recipe for recipe in list_recipes()}
    assert {"quickstart", "chat", "chat-qlora", "completion"} <= set(shipped)
    for name, recipe in shipped.items():
        loaded = load_recipe(name)
        assert loaded.recipe.task == recipe.task
        assert len(recipe.description) > 10


def test_a_file_takes_precedence_over_a_shipped_recipe(write):
    path = write(name="quickstart")
    assert find_recipe("quickstart").resolve() == path


def test_an_unknown_recipe_is_refused_with_the_nearest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="recipe 'quikstart' not found") as caught:
        find_recipe("quikstart")
    assert "Did you mean 'quickstart'?" in caught.value.problems[0].fix


def test_a_missing_file_is_refused_with_the_nearest_file_name(write):
    write(name="support.yaml")
    with pytest.raises(RecipeError, match=r"no such recipe file: suport\.yaml") as caught:
        load_recipe("suport.yaml")
    assert caught.value.exit_code == 2
    assert "Did you mean 'support.yaml'?" in caught.value.problems[0].fix


@pytest.mark.parametrize("task", TASK_FACTS)
def test_a_starter_recipe_passes_the_check_with_its_proposed_gates_and_marks_required_values(write, task):
    text = new_recipe(task)
    proposed = text.rsplit("e.g. ", 1)[1].strip()
    loaded = load_recipe(write(text, whole=True), [f"evaluate.gates={proposed}"])
    assert (loaded.recipe.task, bool(loaded.recipe.evaluate.gates)) == (task, True)
    for key in ("name: my-", "train: data", "max_length:", "gates:"):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(key)]
        assert "# SET" in line


def test_a_starter_recipe_for_an_unknown_task_is_refused():
    with pytest.raises(RecipeError, match="Did you mean 'chat'"):
        new_recipe("chatt")


def test_a_recipe_of_a_task_without_starter_runs_and_new_says_what_to_do(write, tmp_path, monkeypatch):
    monkeypatch.setattr("llmtune.recipe.builtin.recipes_folder", lambda: tmp_path)
    assert marks_left(load_recipe(write())) == []
    with pytest.raises(RecipeError, match="task chat has no starter recipe"):
        new_recipe("chat")


def sections(section: type[RecipeSection] = Recipe) -> list[type[RecipeSection]]:
    inner = [find_section(field.annotation) for field in section.model_fields.values()]
    return [section, *(deeper for found in inner if found for deeper in sections(found))]


def test_every_key_has_a_description_with_its_default():
    for section in sections():
        for name, field in section.model_fields.items():
            description = descriptions(section)[name]
            assert len(description) > 15, f"{section.__name__}.{name}"
            assert field.is_required() or "default" in description.lower()


def test_the_json_schema_is_closed_and_accepts_extends_and_short_forms():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert "extends" in schema["properties"]
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
    train = schema["$defs"]["DataSection"]["properties"]["train"]
    assert {"type": "string"} in train["anyOf"]
