import random
import re
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from support.process import train_in_process
from support.training import adapt, make_recipe, read_metrics, run_training, trained_bytes, with_methods, write_examples

from llmtune.errors import TrainingError
from llmtune.tasks.registry import get_task
from llmtune.train.checkpoint import TrainState
from llmtune.train.preflight import LARGE_TOKENS, run_preflight
from llmtune.train.setup import set_up

CHAT = get_task("chat")


def chat_with_memory_for(tokens, when=lambda model: True):
    """Return the chat task on a device that has memory for `tokens` tokens while `when` is true."""

    def loss(model, batch, by_row=False):
        if batch["input_ids"].numel() > tokens and when(model):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return CHAT.loss(model, batch, by_row)

    return with_methods(CHAT, loss=loss)


def run(folder, recipe, examples, task, console, budget=320):
    budgets = []
    report = {"console": console, "on_budget": budgets.append}
    return run_training(folder, recipe, examples, task=task, budget=budget, **report), budgets


def test_the_rehearsal_restores_weights_optimizer_and_random_numbers(tmp_path, tiny_llama, examples, console):
    recipe = make_recipe(tmp_path, tiny_llama, adapter={"lora_dropout": 0.1})
    adapted = adapt(recipe)
    training = set_up(adapted, examples, CHAT, recipe, tmp_path / "run", console, "inputs")
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    rates = training.schedule.get_last_lr()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run_preflight(training, TrainState(budget=128), console, lambda tokens: None)
    assert all(torch.equal(old, new) for old, new in zip(before, training.model.parameters(), strict=True))
    assert not training.optimizer.state_dict()["state"]
    assert training.schedule.get_last_lr() == rates
    assert all(parameter.grad is None for parameter in training.parameters)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert "Rehearsed: micro-batches of 128 tokens fit" in console.file.getvalue()
    assert re.search(r"^\d+ steps, about a minute at most$", console.file.getvalue(), re.MULTILINE)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(("spared", "expected"), [(0, [160, 80, 80]), (8, [320, 160, 80])])
def test_out_of_memory_halves_the_budget_without_changing_the_loss(
    spared, expected, tmp_path, tiny_llama, examples, console
):
    calls = []

    def later(model):
        calls.append(model.training)
        return len(calls) > spared

    recipe = make_recipe(tmp_path, tiny_llama)
    trained, budgets = run(tmp_path / "run", recipe, examples, chat_with_memory_for(100, when=later), console)
    assert (trained.micro_batch_tokens, budgets) == (80, expected)
    said = console.file.getvalue()
    assert "micro-batches shrink to 80 tokens." in said
    assert ("Out of memory in the rehearsal" in said) == (spared == 0)
    run_training(tmp_path / "calm", recipe, examples, budget=320)
    for a, b in zip(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "calm"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    before = trained_bytes(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-16")
    again = run_training(tmp_path / "run", recipe, examples, budget=320)
    assert (again.resumed_from, again.micro_batch_tokens) == (8, 80), "what was found is kept"
    assert trained_bytes(tmp_path / "run") == before


@pytest.mark.parametrize(("free", "share"), [(10**18, 0.3), (0, 1)])
def test_a_quarter_of_a_large_batch_is_enough_only_if_memory_is_ample(
    free, share, tmp_path, tiny_llama, console, monkeypatch
):
    sizes = []

    def loss(model, batch, by_row=False):
        sizes.append(batch["input_ids"].numel())
        return CHAT.loss(model, batch, by_row)

    monkeypatch.setattr("llmtune.train.preflight.free_memory", lambda: free)
    recipe = make_recipe(tmp_path, tiny_llama, train={"batch_size": 64})
    examples = write_examples(tmp_path / "examples", train=64)
    task = with_methods(CHAT, loss=loss)
    training = set_up(adapt(recipe), examples, task, recipe, tmp_path / "run", console, "inputs")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    run_preflight(training, TrainState(budget=4096), console, lambda tokens: None)
    largest = int(training.examples.lengths.sum())
    assert largest >= LARGE_TOKENS
    assert max(sizes) == pytest.approx(share * largest, rel=0.25 if share < 1 else 0)


def test_a_large_batch_that_may_not_fit_is_tried_completely(tmp_path, tiny_llama, console, monkeypatch):
    monkeypatch.setattr("llmtune.train.preflight.free_memory", lambda: 0)
    recipe = make_recipe(tmp_path, tiny_llama, train={"batch_size": 64, "max_steps": 2})
    examples = write_examples(tmp_path / "examples", train=64)
    _, budgets = run(tmp_path / "run", recipe, examples, chat_with_memory_for(600), console, budget=4096)
    assert budgets == [2048, 1024, 512, 512]
    assert "Out of memory in step" not in console.file.getvalue()


def test_a_budget_below_the_longest_row_starts_at_the_longest_row(tmp_path, tiny_llama, examples):
    trained = run_training(tmp_path / "run", make_recipe(tmp_path, tiny_llama), examples, budget=1)
    assert trained.micro_batch_tokens == 40


def test_a_row_that_can_never_fit_is_an_error_that_says_what_to_change(tmp_path, tiny_llama, examples, console):
    recipe = make_recipe(tmp_path, tiny_llama)
    with pytest.raises(TrainingError) as caught:
        run(tmp_path / "run", recipe, examples, chat_with_memory_for(30), console)
    problem = caught.value.problems[0]
    assert "the longest row (40 tokens) does not fit alone" in problem.what
    assert "train.gradient_checkpointing: true; or set adapter.method: qlora" in problem.fix
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_limited_address_space_shrinks_the_micro_batch_and_training_continues(tmp_path, tiny_llama):
    examples = write_examples(tmp_path / "examples", train=600)
    recipe = make_recipe(tmp_path, tiny_llama, train={"batch_size": 600, "max_steps": 2})
    # 16,384 tokens take 190 MB. The process has up to 70 MB of address space in reserve.
    done = train_in_process(tmp_path, tmp_path / "run", "--memory", 60, "--budget", 16384)
    assert done.returncode == 0, done.stderr
    assert "Out of memory in the rehearsal" in done.stderr
    assert "Out of memory in step" not in done.stderr
    found = int(done.stdout.split()[-1])
    assert 40 < found < 16384
    run_training(tmp_path / "roomy", recipe, examples, budget=16384)
    for a, b in zip(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "roomy"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_errors_other_than_out_of_memory_are_not_swallowed(tmp_path, tiny_llama, examples):
    def loss(model, batch, by_row=False):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(
            tmp_path / "run",
            make_recipe(tmp_path, tiny_llama),
            examples,
            with_methods(CHAT, loss=loss),
            Console(quiet=True),
        )
