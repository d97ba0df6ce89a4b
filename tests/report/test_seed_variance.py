"""Several seeds: mean and spread of each score, and the sentence that holds the gain against the spread."""

import math
import statistics

import pytest

from llmtune.records import Difference, Evaluation
from llmtune.report.report_record import SeedRun, Seeds, Spread
from llmtune.report.seed_variance import describe_gain, describe_spread, spread, warn_of_spread
from llmtune.report.verdict import verdict


def scored(loss: float, match: float, **others: float) -> Evaluation:
    change = Difference(match - 0.1, match - 0.15, match - 0.05, 0.001, 100)
    tuned = {"loss": loss, "exact_match": match, **others}
    return Evaluation({"loss": 3.0, "exact_match": 0.1}, tuned, {"exact_match": change}, (), (), 100)


def test_mean_deviation_and_ends_are_those_of_the_scores() -> None:
    scores = [0.3, 0.5, 0.1]
    found = spread("exact_match", scores, 0.05)
    assert found.mean == pytest.approx(sum(scores) / 3)
    assert found.deviation == pytest.approx(statistics.stdev(scores))
    assert (found.lowest, found.highest, found.spread) == (0.1, 0.5, pytest.approx(0.4))
    assert found.gain == pytest.approx(0.25)
    assert (found.larger, found.better) == (False, True)


@pytest.mark.parametrize(
    ("metric", "scores", "base", "larger", "better"),
    [
        ("loss", [1.0, 1.1], 3.0, True, True),
        ("loss", [3.4, 3.5], 3.0, True, False),
        ("accuracy", [0.4, 0.5], 0.4, False, True),
        ("length_ratio", [1.0, 1.1], 3.0, None, False),
        ("loss", [1.0, math.nan], 3.0, None, None),
        ("loss", [1.0, 1.1], None, None, None),
        ("loss", [1.0], 3.0, None, None),
    ],
)
def test_a_gain_is_held_against_the_spread_where_both_are_there(
    metric: str, scores: list[float], base: float | None, larger: bool | None, better: bool | None
) -> None:
    found = spread(metric, scores, base)
    assert (found.larger, found.better) == (larger, better)


def test_the_report_has_each_seed_and_what_is_missing() -> None:
    found = describe_spread({7: scored(1.0, 0.5, rougeL=0.2), 8: scored(1.2, 0.6), 9: scored(0.9, 0.55)}, [10])
    assert [run.seed for run in found.runs] == [7, 8, 9]
    assert found.runs[1].tuned == {"loss": 1.2, "exact_match": 0.6}
    assert found.runs[1].interval["exact_match"] == (pytest.approx(0.45), pytest.approx(0.55))
    assert found.metrics["loss"].scores == [1.0, 1.2, 0.9]
    assert "rougeL" not in found.metrics, "not every seed has it"
    assert found.missing == [10]
    assert found.told.endswith("Not there yet: seed 10.")


def judged(**metrics: tuple[bool | None, bool]) -> dict[str, Spread]:
    return {name: Spread((), None, larger=larger, better=better) for name, (larger, better) in metrics.items()}


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        (judged(loss=(True, True)), "The gain over the base is larger than the spread between 3 seeds in loss."),
        (judged(loss=(False, True)), "The gain over the base is not larger than the spread between 3 seeds in loss."),
        (
            judged(loss=(True, True), f1=(False, True), wer=(True, False)),
            "The gain over the base is larger than the spread between 3 seeds in loss; it is not in f1; "
            "the tuned model is worse than the base by more than that spread in wer.",
        ),
        (
            judged(wer=(True, False)),
            "The tuned model is worse than the base by more than the spread between 3 seeds in wer.",
        ),
        (judged(kl=(True, False), loss=(None, True)), "There is no spread to hold the gain over the base against."),
    ],
)
def test_one_sentence_says_whether_the_gain_is_larger_than_the_spread(metrics: dict[str, Spread], told: str) -> None:
    assert describe_gain(metrics, 3, []) == told


def test_the_verdict_mentions_a_gain_that_is_within_the_spread_and_no_other() -> None:
    runs = [SeedRun(seed, {}, {}) for seed in (1, 2, 3)]
    within, beyond = (Seeds(runs, (), judged(exact_match=(larger, True)), "") for larger in (False, True))
    found = verdict(scored(1.0, 0.5), within)
    assert found.word == "helped"
    assert "3 seeds lie as far apart as the gain is large" in found.reason
    assert "seed" not in verdict(scored(1.0, 0.5), beyond).reason
    assert warn_of_spread(None, ["accuracy"]) == ""
    assert warn_of_spread(within, ["loss"]) == ""
