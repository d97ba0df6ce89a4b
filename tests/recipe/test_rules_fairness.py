from __future__ import annotations

import pytest

from llmtune.recipe import load_recipe

CLASSIFY = "task: classify\ndata: {train: rows.jsonl, test: 0.2}\nmodel: {name: owner/model}\n"
FAIR = "evaluate.fairness={}"


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["evaluate.fairness.pairs=[own]", "task=classify"], "evaluate.fairness.pairs"),
        (["evaluate.fairness.pairs=[x.csv]", "task=token-classify"], "evaluate.fairness.pairs"),
        (["evaluate.fairness.pairs=[own]", "task=preference", "preference.loss=reward"], "evaluate.fairness.pairs"),
        (["evaluate.fairness.pairs=[own]", "task=qa", "qa.style=extractive"], "evaluate.fairness.pairs"),
        (["evaluate.fairness.swaps=[own]", "task=speech"], "evaluate.fairness.swaps"),
        (["evaluate.fairness.swaps=[own]", "task=translate"], "evaluate.fairness.swaps"),
        (["evaluate.fairness.swaps=[own]", "data.test=0"], "evaluate.fairness.swaps"),
        (["evaluate.fairness.groups=[sex]", "data.test=0"], "evaluate.fairness.groups"),
    ],
)
def test_a_part_that_this_task_or_these_rows_have_no_use_for_is_refused(refuse, sets, key):
    assert [problem.what for problem in refuse(sets=sets) if f"'{key}' has no effect" in problem.what]


@pytest.mark.parametrize("task", ["chat", "classify", "token-classify", "speech", "translate", "qa", "preference"])
def test_what_is_not_stated_is_left_to_the_study(write, task):
    write()
    for test in (0, 0.2):
        recipe = load_recipe("recipe.yaml", [FAIR, f"task={task}", f"data.test={test}"]).recipe
        assert recipe.evaluate.fairness.pairs == ("own",)


@pytest.mark.parametrize(
    ("sets", "what", "fix"),
    [
        (["evaluate.fairness={pairs: [], swaps: []}"], "asks for nothing", "groups"),
        (["evaluate.fairness.groups=[a, a]", "data.test=0.2"], "names something twice", "once"),
        (["evaluate.fairness.swaps=['hub:x/y']", "data.test=0.2"], "'hub:x/y' is no file", "CSV"),
        (["evaluate.fairness.pairs=['hub:a/b/c/d']"], "no name of a data set", "hub:OWNER/NAME[/CONFIG]"),
        (
            [FAIR, "evaluate.gates=['fairness.gap <= 0.05']", "data.test=0.2"],
            "not measured",
            "evaluate.fairness.groups",
        ),
        ([FAIR, "evaluate.gates=['fairness.icat > 60']", "data.test=0.2"], "of StereoSet alone", "StereoSet"),
        ([FAIR, "evaluate.gates=['fairness.swap_changes < base']", "data.test=0"], "not measured here", "Remove it"),
        ([FAIR, "evaluate.gates=['fairness.gpa < 1']", "data.test=0.2"], "unknown metric", "Did you mean"),
        (
            ["evaluate.fairness={swaps: []}", "evaluate.gates=['fairness.stereotyp < 1']"],
            "unknown metric",
            "stereotype",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(refuse, sets, what, fix):
    (problem,) = refuse(sets=sets)
    assert what in problem.what
    assert fix in problem.fix


def test_a_gate_on_pairs_needs_a_model_of_language(refuse):
    (problem,) = refuse(CLASSIFY, sets=[FAIR, "evaluate.gates=['fairness.stereotype <= 0.6']"], whole=True)
    assert "not measured here" in problem.what


def test_gates_on_the_study_hold_without_test_rows_too(write):
    write()
    load_recipe("recipe.yaml", [FAIR, "data.test=0", "evaluate.gates=['fairness.stereotype_distance <= base + 0.05']"])


def test_files_are_relative_to_the_recipe_and_names_stay(write, tmp_path):
    write("evaluate: {fairness: {pairs: [own, x/p.csv, 'hub:a/b'], swaps: [w.csv]}}\n")
    fairness = load_recipe("recipe.yaml", ["data.test=0.2"]).recipe.evaluate.fairness
    assert fairness.pairs == ("own", str(tmp_path / "x" / "p.csv"), "hub:a/b")
    assert fairness.swaps == (str(tmp_path / "w.csv"),)
