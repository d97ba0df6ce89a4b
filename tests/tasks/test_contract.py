"""The contract of every task and variant: batching changes nothing, answers equal single rows, results reload."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pairs import gradient, learn_a_little, quiet, start_training
from support.runs import llmtune
from support.task_cases import CASES, CELLS, EVALUATED, RATES, RELATED, SLOW
from support.training import launch_work, read_metrics
from support.variants import predict

from llmtune.adapter.merging import merge_adapter
from llmtune.data.examples import ExampleReader, load_examples
from llmtune.data.row_store import iterate_rows, load_rows
from llmtune.deploy.release_folder import promote_run
from llmtune.deploy.tuned_model import rules_of_run
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.generation import answer_reader, generate_completions
from llmtune.evaluate.metric import paired_difference
from llmtune.evaluate.opened_runs import open_run_scores
from llmtune.evaluate.per_row_scores import load_measures
from llmtune.launch.topology import Topology
from llmtune.model.causal_lm_loss import decoder_inputs, model_inputs, unwrap
from llmtune.pipeline import run_pipeline
from llmtune.plan import Plan, open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.task_variant import at_ten
from llmtune.run_models import Models
from llmtune.store.run_request import RunRequest
from llmtune.tasks.base import Task
from llmtune.tasks.registry import VARIANTS

LOGITS = ("logits", "last_hidden_state", "start_logits", "end_logits")
WITH_DROPOUT = ("completion-full", "classify-qlora", "ctc", "ctc-headless", "ctc-qlora", "ctc-full")
BASELINES = {
    "qa-extractive": "no answer to every question",
    "classify": "the most frequent class",
    "classify-multi": "the classes that most rows have",
    "classify-number": "the mean of the training rows",
    "token-classify": "the most frequent tag (O) on every word",
    "ctc-headless": "an empty transcript",
    "rerank": "BM25 (words that query and passage share)",
    "rerank-decoder": "BM25 (words that query and passage share)",
    "reward": "the same score for every answer",
}
"""The baselines that replace a base model without a trained head."""
SCORED = {
    "chat": "choice_accuracy",
    "completion": None,
    "classify": "accuracy",
    "classify-multi": "f1_micro",
    "classify-number": "mse",
    "token-classify": "f1",
    "embed": "ndcg@10",
    "embed-labels": "ndcg@10",
    "embed-scores-full": None,
    "rerank": "ndcg@10",
    "summarize": "rougeL",
    "translate": None,
    "qa": None,
}
"""By case, a metric of its baseline without a language model; None if these rows, or the task, have none."""
EVERY = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CELLS]
every_case = pytest.mark.parametrize("name", EVERY)


def opened(run: Path) -> Any:
    """The context of a run, its models, and the test rows without their answers."""
    context = open_finished(run, quiet(), True)
    processor = context.plan.processor
    rows = [context.plan.task.split_answer(row)[0] for _, row in iterate_rows(load_rows(run / "data" / "rows"), "test")]
    return context, Models(context), processor, rows


def test_every_variant_has_a_case():
    covered = {(case.task, case.variant) for case in CASES.values()}
    assert covered == {(name, place) for name, variants in VARIANTS.items() for place in range(len(variants))}


def test_a_variant_is_at_most_two_classes_below_the_base_of_tasks():
    for variants in VARIANTS.values():
        for variant in variants:
            parents = {base for base in type(variant).__bases__ if base is not Task}
            assert all(Task in parent.__bases__ for parent in parents), type(variant)


@pytest.mark.promise(
    "task",
    "loss and gradient",
    by="name",
    equal="itself one row at a time, padded or packed: loss within 1e-5, gradient 2e-4",
)
@every_case
def test_micro_batches_padding_and_packing_change_no_loss_and_no_gradient(name, recipe_file, tmp_path):
    found = []
    case = CELLS[name]
    packings = (True, False) if VARIANTS[case.task][case.variant].packs else (False,)
    for packing in packings:
        changes = (
            {"data": {"packing": packing}} if packing else {"data": {"packing": False} if len(packings) > 1 else {}}
        )
        path = recipe_file(name, tmp_path / str(packing), **changes)
        training = start_training(path, tmp_path / str(packing) / "run")
        assert training.task is VARIANTS[case.task][case.variant]
        with torch.no_grad():
            for i, parameter in enumerate(training.parameters):  # move off the start, where half the gradient is zero
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        found += [gradient(training, budget) for budget in (1, 100_000)]
    (loss, one), *others = found
    assert float(one.norm()) > 0.01
    # The same sums in another order: float32 keeps six digits of a loss, but only four of a gradient with cancellation.
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert float((other - one).norm() / one.norm()) < 2e-4


@every_case
def test_a_run_learns_and_measures_base_and_tuned_model_by_the_same_metrics(name, finished):
    run, report = finished(name)
    if name.startswith("reinforce") and "filter" not in name:  # a policy gradient's loss does not fall; rewards rise
        rewards = [line["figures"]["reward"] for line in read_metrics(run)]
        assert fmean(rewards[-4:]) > fmean(rewards[:4])
    else:
        assert report["train"]["train_loss"] < report["train"]["first_loss"]
    scores, variant = report["evaluation"], VARIANTS[CELLS[name].task][CELLS[name].variant]
    assert scores["difference"].keys() == scores["base"].keys() & scores["tuned"].keys()
    baseline = BASELINES.get(re.sub(f"-({'|'.join([*RATES, 'images'])})$", "", name))
    assert scores["baseline"] == baseline
    row_loss = {"loss"} & scores["tuned"].keys() if baseline and variant.has_row_loss else set()
    assert scores["tuned"].keys() - scores["base"].keys() == row_loss
    for difference in scores["difference"].values():
        low, high = difference["interval"]
        assert low is None or low <= difference["value"] <= high  # None if there are too few rows


@pytest.mark.parametrize("name", [cell for cell in EVERY if cell.values[0] in SCORED])
def test_a_run_scores_the_baseline_of_its_task_on_the_rows_of_the_tuned_model(name, finished):
    folder, report = finished(name)
    found, metric = report["evaluation"]["simple_baselines"], SCORED[name]
    if metric is None:
        assert not found
        return
    facts = TASK_FACTS[CASES[name].task]
    assert [*found] == [*facts.simple_baselines]
    simple = found[facts.simple_baselines[0]]
    assert metric in simple["scores"]
    assert {at_ten(one) for one in simple["scores"]} <= {*facts.baseline_metrics}
    measures = load_measures(folder / "evaluation")
    before, after = measures.simple[simple["name"]][metric], measures.tuned[metric]
    assert before.at == after.at
    assert simple["scores"][metric] == pytest.approx(before.value)
    assert simple["tuned"][metric] == report["evaluation"]["tuned"][metric]
    change = paired_difference(before, after, load_recipe(str(folder.parent / "recipe.yaml")).recipe.seed)
    assert simple["difference"][metric]["value"] == pytest.approx(change.value)


@every_case
def test_a_second_run_is_skipped(name, finished):
    run, report = finished(name)
    again = run_pipeline(load_recipe(str(run.parent / "recipe.yaml")), RunRequest(out=run), quiet())
    assert all(step["skipped"] for step in again["steps"])
    assert again["evaluation"] == report["evaluation"]


@pytest.mark.promise("task", "answers and scores", by="name", equal="answers to single rows; numbers within 1e-4")
@every_case
def test_batched_answers_equal_single_ones_and_those_of_the_evaluation(name, finished):
    run, _ = finished(name)
    context, models, _, rows = opened(run)
    lines = [json.loads(line) for line in (run / "evaluation" / "predictions.jsonl").read_text().splitlines()]
    with models.tuned() as model, torch.inference_mode():
        model.eval()
        together = answer(context.plan, model, rows)
        alone = [answer(context.plan, model, [row])[0] for row in rows[:4]]
    assert len(together) == len(rows) == len(lines) > 3
    for one, other in zip(alone, together, strict=False):
        compare(one, other)
    texts = [context.plan.task.format_prediction(one) for one in together]
    assert [line.get("tuned", text) for line, text in zip(lines, texts, strict=True)] == texts


def answer(plan: Plan, model: torch.nn.Module, rows: list[Any]) -> list[Any]:
    """The answers of a model to rows."""
    if plan.task.predicts:
        return predict(plan.task, model, rows, plan.processor, plan.recipe)
    prompts = [plan.task.prompt(row, plan.processor, plan.recipe) for row in rows]
    outputs = generate_completions(model, prompts, plan.processor, plan.recipe, device="cpu")
    read = answer_reader(plan.processor, plan.recipe)
    return [read(output.token_ids, None).text for output in outputs]


@every_case
def test_a_release_answers_as_its_run_does_when_the_run_and_its_rows_are_gone(name, finished, tmp_path, monkeypatch):
    run, report = finished(name)
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(run, tmp_path / "runs" / "copy"))
    release = promote_run(copy, quiet(), offline=True).folder
    shutil.rmtree(copy)
    context, models, _, rows = opened(run)
    released = open_finished(release, quiet(), True)
    with Models(released).tuned() as model, torch.inference_mode():
        found = answer(released.plan, model.eval(), rows[:4])
    with models.tuned() as model, torch.inference_mode():
        expected = answer(context.plan, model.eval(), rows[:4])
    assert found == expected
    assert released.plan.recipe.task_section() == context.plan.recipe.task_section()
    assert rules_of_run(released) == rules_of_run(context)
    assert open_run_scores(release, name).evaluation.tuned == pytest.approx(report["evaluation"]["tuned"], nan_ok=True)
    with pytest.raises(EnvironmentProblem, match="a release has no rows, and the run that it was made from is gone"):
        _ = released.rows


def compare(one: Any, other: Any) -> None:
    """Compare two predictions up to rounding: padding changes the order of additions."""
    if isinstance(one, str) and re.fullmatch(r"\[-?\d[-+\d., e]*\]", one):
        compare(json.loads(one), json.loads(other))  # a vector as text
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            compare(value, other[key])
    elif isinstance(one, list) and one and isinstance(one[0], float):
        assert one == pytest.approx(other, abs=1e-4)
    else:
        assert one == (pytest.approx(other, abs=1e-4) if isinstance(one, float) else other)


def outputs(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A model's inputs for a batch, and its head's outputs."""
    inputs = model_inputs(model, batch)
    if unwrap(model).config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
    with torch.no_grad():
        output = model.eval()(**inputs)
    return inputs, {key: output[key] for key in LOGITS if key in output}


@pytest.mark.parametrize("name", [cell for cell in EVERY if CELLS[cell.values[0]].method != "full"])
def test_disabling_the_adapter_gives_the_base_and_merging_keeps_it(name, finished):
    run, _ = finished(name)
    context, models, processor, _ = opened(run)
    reader = ExampleReader(load_examples(run / "data" / "examples"), "test", context.plan.task.example_type)
    batch = context.plan.task.collator(processor, context.plan.recipe, False)([reader[0], reader[1]], 0)
    with models.base() as model:
        _, base = outputs(model, batch)
    adapted = models.adapted
    _, tuned = outputs(adapted.model, batch)
    with adapted.model.disable_adapter():
        _, off = outputs(adapted.model, batch)
    _, merged = outputs(merge_adapter(adapted, "dequantized"), batch)
    assert not any(torch.equal(tuned[key], base[key]) for key in base)
    assert all(torch.equal(off[key], base[key]) for key in base), "nothing is computed otherwise: not a bit differs"
    # Merging turns a sum of two float32 products into one: logits, which are below 50, change in their last digits.
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=1e-4)


@pytest.mark.promise("task", "resume", by="name", equal="the run without a stop: every byte of the weights")
@pytest.mark.slow
@every_case
def test_an_interrupted_run_resumes_to_the_same_bytes(name, finished, tmp_path):
    run, _ = finished(name)
    result = "weights" if CELLS[name].method == "full" else "adapter"
    halved = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(halved / result)
    last, *left = sorted((halved / "checkpoints").iterdir(), key=lambda path: -int(path.name.removeprefix("step-")))
    assert left
    shutil.rmtree(last)
    recipe = load_recipe(str(run.parent / "recipe.yaml"))
    report = run_pipeline(recipe, RunRequest(out=halved, until="train"), quiet())
    assert report["train"]["resumed_from"] == int(left[0].name.removeprefix("step-"))
    weights = [path.relative_to(run) for path in (run / result).glob("*.safetensors")]
    assert [(halved / path).read_bytes() for path in weights] == [(run / path).read_bytes() for path in weights] != []


@pytest.mark.promise(
    "task", "two processes", by="name", equal="one process: losses of five steps within 1e-3, with dropout 0.05"
)
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES | RELATED)
def test_two_processes_learn_as_one(name, finished, tmp_path):
    run, _ = finished(name)
    words = ("launch", "local", str(run.parent / "recipe.yaml"), "--processes", 2, "--threads", 1, "--out", "two")
    two = llmtune(*words, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    pairs = list(zip(read_metrics(run), read_metrics(tmp_path / "two"), strict=True))
    assert len(pairs) > 3
    # Sums in another order differ in the last digits, more with each step. Dropout is drawn per process.
    tolerance = 0.05 if name in WITH_DROPOUT else 1e-3
    for alone, together in pairs[:5]:
        # A loss of samples with equal rewards is zero up to rounding.
        assert together["loss"] == pytest.approx(alone["loss"], rel=tolerance, abs=1e-7)


@pytest.mark.promise("task", "two processes", by="name", equal="one process: scores within 1e-5, the same answers")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_evaluate_as_one(name, finished, tmp_path):
    run, report = finished(name)
    again = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(again / "evaluation")
    (again / "report.json").unlink()
    words = ("launch", "local", str(run.parent / "recipe.yaml"), "--processes", 2, "--threads", 2, "--out", again)
    done = llmtune(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train unchanged, skipped" in done.stderr
    together = json.loads((again / "report.json").read_text())
    for model in ("base", "tuned"):
        found, expected = (
            {name: math.nan if value is None else value for name, value in one["evaluation"][model].items()}
            for one in (together, report)
        )
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)
    lines = [(one / "evaluation" / "predictions.jsonl").read_text().splitlines() for one in (run, again)]
    for alone, both in zip(*(map(json.loads, one) for one in lines), strict=True):
        compare(alone, both)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_shards_evaluate_as_one(processes, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    names = [*CASES, *EVALUATED]
    for name in names:
        run, _ = finished(name)
        again = Path(shutil.copytree(run, tmp_path / name / "run", ignore=shutil.ignore_patterns("evaluation")))
        shutil.copy(run.parent / "recipe.yaml", again.parent)
    ways = launch_work("evaluate_all", [tmp_path], Topology(processes, "fsdp"), quiet(), 2)
    assert ways.keys() == {*names}
    assert {*ways.values()} <= {"sharded", "split", "sharded and split"}
    assert ways["chat"] == ("split" if processes == 2 else "sharded")  # it has two heads of keys
    for name in names:
        run, _ = finished(name)
        reports = [json.loads((one / "report.json").read_text()) for one in (run, tmp_path / name / "run")]
        alone, together = (report["evaluation"] for report in reports)
        for model in ("base", "tuned"):
            assert together[model] == pytest.approx(alone[model], rel=1e-5, abs=1e-6), name
        assert together["studies"] == alone["studies"], name
        lines = [(one / "evaluation" / "predictions.jsonl").read_text() for one in (run, tmp_path / name / "run")]
        for one, other in zip(*(map(json.loads, text.splitlines()) for text in lines), strict=True):
            compare(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "processes"),
    [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)],
)
def test_several_processes_take_the_same_steps_as_one(strategy, processes, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    alone = {name: learn_a_little(recipe_file(name, tmp_path / name)) for name in CELLS}
    together = launch_work("learn_all", [tmp_path, strategy], Topology(processes, strategy), quiet(), 2)
    assert together.keys() == alone.keys()
    for name, steps in alone.items():
        for one, other in zip(steps, together[name], strict=True):
            assert other[0] == pytest.approx(one[0], rel=1e-5, abs=1e-6), name
            assert other[1] == pytest.approx(one[1], rel=1e-3), name


RELOAD = """
import json, sys
import peft, torch, transformers
from safetensors.torch import load_file, save_file
for folder, auto_class, method, skipped, inputs, outputs in json.load(open(sys.argv[1])):
    options, plain = {"dtype": torch.float32}, getattr(transformers, auto_class)
    if method == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skipped)
    if method == "full":
        model = plain.from_pretrained(folder, **options)
    elif auto_class in ("AutoModelForCTC", "AutoModelForImageTextToText"):  # PEFT has no class that loads their base
        base = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
        config = transformers.AutoConfig.from_pretrained(folder if auto_class == "AutoModelForCTC" else base)
        model = peft.PeftModel.from_pretrained(plain.from_pretrained(base, config=config, **options), folder)
    else:
        if auto_class.endswith("Classification"):
            config = transformers.AutoConfig.from_pretrained(folder)
            options["num_labels"] = config.num_labels
        named = "AutoPeftModel" if "Question" in auto_class else "AutoPeft" + auto_class.removeprefix("Auto")
        named += "ForFeatureExtraction" if auto_class == "AutoModel" else ""
        auto = getattr(peft, named, peft.AutoPeftModel)
        model = auto.from_pretrained(folder, **options)
        if auto_class.endswith("Classification"):  # transformers 5.2x refuses it as an argument of some models
            model.get_base_model().config.pad_token_id = config.pad_token_id
    for module in model.modules():  # bitsandbytes' inference kernel rounds differently
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        output = model.eval()(**load_file(inputs))
    known = ("logits", "last_hidden_state", "start_logits", "end_logits")
    names = [name for name in known if name in output]
    save_file({name: output[name].contiguous() for name in names}, outputs)
assert not any(name.startswith("llmtune") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def reloaded(finished: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The outputs of a script without llmtune for a batch with each result, and llmtune's own, as files."""
    place, known = tmp_path_factory.mktemp("reloaded"), set()

    def reload(name: str) -> Path:
        if name not in known:
            together = [cell for cell in CELLS if (cell in SLOW) == (name in SLOW)]
            read_in_plain_classes(together, finished, place)
            known.update(together)
        return place / name

    return reload


def read_in_plain_classes(names: list[str], finished: Callable[[str], Any], place: Path) -> None:
    """Give a batch to each result, in this process and in a separate script."""
    asked = []
    for name in names:
        run, _ = finished(name)
        context, models, processor, _ = opened(run)
        reader = ExampleReader(load_examples(run / "data" / "examples"), "test", context.plan.task.example_type)
        batch = context.plan.task.collator(processor, context.plan.recipe, False)([reader[0], reader[1]], 0)
        with models.tuned() as model:
            inputs, output = outputs(model, batch)
            quantized = getattr(unwrap(model).config, "quantization_config", None)
        save_file({key: part.contiguous() for key, part in inputs.items()}, place / f"{name}.inputs")
        save_file({key: part.contiguous() for key, part in output.items()}, place / f"{name}.ours")
        folder = run / ("weights" if CELLS[name].method == "full" else "adapter")
        files = [str(place / f"{name}.{part}") for part in ("inputs", "plain")]
        skipped = quantized and quantized.llm_int8_skip_modules
        asked.append([str(folder), context.plan.task.model_kind.auto_class, CELLS[name].method, skipped, *files])
    (place / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, "-c", RELOAD, str(place / "asked.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.promise("task", "plain library", by="name", equal="transformers and PEFT alone: logits within 1e-4")
@every_case
def test_results_reload_with_plain_classes_and_give_the_same_outputs(name, reloaded):
    ours, plain = (load_file(f"{reloaded(name)}.{part}") for part in ("ours", "plain"))
    assert ours.keys() == plain.keys() != set()
    # The plain classes have their own norms, attention and adapters: logits below 50 differ in their last digits.
    for key, logits in ours.items():
        torch.testing.assert_close(plain[key], logits, rtol=1e-4, atol=1e-4)
