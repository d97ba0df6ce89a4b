"""The evaluation of reinforced runs: samples of base and tuned model, their rewards, gates, verdict and report."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.runs import finish_run, invoke

from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.per_row_scores import load_measures
from llmtune.store.atomic_files import read_json_lines
from llmtune.store.verification import verify_run

REWARDS = '''
def vowels(row, answer):
    """The share of vowels."""
    return sum(letter in "aeiou" for letter in answer.lower()) / max(1, len(answer))


def brief(row, answer):
    return 1 / (1 + len(answer))
'''
METRICS = ["reward", "greedy_reward", "pass@1", "pass@4", "answer_tokens", "samples_cut", "kl", "exact_match"]


def reinforce(folder: Path, model: Path, reinforce: dict[str, Any] | None = None, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rewards.py"
    file.write_text(REWARDS)
    settings = {"rewards": {f"{file}:vowels": 1.0}, "audit": f"{file}:brief", "accept": 0.3, "control": False}
    settings |= {"samples": 4, "max_new_tokens": 6, **(reinforce or {})}
    sections = {"evaluate": {"metrics": METRICS}, "generation": {"max_new_tokens": 6}, **sections}
    return finish_run(folder, model, task="reinforce", reinforce=settings, **sections)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return reinforce(tmp_path_factory.mktemp("reinforced"), tiny_llama)


def test_both_models_are_sampled_and_rated_on_every_test_prompt(run: Path):
    evaluation = load_evaluation(run / "evaluation")
    assert evaluation is not None
    assert set(METRICS) | {"answers_cut"} == set(evaluation.tuned)
    assert evaluation.tuned.keys() == evaluation.base.keys()
    assert evaluation.base["kl"] == 0 < evaluation.tuned["kl"]
    lines = read_json_lines(run / "evaluation/predictions.jsonl")
    assert len(lines) == evaluation.rows
    for line in lines:
        for model in ("base", "tuned"):
            rated = line[f"{model}_prediction"]
            (greedy,) = line[f"{model}_parts"]
            assert rated["greedy"]["text"] == greedy["sampled"], "rewards and samples have the text as sampled"
            assert line[model] == greedy["sampled"].strip()
            assert len(rated["samples"]) == 4
            for sample in rated["samples"]:
                assert sample["rewards"].keys() == {"vowels", "brief"}
                assert sample["reward"] == sample["rewards"]["vowels"]
                assert sample["cut"] == (sample["tokens"] == 6 and sample["cut"])
    samples = [sample for line in lines for sample in line["tuned_prediction"]["samples"]]
    assert evaluation.tuned["reward"] == pytest.approx(sum(one["reward"] for one in samples) / len(samples))
    assert evaluation.tuned["pass@1"] == pytest.approx(sum(one["reward"] >= 0.3 for one in samples) / len(samples))
    assert len({sample["text"] for sample in samples}) > len(lines), "samples differ"


def test_reports_have_the_rewards_samples_before_and_after_and_charts(run: Path):
    page = (run / "report.html").read_text()
    text = (run / "report.md").read_text()
    for name in ("rewards.vowels", "rewards.brief", "rewards.repeats_prompt", "pass@4"):
        assert name in text
        assert name in page
    assert "Samples of base and tuned model" in page
    assert "reward of samples" in page
    measures = load_measures(run / "evaluation")
    assert "unbiased estimate" in measures.tuned["pass@4"].signature
    assert "sha256" in measures.tuned["reward"].signature


def test_a_second_evaluation_draws_the_same_samples(run: Path):
    before = (run / "evaluation/predictions.jsonl").read_bytes()
    (run / "evaluation/base.json").unlink()
    assert invoke("evaluate", run, "--set", "evaluate.samples=4").exit_code == 0
    assert (run / "evaluation/predictions.jsonl").read_bytes() == before


def test_another_version_of_a_reward_rates_both_models_again(tmp_path: Path, tiny_llama: Path):
    run = reinforce(tmp_path, tiny_llama, train={"max_steps": 1, "num_train_epochs": None})
    before = load_evaluation(run / "evaluation")
    lock = json.loads((run / "llmtune.lock").read_text())
    assert lock["metrics"].keys() == {str(tmp_path / "rewards.py")}
    (tmp_path / "rewards.py").write_text(REWARDS.replace("aeiou", "aeiouy "))
    failed = {(one.kind, Path(one.name).name, one.state) for one in verify_run(run).failed}
    assert failed == {(kind, "rewards.py", "changed") for kind in ("metrics", "rewards")}
    verified = invoke("verify", run)
    assert verified.exit_code == 6
    assert f"{tmp_path / 'rewards.py'}: rewards: changed since the run" in verified.stderr.replace("\n", "")
    assert invoke("evaluate", run).exit_code == 0
    after = load_evaluation(run / "evaluation")
    assert before is not None
    assert after is not None
    assert after.base["reward"] > before.base["reward"]
    assert after.tuned["reward"] > before.tuned["reward"]


@pytest.mark.parametrize("change", ["reinforce.control=filter", "evaluate.gates=[reward >= 0]"])
def test_a_control_run_or_a_gate_added_later_trains_nothing_again(run: Path, tmp_path: Path, change: str):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    done = invoke("run", run.parent.parent / "tiny.yaml", "--out", copied, "--json", "--set", change)
    assert done.exit_code == 0, done.stderr
    assert {step["name"]: step["skipped"] for step in json.loads(done.stdout)["steps"]}["train"]
    weights = [(one / "adapter/adapter_model.safetensors").read_bytes() for one in (run, copied)]
    assert weights[0] == weights[1]
    assert (copied / "controls/filter/adapter").exists() is ("control" in change)


@pytest.mark.parametrize(
    "change",
    [
        "rewards={rewards.py:vowels: 2.0}",
        "rewards={rewards.py:vowels: 1.0, rewards.py:brief: 0.1}",
        "temperature=0.7",
        "rounds=1",
        "beta=0.1",
    ],
)
def test_other_weights_and_settings_are_another_recipe(run: Path, change: str):
    refused = invoke("train", run.parent.parent / "tiny.yaml", "--out", run, "--set", f"reinforce.{change}")
    assert refused.exit_code == 2
    assert "a run of another recipe" in " ".join(refused.stderr.split())


def test_allowed_values_are_written_as_in_yaml(run: Path):
    refused = invoke("train", run.parent.parent / "tiny.yaml", "--set", "reinforce.control=never")
    assert refused.exit_code == 2
    assert "'reinforce.control' is 'never'" in refused.stderr
    assert "Allowed: false or filter." in " ".join(refused.stderr.split())


def test_gates_judge_samples_and_each_reward(run: Path):
    passing = ["pass@1 >= 0", "pass@3 <= 1", "answer_tokens <= base", "rewards.brief.high > base - 1", "kl < 1"]
    gates = ", ".join([*passing, "rewards.vowels > 1", "reward.low > base + 1"])
    changes = ["--set", "evaluate.metrics=[reward, pass@1, pass@3, answer_tokens, kl]"]
    assert invoke("evaluate", run, *changes, "--set", f"evaluate.gates=[{gates}]").exit_code == 6
    gate_results = {one["name"]: one["passed"] for one in json.loads((run / "report.json").read_text())["gates"]}
    assert gate_results == dict.fromkeys(passing, True) | {"rewards.vowels > 1": False, "reward.low > base + 1": False}


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ("evaluate.gates=[rewards.vowel > base]", "uses an unknown metric", "rewards.vowels"),
        ("evaluate.gates=[pass@2 > base]", "uses a metric that is not computed", "Add pass@2 to evaluate.metrics"),
        ("evaluate.metrics=[pass@x]", "unknown metric 'pass@x'", "pass@1"),
        ("evaluate.metrics=[pass@9]", "'pass@9' needs 9 samples", "Set reinforce.samples"),
    ],
)
def test_impossible_metrics_and_gates_are_refused_with_their_cure(run: Path, change: str, what: str, fix: str):
    refused = invoke("evaluate", run, "--set", change)
    assert refused.exit_code == 2
    text = " ".join(refused.stderr.split())
    assert what in text
    assert fix in text


def test_a_metric_that_needs_references_is_not_measured_on_prompts_alone(tmp_path: Path, tiny_llama: Path):
    file = tmp_path / "prompts.jsonl"
    questions = [{"messages": [{"role": "user", "content": f"What follows {i}?"}]} for i in range(9)]
    file.write_text("".join(json.dumps(one) + "\n" for one in questions))
    evaluate = {"metrics": ["reward", "exact_match"], "gates": ["reward >= 0"]}
    train = {"max_steps": 1, "num_train_epochs": None}
    run = reinforce(
        tmp_path, tiny_llama, {"mask_truncated": False}, data={"test": str(file)}, evaluate=evaluate, train=train
    )
    evaluation = load_evaluation(run / "evaluation")
    assert evaluation is not None
    assert "exact_match" not in evaluation.tuned
    why = "not measured: 9 of 9 test rows have no reference answer"
    assert evaluation.signatures["exact_match"] == why
    assert why in (run / "report.html").read_text()
    failed = invoke("evaluate", run, "--set", "evaluate.gates=[exact_match >= 0]")
    assert failed.exit_code == 6
    assert "wanted exact_match >= 0, got not measured" in " ".join(failed.stderr.split())


def test_all_weights_have_no_distance_from_the_base(tmp_path: Path, tiny_llama: Path):
    sections = {"adapter": {"method": "full", "r": None, "lora_alpha": None}, "train": {"learning_rate": 1e-4}}
    run = reinforce(tmp_path, tiny_llama, **sections, evaluate={"metrics": None})
    evaluation = load_evaluation(run / "evaluation")
    assert evaluation is not None
    assert "kl" not in evaluation.tuned
    assert "adapter" in evaluation.signatures["kl"]
    assert "reinforce.samples is 4" in evaluation.signatures["pass@8"]


def test_exports_answer_the_prompts_with_the_same_random_numbers(tmp_path: Path, tiny_llama: Path):
    run = reinforce(tmp_path, tiny_llama, deploy=["merged"])
    certificate = json.loads((run / "merged/certificate.json").read_text())
    assert certificate["score"]["difference"]["reward"]["value"] == pytest.approx(0, abs=1e-6)
    assert "kl" not in certificate["score"]["export"]
