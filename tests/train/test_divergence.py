import json
import math

import numpy as np
import pytest
from support.classifying import recipe_for
from support.families import build_bert
from support.pairs import quiet

from llmtune.errors import TrainingError
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from llmtune.train.divergence import WINDOW, Divergence

GUESSING = math.log(49152)


def feed(losses):
    watch = Divergence(GUESSING)
    return [watch.observe(loss) for loss in losses]


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_very_different_difficulty_do_not_stop_training(seed):
    losses = np.random.default_rng(seed).gamma(1.5, 1.2, 5000)  # between 0 and 15, mean 1.8
    assert losses.max() > 8
    assert not any(feed(losses))
    assert not any(feed(np.linspace(3, 0.1, 200)))
    assert not any(feed([2.0] * 20 + [50.0] * 4 + [2.0] * 20)), "one bad batch, or four"


def test_a_loss_that_diverges_in_the_first_steps_is_detected():
    found = feed([2.2] + [9.5] * 20)
    assert "diverged" in found[WINDOW - 1]


def test_a_loss_that_leaves_a_low_plateau_is_detected_within_ten_steps():
    found = feed([2.0] * 20 + [0.3] * 100 + [7.0] * 10)
    assert not any(found[:120])
    assert "after 0.30" in found[-1]


def test_a_loss_worse_than_guessing_is_detected_for_any_start():
    found = feed([10.5] + [12.5] * 10)
    assert "worse than guessing every token at random" in found[-1]


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("seed", range(5))
def test_a_squared_error_that_only_fluctuates_is_not_stopped(seed, batch):
    errors = np.random.default_rng(seed).normal(0, 20, (2000, batch))
    watch = Divergence(20.0**2, on_tokens=False)
    assert not any(watch.observe(loss) for loss in np.square(errors).mean(1))


@pytest.mark.parametrize("start", [1e-4, 1.0, 400.0])
def test_a_squared_error_that_explodes_is_detected_at_any_scale(start):
    watch = Divergence(start, on_tokens=False)
    found = [watch.observe(loss) for loss in start * np.concatenate([np.ones(50), 1.5 ** np.arange(60)])]
    at = next(i for i, wrong in enumerate(found) if wrong)
    assert 50 < at < 70
    assert "times that of the start" in found[at]


NOISE = np.random.default_rng(0).normal(50, 20, 80)
TEXTS = [f"the {colour} cat number {i}" for i, colour in enumerate(["red", "blue", "green", "black"] * 20)]
NUMBERS = [{"text": text, "label": float(label)} for text, label in zip(TEXTS, NOISE, strict=True)]
"""Labels that are unrelated to their texts."""


def regress(folder, **train):
    model = build_bert(folder / "model", num_hidden_layers=1)
    train = {"batch_size": 4, "num_train_epochs": None, "logging_steps": 100, **train}
    data = {"validation": 0, "test": 0.1, "deduplicate": "none", "packing": False}
    recipe = load_recipe(str(recipe_for(folder / "recipe.yaml", model, NUMBERS, train=train, data=data)))
    return run_pipeline(recipe, RunRequest(out=folder / "run", until="train"), quiet())


@pytest.mark.slow
def test_a_regression_on_noise_runs_for_two_thousand_steps(tmp_path):
    report = regress(tmp_path, max_steps=2000, learning_rate=1e-4)
    assert report["train"]["steps"] == 2000


def test_a_regression_that_explodes_is_stopped(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss diverged: its median .* times that of the start"):
        regress(tmp_path, max_steps=200, learning_rate=10.0, warmup_steps=0)


def test_a_restored_divergence_continues_as_if_never_interrupted():
    losses = [2.0] * 15 + [6.5] * 10
    one = Divergence(GUESSING)
    expected = [one.observe(loss) for loss in losses]
    first = Divergence(GUESSING)
    got = [first.observe(loss) for loss in losses[:18]]
    second = Divergence(GUESSING)
    second.restore(json.loads(json.dumps(first.save())))
    assert got + [second.observe(loss) for loss in losses[18:]] == expected
    assert expected[-1]
