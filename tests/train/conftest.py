import pytest
from support.training import make_recipe, write_examples


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    """Sixty training rows and ten validation rows of 8 to 40 tokens."""
    return write_examples(tmp_path_factory.mktemp("train") / "examples", train=60, validation=10)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_llama, examples):
    """An uninterrupted run with dropout: its folder, its recipe, its record."""
    from support.training import run_training

    folder = tmp_path_factory.mktemp("finished")
    recipe = make_recipe(folder, tiny_llama, adapter={"lora_dropout": 0.1}, train={"save_steps": 3, "eval_steps": 5})
    return folder / "run", recipe, run_training(folder / "run", recipe, examples)
