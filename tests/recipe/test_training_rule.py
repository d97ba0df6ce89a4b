"""Test that unset epochs, rate and batch size are chosen by rows and model, and stated values are kept."""

import pytest

from llmtune.recipe.loader import load_recipe
from llmtune.recipe.training_rule import choose_training, few_steps, with_choices


def chosen(write, text: str = "", *, rows: int = 196, width: int = 576, new_head: bool = False) -> dict[str, float]:
    choices = choose_training(load_recipe(write(text)).recipe, rows, width, new_head)
    return {key: choice.value for key, choice in choices.items()}


@pytest.mark.parametrize(
    ("rows", "batch", "epochs"), [(60, 4, 4), (196, 4, 3), (982, 8, 1), (2400, 16, 1), (100_000, 16, 1)]
)
def test_small_sets_get_small_batches_and_more_epochs(write, rows, batch, epochs):
    values = chosen(write, rows=rows)
    assert (values["batch_size"], values["num_train_epochs"]) == (batch, epochs)


def test_the_rate_falls_with_width_and_is_a_tenth_for_full_tuning_and_a_fifth_for_preferences(write):
    assert chosen(write, width=576)["learning_rate"] == 1e-3
    assert chosen(write, width=2000)["learning_rate"] == 5e-4
    assert chosen(write, width=4096)["learning_rate"] == pytest.approx(2.9e-4)
    assert chosen(write, "adapter: {method: full}\n", width=2000)["learning_rate"] == 5e-5
    preference = load_recipe(write(), ["task=preference"]).recipe
    assert choose_training(preference, 196, 2000, new_head=False)["learning_rate"].value == 1e-4


def test_a_new_head_is_trained_for_longer(write):
    values = chosen(write, rows=800, new_head=True)
    assert (values["batch_size"], values["num_train_epochs"]) == (16, 6)
    assert chosen(write, rows=800)["num_train_epochs"] == 1


def test_stated_values_are_kept_and_decide_the_rest(write):
    assert chosen(write, "train: {batch_size: 16, learning_rate: 2.0e-4}\n") == {"num_train_epochs": 4}
    assert set(chosen(write, "train: {max_steps: 5}\n")) == {"learning_rate", "batch_size"}
    assert set(chosen(write, "train: {batch_tokens: 500}\n")) == {"learning_rate", "num_train_epochs"}


def test_choices_are_written_with_reasons_and_survive_reloading(write, tmp_path):
    loaded = load_recipe(write())
    made = with_choices(loaded, choose_training(loaded.recipe, 196, 576, new_head=False))
    text = made.to_yaml()
    assert "num_train_epochs: 3.0  # chosen: 196 rows, about 100 steps, at most 4 epochs" in text
    (tmp_path / "again.yaml").write_text(text)
    again = load_recipe(tmp_path / "again.yaml").recipe
    assert again.train.batch_size == 4
    assert choose_training(again, 5000, 576, new_head=False) == {}


def test_few_steps_give_a_warning(write):
    few = load_recipe(write("train: {batch_size: 16, num_train_epochs: 1}\n")).recipe
    assert few_steps(few, 218).startswith("Only 14 steps")
    assert few_steps(few, 2000) is None
    assert few_steps(load_recipe(write("train: {max_steps: 5}\n")).recipe, 218) is None
