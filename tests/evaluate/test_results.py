from types import SimpleNamespace

import numpy as np
import pytest

from llmtune.evaluate.inference import Answers
from llmtune.evaluate.metric import Measure, PairedMeasures, columns, measure_means, ratio
from llmtune.evaluate.results import find_flips, flipped_rows, load_base, save_base

ROWS = 30


def right(values, metric="exact_match"):
    values = np.asarray(values, dtype=float)
    sums = columns(values, np.ones(len(values)))
    return Measure(metric, sums, ratio, right_wrong=True, at=tuple(range(len(values))))


@pytest.fixture
def told():
    """A plan and the answers of both models: the base answers `b`, the tuned model `t`."""
    names = [str(i) for i in range(ROWS)]
    plan = SimpleNamespace(
        origins=[f"rows.jsonl:{i}" for i in range(ROWS)],
        prompts=names,
        references=names,
        choices=("x", "y"),
        pictured=(),
    )
    models = {"base": "b", "tuned": "t"}
    return plan, {name: Answers(None, dict.fromkeys(range(ROWS), said), {}) for name, said in models.items()}


def test_flips_are_counted_in_both_directions_and_a_few_are_shown_spread_over_all(told):
    before = [i < 4 for i in range(ROWS)]
    after = [i >= 2 for i in range(ROWS)]
    found = find_flips(PairedMeasures({"exact_match": right(before)}, {"exact_match": right(after)}), *told, 5)[
        "exact_match"
    ]
    assert (found.gained, found.lost, found.rows) == (26, 2, ROWS)
    assert [row["prompt"] for row in found.lost_rows] == ["0", "1"]
    assert len(found.gained_rows) == 5
    shown = [int(row["prompt"]) for row in found.gained_rows]
    assert min(shown) < 12 < 22 < max(shown)
    assert found.gained_rows[0].keys() == {"origin", "prompt", "reference", "base", "tuned"}


def test_no_more_rows_are_shown_than_samples(told):
    before, after = right([False] * ROWS), right([True] * ROWS)
    for wanted, shown in ((0, 0), (2, 2), (1000, 5)):
        found = find_flips(PairedMeasures({"m": before}, {"m": after}), *told, wanted)["m"]
        assert found.gained == ROWS
        assert len(found.gained_rows) == shown


def test_only_right_or_wrong_metrics_of_both_models_have_flips(told):
    means = measure_means("rougeL", [0.5] * ROWS, "")
    tunes = {"rougeL": means, "exact_match": right([True] * ROWS), "choice_accuracy": right([True] * ROWS)}
    bases = {"rougeL": means, "exact_match": right([True] * ROWS)}
    assert find_flips(PairedMeasures(bases, tunes), *told, 5).keys() == {"exact_match"}


def test_a_tie_is_not_a_flip_and_a_base_of_ties_has_none(told):
    before, after = right([0.5, 0.5, 0, 1]), right([1, 0, 1, 0.5])
    assert flipped_rows(before, after) == ([2], [])
    assert find_flips(PairedMeasures({"m": right([0.5] * 4)}, {"m": after}), *told, 5) == {}


def test_recorded_answers_are_read_only_as_they_were_written(tmp_path):
    answers = Answers(None, {0: "yes", 1: "no"}, {0: [0.5, float("nan")]}, corpus=np.ones((2, 300)))
    save_base(tmp_path, answers, "inputs")
    files = {path: path.read_bytes() for path in (tmp_path / "base.json", tmp_path / "base.npy")}
    read = load_base(tmp_path, "inputs").answers
    assert read is not None
    assert (read.texts, read.corpus.tolist()) == (answers.texts, answers.corpus.tolist())
    for path, whole in files.items():
        for damaged in (
            whole[:-90] + bytes(90),
            whole[:-90],
            whole.replace(b"yes", b"yet").replace(b"\xf0?", b"\xf1?"),
            b"",
        ):
            path.write_bytes(damaged)
            assert load_base(tmp_path, "inputs").answers is None
        path.write_bytes(whole)
