from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.errors import RecipeError
from llmtune.train.batch_plan import StepPlan, best_fit, divide, heaviest, micro_batches, occupied_tokens, padding_share

lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(lambda sizes: np.asarray(sizes, dtype=np.int32))


def plan(lengths, seed=0, batch_size=4, batch_tokens=None, epochs=1.0, max_steps=None):
    return StepPlan(np.asarray(lengths, dtype=np.int32), seed, batch_size, batch_tokens, epochs, max_steps)


def epochs_of(made, lengths, epochs=2):
    """Return the rows of the steps of each epoch, and check that each epoch has every row once."""
    for epoch in range(epochs):
        first = epoch * made.steps_per_epoch
        steps = [made.rows(first + step) for step in range(1, made.steps_per_epoch + 1)]
        assert sorted(np.concatenate(steps)) == list(range(len(lengths)))
        yield steps


def rows_of(made, steps):
    return [made.rows(step).tolist() for step in range(1, steps + 1)]


@given(lengths_of, st.integers(0, 2**63 - 1), st.integers(1, 7))
def test_each_epoch_contains_every_row_once_and_steps_have_batch_size_rows(lengths, seed, batch_size):
    made = plan(lengths, seed, batch_size, epochs=2)
    for steps in epochs_of(made, lengths):
        assert all(len(rows) == batch_size for rows in steps[:-1])
        assert 1 <= len(steps[-1]) <= batch_size


@given(lengths_of, st.integers(0, 1000), st.integers(60, 200))
def test_steps_of_batch_tokens_contain_every_row_once_and_stay_within_the_limit(lengths, seed, tokens):
    made = plan(lengths, seed, batch_tokens=tokens, epochs=2)
    for steps in epochs_of(made, lengths):
        assert all(lengths[rows].sum() <= tokens for rows in steps)


@given(lengths_of, st.integers(0, 1000))
def test_best_fit_needs_at_most_eleven_ninths_of_the_optimal_number_of_bins(lengths, seed):
    bins = best_fit(lengths, 100)
    assert len(bins) <= 11 / 9 * np.ceil(lengths.sum() / 100) + 1 or lengths.max() > 33
    shuffled = np.random.default_rng(seed).permutation(lengths)
    assert len(best_fit(shuffled, 100)) == len(bins)


def test_the_rows_of_a_step_depend_only_on_seed_and_step():
    lengths = list(range(1, 40))
    forwards = rows_of(plan(lengths, seed=3, epochs=5), 50)
    fresh = [plan(lengths, seed=3, epochs=5).rows(step).tolist() for step in range(50, 0, -1)]
    assert forwards == fresh[::-1]
    assert rows_of(plan(lengths, seed=4, epochs=5), 50) != forwards
    per_epoch = plan(lengths, seed=3, epochs=5).steps_per_epoch
    assert forwards[:per_epoch] != forwards[per_epoch : 2 * per_epoch], "epochs differ in their order"


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(1, None, 5), (0.5, None, 3), (0.01, None, 1), (2.2, None, 11), (1, 12, 12)]
)
def test_epochs_may_be_fractional_and_max_steps_overrides_them(epochs, max_steps, steps):
    assert plan([5] * 18, epochs=epochs, max_steps=max_steps).total_steps == steps


def test_a_row_longer_than_batch_tokens_is_refused():
    with pytest.raises(RecipeError, match="100 tokens a step, but the longest training example has 101"):
        plan([5, 101], batch_tokens=100)


@given(lengths_of, st.integers(1, 5))
def test_rows_are_divided_evenly_by_tokens_over_processes(lengths, processes):
    rows = np.arange(len(lengths))
    shares = divide(rows, lengths, processes)
    assert sorted(np.concatenate(shares)) == rows.tolist()
    loads = [int(lengths[share].sum()) for share in shares]
    assert max(loads) - min(loads) <= lengths.max()


@given(lengths_of, st.integers(60, 300), st.booleans(), st.sampled_from([None, 0, 20, 200]))
def test_micro_batches_contain_each_row_once_within_the_budget_heaviest_first(lengths, budget, packed, pass_tokens):
    rows = np.arange(len(lengths))
    groups = micro_batches(rows, lengths, budget, packed, pass_tokens)
    assert sorted(np.concatenate(groups)) == rows.tolist()
    costs = [occupied_tokens(group, lengths, packed) for group in groups]
    assert max(costs) <= budget
    assert costs == sorted(costs, reverse=True)


@settings(max_examples=50)
@given(lengths_of, st.integers(60, 200), st.booleans(), st.integers(1, 8), st.integers(0, 100))
def test_the_rehearsed_micro_batch_has_the_longest_row_and_the_most_supervised_one(lengths, budget, packed, size, seed):
    supervised = np.random.default_rng(seed).integers(0, lengths + 1).astype(np.int32)
    rehearsed = heaviest(lengths, [supervised], budget, packed, size)
    for rows in rehearsed:
        assert len(rows) <= size
        assert occupied_tokens(rows, lengths, packed) <= budget
    taken = np.concatenate(rehearsed)
    assert lengths[taken].max() == lengths.max()
    assert supervised[taken].max() == supervised.max()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(60, 150), st.integers(0, 80))
def test_padded_rows_are_cut_to_minimise_padding_and_passes(sizes, budget, pass_tokens):
    falling = np.asarray(sorted(sizes, reverse=True), dtype=np.int32)

    def price(groups):
        costs = [occupied_tokens(np.asarray(group), falling, False) for group in groups]
        return sum(costs) + pass_tokens * len(costs) if max(costs) <= budget else np.inf

    found = micro_batches(np.arange(len(falling)), falling, budget, False, pass_tokens)
    places = range(1, len(falling))
    ways = (ends for count in range(len(falling)) for ends in combinations(places, count))
    assert price(found) == min(price(np.split(np.arange(len(falling)), ends)) for ends in ways)


@given(lengths_of, st.integers(60, 300))
def test_without_a_cost_per_pass_padded_rows_use_as_few_micro_batches_as_fit(lengths, budget):
    ordered, greedy = sorted(lengths.tolist(), reverse=True), 0
    while ordered:
        ordered, greedy = ordered[budget // ordered[0] :], greedy + 1
    assert len(micro_batches(np.arange(len(lengths)), lengths, budget, False)) == greedy


def test_the_padding_share_counts_positions_without_a_token():
    made = plan([10, 30], batch_size=2)
    assert padding_share(made, 1, 100, packed=False) == pytest.approx(1 - 40 / 60)
    assert padding_share(made, 1, 30, packed=False) == 0  # a row at a time
    assert padding_share(made, 1, 100, packed=False, processes=2) == 0
    assert padding_share(made, 1, 100, packed=True) == 0
    assert padding_share(made, 1, 100, packed=False, pass_tokens=5) == 0  # two passes are cheaper than 20 positions


def test_a_process_may_get_no_rows():
    assert [share.tolist() for share in divide(np.array([3]), np.full(5, 9, dtype=np.int32), 2)] == [[3], []]
    assert micro_batches(np.array([], dtype=np.int64), np.full(5, 9, dtype=np.int32), 64, True) == []


def test_the_rehearsal_has_the_batch_with_the_most_pictures():
    lengths = np.array([40, 30, 20, 10], dtype=np.int32)
    supervised, pictures = np.array([9, 1, 1, 1], dtype=np.int32), np.array([0, 0, 1, 4], dtype=np.int32)
    found = [rows.tolist() for rows in heaviest(lengths, [supervised, pictures], 40, False, 2)]
    assert found == [[0], [3, 2]]
