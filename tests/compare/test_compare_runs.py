"""`llmtune compare RUN RUN`: differences are separated from noise, and incomparable runs are refused."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.runs import invoke

from llmtune.compare.compare_runs import (
    compare_runs,
    describe_costs,
    describe_pair,
    describe_pairs,
    finish,
    pair_section,
)
from llmtune.compare.comparison_pictures import shown_metrics
from llmtune.compare.run_comparison import make_comparison
from llmtune.errors import DataError, EnvironmentProblem, RecipeError
from llmtune.evaluate.evaluation_file import EVALUATION
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.opened_runs import name_runs, open_runs
from llmtune.evaluate.per_row_scores import PerRowScores, load_measures, save_measures
from llmtune.store.atomic_files import hash_folder, read_json, write_json
from llmtune.store.report_record import Verdict


@pytest.fixture
def compare(tmp_path, console):
    return lambda *runs: compare_runs(runs, tmp_path / "comparison", console)


def only(made):
    (pair,) = made["pairs"]
    return pair


def seal(run: Path) -> None:
    """Make the manifest agree with the current contents of the evaluation folder."""
    manifest = read_json(run / "run.json")
    manifest["steps"]["evaluate"]["outputs"] = {"evaluation": hash_folder(run / "evaluation")}
    write_json(run / "run.json", manifest)


def change_measures(run: Path, change: Callable[[PerRowScores], PerRowScores]) -> None:
    folder = run / "evaluation"
    now = change(load_measures(folder))
    save_measures(folder, now)
    seal(run)


def turn_rows(found: PerRowScores) -> PerRowScores:
    """The same rows in another order, with their measures."""
    order = list(range(len(found.rows)))
    random.Random(4).shuffle(order)
    places = {was: now for now, was in enumerate(order)}

    def move(one: Measure) -> Measure:
        turned = list(range(len(one.at)))
        random.Random(5).shuffle(turned)
        return replace(one, sums_NK=one.sums_NK[turned], at=tuple(places[one.at[n]] for n in turned))

    rows = tuple(found.rows[was] for was in order)
    sides = [{metric: move(one) for metric, one in side.items()} for side in (found.base, found.tuned)]
    return PerRowScores(*sides, rows)


def test_the_same_adapter_twice_is_inconclusive(compare, good, twin):
    for other in (twin, good):
        pair = only(compare(good, other))
        assert pair["verdict"]["word"] == "inconclusive"
        assert "same model" in pair["verdict"]["reason"]
        assert {metric: found["value"] for metric, found in pair["difference"].items()} == {
            "loss": 0,
            "accuracy": 0,
            "exact_match": 0,
        }


def test_scores_that_differ_by_rounding_share_one_base(compare, tmp_path, good, twin, read):
    moved = shutil.copytree(twin, tmp_path / "moved")
    scores = read_json(moved / "evaluation" / EVALUATION)
    scores["base"]["loss"] += 1e-7
    write_json(moved / "evaluation" / EVALUATION, scores)
    seal(moved)
    compare(good, moved)
    assert "base scores differ" not in read()


def test_rows_in_another_order_are_joined_by_content(compare, tmp_path, train, good):
    worse = train("short", "train.num_train_epochs=1")
    turned = shutil.copytree(worse, tmp_path / "turned")
    change_measures(turned, turn_rows)
    straight, crossed = (only(compare(good, run)) for run in (worse, turned))
    assert crossed["difference"] == straight["difference"]
    assert straight["difference"]["loss"]["value"] != 0


def test_an_adapter_from_rows_in_another_order_is_inconclusive(compare, train, good, place):
    lines = (place / "rows.jsonl").read_text().splitlines(keepends=True)
    random.Random(2).shuffle(lines)
    (place / "turned.jsonl").write_text("".join(lines))
    other = train("reordered", f"data.train={place}/turned.jsonl")
    pair = only(compare(good, other))
    assert pair["difference"]["loss"]["value"] != 0
    assert pair["verdict"]["word"] == "inconclusive"
    assert "training noise" in pair["verdict"]["reason"]


def test_a_run_that_learned_less_is_worse_and_the_reverse_is_better(compare, train, good, read):
    short = train("shorter", "train.num_train_epochs=null", "train.max_steps=1")
    pair, back = (only(compare(*runs)) for runs in ((good, short), (short, good)))
    assert (pair["verdict"]["word"], back["verdict"]["word"]) == ("worse", "better")
    low, high = pair["difference"]["loss"]["interval"]
    assert 0 < low < high
    assert "shorter against good: Worse in loss" in read()


def test_a_difference_is_that_of_the_scores(compare, train, good):
    other = train("short", "train.num_train_epochs=1")
    pair = only(compare(good, other))
    tuned = [json.loads((run / "report.json").read_text())["evaluation"]["tuned"] for run in (good, other)]
    for metric, found in pair["difference"].items():
        assert found["value"] == pytest.approx(tuned[1][metric] - tuned[0][metric])
        low, high = found["interval"]
        assert low <= found["value"] <= high


def test_the_files_contain_the_content_of_the_table(compare, tmp_path, train, good, read):
    runs = (
        good,
        train("short", "train.num_train_epochs=1"),
        train("shorter", "train.num_train_epochs=null", "train.max_steps=1"),
    )
    made = compare(*runs)
    folder = tmp_path / "comparison"
    assert json.loads((folder / "compare.json").read_text())["pairs"] == made["pairs"]
    assert [one["key"] for one in made["settings"]] == ["train.num_train_epochs", "train.max_steps"]
    page, text = (folder / "compare.html").read_text(), (folder / "compare.md").read_text()
    for name in ("good", "short", "shorter"):
        assert f">{name}</th>" in page
        assert f"| {name} |" in text
    assert "not trained for the same number of steps" in page
    assert page.count(" minus ") == 2 * 3, "in the navigation, and as a title"
    assert "http:" not in page
    assert "https:" not in page
    assert (folder / "compare.svg").read_text().startswith("<?xml")
    assert (folder / "compare.png").read_bytes()[:4] == b"\x89PNG"
    (run,) = [one for one in made["runs"] if one["name"] == "good"]
    weights = (good / "adapter/adapter_model.safetensors").stat().st_size
    manifest = read_json(good / "run.json")["steps"]
    assert run["disk_bytes"] == weights
    assert run["peak_bytes"] == manifest["train"]["peak_bytes"]
    assert run["trainable"] == manifest["adapt"]["facts"]["trainable"]


def test_other_test_rows_are_refused_with_the_number_that_differ(compare, train, good, place):
    lines = (place / "rows.jsonl").read_text().splitlines(keepends=True)
    (place / "fewer.jsonl").write_text("".join(lines[:40]))
    fewer = train("fewer", f"data.train={place}/fewer.jsonl")
    with pytest.raises(DataError, match=r"not measured on the same rows: of \d+ test rows \d+ are in both"):
        compare(good, fewer)


@pytest.mark.parametrize(
    ("name", "sets", "said"),
    [
        ("longer", ["generation.max_new_tokens=3"], "generation.max_new_tokens: 3, but good with 8"),
        ("limited", ["evaluate.limit=5"], "exact_match was measured on 5 rows"),
        ("perplex", ["evaluate.metrics=[perplexity]"], "no metric in common"),
        ("all-learned", ["data.train_on=all"], "data.train_on: all, but good with assistant"),
    ],
)
def test_other_measurement_settings_are_refused_by_name(compare, train, good, name, sets, said):
    other = train(name, "train.num_train_epochs=null", "train.max_steps=1", *sets)
    with pytest.raises(RecipeError, match=said):
        compare(good, other)


def test_a_metric_of_only_one_run_is_omitted_with_the_reason(compare, train, good):
    other = train("more", "train.num_train_epochs=null", "train.max_steps=1", "evaluate.metrics=[loss, chrf]")
    pair = only(compare(good, other))
    assert list(pair["difference"]) == ["loss"]
    assert pair["left_out"]["chrf"] == "measured only in more"


def test_losses_per_token_of_other_tokenizers_are_omitted(compare, good, twin):
    def count_otherwise(found: PerRowScores) -> PerRowScores:
        loss = replace(found.tuned["loss"], sums_NK=found.tuned["loss"].sums_NK * np.array([1.0, 2.0]))
        return replace(found, tuned={**found.tuned, "loss": loss})

    change_measures(twin, count_otherwise)
    pair = only(compare(good, twin))
    assert "other units" in pair["left_out"]["loss"]
    assert set(pair["difference"]) == {"accuracy", "exact_match"}


def test_other_tasks_are_refused(compare, train, good, place):
    pairs = [{"prompt": f"What comes after {i}? ", "completion": str(i + 1)} for i in range(40)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    short = ("train.num_train_epochs=null", "train.max_steps=1")
    other = train("completing", "task=completion", f"data.train={place}/pairs.jsonl", *short)
    with pytest.raises(RecipeError, match="task completion, but good has task chat"):
        compare(good, other)


def test_all_problems_with_the_folders_are_reported_at_once(compare, tmp_path, train, good):
    unscored = train("unscored", "train.num_train_epochs=null", "train.max_steps=1", until="train")
    prepared = train("prepared", until="prepare")
    with pytest.raises(RecipeError) as error:
        compare(good, unscored, prepared, tmp_path / "nothing")
    said = [problem.what for problem in error.value.problems]
    assert said == ["this run has no scores yet", "this run has no trained model yet", "run folder not found"]


def test_a_run_without_test_rows_has_nothing_to_compare(compare, train, good):
    bare = train(
        "bare", "data.test=0", "evaluate=null", "generation=null", "train.num_train_epochs=null", "train.max_steps=1"
    )
    with pytest.raises(RecipeError, match="no test rows"):
        compare(good, bare)


@pytest.mark.parametrize("name", ["measures.npz", "evaluation.json", "predictions.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_scores_are_an_error_of_the_environment(compare, good, twin, name, damage):
    path = twin / "evaluation" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(EnvironmentProblem, match="damaged"):
        compare(good, twin)


def test_scores_of_an_older_run_must_be_recomputed(compare, good, twin):
    (twin / "evaluation" / "measures.npz").unlink()
    seal(twin)
    with pytest.raises(EnvironmentProblem, match="no row scores"):
        compare(good, twin)


def test_a_single_run_is_refused(compare, good):
    with pytest.raises(RecipeError, match="a single run"):
        compare(good)


def test_runs_are_named_by_their_shortest_distinct_suffixes():
    paths = [Path("/a/x/lora"), Path("/a/y/lora"), Path("/a/y/full")]
    assert name_runs(paths) == ["x/lora", "y/lora", "y/full"]
    assert name_runs(paths[1:]) == ["lora", "full"]
    assert name_runs([paths[0], paths[0]]) == ["lora", "lora (2)"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tiny.yaml"], 2, "--methods full,lora,qlora"),
        (["good", "good", "--set", "seed=1"], 2, "--set"),
        (["good", "good", "--methods", "full,lora"], 2, "--methods needs exactly one recipe"),
    ],
)
def test_an_invalid_call_ends_with_advice(place, good, words, code, said, monkeypatch):
    monkeypatch.chdir(place)
    done = invoke("compare", *words)
    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_prints_one_json_document_or_the_comparison_on_stdout(place, good, train, monkeypatch):
    train("short", "train.num_train_epochs=1")
    monkeypatch.chdir(place)
    done = invoke("compare", "good", "short", "--json")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert (place / made["folder"] / "compare.html").exists()
    assert made["folder"].startswith("runs/compare-")
    assert done.stderr == ""
    plain = invoke("compare", "good", "short")
    assert f"comparison: {made['folder']}/compare.html" in plain.stdout
    assert "short minus good" in plain.stdout


# The page and the picture


@pytest.fixture
def made(good, train):
    """Two runs, under a name that contains markup, and with fixed figures."""
    shorter = train("shorter", "train.num_train_epochs=null", "train.max_steps=1")
    comparison = make_comparison(open_runs([good, shorter]), "methods", "<b>tickets</b>")
    figures = {"train_seconds": 100.0, "peak_bytes": 2_000_000_000, "rate": "the recipe's", "gates": ()}
    first, second = (replace(run, folder="runs/" + SECRET, **figures) for run in comparison.runs)
    runs = [first, replace(second, method="full", train_seconds=40.0)]
    return replace(comparison, runs=runs, notes=["a | note"])


SECRET = "hf_" + "s3cret" * 6


def test_a_methods_cost_is_reported_relative_to_the_first(made):
    assert describe_pair(made.pairs[0]).startswith("shorter against good: Worse in loss")
    unclear = Verdict("worse", "Worse in loss; accuracy is better, but not clearly. Read on.")
    pair = replace(made.pairs[0], verdict=unclear)
    assert describe_pair(pair) == f"shorter against good: {unclear.reason}", "no headline says worse alone"
    section = pair_section(pair, [], "chat")
    assert section.title == "shorter minus good: worse in loss; accuracy is better, but not clearly"
    same = replace(made.pairs[0], verdict=Verdict("inconclusive", ""))
    told = describe_pairs([made.pairs[0], *[same] * 9])
    assert told == [
        describe_pair(made.pairs[0]),
        "In the other 9 pairs there is no clear difference: more held-out rows would tell.",
    ]
    (told,) = describe_costs(made.runs)
    assert told.startswith("Compared with good, shorter takes 40 % of the training time, 100 % of the peak memory")


def test_names_stay_text_secrets_are_redacted_and_a_missing_number_is_a_dash(made, tmp_path, console):
    pair = replace(made.pairs[0], left_out={"loss": "other units"})
    bare = replace(made.runs[1], train_seconds=None, peak_bytes=None, trainable=None, share=None, difference={})
    made = replace(made, runs=[made.runs[0], bare], pairs=[pair])
    finish(made, tmp_path, console)
    assert shown_metrics(made.runs) == []
    page, text = (tmp_path / "compare.html").read_text(), (tmp_path / "compare.md").read_text()
    assert "<b>tickets" not in page
    assert r"a \| note" in text
    assert "## shorter minus good: worse in loss" in text
    assert "loss is omitted: other units." in text
    assert "| training | 1 min 40 s | – |" in text
    assert json.loads((tmp_path / "compare.json").read_text())["runs"][0]["rate"] == "the recipe's"
    for name in ("compare.html", "compare.md", "compare.json", "compare.svg"):
        assert SECRET not in (tmp_path / name).read_text()


def test_the_picture_is_reproducible_byte_for_byte(made, tmp_path, console):
    pictures = []
    for name in ("a", "b"):
        finish(made, tmp_path / name, console)
        pictures.append([(tmp_path / name / f"compare.{kind}").read_bytes() for kind in ("svg", "png")])
    assert pictures[0] == pictures[1]
