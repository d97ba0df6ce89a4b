"""Requirements on every metric of every task: weight rows by their draws, and survive a round trip to disk."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rated_samples import RATED_FACTS, SAMPLED_METRICS, rate_prompt

from llmtune.data.answer_parser import ParsedAnswer, ToolTurn
from llmtune.data.chat_rows import ToolCall
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.calibration import Chosen, measure_calibration
from llmtune.evaluate.classification_metrics import (
    CLASS_METRICS,
    ENTITY_METRICS,
    LabelKind,
    measure_classes,
    measure_entities,
)
from llmtune.evaluate.metric import Measure, paired_difference
from llmtune.evaluate.per_row_scores import MEASURES, PerRowScores, load_measures, name_rows, save_measures
from llmtune.evaluate.ranking_metrics import RankedQuery, measure_ranking, measure_spread
from llmtune.evaluate.text_metrics import TEXT_MEASURES, TOKEN_METRICS, measure_cer, measure_tokens, measure_wer
from llmtune.evaluate.tool_metrics import measure_tools
from llmtune.recipe.task_facts import CALIBRATION, RANKING, TASK_FACTS, TOOL_METRICS
from llmtune.recipe.task_sections import PreferenceSection
from llmtune.tasks.preference_metrics import measure_preferences
from llmtune.tasks.sample_metrics import measure_samples

ROWS = 12
random = np.random.default_rng(3)
REFERENCES = ["The cat sat on the mat, and it stayed.", "Ein Satz\nmit zwei Zeilen.", "vier", "猫が座っている"] * 3
TEXTS = ["The cat sat on a mat and it stayed .", "Zwei Zeilen\nmit einem Satz.", " vier\n", ""] * 3
LABELS = ("red", "green", "blue")
RIGHT = [["B-X", "I-X", "O"], ["B-Y", "B-X", "O"], ["O", "O", "O"]] * 4
FOUND = [["B-X", "O", "O"], ["B-Y", "I-Y", "O"], ["O", "B-X", "O"], ["B-X", "I-X", "O"]] * 3
COUNTS = [random.random(ROWS), random.integers(0, 2, ROWS) * 1.0, random.integers(2, 9, ROWS) * 1.0]
SAID = [
    {"chosen": -i * 0.1, "rejected": -1.0, "chosen_tokens": 3, "rejected_tokens": 2, "kl": 0.1 * i} for i in range(ROWS)
]
BEFORE = [{**one, "chosen": -0.5} for one in SAID]
RANKED = [RankedQuery(random.integers(0, 5, 20), [2, 1, *random.integers(0, 2, 18)], [1]) for _ in range(ROWS)]
VECTORS = [{"query": random.normal(size=8).tolist()} for _ in range(ROWS)]
ANSWERS = [{"answer": -i * 0.1} for i in range(ROWS)]


def of(values: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    return [values[row] for row in rows]


def classes(kind: LabelKind, labels: tuple[str, ...]) -> dict[str, Callable[[list[int]], Measure]]:
    scores = random.random((ROWS, 1 if kind == "regression" else len(labels)))
    right = [labels[i % len(labels)] for i in range(ROWS)]
    references: Any = {"single": right, "multi": [[one] for one in right], "regression": [i % 5.0 for i in range(ROWS)]}

    def build(metric: str, rows: list[int]) -> Measure:
        return measure_classes(metric, kind, scores[rows], of(references[kind], rows), labels)

    return {f"{metric} of {kind} {len(labels)}": partial(build, metric) for metric in CLASS_METRICS[kind]}


def tokens(metric: str, rows: list[int]) -> Measure:
    nats, correct, counts = (values[rows] for values in COUNTS)
    return measure_tokens(metric, nats, correct, counts, counts * 4)


def preferences(metric: str, rows: list[int]) -> Measure:
    found = measure_preferences(metric, of(SAID, rows), [], PreferenceSection(), of(BEFORE, rows))
    assert found is not None
    return found


def thumbs(rows: list[int]) -> Measure:
    good, base = [row % 2 == 0 for row in rows], [{"answer": -0.5}] * len(rows)
    found = measure_preferences("margin", of(ANSWERS, rows), good, PreferenceSection(loss="kto"), base)
    assert found is not None
    return found


CALL: ToolCall = {"type": "function", "function": {"name": "clock", "arguments": {}}}
CALLED = [[ParsedAnswer("", tool_calls=(CALL,) * (i % 2))] * 2 for i in range(ROWS)]
TURNS = [[ToolTurn({"tools": []}, [CALL]), ToolTurn({"tools": []}, [])]] * ROWS


def tools(metric: str, rows: list[int]) -> Measure:
    return measure_tools(metric, dict(enumerate(of(CALLED, rows))), dict(enumerate(of(TURNS, rows))))


RATED = [rate_prompt(*random.integers(0, 2, 10) * 1.0, kl=i * 0.1, tokens=i) for i in range(ROWS)]


def samples(metric: str, rows: list[int]) -> Measure:
    found = measure_samples(metric, of(RATED, rows), RATED_FACTS)
    assert found is not None
    return found


LOGITS = random.normal(size=(ROWS, len(LABELS)))
CHOSEN = {
    "choices": np.eye(len(LABELS))[[i % len(LABELS) for i in range(ROWS)]] > 0,
    "labels": random.random((ROWS, len(LABELS))) > 0.5,
}


def probabilities(metric: str, kind: str, rows: list[int]) -> Measure:
    chosen = Chosen(LABELS, LOGITS[rows], CHOSEN[kind][rows], tuple(range(len(rows))), many=kind == "labels")
    return measure_calibration(metric, chosen, 1.5)


METRICS: dict[str, Callable[[list[int]], Measure]] = {
    **{metric: partial(tokens, metric) for metric in TOKEN_METRICS},
    **{
        f"{metric} of texts": lambda rows, build=build: build(of(TEXTS, rows), of(REFERENCES, rows))
        for metric, build in TEXT_MEASURES.items()
    },
    **classes("single", LABELS),
    **classes("single", LABELS[:2]),
    **classes("multi", LABELS[:2]),
    **classes("regression", LABELS),
    **{
        f"{metric} of entities": lambda rows, metric=metric: measure_entities(metric, of(FOUND, rows), of(RIGHT, rows))
        for metric in ENTITY_METRICS
    },
    "wer": lambda rows: measure_wer(of(TEXTS, rows), of(REFERENCES, rows)),
    "cer": lambda rows: measure_cer(of(TEXTS, rows), of(REFERENCES, rows)),
    **{
        f"{one} of pairs": partial(preferences, one)
        for one in ("accuracy", "margin", "likelihood_accuracy", "kl", "loss")
    },
    "margin of thumbs": thumbs,
    **{f"{metric} of tools": partial(tools, metric) for metric in TOOL_METRICS},
    **{f"{metric} of {kind}": partial(probabilities, metric, kind) for metric in CALIBRATION for kind in CHOSEN},
    **{
        f"{metric} of vectors": lambda rows, metric=metric: measure_spread(metric, of(VECTORS, rows))
        for metric in ("random_cosine", "effective_rank")
    },
    **{
        f"{metric} of rankings": lambda rows, metric=metric: measure_ranking(metric, of(RANKED, rows))
        for metric in RANKING
    },
    **{metric: partial(samples, metric) for metric in SAMPLED_METRICS},
}
"""Every metric, on some of twelve rows."""


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return np.random.default_rng(1).multinomial(ROWS, np.full(ROWS, 1 / ROWS), size=4).astype(float)


# A vector is compared with those of all rows, also of rows that are not drawn.
@pytest.mark.parametrize("name", [name for name in METRICS if not name.endswith("vectors")])
def test_a_row_drawn_several_times_counts_like_as_many_copies(name: str, drawn: np.ndarray) -> None:
    wanted = [METRICS[name](np.repeat(np.arange(ROWS), row.astype(int)).tolist()).value for row in drawn]
    assert METRICS[name](list(range(ROWS))).resampled(drawn) == pytest.approx(wanted, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", [name for name in METRICS if not name.endswith(("pairs", "thumbs"))])
def test_a_metric_without_rows_is_nan(name: str) -> None:
    assert math.isnan(METRICS[name]([]).value)


@pytest.mark.parametrize("name", METRICS)
def test_a_measure_survives_a_round_trip(tmp_path: Path, name: str, drawn: np.ndarray) -> None:
    at = tuple(range(1, ROWS + 1))
    rows = name_rows([f"row {i}" for i in range(ROWS + 1)])
    was = replace(METRICS[name](list(range(ROWS))), at=at)
    save_measures(tmp_path, PerRowScores({}, {was.metric: was}, rows))
    found = load_measures(tmp_path)
    now = found.tuned[was.metric]
    assert (found.rows, found.base) == (rows, {})
    assert (now.at, now.right_wrong, now.signature) == (at, was.right_wrong, was.signature)
    np.testing.assert_array_equal(now.resampled(drawn), was.resampled(drawn))
    turned = replace(now, sums_NK=now.sums_NK[::-1])
    np.testing.assert_allclose(turned.resampled(drawn[:, ::-1]), was.resampled(drawn))
    assert paired_difference(now, was, 1).value == 0


def test_every_metric_of_every_task_is_tested_for_the_round_trip() -> None:
    tried = {build(list(range(ROWS))).metric for build in METRICS.values()}
    known = {metric for facts in TASK_FACTS.values() for metric in facts.metrics}
    assert known - tried <= {"choice_accuracy", "answers_cut"}  # means, as exact_match and rouge are


def test_the_same_measures_give_the_same_bytes_and_truncated_files_are_an_error(tmp_path: Path) -> None:
    found = {metric: tokens(metric, list(range(ROWS))) for metric in TOKEN_METRICS}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_measures(tmp_path / name, PerRowScores(found, found, name_rows(["x"] * ROWS)))
    whole = (tmp_path / "a" / MEASURES).read_bytes()
    assert whole == (tmp_path / "b" / MEASURES).read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "a" / MEASURES).write_bytes(whole[:size])
        with pytest.raises(EnvironmentProblem, match=r"damaged(.|\n)*llmtune evaluate"):
            load_measures(tmp_path / "a")
    with pytest.raises(EnvironmentProblem, match="llmtune evaluate"):
        load_measures(tmp_path / "gone")
