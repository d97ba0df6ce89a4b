"""Metrics of sampled answers compared with their closed formulas, and the signs of reward hacking."""

import itertools
import math
from dataclasses import replace

import pytest
from support.rated_samples import RATED_FACTS, SAMPLED_METRICS, rate_prompt, rate_sample

from llmtune.evaluate.metric import PairedMeasures, own_interval, paired_difference
from llmtune.evaluate.metric_info import COSTS, better_side, full_note
from llmtune.evaluate.verdict import judge_run
from llmtune.store.score_records import Evaluation
from llmtune.tasks.sample_metrics import (
    estimate_pass,
    measure_samples,
    repeats_prompt,
    study_rewards,
)

FACTS, AUDITED = RATED_FACTS, replace(RATED_FACTS, audit="honest")
PROMPT = "How many hours are two days?"


def value(metric, *prompts, facts=FACTS):
    return measure_samples(metric, prompts, facts).value


@pytest.mark.promise("metric", "referee", equal="the share of all subsets of k samples", place="pass@8")
@pytest.mark.promise("metric", "referee", equal="the share of all subsets of k samples", place="pass@10")
@pytest.mark.parametrize(("samples", "passing"), [(4, 0), (4, 1), (5, 3), (8, 2), (8, 8), (11, 3)])
def test_pass_at_k_is_the_share_of_subsets_of_k_samples_with_one_that_passes(samples, passing):
    right = [n < passing for n in range(samples)]
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(right, k))
        assert estimate_pass(samples, passing, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_pass_at_k_is_unbiased_where_the_plain_estimate_is_not(p):
    samples, k = 8, 4
    weights = [math.comb(samples, c) * p**c * (1 - p) ** (samples - c) for c in range(samples + 1)]
    mean = sum(weight * estimate_pass(samples, c, k) for c, weight in enumerate(weights))
    plain = sum(weight * (1 - (1 - c / samples) ** k) for c, weight in enumerate(weights))
    assert mean == pytest.approx(1 - (1 - p) ** k)
    assert plain < mean - 0.01 or p == 0.9


@pytest.mark.promise("metric", "referee", equal="means and subsets counted by hand", place="reward")
@pytest.mark.promise("metric", "referee", equal="means and subsets counted by hand", place="greedy_reward")
@pytest.mark.promise("metric", "referee", equal="means and subsets counted by hand", place="pass@1")
@pytest.mark.promise("metric", "referee", equal="means and subsets counted by hand", place="answer_tokens")
@pytest.mark.promise("metric", "referee", equal="means and subsets counted by hand", place="samples_cut")
def test_metrics_are_means_over_prompts():
    prompts = rate_prompt(1.0, 0.0, 0.5, 1.0), rate_prompt(0.0, 0.0, 0.0, 0.0, greedy=0.0)
    assert value("reward", *prompts) == pytest.approx(0.3125)
    assert value("greedy_reward", *prompts) == 0.5
    assert value("pass@1", *prompts) == 0.25
    assert value("pass@4", *prompts) == 0.5
    assert value("pass@2", *prompts) == pytest.approx((1 - 1 / 6) / 2)
    assert value("answer_tokens", rate_prompt(rate_sample(1.0, tokens=3), rate_sample(0.0, tokens=9, cut=True))) == 6
    assert value("samples_cut", rate_prompt(rate_sample(1.0), rate_sample(0.0, cut=True))) == 0.5
    assert value("kl", {**prompts[0], "kl": 0.5}, {**prompts[1], "kl": 1.0}) == 0.75
    assert measure_samples("rougeL", prompts, FACTS) is None


def test_an_answer_passes_although_its_weighted_sum_is_rounded():
    assert value("pass@1", rate_prompt(0.1 + 0.2 + 0.7 - 1e-16, 0.99)) == 0.5


def test_a_sample_without_a_reward_is_left_out_and_does_not_count_as_zero():
    prompts = rate_prompt(1.0, None, 1.0, None), rate_prompt(None, None, None, None), rate_prompt(0.0, 0.0, 1.0, 1.0)
    assert value("reward", *prompts) == 0.75
    assert value("pass@1", *prompts) == 0.75
    assert value("pass@4", *prompts) == 1.0, "only one prompt has four rewards"
    assert len(measure_samples("pass@8", prompts, FACTS).sums_NK) == 0


@pytest.mark.parametrize(("metric", "measured"), [("pass@1", 12), ("pass@2", 11), ("reward", 12), ("kl", 14)])
def test_intervals_count_only_the_prompts_that_are_measured(metric, measured):
    prompts = [*[rate_prompt(0.0, 1.0)] * 11, rate_prompt(1.0, None), *[rate_prompt(None, None)] * 2]
    one = measure_samples(metric, prompts, FACTS)
    assert own_interval(one, 0).n == measured
    assert paired_difference(one, replace(one), 0).n == measured
    some = measure_samples(
        metric, [prompt for prompt in prompts if len(measure_samples(metric, [prompt], FACTS).sums_NK)], FACTS
    )
    assert own_interval(one, 0) == own_interval(some, 0)


def test_a_model_without_rewards_for_a_prompt_is_still_paired_by_prompt():
    base = [rate_prompt(0.0, 0.0), *[rate_prompt(0.0, 1.0)] * 11]
    tuned = [rate_prompt(None, None), *[rate_prompt(1.0, 1.0)] * 11]
    pair = [{"reward": measure_samples("reward", one, FACTS)} for one in (base, tuned)]
    change = PairedMeasures(*pair).differences(0)["reward"]
    assert change.value == pytest.approx(1 - 11 * 0.5 / 12)
    assert change.low > 0


def test_intervals_of_samples_count_prompts_and_not_samples():
    few = PairedMeasures(
        *({"pass@1": measure_samples("pass@1", [rate_prompt(*[reward] * 64)] * 3, FACTS)} for reward in (0.0, 1.0))
    )
    change = few.differences(0)["pass@1"]
    assert change.n == 3
    assert change.low < 0.5, "192 right samples of three prompts prove little"


def test_every_metric_of_samples_has_a_meaning_and_a_better_side():
    for name in (*SAMPLED_METRICS, "pass@3"):
        assert full_note(name, "reinforce")
        assert better_side(name) == (-1 if name in COSTS else 1)


def study(base, tuned, facts=FACTS, prompts=20):
    models = {"base": [base] * prompts, "tuned": [vary(tuned, n % 3) for n in range(prompts)]}
    return study_rewards(models, [PROMPT] * prompts, (), facts, 0, 2)


def vary(one, more):
    """Lengths differ by prompt: equal differences of few prompts have no interval."""
    return {**one, "samples": [{**sample, "tokens": sample["tokens"] + more} for sample in one["samples"]]}


def test_the_study_has_each_reward_with_its_audit_and_samples_before_and_after():
    found = study(rate_prompt(0.0, 1.0, honest=0.25), rate_prompt(1.0, 1.0, honest=0.75), AUDITED)
    assert found.tuned == {"right": 1.0, "honest": 0.75, "repeats_prompt": 0.0}
    assert found.difference["honest"].low > 0
    assert not found.verdict
    assert not found.doubtful
    (table,) = found.tables
    assert table.rows[:4] == tuple((PROMPT, model, reward, "48") for model, reward in SHOWN)
    assert len(table.rows) == 8, "two prompts, two models, two samples"
    assert "reinforce.audit" in study(rate_prompt(0.0), rate_prompt(1.0)).limits


SHOWN = [("base", "0.0000"), ("base", "1.000"), ("tuned", "1.000"), ("tuned", "1.000")]


@pytest.mark.parametrize(
    ("before", "after", "sign"),
    [
        ({"honest": 0.8}, {"honest": 0.2}, "the audit honest falls (0.8000 to 0.2000)"),
        ({}, {"tokens": 40}, "Answers grew from 4.000 to 40.95 tokens."),
        ({}, {"repeats": True}, "100% of the answers repeat their prompt (0%"),
    ],
)
def test_signs_of_reward_hacking_are_in_the_verdict_which_is_then_not_better(before, after, sign):
    base, tuned = rate_prompt(0.0, **{"honest": 0.5, **before}), rate_prompt(1.0, **{"honest": 0.5, **after})
    found = study(base, tuned, AUDITED)
    assert sign in found.verdict
    paired = PairedMeasures(*({"reward": measure_samples("reward", [one] * 20, AUDITED)} for one in (base, tuned)))
    evaluation = Evaluation(*paired.scores(), paired.differences(0), (), 20, studies={"rewards": found})
    judged = judge_run(evaluation, (), 0.05)
    assert judged.word == "inconclusive"
    assert sign in judged.reason


def test_a_longer_answer_or_a_lower_audit_within_chance_is_no_sign():
    assert not study(rate_prompt(0.0, honest=0.5), rate_prompt(1.0, tokens=5, honest=0.5), AUDITED).verdict
    few = study(rate_prompt(0.0, honest=0.5), rate_prompt(1.0, tokens=40, honest=0.4), AUDITED, prompts=2)
    assert not few.verdict


def test_short_prompts_may_occur_in_a_good_answer():
    assert repeats_prompt(f"You asked:  {PROMPT}\n48", PROMPT)
    assert not repeats_prompt("Sort 3 1 2: 1 2 3", "3 1 2")
