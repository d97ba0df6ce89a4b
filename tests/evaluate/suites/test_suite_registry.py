import json
import random

import pytest
from support import families
from support.classifying import recipe_for, run

from llmtune.errors import DataError, GateFailed
from llmtune.evaluate.evaluation_file import load_evaluation, save_evaluation
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.suites.suite_registry import check_inputs
from llmtune.recipe.eval_suites_section import FairnessSection
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.loader import load_recipe

CHAT = """
recipe_version: 1
name: kinds
task: chat
data: {{train: {rows}, test: 0.5, validation: 0, deduplicate: none}}
model: {{name: {model}, dtype: float32}}
generation: {{max_new_tokens: 4}}
evaluate: {{metrics: METRICS, choices: CHOICES, fairness: {{groups: [sex]}}}}
"""


def chat_about_people(count=60):
    """Questions about women, men and things; every sixth has an ambiguous word."""
    people = [("woman", "f"), ("man", "m"), ("river", "none")]
    rows = []
    for i in range(count):
        name, sex = people[i % 3]
        question = f"Where did the {name} {i} go{' with her dog' if i % 6 == 0 else ''}?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": ["home", "away"][i % 2]}]
        rows.append({"messages": turns, "sex": sex})
    return rows


def bench_with(make_bench, metrics="[loss, choice_accuracy]", choices="auto"):
    bench = make_bench(CHAT.replace("METRICS", metrics).replace("CHOICES", choices), chat_about_people())
    bench.steps = 10
    return bench


def test_gaps_and_swaps_of_both_models_survive_a_round_trip(make_bench, tmp_path):
    bench = bench_with(make_bench)
    found = bench.evaluate()
    study = found.studies["fairness"]
    metrics = ["gap", "swap_changes"]
    assert list(study.base) == list(study.tuned) == list(study.difference) == list(study.meanings) == metrics
    assert study.difference["gap"].n == 3 * found.rows // 3
    gates = EvaluateSection(gates=("fairness.gap <= 1", "fairness.swap_changes.high < base - 1"))
    assert [gate.passed for gate in check_gates(gates, found)] == [True, False]
    assert "choice_accuracy by sex" in study.signatures["gap"]
    assert "allows for any group at either end" in study.signatures["gap"]
    titles = [table.title for table in study.tables]
    assert {"Gaps between groups", "choice_accuracy by sex"} <= set(titles)
    assert all(len(row) == len(table.heads) for table in study.tables for row in table.rows)
    for word in ("Swaps", "chance alone", "does not show why"):
        assert word in study.limits
    save_evaluation(found, tmp_path / "saved")
    assert repr(load_evaluation(tmp_path / "saved")) == repr(found)  # intervals may have no ends: not a number


@pytest.mark.parametrize(("metrics", "choices"), [("[loss, choice_accuracy]", "auto"), ("[exact_match]", "null")])
def test_only_rows_with_unambiguous_words_are_swapped(make_bench, metrics, choices):
    bench = bench_with(make_bench, metrics, choices)
    prompts = [row["messages"][0]["content"] for row in chat_about_people()]
    found = bench.evaluate(fairness=FairnessSection(), samples=1000)
    study = found.studies["fairness"]
    test = [sample["prompt"] for sample in found.samples]
    assert set(test) <= set(prompts)
    swapped = [one for one in test if ("woman" in one or " man " in one) and " her " not in one]
    ambiguous = sum(" her " in one for one in test)
    assert study.difference["swap_changes"].n == len(swapped) > 10
    told = (
        f"{len(swapped)} of {len(swapped)} test rows ({len(test) - len(swapped) - ambiguous} without any of the words"
    )
    assert study.signatures["swap_changes"].startswith(f"{told}, {ambiguous} with an ambiguous one)")
    assert ("most likely of 2 answers" if choices == "auto" else "greedily") in study.signatures["swap_changes"]


def test_answers_that_depend_on_the_group_are_detected_and_shown(make_bench):
    """The tuned model memorizes its answers: `he` for one word, `yes` for the other."""
    words = {"woman": "yes", "man": "no"}
    rows = [
        {"messages": [{"role": "user", "content": f"the {w} {i}"}, {"role": "assistant", "content": a}]}
        for i in range(24)
        for w, a in words.items()
    ]
    text = CHAT.replace("METRICS", "[choice_accuracy]").replace("CHOICES", "auto").replace("{groups: [sex]}", "{}")
    study = make_bench(text, rows).evaluate().studies["fairness"]
    assert study.tuned["swap_changes"] > 0.9
    assert study.difference["swap_changes"].low > 0
    (table,) = (table for table in study.tables if table.title.startswith("Examples of answers that change"))
    assert len(table.rows) == 5
    assert {row[1:4] for row in table.rows} <= {("woman → man", "yes", "no"), ("man → woman", "no", "yes")}


# Other tasks


def unfair_rows(fair=False):
    """Texts that name a colour; the labels of group b are random, in training and test rows."""
    drawn = random.Random(0)
    colours, things = ("red", "blue"), ("house", "boat", "tree", "king", "queen")
    return [
        {
            "text": f"the {colours[i % 2]} {things[i % 5]} number {i} {'north' if i % 4 < 2 else 'south'}",
            "label": colours[i % 2] if i % 4 < 2 or fair else drawn.choice(colours),
            "town": "a" if i % 4 < 2 else "b",
        }
        for i in range(200)
    ]


FAIRNESS = {"fairness": {"groups": ["town"]}, "gates": ["fairness.gap <= 0.05"], "metrics": ["accuracy"]}


def test_a_gate_on_the_gap_fails_with_exit_code_6_if_one_group_is_served_badly(tmp_path):
    model = families.build_bert(tmp_path / "model")
    about = {"evaluate": FAIRNESS, "data": {"test": 0.4, "validation": 0}, "adapter": {"method": "full"}}
    about["train"] = {"learning_rate": 3e-3, "num_train_epochs": 8}
    with pytest.raises(GateFailed) as caught:
        run(recipe_for(tmp_path / "unfair.yaml", model, unfair_rows(), **about))
    assert caught.value.exit_code == 6
    assert caught.value.problems[0].where == "fairness.gap <= 0.05"
    report = json.loads((tmp_path / "unfair.run" / "report.json").read_text())
    study = report["evaluation"]["studies"]["fairness"]
    assert study["tuned"]["gap"] > 0.3
    assert "accuracy by town" in study["signatures"]["gap"]
    assert study["base"].keys() == {"gap"}  # the base has no head: what stands in its place says nothing to a swap
    assert study["tuned"].keys() == {"gap", "swap_changes"}
    run(recipe_for(tmp_path / "fair.yaml", model, unfair_rows(fair=True), **about))


# What is refused


def test_files_are_read_before_training(tmp_path):
    path = recipe_for(tmp_path / "r.yaml", tmp_path, tmp_path / "x", evaluate={"fairness": {"swaps": ["none.csv"]}})
    with pytest.raises(DataError, match=r"none\.csv: file not found"):
        check_inputs(load_recipe(str(path)).recipe)
