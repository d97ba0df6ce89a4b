"""DeepSpeed's ZeRO-2 and ZeRO-3: several processes learn what one learns, and go on from each other's checkpoints."""

import json
import os
from pathlib import Path

import pytest
from support.runs import llmtune, write_recipe
from support.together import METHODS, TRAIN, assert_same, leave_step_4, train
from support.training import make_recipe, read_metrics, run_training, write_examples

TESTS = Path(__file__).parents[1]
pytest.importorskip("deepspeed", reason="pip install 'llmtune-cli[deepspeed]'")


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("method", "processes", "strategy"),
    [
        ("lora", 2, "zero2"),
        ("full", 2, "zero2"),
        ("lora", 2, "zero3"),
        ("full", 2, "zero3"),
        ("added", 2, "zero3"),
        ("scalar", 2, "zero2"),
        ("scalar", 2, "zero3"),
        ("full", 4, "zero2"),
        ("full", 4, "zero3"),
    ],
)
def test_several_processes_learn_what_one_learns(method, processes, strategy, tmp_path, tiny_llama, console):
    examples = write_examples(tmp_path / "examples", train=61, validation=7)
    settings = TRAIN | {"gradient_checkpointing": True, "warmup_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1}
    recipe = make_recipe(tmp_path, tiny_llama, train=settings, adapter=METHODS[method])
    together = train(tmp_path, "together", processes, strategy, console)
    run_training(tmp_path / "alone", recipe, examples)
    assert_same(tmp_path / "alone", together)
    norms = [[line["grad_norm"] for line in read_metrics(run)] for run in (tmp_path / "alone", together)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("optim", ["rmsprop", "sgd"])
def test_other_optimizers_learn_what_they_learn_in_one_process(optim, tmp_path, tiny_llama, console):
    examples = write_examples(tmp_path / "examples", train=30, validation=7)
    settings = TRAIN | {"optim": optim, "learning_rate": 1e-3 if optim == "sgd" else 1e-4}
    recipe = make_recipe(tmp_path, tiny_llama, train=settings, adapter=METHODS["lora"])
    together = train(tmp_path, "together", 2, "zero3", console)
    run_training(tmp_path / "alone", recipe, examples)
    assert_same(tmp_path / "alone", together)


@pytest.mark.parametrize(
    ("method", "first", "then"),
    [
        ("full", (4, "zero3"), (2, "zero3")),
        ("lora", (2, "zero3"), (1, "ddp")),
        ("full", (1, "ddp"), (2, "zero2")),
        ("lora", (2, "zero2"), (2, "zero3")),
        ("full", (2, "zero3"), (2, "fsdp")),
        ("full", (2, "fsdp"), (2, "zero3")),
        ("lora", (2, "fsdp"), (2, "zero2")),
    ],
)
def test_a_checkpoint_goes_on_in_another_number_of_processes(method, first, then, tmp_path, tiny_llama, console):
    examples = write_examples(tmp_path / "examples", train=61, validation=7)
    recipe = make_recipe(tmp_path, tiny_llama, train=TRAIN, adapter=METHODS[method])
    run_training(tmp_path / "alone", recipe, examples)
    run = train(tmp_path, "run", *first, console)
    leave_step_4(run)
    train(tmp_path, "run", *then, console)
    assert_same(tmp_path / "alone", run)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_run_in_bfloat16_learns_as_one_process_does(strategy, tmp_path, tiny_llama, console):
    examples = write_examples(tmp_path / "examples", train=61, validation=7)
    recipe = make_recipe(tmp_path, tiny_llama, train=TRAIN, model={"dtype": "bfloat16"})
    together = train(tmp_path, "together", 2, strategy, console)
    run_training(tmp_path / "alone", recipe, examples)
    one, two = ([line["loss"] for line in read_metrics(run)] for run in (tmp_path / "alone", together))
    assert two == pytest.approx(one, rel=5e-3)


def test_a_whole_run_scores_as_in_one_process_and_prints_one_document(here, tiny_llama, chat_rows):
    settings = {"max_steps": 4, "num_train_epochs": None}
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, train=settings, model={"dtype": "float32"})
    scores = []
    for words in (["run"], ["launch", "local", "--processes", 2, "--strategy", "zero3", "--threads", 2]):
        done = llmtune(*words, "tiny.yaml", "--out", words[0], "--json", cwd=here)
        assert done.returncode == 0, done.stderr
        assert "DeepSpeed" not in done.stderr
        scores.append(json.loads(done.stdout)["evaluation"]["tuned"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    assert llmtune("verify", "launch", cwd=here).returncode == 0
