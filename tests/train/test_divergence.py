import json
import math

import numpy as np
import pytest

from llmtune.train.divergence import WINDOW, Divergence

GUESSING = math.log(49152)


def feed(losses):
    watch = Divergence(GUESSING)
    return [watch.observe(loss) for loss in losses]


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_very_different_difficulty_are_left_alone(seed):
    losses = np.random.default_rng(seed).gamma(1.5, 1.2, 5000)  # between 0 and 15, mean 1.8
    assert losses.max() > 8
    assert not any(feed(losses))
    assert not any(feed(np.linspace(3, 0.1, 200)))
    assert not any(feed([2.0] * 20 + [50.0] * 4 + [2.0] * 20)), "one bad batch, or four"


def test_a_loss_that_goes_astray_in_the_first_steps_is_found():
    found = feed([2.2] + [9.5] * 20)
    assert "diverged" in found[WINDOW - 1]


def test_a_loss_that_leaves_a_low_plateau_is_found_within_ten_steps():
    found = feed([2.0] * 20 + [0.3] * 100 + [7.0] * 10)
    assert not any(found[:120])
    assert "after 0.30" in found[-1]


def test_worse_than_guessing_is_found_whatever_the_start_was():
    found = feed([10.5] + [12.5] * 10)
    assert "worse than guessing every token at random" in found[-1]


def test_what_is_saved_goes_on_as_if_nothing_had_happened():
    losses = [2.0] * 15 + [6.5] * 10
    one = Divergence(GUESSING)
    expected = [one.observe(loss) for loss in losses]
    first = Divergence(GUESSING)
    got = [first.observe(loss) for loss in losses[:18]]
    second = Divergence(GUESSING)
    second.restore(json.loads(json.dumps(first.save())))
    assert got + [second.observe(loss) for loss in losses[18:]] == expected
    assert expected[-1]
