"""Ratings of better and worse answers, by row and as metrics."""

import math

import numpy as np
import pytest
import torch
from support.adapting import open_model, quiet, recipe_with
from support.variants import PREFERENCE
from support.variants import predict as predict_rows
from torch.nn.functional import logsigmoid

from llmtune.adapter.injection import inject, trained_parameters
from llmtune.errors import DataError
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import PreferenceSection
from llmtune.tasks.preference_metrics import measure_preferences, rewards

BASE = [
    {"chosen": -10.0, "rejected": -8.0, "chosen_tokens": 5.0, "rejected_tokens": 4.0, "kl": 0.0},
    {"chosen": -6.0, "rejected": -9.0, "chosen_tokens": 2.0, "rejected_tokens": 3.0, "kl": 0.0},
    {"chosen": -7.0, "rejected": -7.0, "chosen_tokens": 7.0, "rejected_tokens": 7.0, "kl": 0.0},
]
TUNED = [
    {"chosen": -6.0, "rejected": -9.0, "chosen_tokens": 5.0, "rejected_tokens": 4.0, "kl": 0.3},
    {"chosen": -7.0, "rejected": -8.0, "chosen_tokens": 2.0, "rejected_tokens": 3.0, "kl": 0.1},
    {"chosen": -6.0, "rejected": -6.0, "chosen_tokens": 7.0, "rejected_tokens": 7.0, "kl": 0.2},
]
APART = [0.5 * (4 + 1), 0.5 * (-1 - 1), 0.0]
"""Rewards of chosen minus rejected, with beta 0.5."""


def settings(loss="dpo", **more):
    return PreferenceSection(loss=loss, beta=0.5, **more)


def measure(metric, loss="dpo", said=TUNED, base=BASE, thumbs=(True,) * 3, **more):
    return measure_preferences(metric, said, thumbs, settings(loss, **more), base)


@pytest.mark.promise("metric", "referee", equal="rewards by hand", place="margin")
@pytest.mark.promise("metric", "referee", equal="rewards by hand", place="likelihood_accuracy")
@pytest.mark.promise("metric", "referee", equal="rewards by hand", place="kl")
def test_metrics_of_dpo_by_hand():
    assert measure("margin").value == pytest.approx(np.mean(APART))
    assert measure("accuracy").value == pytest.approx((1 + 0 + 0.5) / 3)
    assert measure("likelihood_accuracy").value == pytest.approx((1 + 1 + 0.5) / 3)
    assert measure("kl").value == pytest.approx(0.2)
    assert measure("loss").value == pytest.approx(-float(logsigmoid(torch.tensor(APART)).mean()))
    smooth = -0.8 * logsigmoid(torch.tensor(APART)) - 0.2 * logsigmoid(-torch.tensor(APART))
    assert measure("loss", label_smoothing=0.2).value == pytest.approx(float(smooth.mean()))


def test_the_ipo_loss_is_per_token():
    margins = [4 / 5 + 1 / 4, -1 / 2 - 1 / 3, 1 / 7 - 1 / 7]
    assert measure("loss", "ipo").value == pytest.approx(np.mean([(margin - 1) ** 2 for margin in margins]))


def test_orpo_rewards_are_mean_likelihoods_and_need_no_base():
    assert rewards(TUNED, "chosen", settings("orpo"), None).tolist() == pytest.approx([-0.6, -1.75, -3 / 7])
    assert measure("margin", "orpo", base=None).value == pytest.approx(np.mean([-0.6 + 1.125, -1.75 + 4 / 3, 0]))
    assert measure("loss", "orpo") is None


def test_reward_model_rewards_are_scores_with_the_centre_in_the_loss():
    said = [{"chosen": 1.0, "rejected": 0.5}, {"chosen": -1.0, "rejected": 2.0}]
    plain = -float(logsigmoid(torch.tensor([0.5, -3.0])).mean())
    assert measure("margin", "reward", said, None).value == pytest.approx(-1.25)
    assert measure("loss", "reward", said, None).value == pytest.approx(plain)
    centred = measure("loss", "reward", said, None, center_rewards_coefficient=0.1).value
    assert centred == pytest.approx(plain + 0.1 * (1.5**2 + 1.0**2) / 2)
    assert measure("kl", "reward", said, None) is None
    assert measure("likelihood_accuracy", "reward", said, None) is None


def test_without_a_base_only_likelihoods_are_measured():
    assert measure("accuracy", base=None) is None
    assert measure("likelihood_accuracy", base=TUNED).value == measure("likelihood_accuracy").value


def test_the_reference_compared_with_itself_gives_only_ties():
    assert measure("accuracy", said=BASE).value == 0.5
    assert measure("margin", said=BASE).value == 0
    assert measure("loss", said=BASE).value == pytest.approx(math.log(2))


THUMBED = [({"answer": -5.0}, {"answer": -4.0}, True), ({"answer": -5.0}, {"answer": -8.0}, False)]


def test_thumbs_count_as_right_by_the_sign_of_the_reward():
    base, tuned, thumbs = (
        list(part) for part in zip(*THUMBED, ({"answer": -5.0}, {"answer": -5.5}, True), strict=True)
    )
    assert measure("accuracy", "kto", tuned, base, thumbs).value == pytest.approx(2 / 3)
    assert measure("margin", "kto", tuned, base, thumbs).value == pytest.approx((0.5 - 0.25) / 2 + 1.5)
    assert measure("loss", "kto", tuned, base, thumbs) is None
    assert measure("likelihood_accuracy", "kto", tuned, base, thumbs) is None


@pytest.mark.parametrize("row", [0, 1])
def test_thumbs_of_one_kind_have_an_accuracy_and_no_margin(row):
    base, tuned, thumb = THUMBED[row]
    assert measure("accuracy", "kto", [tuned], [base], [thumb]).value == 1
    assert measure("margin", "kto", [tuned], [base], [thumb]) is None


# Predictions

ROWS = [
    {"messages": [{"role": "user", "content": question}], "chosen": chosen, "rejected": rejected, "good": True}
    for question, chosen, rejected in (
        ("Which colour is the sky?", "The sky is blue.", "red"),
        ("How many legs has a cat?", "Four", "one two three four five six seven"),
        ("Name a bird", "fox and dog and fish and cat and bird", "dog"),
    )
]


@pytest.fixture(scope="module")
def tuned(tiny_llama):
    """A model with an adapter off its start, and its recipe."""
    recipe = recipe_of(tiny_llama, "dpo")
    adapted = inject(open_model(recipe), recipe, quiet())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(adapted.model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted


def recipe_of(model, loss, **sections):
    content = recipe_with(model, **{"adapter": {"r": 4}, **sections}).model_dump(exclude_unset=True)
    return Recipe.model_validate({**content, "task": "preference", "preference": {"loss": loss}})


def predict(adapted, rows, loss="dpo", **sections):
    recipe = recipe_of(adapted.selected.model_ref.name, loss, **sections)
    with torch.inference_mode():
        return predict_rows(PREFERENCE, adapted.model, rows, adapted.selected.processor, recipe)


def test_an_answer_gets_the_same_rating_in_a_pair_and_alone(tuned):
    pairs = predict(tuned, ROWS)
    single = predict(tuned, [{**row, "answer": row["chosen"]} for row in ROWS], "kto")
    assert [one["answer"] for one in single] == pytest.approx([pair["chosen"] for pair in pairs], abs=1e-4)
    assert [one["answer_tokens"] for one in single] == [pair["chosen_tokens"] for pair in pairs]
    assert [one["kl"] for one in single] == pytest.approx([pair["kl"] for pair in pairs], abs=1e-5)


def test_an_unavailable_divergence_is_omitted(tuned):
    assert "kl" not in predict(tuned, ROWS, adapter={"bias": "all"})[0]


def test_an_unencodable_row_is_an_error_not_a_missing_number(tuned):
    with pytest.raises(DataError, match="row 2 of the request: too long: "):
        predict(tuned, [ROWS[0], {**ROWS[1], "rejected": "fox " * 100}], data={"max_length": 50})
