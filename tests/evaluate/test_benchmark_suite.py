"""Benchmarks of lm-eval on base and tuned model: lm-eval's scores, with paired intervals."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from support.benchmark_tasks import CHOOSE, GROUP, LIKELY, rows_to_learn, write_tasks
from support.models import build_llama
from support.rows import write_jsonl
from support.runs import llmtune, write_recipe

from llmtune.errors import DataError
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.metric import paired_difference
from llmtune.evaluate.suites.benchmarks import measure_group, measure_task
from llmtune.evaluate.suites.lm_eval import quietly
from llmtune.pipeline import evaluate_run, run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest

pytestmark = pytest.mark.needs("lm_eval")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model has memorized the benchmark questions."""
    place = tmp_path_factory.mktemp("harness")
    write_tasks(place)
    model = build_llama(place / "model")
    recipe = write_recipe(
        place / "recipe.yaml",
        model,
        write_jsonl(place / "rows.jsonl", rows_to_learn()),
        task="completion",
        data={"test": 0.0, "validation": 0.0, "deduplicate": "none", "packing": None},
        train={"num_train_epochs": 20, "learning_rate": 5e-3, "batch_size": 4},
        adapter={"r": 32, "lora_alpha": 64},
        evaluate={"metrics": None, "benchmarks": ["choose.yaml", "write.yaml", "read.yaml"]},
    )
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=place / "run", offline=True), Console(file=io.StringIO()))
    return place


def study(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run" / "report.json").read_text())["evaluation"]["studies"]
    return found["benchmarks"]


def lm_eval_files(run: Path, name: str) -> dict[str, dict[str, Any]]:
    """lm-eval's own results of one model, by benchmark."""
    return {path.stem: json.loads(path.read_text()) for path in (run / "evaluation/benchmarks" / name).iterdir()}


def plain_lm_eval(place: Path, **settings: Any) -> dict[str, Any]:
    """lm-eval's results for a model that it loads itself, one request at a time."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place), include_defaults=False)
    named = ["chosen_colours", "written_colours", "read_colours"]
    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()), quietly():
        found: dict[str, Any] = simple_evaluate(
            "hf", {"dtype": "float32", **settings}, tasks=named, task_manager=manager, batch_size=1, device="cpu"
        )
    return found


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task}/{key}": value
        for task, scores in results["results"].items()
        for key, value in scores.items()
        if isinstance(value, float) and "_stderr" not in key
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adapter"), [("base", {}), ("tuned", {"peft": "run/adapter"})])
def test_scores_equal_those_of_lm_eval_with_a_model_it_loads_itself(
    done: Path, name: str, adapter: dict[str, str]
) -> None:
    plain = numbers(plain_lm_eval(done, pretrained="model", **adapter))
    found = [numbers(one) for one in lm_eval_files(done / "run", name).values()]
    assert {key: value for one in found for key, value in one.items()} == pytest.approx(plain, rel=1e-5)
    scores = study(done)[name]
    assert scores["choose.acc"] == plain["chosen_colours/acc,none"]
    assert scores["write.exact_match.strict-match"] == plain["written_colours/exact_match,strict-match"]
    assert scores["write.exact_match.as_said"] == plain["written_colours/exact_match,as@said"]
    assert scores["read.bits_per_byte"] == pytest.approx(plain["read_colours/bits_per_byte,none"])


def test_learning_shows_as_paired_intervals_over_the_questions(done: Path) -> None:
    found = study(done)
    for metric in ("choose.acc", "write.exact_match.strict-match"):
        change = found["difference"][metric]
        assert change["value"] == pytest.approx(found["tuned"][metric] - found["base"][metric])
        assert change["interval"][0] > 0.1
        assert (change["n"], change["test"]) == (30, "Bayesian bootstrap")
    assert found["difference"]["read.bits_per_byte"]["test"] == "Bayesian bootstrap"
    assert found["better"]["choose.acc"] == 1
    assert found["better"]["read.bits_per_byte"] == -1


def test_a_score_that_is_not_a_sum_over_questions_has_no_interval_and_says_so(done: Path) -> None:
    found = study(done)
    assert found["tuned"]["write.chrf.strict-match"] > found["base"]["write.chrf.strict-match"]
    assert "write.chrf.strict-match" not in found["difference"]
    assert "no interval" in found["signatures"]["write.chrf.strict-match"]
    assert "no interval" not in found["signatures"]["choose.acc"]
    assert "30 of 30 questions" in found["signatures"]["choose.acc"]


def again(place: Path, *sets: str) -> dict[str, Any]:
    """Evaluate the run once more with other settings."""
    loaded = load_recipe(str(place / "recipe.yaml"), list(sets))
    out = place / f"again-{len(list(place.iterdir()))}"
    shutil.copytree(place / "run", out)
    report = evaluate_run(loaded, out, Console(file=io.StringIO()), offline=True)
    found: dict[str, Any] = report["evaluation"]["studies"]["benchmarks"]
    return {**found, "out": out}


def test_limit_examples_and_template_apply_to_one_benchmark_only(done: Path) -> None:
    choose, write, read = (done / f"{name}.yaml" for name in ("choose", "write", "read"))
    named = f"{{task: {choose}, limit: 7, num_fewshot: 2}}, {{task: {write}, apply_chat_template: true}}, {read}"
    found = again(done, f"evaluate.benchmarks=[{named}]")
    assert found["difference"]["choose.acc"]["n"] == 7
    signatures = found["signatures"]
    assert "2 examples before each question, 7 of 30 questions" in signatures["choose.acc"]
    assert "chat template" in signatures["write.exact_match.as_said"]
    assert "chat template" not in signatures["read.bits_per_byte"]
    before = study(done)["tuned"]
    assert found["tuned"]["write.chrf.as_said"] != before["write.chrf.as_said"]
    assert found["tuned"]["read.bits_per_byte"] == before["read.bits_per_byte"]
    saved = lm_eval_files(found["out"], "tuned")
    assert saved["choose"]["n-shot"] == {"chosen_colours": 2}
    assert {name: one["config"]["limit"] for name, one in saved.items()} == {"choose": 7, "write": None, "read": None}


def test_requests_truncated_to_fit_the_context_are_counted(done: Path) -> None:
    (done / "long.yaml").write_text(CHOOSE + f"description: {'the sky is blue and ' * 600}\n")
    long = again(done, f"evaluate.benchmarks=[{{task: {done / 'long.yaml'}, limit: 2}}]")
    assert "8 requests truncated on the left" in long["signatures"]["long.acc"]
    assert "truncated on the left" not in study(done)["signatures"]["choose.acc"]


def test_trained_tokens_of_tied_embeddings_are_scored_as_trained(bench: Any) -> None:
    base = bench.load()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    settings = LoraConfig(init_lora_weights=False, target_modules=["q_proj"], trainable_token_indices=[5, 6])
    model = get_peft_model(base, settings)
    model.eval()
    context = EvalContext(bench.recipe, bench.task, bench.processor, None, "cpu", bench.console)
    ids = [bench.processor.bos_token_id, *bench.processor("the red house").input_ids]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(logs[at, token]) for at, token in enumerate(ids[1:]))
    from lm_eval.api.instance import Instance

    from llmtune.evaluate.suites.lm_eval_model import BatchedLM

    request = Instance("loglikelihood", {}, ("", "the red house"), 0, ("task", 0, 1))
    ((nats, _),) = BatchedLM(model, context, lambda rows: None).loglikelihood([request])
    assert nats == pytest.approx(expected, rel=1e-5)


def test_a_task_that_cannot_be_run_stops_a_run_before_training(done: Path) -> None:
    (done / "exam.yaml").write_text(CHOOSE.replace("test_split: test", "test_split: exam"))
    loaded = load_recipe(str(done / "recipe.yaml"), [f"evaluate.benchmarks={done / 'exam.yaml'}"])
    with pytest.raises(DataError, match="'exam'"):
        run_pipeline(loaded, RunRequest(out=done / "stopped", offline=True), Console(file=io.StringIO()))
    assert not (done / "stopped" / "adapter").exists()


def test_an_error_during_the_questions_is_reported_without_a_traceback(done: Path) -> None:
    (done / "late.py").write_text("def score(row, said):\n    return {'acc': row['lost']}\n")
    (done / "late.yaml").write_text(CHOOSE + "process_results: !function late.score\n")
    with pytest.raises(DataError, match=r"late\.yaml: lm-eval cannot use the task: KeyError 'lost'"):
        again(done, f"evaluate.benchmarks={done / 'late.yaml'}")


@pytest.mark.parametrize("weighed", [True, False])
def test_a_group_has_a_score_and_an_interval_besides_those_of_its_tasks(done: Path, weighed: bool) -> None:
    few = LIKELY.replace("test_split: test", "test_split: test\nprocess_docs: !function first.ten")
    (done / "likely.yaml").write_text(few)
    (done / "first.py").write_text("def ten(rows):\n    return rows.select(range(10))\n")
    (done / "every.yaml").write_text(GROUP.replace("WEIGHED", str(weighed).lower()))
    found = again(done, f"evaluate.benchmarks={done / 'every.yaml'}")
    scores = found["tuned"]
    parts = [(scores["chosen_colours.acc"], 30), (scores["likely_colours.acc"], 10)]
    sizes = [size if weighed else 1 for _, size in parts]
    assert scores["every.acc"] == pytest.approx(np.average([value for value, _ in parts], weights=sizes))
    change = found["difference"]["every.acc"]
    assert change["value"] == pytest.approx(scores["every.acc"] - found["base"]["every.acc"])
    assert change["n"] == 40
    assert change["interval"][0] > (0 if weighed else -0.01)  # unweighed, ten questions count as much as thirty
    assert {"every_colour_inner.acc", "likely_colours.perplexity"} <= found["difference"].keys()


def test_a_mean_over_tasks_is_compared_with_a_model_that_scores_zero_in_all_of_them() -> None:
    from lm_eval.api.group import AggMetricConfig, Group

    group = Group("g", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=False)])
    found = []
    for first, second in ((0.0, 0.0), (1.0, 0.5)):
        parts = [
            measure_task("acc", value, [{"doc_id": i, "acc": float(i < value * size)} for i in range(size)])
            for value, size in ((first, 10), (second, 30))
        ]
        measure = measure_group(group, "acc", (first + second) / 2, parts)
        assert measure is not None
        found.append(measure)
    change = paired_difference(*found, seed=1)
    assert change.value == pytest.approx(0.75)
    assert change.low > 0.3


def test_the_task_that_replaces_stereotype_pairs_gives_their_share_with_a_paired_interval(done: Path) -> None:
    import lm_eval

    shipped = Path(lm_eval.__file__).parent / "tasks" / "crows_pairs" / "crows_pairs_english.yaml"
    pairs = [{"sent_more": f"The cat is {a}.", "sent_less": f"The dog is {a}."} for a in ("red", "blue", "old")]
    write_jsonl(done / "pairs.jsonl", pairs)
    rows = "dataset_path: json\ndataset_name: null\ndataset_kwargs: {data_files: {test: pairs.jsonl}}\n"
    (done / "pairs.yaml").write_text(f"include: {shipped}\ntask: pairs\n{rows}")
    found = again(done, f"evaluate.benchmarks={done / 'pairs.yaml'}")
    assert 0 <= found["tuned"]["pairs.pct_stereotype"] <= 1
    assert found["difference"]["pairs.pct_stereotype"]["n"] == 3


@pytest.mark.slow
def test_two_processes_give_the_same_scores_as_one(done, tmp_path):
    studies = []
    for processes in (1, 2):
        run = Path(shutil.copytree(done / "run", tmp_path / f"run-{processes}"))
        shutil.rmtree(run / "evaluation")
        words = ["launch", "local", done / "recipe.yaml", "--processes", processes, "--threads", 2, "--out", run]
        finished = llmtune(*words, "--set", "evaluate.forgetting={}", cwd=done)
        assert finished.returncode == 0, finished.stderr
        studies.append(json.loads((run / "report.json").read_text())["evaluation"]["studies"])
    alone, together = studies
    assert together.keys() == alone.keys() == {"benchmarks", "forgetting"}
    for name, study in alone.items():
        for model in ("base", "tuned"):
            assert together[name][model] == pytest.approx(study[model], rel=1e-5, abs=1e-6)
