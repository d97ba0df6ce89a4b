"""Preference learning with every loss: complete runs, metrics recomputed with plain classes, and refused settings."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from support.pairs import LIKED, THUMBS, quiet, recipe_of, run_recipe
from support.rows import chat, write_jsonl
from support.runs import invoke, llmtune
from support.training import read_metrics, run_training, trained_bytes
from support.variants import predict
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.data.examples import load_examples
from llmtune.data.row_store import iterate_rows, load_rows
from llmtune.errors import DataError
from llmtune.pipeline import run_pipeline
from llmtune.plan import open_finished
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.task_variant import LOSS_METRICS
from llmtune.run_models import Models
from llmtune.serve.finished_run import FinishedRun
from llmtune.store.run_request import RunRequest

LOSSES = tuple(LOSS_METRICS)
QUIET_HEAD = {"generation": {"max_new_tokens": None}}
"""A reward model writes no answers."""
RUNS = {
    **{loss: {} for loss in LOSSES},
    "dpo-full": {"adapter": {"method": "full"}, "train": {"learning_rate": 1.0e-3}},
    "dpo-gpt2": {},
}


def rows_for(loss):
    return THUMBS if loss == "kto" else LIKED


def sections_of(loss, **sections):
    return {"preference": {"loss": loss}, **(QUIET_HEAD if loss == "reward" else {}), **sections}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, tiny_gpt2):
    """Complete runs by name, each made on first use: its folder and report."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def make(name):
        if name not in made:
            loss = name.split("-")[0]
            model = tiny_gpt2 if name.endswith("gpt2") else tiny_llama
            report = run_recipe(folder / name, model, rows_for(loss), "preference", **sections_of(loss, **RUNS[name]))
            made[name] = folder / name / "run", report
        return made[name]

    return make


def test_rows(run):
    return [row for _, row in iterate_rows(load_rows(run / "data" / "rows"), "test")]


test_rows.__test__ = False


@pytest.mark.parametrize("name", RUNS)
def test_preferences_are_learned_and_compared_with_the_base(name, runs):
    _, report = runs(name)
    loss, scores = name.split("-")[0], report["evaluation"]
    assert report["train"]["train_loss"] < report["train"]["first_loss"]
    wanted = {*LOSS_METRICS[loss]} - {"likelihood_accuracy"} - ({"kl"} if "full" in name else set())
    for part in ("base", "tuned", "difference"):
        assert set(scores[part]) == wanted
    assert scores["tuned"]["accuracy"] > 0.9
    assert scores["tuned"]["margin"] > scores["base"]["margin"]
    assert all(not math.isnan(value) for value in scores["tuned"].values())
    if loss != "orpo":  # its rewards have no reference
        assert (scores["base"]["accuracy"], scores["base"]["margin"]) == (0.5, 0.0)
    if "kl" in wanted:
        assert scores["base"]["kl"] == 0 < scores["tuned"]["kl"]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("dpo")])
def test_dpo_starts_at_log_two_if_the_model_is_its_reference(name, runs):
    run, report = runs(name)
    dropout = 0.01 if name == "dpo-gpt2" else 1e-6  # GPT-2 has its own dropout, its reference has none
    assert report["train"]["first_loss"] == pytest.approx(math.log(2), abs=dropout)
    assert report["evaluation"]["base"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    last = [line["validation_loss"] for line in read_metrics(run) if "validation_loss" in line][-1]
    assert last < math.log(2)


# The metrics, recomputed


def plain_logps(model, tokenizer, row, answer):
    """A model's log-probabilities [A, V] at each token of an answer, and those of its tokens [A]."""
    turns = [*row["messages"], {"role": "assistant", "content": answer}]
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    else:
        prompt = tokenizer(f"{turns[0]['content']}\n")["input_ids"]
        text = f"{turns[0]['content']}\n{answer}{tokenizer.eos_token}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        logps_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    logps_AV, answer_A = logps_TV[len(prompt) - 1 : -1], torch.tensor(ids[len(prompt) :])
    return logps_AV, logps_AV.gather(1, answer_A[:, None])[:, 0]


def plain_models(run, report):
    """The base and tuned model of a run, loaded with the classes of transformers and PEFT."""
    base = AutoModelForCausalLM.from_pretrained(report["recipe"]["model"]["name"]).eval()
    if (run / "weights").exists():
        return base, AutoModelForCausalLM.from_pretrained(run / "weights").eval()
    return base, AutoPeftModelForCausalLM.from_pretrained(run / "adapter").eval()


@pytest.mark.parametrize("name", ["dpo", "dpo-full", "dpo-gpt2", "ipo", "orpo"])
def test_pair_metrics_match_plain_models(name, runs):
    run, report = runs(name)
    base, tuned = plain_models(run, report)
    tokenizer = AutoTokenizer.from_pretrained(report["recipe"]["model"]["name"])
    rows, loss = test_rows(run), name.split("-")[0]
    found = {"margin": [], "accuracy": [], "likelihood_accuracy": [], "loss": [], "kl": []}
    for row in rows:
        said = [
            [plain_logps(model, tokenizer, row, row[side]) for side in ("chosen", "rejected")]
            for model in (base, tuned)
        ]
        (b_chosen, b_rejected), (t_chosen, t_rejected) = [[logps_A for _, logps_A in side] for side in said]
        if loss == "orpo":
            margin = 0.1 * (t_chosen.mean() - t_rejected.mean())
        else:
            margin = 0.1 * ((t_chosen - b_chosen).sum() - (t_rejected - b_rejected).sum())
        found["margin"].append(float(margin))
        found["accuracy"].append(float(margin > 0))
        found["likelihood_accuracy"].append(float(t_chosen.sum() > t_rejected.sum()))
        tuned_AV, base_AV = said[1][0][0], said[0][0][0]
        found["kl"].append(float((tuned_AV.exp() * (tuned_AV - base_AV)).sum(1).mean()))
        if loss == "ipo":
            found["loss"].append(float(((t_chosen - b_chosen).mean() - (t_rejected - b_rejected).mean() - 5) ** 2))
        else:
            found["loss"].append(float(torch.nn.functional.softplus(-margin)))
    tuned_scores = report["evaluation"]["tuned"]
    assert len(rows) == report["evaluation"]["rows"]
    for metric, score in tuned_scores.items():
        assert score == pytest.approx(np.mean(found[metric]), abs=2e-5), metric


def score(run, rows):
    """The ratings of rows by the model of a run, loaded by llmtune."""
    context = open_finished(run, quiet(), True)
    processor = context.plan.processor
    with Models(context).tuned() as model, torch.inference_mode():
        return predict(context.plan.task, model, rows, processor, context.plan.recipe)


def test_a_single_answer_is_scored_from_the_ids_of_training(runs):
    run, _ = runs("reward")
    row = test_rows(run)[0]
    given = {"prompt": row["messages"][0]["content"], "answer": row["chosen"]}
    said = FinishedRun(run).answer(given)["prediction"]
    (pair,) = score(run, [row])
    assert said == {"answer": pytest.approx(pair["chosen"], abs=1e-6)}


# Runs that start from another run


def test_a_file_of_prompts_is_answered_by_the_tuned_model(runs, tmp_path):
    run, _ = runs("dpo")
    prompt = LIKED[0]["prompt"]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt}])
    done = invoke("generate", run, "--input", rows)
    assert json.loads(done.stdout)["answer"] == FinishedRun(run).generate(prompt)


@pytest.fixture(scope="module")
def chatted(tmp_path_factory, tiny_llama):
    """A chat run to start from: it has learned the good answers."""
    folder = tmp_path_factory.mktemp("chatted")
    rows = [chat(row["prompt"], row["chosen"]) for row in LIKED]
    run_recipe(folder, tiny_llama, rows, "chat", evaluate={"metrics": ["loss"]})
    return folder / "run"


def test_starting_from_an_adapter_uses_it_as_the_reference(chatted, tiny_llama, tmp_path):
    adapter = {"r": None, "lora_alpha": None, "start_from": str(chatted)}
    metrics = {"metrics": ["loss", "likelihood_accuracy", "kl", "margin"]}
    train = {"learning_rate": 5.0e-3}
    report = run_recipe(
        tmp_path, tiny_llama, LIKED, "preference", **sections_of("dpo", adapter=adapter, evaluate=metrics, train=train)
    )
    scores = report["evaluation"]
    assert report["train"]["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert report["train"]["train_loss"] < math.log(2)
    assert scores["base"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert scores["base"]["kl"] > 0  # the chat run differs from the model without an adapter
    assert scores["signatures"]["base"].startswith("the base model with the adapter of adapter.start_from")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    start = PeftModel.from_pretrained(model, chatted / "adapter").eval()
    start.load_adapter(tmp_path / "run" / "adapter", "tuned")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    margins = []
    for row in test_rows(tmp_path / "run"):
        sums = {}
        for name in ("default", "tuned"):
            start.set_adapter(name)
            said = [plain_logps(start, tokenizer, row, row[side])[1].sum() for side in ("chosen", "rejected")]
            sums[name] = float(said[0] - said[1])
        margins.append(0.1 * (sums["tuned"] - sums["default"]))
    assert scores["tuned"]["margin"] == pytest.approx(np.mean(margins), abs=2e-5)


@pytest.mark.parametrize("kind", ["start_from", "full", "pissa"])
def test_a_resumed_run_keeps_its_reference_and_ends_with_the_same_bytes(kind, chatted, tiny_llama, tmp_path):
    adapter = {"start_from": {"r": None, "lora_alpha": None, "start_from": str(chatted)}, "full": {"method": "full"}}
    train = {"max_steps": 6, "num_train_epochs": None, "save_steps": 4, "learning_rate": 1.0e-3}
    sections = sections_of("dpo", adapter=adapter.get(kind, {"init_lora_weights": "pissa"}), train=train)
    loaded = load_recipe(str(recipe_of(tmp_path, tiny_llama, LIKED, "preference", **sections)))
    run_pipeline(loaded, RunRequest(out=tmp_path / "run", until="prepare"), quiet())
    examples = load_examples(tmp_path / "run" / "data" / "examples")
    run_training(tmp_path / "whole", loaded.recipe, examples, budget=2048)
    lines = read_metrics(tmp_path / "whole")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["loss"] < math.log(2)
    shutil.copytree(tmp_path / "whole", tmp_path / "halved")
    shutil.rmtree(tmp_path / "halved" / "checkpoints" / "step-6")
    assert run_training(tmp_path / "halved", loaded.recipe, examples, budget=2048).resumed_from == 4
    assert [line["loss"] for line in read_metrics(tmp_path / "halved")] == [line["loss"] for line in lines]
    if kind == "full":
        names = [tmp_path / name / "weights" / "model.safetensors" for name in ("whole", "halved")]
        assert names[0].read_bytes() == names[1].read_bytes()
    else:
        assert trained_bytes(tmp_path / "halved") == trained_bytes(tmp_path / "whole")


# Micro-batches and processes


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_two_processes_learn_preferences_as_one_does(loss, tiny_llama, tmp_path):
    """With 17 rows an epoch's last step has one: processes without a row take part in KTO's step statistics."""
    sections = sections_of(loss, adapter={"lora_dropout": 0.0}, evaluate={"metrics": None})
    data = {"validation": 0, "test": 0}
    recipe_of(tmp_path, tiny_llama, rows_for(loss)[:17], "preference", data=data, **sections)
    two = llmtune("launch", "local", "recipe.yaml", "--processes", 2, "--threads", 2, "--out", "two", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    one = llmtune("train", "recipe.yaml", "--out", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    pairs = list(zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True))
    assert len(pairs) == 6
    for alone, together in pairs:
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


# Refused and omitted


def refuse(kind, folder, model, rows, **sections):
    with pytest.raises(kind) as caught:
        run_recipe(folder, model, rows, "preference", **sections)
    return caught.value


@pytest.mark.parametrize(("loss", "rows"), [("kto", LIKED), ("dpo", THUMBS), ("reward", THUMBS)])
def test_rows_of_the_other_kind_are_reported_once(loss, rows, tiny_llama, tmp_path):
    error = refuse(DataError, tmp_path, tiny_llama, rows, **sections_of(loss))
    assert error.exit_code == 3
    (problem,) = error.problems
    assert problem.what.startswith(f"preference.loss: {loss} learns from ")
    assert str(tmp_path / "rows.jsonl") in problem.where
    assert problem.fix.startswith("Set preference.loss to ")


def test_with_full_tuning_the_report_explains_the_missing_divergence(runs):
    signatures = runs("dpo-full")[1]["evaluation"]["signatures"]
    assert signatures["kl"].startswith("not measured: with adapter.method: full")


def test_the_report_explains_the_missing_margin_of_thumbs_of_one_kind(tiny_llama, tmp_path):
    up = write_jsonl(tmp_path / "up.jsonl", [row for row in THUMBS if row["label"]][:3])
    train = {"max_steps": 2, "num_train_epochs": None}
    sections = sections_of("kto", data={"test": str(up), "validation": 0}, train=train)
    scores = run_recipe(tmp_path / "kto", tiny_llama, THUMBS[:20], "preference", **sections)["evaluation"]
    assert set(scores["tuned"]) == {"accuracy", "kl"}
    assert scores["signatures"]["margin"].startswith("not measured: ")
