"""Exports scored by their own runtime, paired with the tuned model; gates on them, and comparisons with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import families
from support.classifying import colour_rows, recipe_for
from support.classifying import run as run_classifier
from support.rows import write_jsonl
from support.runs import finish_run, invoke, write_recipe
from transformers import AutoModelForCausalLM

from llmtune.compare.compare_methods import change
from llmtune.deploy.parity import LIMITS
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.opened_runs import open_run_scores
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.loader import load_recipe
from llmtune.records import Difference
from llmtune.store.atomic_files import read_json
from llmtune.store.score_records import Evaluation, Study

NEAR = "deploy.merged.accuracy.low > tuned - 0.5"
SAME = "deploy.merged.accuracy >= tuned"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run of a tiny encoder that merges its model, with gates on the merged one."""
    folder = tmp_path_factory.mktemp("exports")
    recipe = recipe_for(
        folder / "r.yaml",
        families.build_bert(folder / "model"),
        colour_rows(60),
        deploy=["merged"],
        evaluate={"gates": [NEAR, SAME]},
        adapter={"r": 4},
    )
    report, run = run_classifier(recipe)
    return report, run


@pytest.fixture(scope="module")
def chat(tmp_path_factory, tiny_llama):
    return finish_run(tmp_path_factory.mktemp("chat"), tiny_llama, deploy=["merged"])


def test_an_export_is_scored_on_the_test_rows_and_gated(classifier):
    report, run = classifier
    scored = read_json(run / "merged/certificate.json")["score"]
    assert scored["export"]["accuracy"] == report["evaluation"]["tuned"]["accuracy"]
    assert scored["difference"]["accuracy"]["value"] == 0
    assert scored["rows"] == report["evaluation"]["rows"]
    assert scored["usage"]["rows_per_second"] > 0
    assert scored["tuned_usage"]["rows_per_second"] > 0
    assert scored["tuned_bytes"] > scored["bytes"] > 0
    assert {gate["name"]: gate["passed"] for gate in report["gates"]} == {NEAR: True, SAME: True}
    assert "merged" in (run / "report.md").read_text()
    assert "tuned.deploy.merged.accuracy" in (run / "junit.xml").read_text()


def test_an_export_has_no_divergence_from_a_base_that_it_does_not_contain(tmp_path, tiny_llama):
    rows = [{"prompt": f"Colour {i}?", "chosen": "red", "rejected": "blue"} for i in range(30)]
    sections = {"preference": {"loss": "orpo"}, "evaluate": {"metrics": ["accuracy", "kl"]}, "deploy": ["merged"]}
    rows = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = write_recipe(tmp_path / "r.yaml", tiny_llama, rows, task="preference", generation=None, **sections)
    _, run = run_classifier(recipe)
    scored = read_json(run / "merged/certificate.json")["score"]
    assert set(scored["export"]) == {"accuracy"}
    assert scored["left_out"] == {"kl": "measured only in tuned"}


def test_a_release_has_the_scores_of_exports(classifier, tmp_path):
    _, run = classifier
    assert invoke("release", run, "--out", tmp_path / "r.json").exit_code == 0
    certificates = read_json(tmp_path / "r.json")["certificates"]
    assert certificates["merged/certificate.json"]["score"]["export"]


def test_compare_takes_a_run_and_its_export(classifier, tmp_path):
    _, run = classifier
    result = invoke("compare", run, run / "merged", "--out", tmp_path / "compared")
    assert result.exit_code == 0, result.output
    runs = read_json(tmp_path / "compared/compare.json")["runs"]
    assert [one["tuned"]["accuracy"] for one in runs] == [runs[0]["tuned"]["accuracy"]] * 2
    assert all(one["row_seconds"] > 0 for one in runs)
    assert runs[0]["served_bytes"] > runs[1]["served_bytes"]
    assert (tmp_path / "compared/pareto.png").exists()


def test_an_export_of_an_earlier_training_does_not_count_as_the_runs(classifier, tmp_path):
    """It stays in the folder if the run is trained again; its scores are those of other weights."""
    run = shutil.copytree(classifier[1], tmp_path / "run")
    file = run / "merged/certificate.json"
    file.write_text(json.dumps(read_json(file) | {"trained_sha256": "0" * 64}))
    assert invoke("release", run, "--out", tmp_path / "r.json").exit_code == 0
    assert read_json(tmp_path / "r.json")["certificates"] == {}
    with pytest.raises(EnvironmentProblem, match="made from an earlier training"):
        open_run_scores(run / "merged", "merged")


def test_an_export_out_of_its_run_folder_is_not_compared(classifier, tmp_path):
    _, run = classifier
    shutil.copytree(run / "merged", tmp_path / "merged")
    with pytest.raises(RecipeError, match="not in its run folder"):
        open_run_scores(tmp_path / "merged", "merged")


def test_a_copy_of_the_merged_model_is_certified_as_foreign(chat):
    result = invoke("deploy", "certify", chat / "merged", "--run", chat, "--json")
    assert result.exit_code == 0, result.output
    certificate = json.loads(result.stdout)
    assert certificate["passed"]
    assert certificate["score"]["difference"]["loss"]["value"] == pytest.approx(0, abs=1e-4)
    assert (chat / "certified/merged/measures.npz").exists()


def test_the_rounding_of_a_16_bit_run_is_allowed_in_exports_of_others(tmp_path, tiny_llama):
    run = finish_run(tmp_path, tiny_llama, deploy=["merged"], model={"name": str(tiny_llama), "dtype": "bfloat16"})
    other = tmp_path / "float32"
    shutil.copytree(run / "merged", other)
    AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).save_pretrained(other)
    result = invoke("deploy", "certify", other, "--run", run, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["limits"]["kl_mean"] >= LIMITS["rounded"].kl_floor


def break_folder(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_export_with_another_number_of_labels_is_named(classifier, tmp_path):
    _, run = classifier
    folder = shutil.copytree(run / "merged", tmp_path / "merged")
    config, two = read_json(folder / "config.json"), {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (folder / "config.json").write_text(json.dumps({**config, **two}))
    weights = load_file(folder / "model.safetensors")
    weights |= {name: part[:2].clone() for name, part in weights.items() if name.startswith("classifier.")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = invoke("deploy", "certify", folder, "--run", run)
    assert result.exit_code == 6, result.output
    assert "the export has 2 labels, the tuned model 3" in " ".join(result.output.split())


def scored(low, high, value=0.0):
    change = Difference(value, low, high, 0.5, 100)
    study = Study("onnx", {"accuracy": 0.9}, {"accuracy": 0.9 + value}, {"accuracy": change}, {}, {"accuracy": 1})
    return Evaluation({}, {}, {}, (), 100, exports={"merged": study})


@pytest.mark.parametrize(
    ("evaluation", "passed"),
    [(scored(-0.005, 0.01), True), (scored(-0.05, -0.02, -0.03), False), (scored(-0.05, 0.04), None)],
)
def test_a_gate_on_an_export_has_three_outcomes(evaluation, passed):
    section = EvaluateSection(gates=("deploy.merged.accuracy.low > tuned - 0.01",), when_unsure="report")
    assert check_gates(section, evaluation)[0].passed is passed


def test_a_gate_on_an_export_that_is_not_made_yet_names_the_command():
    (result,) = check_gates(EvaluateSection(gates=(SAME,)), Evaluation({}, {}, {}, (), 0))
    assert result.passed is False
    assert "`llmtune run` makes" in result.got


def test_methods_are_compared_without_exports_and_their_gates(tiny_llama, tmp_path):
    evaluate = {"gates": ["loss < base", "deploy.merged.loss.high <= tuned"], "when_unsure": "report"}
    path = write_recipe(tmp_path / "r.yaml", tiny_llama, "rows.jsonl", deploy=["merged"], evaluate=evaluate)
    changed = load_recipe(path, change(load_recipe(path), "full")).recipe
    assert (changed.deploy.products, changed.evaluate.gates) == ((), ("loss < base",))


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("deploy.gguf.loss <= tuned", "uses an export that is not made"),
        ("deploy.merged.rouge <= tuned", "uses a metric that is not computed"),
        ("deploy.merged.loss <= base", "compares with the wrong model"),
        ("loss <= tuned", "compares with the wrong model"),
    ],
)
def test_impossible_gates_on_exports_are_refused(gate, said, tiny_llama, tmp_path):
    with pytest.raises(RecipeError, match=said):
        finish_run(tmp_path, tiny_llama, deploy=["merged"], evaluate={"gates": [gate]})


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return folder


def leave_out_a_layer(folder):
    break_folder(folder, lambda weights: [weights.pop(name) for name in [*weights] if "layers.0.mlp" in name])
    return folder


def write_garbage(name):
    def write(folder):
        (folder.parent / name).write_bytes(b"garbage" * 100)
        return folder.parent / name

    return write


@pytest.mark.parametrize(
    ("damage", "code"),
    [(cut_weights, 4), (leave_out_a_layer, 6), (write_garbage("model.gguf"), 4), (write_garbage("model.onnx"), 4)],
)
def test_a_damaged_export_is_named_without_a_traceback(damage, code, chat, tmp_path):
    shutil.copytree(chat / "merged", tmp_path / "merged")
    result = invoke("deploy", "certify", damage(tmp_path / "merged"), "--run", chat)
    assert result.exit_code == code, result.output
    assert str(tmp_path) in result.output.replace("\n", "")


def test_other_metrics_score_the_exports_again(classifier):
    _, run = classifier
    more = "evaluate.metrics=[loss, accuracy, matthews]"
    result = invoke("run", run.with_name("r.yaml"), "--out", run, "--set", more)
    assert result.exit_code == 0, result.output
    scored = read_json(run / "report.json")["deploy"]["exports"]["merged"]["score"]
    assert "matthews" in scored["difference"]


def test_certify_refuses_what_it_cannot_open(chat, tmp_path):
    for words, said in [
        ((tmp_path / "none", "--run", chat), "not found"),
        ((tmp_path, "--run", chat), "not an export that llmtune can open"),
        ((chat,), "an export and its run are needed"),
        ((chat / "merged", "--run", chat, "--model", "x"), "applies to endpoints only"),
    ]:
        result = invoke("deploy", "certify", *words)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.output.split())


@pytest.mark.parametrize("kind", ["classes", "text"])
def test_a_limit_scores_an_export_on_some_rows_and_says_so(kind, classifier, chat, tmp_path):
    run = shutil.copytree(classifier[1] if kind == "classes" else chat, tmp_path / "run")
    shutil.rmtree(run / "merged")
    result = invoke("deploy", "merge", run, "--limit", 3)
    assert result.exit_code == 0, result.output
    scored = read_json(run / "merged/certificate.json")["score"]
    every = read_json(run / "report.json")["evaluation"]["rows"]
    assert (scored["rows"], scored["test_rows"]) == (3, every)
    assert {change["n"] for change in scored["difference"].values()} == {3}
    assert {metric: scored["tuned"][metric] for metric in scored["export"]} == pytest.approx(scored["export"], abs=1e-4)
    assert f"on 3 of {every} test rows" in result.output.replace("\n", " ")
    refused = invoke("compare", run, run / "merged", "--out", tmp_path / "compared")
    assert refused.exit_code == 2
    assert "deploy.limit" in refused.output.replace("\n", " ")


def test_a_limit_in_the_recipe_holds_for_a_run_and_widens_the_interval_of_its_gate(tiny_llama, tmp_path):
    gate = "deploy.merged.accuracy.low > tuned - 1"
    deploy = {"products": ["merged"], "limit": 2}
    run = finish_run(tmp_path, tiny_llama, deploy=deploy, evaluate={"gates": [gate]})
    report = read_json(run / "report.json")
    assert report["deploy"]["exports"]["merged"]["score"]["rows"] == 2
    assert f"2 of {report['evaluation']['rows']}" in (run / "report.md").read_text()
    assert "limit: 2" in (run / "recipe.yaml").read_text()
    again = invoke("run", tmp_path / "tiny.yaml", "--out", run, "--set", "deploy.limit=3")
    assert again.exit_code == 0, again.output
    assert read_json(run / "merged/certificate.json")["score"]["rows"] == 3


def test_a_limit_on_an_adapter_alone_is_refused(chat):
    result = invoke("deploy", "gguf", chat, "--adapter-only", "--limit", 3)
    assert result.exit_code == 2
    assert "is not scored" in result.output
