"""The state of a training before its first step."""

import pytest
from support import families
from support.classifying import recipe_for
from support.pairs import start_training

ROWS = [{"text": f"the cat number {i * 7} is blue", "label": 1000.0 + i % 7} for i in range(40)]


@pytest.mark.parametrize(("family", "method"), [("bert", "lora"), ("roberta", "full")])
def test_a_new_head_for_numbers_starts_near_their_mean_and_that_of_a_sharded_model_at_it(tmp_path, family, method):
    model = getattr(families, f"build_{family}")(tmp_path / "model")
    data = {"validation": 0, "test": 0, "deduplicate": "none"}
    path = recipe_for(tmp_path / "recipe.yaml", model, ROWS, adapter={"method": method}, data=data)
    training = start_training(path, tmp_path / "run")
    labels = [example.values[0] for example in training.examples]
    mean = sum(labels) / len(labels)
    trained = [p for p in training.parameters if p.shape == (1,)]
    assert [bias.item() for bias in trained] == pytest.approx([mean], abs=3)
    training.task.start_head(training.adapted, [*training.examples], training.recipe, whole=False)
    assert [bias.item() for bias in trained] == pytest.approx([mean])
    config = training.adapted.selected.model.config
    guessing = training.task.guessing_loss(config, training.examples, training.recipe)
    assert guessing == pytest.approx(sum((label - mean) ** 2 for label in labels) / len(labels), rel=1e-4)
