"""Every metric's own and paired interval by simulation, and the outcomes of the gates that read them.

An end of an interval errs if the true value is beyond it: a gate whose limit is just there then passes wrongly. It does
so in at most 5 of 100 runs. A cell fails if that is too few for the counted errors, by Clopper and Pearson's interval.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import interval_scenes as simulated
from support.interval_scenes import KINDS, SCENES, SIZES
from support.rated_samples import RATED_FACTS, SAMPLED_METRICS, rate_prompt

from llmtune.data.answer_parser import ParsedAnswer, ToolTurn
from llmtune.errors import RecipeError
from llmtune.evaluate import intervals
from llmtune.evaluate.calibration import Chosen, measure_calibration
from llmtune.evaluate.classification_metrics import (
    CLASS_METRICS,
    ENTITY_METRICS,
    LabelKind,
    measure_classes,
    measure_entities,
)
from llmtune.evaluate.decision import measure_decisions
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.intervals import exact_interval
from llmtune.evaluate.metric import Measure, measure_right, measure_shares, own_interval, paired_difference
from llmtune.evaluate.metric_info import better_side
from llmtune.evaluate.paired_statistics import widen
from llmtune.evaluate.ranking_metrics import RankedQuery, measure_ranking, measure_spread
from llmtune.evaluate.suites.own_metrics import OwnMetric, measure_values
from llmtune.evaluate.text_metrics import (
    SQUAD_METRICS,
    TEXT_MEASURES,
    TOKEN_METRICS,
    measure_cer,
    measure_squad,
    measure_tokens,
    measure_wer,
)
from llmtune.evaluate.tool_metrics import measure_tools
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.recipe.task_facts import CALIBRATION, DECISIONS, RANKING, TASK_FACTS, TOOL_METRICS
from llmtune.recipe.task_sections import PreferenceSection
from llmtune.records import Difference
from llmtune.store.score_records import Champion, Decision, Evaluation, Study, Threshold
from llmtune.tasks.preference_metrics import measure_preferences
from llmtune.tasks.sample_metrics import measure_samples

BAR = 0.05
TRIALS, FEW_TRIALS = 300, 100
SLOW_TRIALS = {"bleu": 40, "spearman": 80, "pearson": 150, "area": 150, "mean area": 150}
QUICK = ("right or wrong", "share of tokens", "number")
QUICK_CELLS = (("ties", 5), ("groups", 20), ("rare", 60), ("unequal", 60), ("unequal", 200), ("long", 60))


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fewer draws, and the same in each trial: rows are new in each, so trials stay independent."""
    draw = intervals.draw_weights
    again = cache(lambda units, total, seed, _: list(draw(units, total, seed, simulated.RESAMPLES)))
    monkeypatch.setattr(intervals, "draw_weights", again)


def exceed(kind: str, cells: list[tuple[str, int]], trials: int, *, paired: bool) -> dict[tuple[str, int], list[int]]:
    """Return the cells in which more than 5 of 100 ends of intervals are shown to err, with the errors at each end."""
    counted = {cell: simulated.count_errors(kind, *cell, trials, paired=paired) for cell in cells}
    return {
        cell: list(errors)
        for cell, errors in counted.items()
        if max(exact_interval(count, trials, 0.05)[0] for count in errors) > BAR
    }


@cache
def exceed_all(kind: str, paired: bool) -> dict[tuple[str, int], list[int]]:
    trials = SLOW_TRIALS.get(kind, TRIALS)
    return exceed(kind, [(scene, rows) for scene in SCENES for rows in SIZES], trials, paired=paired)


# Metrics by name


TWO = ["a b c d e", "b a"]
TURNS = {0: [ToolTurn({"messages": [], "tools": []}, ())]}
QUERY = RankedQuery([2.0, 1.0], [1, 0])
RATING = {"chosen": -1.0, "rejected": -2.0, "answer": -1.0, "kl": 0.1, "chosen_tokens": 2.0, "rejected_tokens": 2.0}


def classified(metric: str, kind: LabelKind) -> Measure:
    labels = ("red", "green") if metric == "auroc" and kind == "single" else ("red", "green", "blue")
    references = {"single": ["red", "green"], "multi": [["red"], ["green"]], "regression": [0.2, 0.4]}[kind]
    scores = np.array([[0.3, 0.7, 0.1], [0.2, 0.4, 0.9]])[:, : 1 if kind == "regression" else len(labels)]
    return measure_classes(metric, kind, scores, references, labels)


def calibrated(metric: str, *, many: bool) -> Measure:
    right_UK = np.array([[True, False], [False, True]])
    return measure_calibration(metric, Chosen(("red", "green"), np.eye(2), right_UK, (0, 1), many))


def decided(metric: str) -> Measure:
    chosen = Chosen(("red", "green"), 9 * np.eye(2), np.eye(2) > 0, (0, 1), False)
    threshold = Threshold(0.1, 0.9, 0.0, 2, 2, 0)
    bounds, scope = {"set_bounds": (0.5, 0.5), "coverage": 0.9}, {"lowest_score": 0.0, "false_alarms": 0.1}
    return measure_decisions(Decision(chosen.labels, False, 2, 1, threshold, **bounds, **scope), chosen)[0][metric]


def preferred(metric: str, loss: str = "dpo") -> Measure:
    return measure_preferences(metric, [RATING] * 2, [True, False], PreferenceSection(loss=loss), [RATING] * 2)


BUILT: dict[str, list[Callable[[], Measure]]] = defaultdict(list)
"""The ways in which tasks build each metric."""
for _metric in TOKEN_METRICS:
    BUILT[_metric].append(partial(measure_tokens, _metric, *np.ones((4, 2))))
for _metric, _build in TEXT_MEASURES.items():
    BUILT[_metric].append(partial(_build, TWO, TWO))
for _metric in SQUAD_METRICS:
    BUILT[_metric].append(partial(measure_squad, _metric, TWO, [[text] for text in TWO]))
for _metric, _build in (("wer", measure_wer), ("cer", measure_cer)):
    BUILT[_metric].append(partial(_build, TWO, TWO))
for _kind, _names in CLASS_METRICS.items():
    for _metric in _names:
        BUILT[_metric].append(partial(classified, _metric, _kind))
for _metric in ENTITY_METRICS:
    BUILT[_metric].append(partial(measure_entities, _metric, [["B-X"]] * 2, [["B-X"]] * 2))
for _metric, _many in product(CALIBRATION, (False, True)):
    BUILT[_metric].append(partial(calibrated, _metric, many=_many))
for _metric in TOOL_METRICS:
    BUILT[_metric].append(partial(measure_tools, _metric, {0: [ParsedAnswer("")]}, TURNS))
for _metric in RANKING:
    BUILT[_metric].append(partial(measure_ranking, _metric, [QUERY, QUERY]))
for _metric in ("random_cosine", "effective_rank"):
    BUILT[_metric].append(partial(measure_spread, _metric, [{"query": [1.0, 0.0]}, {"query": [0.0, 1.0]}]))
for _metric in ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"):
    BUILT[_metric].append(partial(preferred, _metric))
BUILT["margin"].append(partial(preferred, "margin", "kto"))
BUILT["choice_accuracy"].append(partial(measure_right, [True, False], "choice_accuracy"))
BUILT["answers_cut"].append(partial(measure_shares, "answers_cut", [0.0, 1.0], ""))
for _metric in [name for names in DECISIONS.values() for name in names]:
    BUILT[_metric].append(partial(decided, _metric))
for _metric, _facts in product(SAMPLED_METRICS, (RATED_FACTS, replace(RATED_FACTS, shares=frozenset()))):
    BUILT[_metric].append(partial(measure_samples, _metric, [rate_prompt(1.0, 0.0)] * 2, _facts))
for _kind_of_value in ("bool", "share", "number"):
    _own = OwnMetric("own", Path(__file__), _kind_of_value, "")
    BUILT[f"own ({_kind_of_value})"].append(partial(measure_values, _own, [0.0, 1.0]))
NAMES = sorted(BUILT)


def name_kind(measure: Measure) -> str:
    """Return the simulated kind of a measure: the same formula and bounds."""
    shape = (measure.formula, measure.bounds, measure.right_wrong, measure.ranking)
    if measure.right_wrong:
        return "right or wrong"
    (kind, *_) = [
        name for name, kind in KINDS.items() if (kind.formula, kind.bounds, kind.right_wrong, kind.ranking) == shape
    ]
    return kind


def test_every_metric_of_a_task_is_simulated() -> None:
    listed = {metric for facts in TASK_FACTS.values() for metric in facts.metrics}
    listed |= {metric for metrics in DECISIONS.values() for metric in metrics}
    assert listed <= BUILT.keys()
    for metric in NAMES:
        assert metric == "ece" or all(name_kind(build()) in KINDS for build in BUILT[metric])


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("paired", [False, True], ids=["own", "paired"])
@pytest.mark.parametrize("kind", QUICK)
def test_ends_of_intervals_seldom_err(kind: str, paired: bool) -> None:
    assert exceed(kind, [*QUICK_CELLS], FEW_TRIALS, paired=paired) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
@pytest.mark.promise("metric", "own interval", equal="the true score, beyond an end in at most 5 of 100 simulated runs")
@pytest.mark.parametrize("metric", [name for name in NAMES if name != "ece"])
def test_an_end_of_a_score_s_own_interval_errs_in_at_most_5_of_100_runs(metric: str) -> None:
    kinds = {name_kind(build()) for build in BUILT[metric]}
    assert {kind: errors for kind in kinds if (errors := exceed_all(kind, False))} == {}


@pytest.mark.slow
@pytest.mark.usefixtures("few_draws")
@pytest.mark.promise(
    "metric", "paired interval", equal="the true difference, beyond an end in at most 5 of 100 simulated runs"
)
@pytest.mark.parametrize("metric", [name for name in NAMES if name != "ece"])
def test_an_end_of_a_paired_interval_errs_in_at_most_5_of_100_runs(metric: str) -> None:
    kinds = {name_kind(build()) for build in BUILT[metric]}
    assert {kind: errors for kind in kinds if (errors := exceed_all(kind, True))} == {}


# p-values and gates


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "bleu"])
def test_p_and_interval_agree_at_every_level_on_whether_two_models_differ(kind: str) -> None:
    generator, agreed = np.random.default_rng(4), set()
    for scene, rows in product(("rare", "between", "groups"), (20, 100, 100)):
        found = paired_difference(*simulated.draw(KINDS[kind], scene, generator, rows), seed=0)
        assert math.isfinite(found.low) or found.p == 1
        for alpha in (0.3, 0.05, 0.05 / 6, 0.05 / 52, 0.05 / 52 / 6, found.p * 0.99, min(0.99, found.p * 1.01)):
            wide = widen(found, alpha)
            excluded = wide.low > 0 or wide.high < 0
            assert excluded == (found.p < alpha), (found, alpha)
            agreed.add(excluded)
    assert agreed


@pytest.mark.promise("metric", "gates", refused="on an interval: it has none; brier and nll are named", place="ece")
@pytest.mark.parametrize("gate", ["ece.high <= 0.1", "ece.high < base", "deploy.gguf.ece.low > tuned * 0.9"])
def test_a_gate_on_an_interval_of_ece_is_refused(gate: str) -> None:
    with pytest.raises(RecipeError, match=r"ece has none.*\n?.*brier or nll"):
        parse_gate(gate)


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize(("before", "factor"), [(0.3, 2), (0.3, 3), (0.8, 0.75)])
def test_a_gate_with_a_factor_seldom_passes_at_its_limit(before: float, factor: float) -> None:
    generator, passed = np.random.default_rng(7), 0
    section = EvaluateSection(gates=(f"accuracy.low > base * {factor}",))
    for _ in range(200):
        base, tuned = (
            measure_right((generator.random(60) < p).tolist(), "accuracy") for p in (before, before * factor)
        )
        change, scores = paired_difference(base, tuned, 0), [{"accuracy": one.value} for one in (base, tuned)]
        (gate,) = check_gates(section, Evaluation(*scores, {"accuracy": change}, (), 60))
        passed += gate.passed is True
    assert exact_interval(passed, 200, 0.05)[0] <= BAR


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(0, 12), st.integers(0, 12)),
    st.integers(2, 30),
    st.sampled_from(("low", "high")),
    st.sampled_from((">", ">=", "<", "<=", "==")),
    st.sampled_from(("base", "base {sign} 0.1", "base * 1.5", "base * {limit}", "base {sign} {limit}", "{limit}")),
    st.sampled_from(("+", "-")),
)
def test_every_gate_on_an_interval_has_a_result_for_any_small_counts(
    right: tuple[int, int], rows: int, end: str, op: str, form: str, sign: str
) -> None:
    """At the observed difference, too, where no number of rows would tell."""
    models = [measure_right([n < min(count, rows) for n in range(rows)], "accuracy") for count in right]
    change, scores = paired_difference(*models, seed=0), [{"accuracy": one.value} for one in models]
    limit = f"{abs(change.value):.17g}" if "e-" not in f"{abs(change.value):.17g}" else "0"
    section = EvaluateSection(gates=(f"accuracy.{end} {op} {form.format(sign=sign, limit=limit)}",))
    intervals_of = {"accuracy": own_interval(models[1], 0)}
    (gate,) = check_gates(section, Evaluation(*scores, {"accuracy": change}, (), rows, intervals=intervals_of))
    assert gate.passed in (True, False, None)


@pytest.mark.parametrize("gate", ["accuracy.low > base + 0.1", "accuracy.low > base * 1.5", "accuracy.low > 0.3"])
def test_a_gate_at_the_observed_score_needs_no_number_of_rows(gate: str) -> None:
    base, tuned = (measure_right([n < right for n in range(60)], "accuracy") for right in (12, 18))
    scores, change = [{"accuracy": one.value} for one in (base, tuned)], {"accuracy": paired_difference(base, tuned, 0)}
    section = EvaluateSection(gates=(gate, gate.replace(".low >", " >=")), when_unsure="report")
    of_end, of_score = check_gates(
        section, Evaluation(*scores, change, (), 60, intervals={"accuracy": own_interval(tuned, 0)})
    )
    assert (of_end.passed, "no number of rows" in of_end.note) == (None, True)
    assert of_score.passed, "0.2 + 0.1 is 0.3, but for rounding"


FORMS = {
    "own": "{metric}.{end} {op} 0.5",
    "base": "{metric}.{end} {op} base",
    "base, margin": "{metric}.{end} {op} base {worse} 0.1",
    "champion": "{metric}.{end} {op} champion",
    "champion, margin": "{metric}.{end} {op} champion {worse} 0.1",
    "tuned": "deploy.gguf.{metric}.{end} {op} tuned",
    "tuned, margin": "deploy.gguf.{metric}.{end} {op} tuned {worse} 0.1",
}
"""Forms of gates on an interval."""
LIMITS = {"own": 0.5, "base, margin": -0.1, "champion, margin": -0.1, "tuned, margin": -0.1}
"""Where the interval must be on the better side, if it is not zero."""


def check_form(form: str, metric: str, centre: float | None) -> bool | None:
    """Return the outcome of a gate if the middle of the interval is `centre` on the better side of the limit.

    None: there is no interval.
    """
    side = better_side(metric) or 1
    words = {"end": "low", "op": ">", "worse": "-"} if side > 0 else {"end": "high", "op": "<", "worse": "+"}
    value = LIMITS.get(form, 0.0) * (side if form != "own" else 1) + side * (centre or 0.0)
    ends = (math.nan, math.nan) if centre is None else (value - 0.2, value + 0.2)
    change, scores = {metric: Difference(value, *ends, 0.5, 100)}, {metric: 0.5}
    study, champion = Study("gguf", scores, scores, change, {}, {}), Champion("runs/best", scores, change, {}, scores)
    evaluation = Evaluation(
        scores, scores, change, (), 100, exports={"gguf": study}, champion=champion, intervals=change
    )
    section = EvaluateSection(gates=(FORMS[form].format(metric=metric, **words),), when_unsure="report")
    (gate,) = check_gates(section, evaluation)
    return gate.passed


@pytest.mark.promise(
    "metric", "gates", equal="passed, failed and inconclusive, against a number, base, champion and tuned model"
)
@pytest.mark.parametrize("metric", [name for name in NAMES if name != "ece"])
def test_every_form_of_a_gate_passes_fails_and_is_inconclusive(metric: str) -> None:
    for name in ("own", "own_cost") if metric.startswith("own (") else (metric,):
        for form in FORMS:
            outcomes = [check_form(form, name, centre) for centre in (0.3, -0.3, 0.0, None)]
            assert outcomes == [True, False, None, None], form
        better, worse = (0.6, 0.4) if better_side(name) >= 0 else (0.4, 0.6)
        gates = (f"{name} {'>' if better > worse else '<'} 0.5", f"{name} {'>' if better > worse else '<'} base")
        for score, passed in ((better, True), (worse, False), (math.nan, False)):  # a score is never inconclusive
            found = check_gates(EvaluateSection(gates=gates), Evaluation({name: 0.5}, {name: score}, {}, (), 100))
            assert [gate.passed for gate in found] == [passed, passed]


@pytest.mark.promise(
    "metric", "gates", equal="passed, failed and inconclusive, against a number", place="judge.win_rate"
)
@pytest.mark.parametrize(
    ("low", "high", "passed"), [(0.6, 0.8, True), (0.2, 0.4, False), (0.4, 0.6, None), (math.nan, math.nan, None)]
)
def test_a_gate_on_the_win_rate_passes_fails_and_is_inconclusive(low: float, high: float, passed: bool | None) -> None:
    win_rate = {"win_rate": Difference(0.5, low, high, 1.0, 60)}
    study = Study("judge", {"win_rate": 0.5}, {"win_rate": 0.5}, {}, {}, {}, intervals=win_rate)
    section = EvaluateSection(gates=("judge.win_rate.low > 0.5",), when_unsure="report")
    (gate,) = check_gates(section, Evaluation({}, {}, {}, (), 60, studies={"judge": study}))
    assert gate.passed is passed
