"""Default epochs, learning rate and batch size, chosen by rows, model width and method.

Sources. Rate: Schulman et al., "LoRA Without Regret", Thinking Machines Lab, 2025. Its cookbook uses 5e-4 for LoRA at a
width of 2,000, falling with width to the power 0.78, and a tenth for full tuning. Large batches hurt LoRA more than
full tuning. Epochs: Muennighoff et al., "Scaling Data-Constrained Language Models", 2023: up to four epochs of the same
rows are nearly as good as new rows. New heads: Mosbach et al., "On the Stability of Fine-tuning BERT", 2021: small sets
need many more steps, 20 epochs in the paper, in batches of 16 as in BERT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.peft_options import rate_factor
from llmtune.recipe.schema import Recipe

WIDTH = 2000
LORA_RATE = 5e-4
"""At WIDTH."""
EXPONENT = 0.78
HIGHEST_LORA_RATE = 1e-3
"""Cap for narrow models: the sources have none below a width of 1,000."""
PREFERENCE_SHARE = 0.2
"""Preference tuning starts from a model that already answers, and large steps destroy its answers."""
BATCHES = ((1600, 16), (400, 8), (0, 4))
"""(minimum training rows, batch size), largest first."""
STEPS, MOST_EPOCHS = 100, 4
HEAD_BATCH, HEAD_STEPS, MOST_HEAD_EPOCHS = 16, 300, 20
MOST_STARTED_EPOCHS = 5
"""For a head that starts at a regression (`llmtune.tasks.frozen_base`): it need not be found from random weights."""
ACCURACY = "accuracy"
FEW_STEPS = 50
"""A run with fewer steps warns: the schedule has too little time."""


class Choice(NamedTuple):
    """A value and the reason for it."""

    value: Any
    """A number, a metric, or a tuple of metrics."""
    why: str

    def __str__(self) -> str:
        """Write the value with its reason."""
        shown = f"{self.value:g}" if isinstance(self.value, float | int) else "".join(self.value)
        return f"{shown} (chosen: {self.why})"


def choose_training(recipe: Recipe, rows: int, width: int | None, new_head: bool) -> dict[str, Choice]:
    """Return the rule's values for keys of `train` that the recipe does not set.

    Args:
        recipe: As loaded; `model_fields_set` distinguishes stated values from defaults.
        rows: Training rows.
        width: Hidden size of the model, if its configuration names one.
        new_head: Whether training starts with a new head.
    """
    train = recipe.train
    batch = HEAD_BATCH if new_head else next(size for least, size in BATCHES if rows >= least)
    if "batch_size" in train.model_fields_set or train.batch_tokens is not None:
        batch = train.batch_size
    most_epochs = MOST_STARTED_EPOCHS if starts_fitted(recipe) else MOST_HEAD_EPOCHS
    steps, most = (HEAD_STEPS, most_epochs) if new_head else (STEPS, MOST_EPOCHS)
    epochs = min(most, max(1, math.ceil(steps * batch / max(rows, 1))))
    rate = min(HIGHEST_LORA_RATE, LORA_RATE * (WIDTH / (width or WIDTH)) ** EXPONENT)
    rate *= rate_factor(recipe.adapter.method)
    rate *= PREFERENCE_SHARE if recipe.variant.loss else 1
    choices = {
        "learning_rate": Choice(float(f"{rate:.1e}"), f"{recipe.adapter.method}, width {width or 'unknown'}"),
        "num_train_epochs": Choice(float(epochs), f"{rows} rows, about {steps} steps, at most {most} epochs"),
        "batch_size": Choice(batch, f"{rows} rows"),
        **choose_measure(recipe),
    }
    instead = {"num_train_epochs": train.max_steps, "batch_size": train.batch_tokens}
    return {
        key: choice for key, choice in choices.items() if key not in train.model_fields_set and instead.get(key) is None
    }


def choose_measure(recipe: Recipe) -> dict[str, Choice]:
    """Return accuracy as the measure of the best checkpoint of a head that starts at a regression.

    A model that learned few rows is sure of its errors, so that the loss is lowest at an early step, where the learning
    rate is still high and the labels are worse. Nothing if the recipe has a measure, or its labels are numbers.
    """
    train, measured = recipe.train, recipe.evaluate.metrics
    chooses = bool(recipe.data.validation) and train.load_best_model_at_end
    stated = {"eval_metrics", "metric_for_best_model"} & train.model_fields_set
    if not chooses or stated or not starts_fitted(recipe) or ACCURACY not in measured:
        return {}
    why = "the loss of few rows is lowest too early"
    return {"eval_metrics": Choice((ACCURACY,), why), "metric_for_best_model": Choice(ACCURACY, why)}


def starts_fitted(recipe: Recipe) -> bool:
    """Return whether a new head starts at a regression on the base's features, the one that `frozen` scores."""
    return "frozen" in recipe.variant.facts.simple_baselines


def with_choices(loaded: LoadedRecipe, choices: Mapping[str, Choice]) -> LoadedRecipe:
    """Return the recipe with the chosen values set, and their reasons as origins."""
    values = {key: one.value for key, one in choices.items()}
    train = loaded.recipe.train.model_copy(update=values)
    origins = {f"train.{key}": f"chosen: {one.why}" for key, one in choices.items()}
    recipe = loaded.recipe.model_copy(update={"train": train})
    return replace(loaded, recipe=recipe, origins=loaded.origins | origins)


def with_length(loaded: LoadedRecipe, length: int, model: str) -> LoadedRecipe:
    """Return the recipe with `data.max_length` set to the context length of the chosen candidate."""
    data = loaded.recipe.data.model_copy(update={"max_length": length})
    origins = {**loaded.origins, "data.max_length": f"chosen: the context of {model}"}
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"data": data}), origins=origins)


def count_checkpoints(recipe: Recipe, rows: int) -> int:
    """Return how many checkpoints training will choose from by validation rows; 1 if it does not choose."""
    train = recipe.train
    if not recipe.data.validation or not (train.load_best_model_at_end or train.early_stopping_patience):
        return 1
    of_epoch = math.ceil(rows / train.batch_size)
    steps = train.max_steps or math.ceil((train.num_train_epochs or 1) * of_epoch)
    return max(1, math.ceil(steps / (train.eval_steps or of_epoch)))


def compared_checkpoints(recipe: Recipe, curve: Sequence[Mapping[str, object]]) -> int:
    """Return how many checkpoints training chose from by validation rows; `curve` has the lines of metrics.jsonl."""
    chooses = recipe.train.load_best_model_at_end or recipe.train.early_stopping_patience
    return max(1, sum("validation_loss" in line for line in curve)) if chooses else 1


def few_steps(recipe: Recipe, rows: int) -> str | None:
    """Return a warning if `rows` training rows give few steps and the recipe does not set the steps itself."""
    train = recipe.train
    if train.max_steps is not None or train.batch_tokens is not None:
        return None
    steps = math.ceil(train.num_train_epochs * math.ceil(rows / train.batch_size))
    more = "Add rows, raise train.num_train_epochs or lower train.batch_size"
    return f"Only {steps} steps: expect little change. {more}." if steps < FEW_STEPS else None
