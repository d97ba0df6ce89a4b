"""`evaluate.looks`: error rates of fifty models in a row with known truth, and how looks are counted."""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from support import looks as simulated
from support.runs import finish_run, invoke

from llmtune.deploy.releases import make_release
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.champion import open_champion
from llmtune.evaluate.gates import check_gates, list_power
from llmtune.evaluate.looks import check_looks, count_look
from llmtune.evaluate.metric import ratio
from llmtune.evaluate.opened_runs import ScoredRun
from llmtune.evaluate.paired_statistics import difference, smallest_difference, widen
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import Difference
from llmtune.store.score_records import Champion, Evaluation

GATE = "accuracy.low > champion - 0.9"
KINDS = [pytest.param(kind, marks=() if kind == "right or wrong" else pytest.mark.slow) for kind in simulated.KINDS]
"""Simulated 1,000 times each; losses only in the slow suite."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_unchanged_models_raise_a_false_alarm_in_at_most_5_of_100_series(kind: str) -> None:
    shared, alone = simulated.first_alarms(kind)
    assert len(shared) == 1000
    assert np.mean(shared <= simulated.LOOKS) <= 0.05
    assert np.mean(alone <= simulated.LOOKS) > 0.4  # without `looks`


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_true_loss_is_found_with_the_promised_power(kind: str) -> None:
    deviation = simulated.mean_deviation(kind)
    smallest = smallest_difference(deviation, simulated.ROWS, 0.05 / simulated.LOOKS)
    assert simulated.share_outcomes(kind, -smallest).failed == pytest.approx(0.8, abs=0.07)
    for true in (0.0, -smallest / 2, -smallest * 0.75, -smallest):
        found, computed = simulated.share_outcomes(kind, true), simulated.compute_shares(deviation, true)
        assert astuple(found) == pytest.approx(astuple(computed), abs=0.07), true


@pytest.mark.parametrize("kind", simulated.KINDS)
def test_these_simulations_use_the_intervals_of_gates(kind: str) -> None:
    change_NM = simulated.draw_series(kind, np.random.default_rng(2), 3)
    ends = zip(*simulated.measure_ends(change_NM, kind, simulated.LOOKS), strict=True)
    for change_N, (low, high) in zip(change_NM.T, ends, strict=True):
        right_wrong = kind == "right or wrong"
        sums = [np.stack([part, np.ones_like(part)], 1) for part in (np.maximum(-change_N, 0), np.maximum(change_N, 0))]
        found = widen(difference(*sums, ratio, right_wrong=right_wrong, seed=0, resamples=600), 0.001)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)


def test_gates_and_plans_use_the_level_of_one_look() -> None:
    change = Difference(0.03, 0.001, 0.06, 0.04, 400)
    evaluation = Evaluation({}, {"accuracy": 0.53}, {}, (), 400)
    champion = Champion("releases/best.json", {"accuracy": 0.5}, {"accuracy": change}, {})
    evaluation = Evaluation({}, {"accuracy": 0.53}, {}, (), 400, champion=champion)
    once, weekly = (
        EvaluateSection(gates=("accuracy.low > champion",)),
        EvaluateSection(gates=("accuracy.low > champion",), looks=50, when_unsure="report"),
    )
    (passed,), (unsure,) = (check_gates(section, evaluation) for section in (once, weekly))
    assert passed.passed is True
    assert unsure.passed is None
    assert unsure.wanted == "low end of the difference from the champion, at 99.9 %, > 0"
    assert float(unsure.got) == pytest.approx(0.03 - 0.029 * 3.3150 / 1.9659, abs=1e-4)  # t of 399 at 99.95 %, 97.5 %
    (alone,), (planned,) = (list_power(section, evaluation) for section in (once, weekly))
    assert planned.rows_needed is not None
    assert alone.rows_needed is not None
    assert f"about {planned.rows_needed:,} would tell" in unsure.note
    assert planned.rows_needed / alone.rows_needed == pytest.approx((3.29 + 0.84) ** 2 / (1.96 + 0.84) ** 2, rel=0.02)
    assert planned.smallest > alone.smallest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return finish_run(tmp_path_factory.mktemp("looks"), tiny_llama, train={"num_train_epochs": 1})


@pytest.fixture
def releases(run: Path, tmp_path: Path) -> Path:
    make_release(run, tmp_path / "releases" / "first.json")
    return tmp_path / "releases"


def recipe_with(run: Path, champion: Path, looks: int) -> tuple[Recipe, ScoredRun]:
    sets = [f"evaluate.champion={champion}", f"evaluate.gates=['{GATE}']", f"evaluate.looks={looks}"]
    recipe = load_recipe(run.parent.parent / "tiny.yaml", sets).recipe
    opened = open_champion(recipe)
    assert opened is not None
    return recipe, opened


def test_a_model_is_counted_once_and_one_too_many_is_refused(run: Path, releases: Path) -> None:
    recipe = recipe_with(run, releases, 2)
    ledger = releases / "releases.jsonl"
    assert (count_look(*recipe, "f1", "a") or "").startswith("look 1 of 2 on these test rows")
    written = ledger.read_text()
    check_looks(*recipe, "f1")
    check_looks(*recipe, "f2")
    assert (count_look(*recipe, "f1", "a") or "").startswith("look 1 of 2")
    assert ledger.read_text() == written
    assert (count_look(*recipe, "f2", "b") or "").startswith("look 2 of 2")
    check_looks(*recipe, "f2")  # a retry of the last one
    for refused in (lambda: check_looks(*recipe, "f3"), lambda: count_look(*recipe, "f3", "c")):
        with pytest.raises(RecipeError, match="2 models were already compared on these test rows") as caught:
            refused()
        assert "new rows" in str(caught.value)
    assert len(ledger.read_text().splitlines()) == 2
    assert (count_look(*recipe, "f2", "b") or "").startswith("look 2 of 2")


def test_a_look_gets_its_own_line_even_if_an_editor_removed_the_last_newline(run: Path, releases: Path) -> None:
    recipe, ledger = recipe_with(run, releases, 3), releases / "releases.jsonl"
    count_look(*recipe, "f1", "a")
    ledger.write_text(ledger.read_text().rstrip("\n"))
    count_look(*recipe, "f2", "b")
    assert [json.loads(line)["run"] for line in ledger.read_text().splitlines()] == ["f1", "f2"]


def test_the_remaining_error_counts_if_the_number_of_looks_changed(run: Path, releases: Path) -> None:
    for name in "ab":
        count_look(*recipe_with(run, releases, 4), name, name)
    with pytest.raises(RecipeError, match="Set it to 3 or more"):  # half of the error is left, and 1 of 1.9 takes more
        count_look(*wide(run, releases), "c", "c")
    assert count_look(*recipe_with(run, releases, 2), "c", "c")
    with pytest.raises(RecipeError, match="3 models"):
        count_look(*recipe_with(run, releases, 100), "d", "d")
    count_look(*recipe_with(run, releases, 4), "a", "a")
    spent = [json.loads(line)["alpha"] for line in (releases / "releases.jsonl").read_text().splitlines()]
    assert sum(spent) == pytest.approx(0.05)


def test_growing_test_rows_have_one_count_and_those_of_another_file_their_own(run: Path, releases: Path) -> None:
    recipe, champion = recipe_with(run, releases, 2)
    assert count_look(recipe, champion, "f1", "a")
    grown = replace(champion, measures=replace(champion.measures, rows=(*champion.measures.rows, "new-1")))
    assert (count_look(recipe, grown, "f2", "b") or "").startswith("look 2 of 2")
    with pytest.raises(RecipeError, match="2 models were already compared"):
        check_looks(recipe, grown, "f3")
    source = recipe.data.train[0].model_copy(update={"path": "test.jsonl"})
    held_out = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": (source,)})})
    assert (count_look(held_out, replace(grown, recipe=held_out), "f3", "c") or "").startswith("look 2 of 2")


def wide(run: Path, releases: Path) -> tuple[Recipe, ScoredRun]:
    """A recipe in which one look takes more than half of the error."""

    class Wide(EvaluateSection):
        @property
        def alpha(self) -> float:
            return 0.026

    recipe, champion = recipe_with(run, releases, 2)
    section = Wide.model_construct(**dict(recipe.evaluate))
    return recipe.model_copy(update={"evaluate": section}), champion


def test_other_rows_start_a_new_count_and_the_champion_itself_is_not_counted(run: Path, releases: Path) -> None:
    recipe, ledger = recipe_with(run, releases, 2), releases / "releases.jsonl"
    own = json.loads((releases / "first.json").read_text())["trained"]
    assert count_look(*recipe, "f", own) is None
    assert not ledger.exists()
    other = {"date": "2026-01-01", "run": "f", "tests": "others", "trained": "z", "champion": own, "alpha": 0.05}
    ledger.write_text(json.dumps(other) + "\n")
    assert (count_look(*recipe, "f", "a") or "").startswith("look 1 of 2")


def test_nothing_is_trained_if_looks_cannot_be_counted(run: Path, releases: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the champion is a run folder"):
        check_looks(*recipe_with(run, run, 2), "f")
    look = {"tests": "t", "trained": "a", "champion": "c", "alpha": 0.01}
    for line in (
        b'{"tests": "half a li',
        b"<<<<<<< HEAD",
        b"7",
        b"\xff",
        *(
            json.dumps(look | one).encode()
            for one in ({"trained": []}, {"alpha": "much"}, {"alpha": -1}, {"tests": None})
        ),
    ):
        (releases / "releases.jsonl").write_bytes(json.dumps(look).encode() + b"\n" + line)
        with pytest.raises(EnvironmentProblem, match="damaged"):
            check_looks(*recipe_with(run, releases, 2), "f")
    (releases / "releases.jsonl").unlink()
    (releases / "releases.jsonl").mkdir()
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        check_looks(*recipe_with(run, releases, 2), "f")
    (tmp_path / "empty").mkdir()
    sets = ["--set", f"evaluate.champion={tmp_path / 'empty'}", "--set", f"evaluate.gates=['{GATE}']"]
    done = invoke("recipes", "check", run.parent.parent / "tiny.yaml", *sets)
    assert done.exit_code == 2
    assert "llmtune release RUN" in done.stderr
    plain = ["--set", "evaluate.looks=5"]
    done = invoke("recipes", "check", run.parent.parent / "tiny.yaml", *plain)
    assert done.exit_code == 2
    assert "'evaluate.looks' has no effect without a gate on the end of an interval" in done.stderr
    done = invoke(
        "recipes", "check", run.parent.parent / "tiny.yaml", *plain, "--set", "evaluate.gates=[loss.high < base]"
    )
    assert done.exit_code == 2
    assert "'evaluate.looks' has no effect without a champion" in done.stderr


def test_the_newest_release_with_the_recipes_name_is_the_champion_of_a_weekly_run(
    run: Path, releases: Path, tmp_path: Path
) -> None:
    first = json.loads((releases / "first.json").read_text())
    later = {**first, "date": "2999-01-01 00:00 UTC"}
    (releases / "later.json").write_text(json.dumps({**later, "trained": "another"}))
    (releases / "others.json").write_text(json.dumps({**later, "name": "other", "date": "2999-01-02 00:00 UTC"}))
    sets = [f"evaluate.champion={releases}", f"evaluate.gates=['{GATE}']", "evaluate.looks=2"]
    options = [word for value in sets for word in ("--set", value)]
    recipe = run.parent.parent / "tiny.yaml"
    done = invoke("run", recipe, "--out", tmp_path / "one", *options)
    assert done.exit_code == 0, done.output
    assert "look 1 of 2 on these test rows" in " ".join(done.stderr.split())
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["look"].startswith("look 1 of 2")
    assert report["evaluation"]["champion"]["folder"] == str(releases / "later.json")
    shutil.rmtree(tmp_path / "one")
    again = invoke("run", recipe, "--out", tmp_path / "one", *options)  # another machine, the same command
    assert again.exit_code == 0, again.output
    assert len((releases / "releases.jsonl").read_text().splitlines()) == 1
    for seed, code in ((1, 0), (2, 2)):
        done = invoke("run", recipe, "--out", tmp_path / f"seed-{seed}", *options, "--set", f"seed={seed}")
        assert done.exit_code == code, done.output
    assert not (tmp_path / "seed-2" / "adapter").exists()
    (releases / "releases.jsonl").unlink()
    kept = invoke("run", recipe, "--out", tmp_path / "one", *options)  # the folder is there, and the count was lost
    assert kept.exit_code == 0, kept.output
    assert len((releases / "releases.jsonl").read_text().splitlines()) == 1
