"""Failures that must be impossible in training: each test provokes one without its guard, then sees it caught."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.pairs import gradient, start_training
from support.runs import invoke
from support.training import read_metrics, trained_bytes
from transformers import AutoModelForCausalLM

from llmtune.tasks.base import Task
from llmtune.train import loop, resume

really_lose, really_update = Task.loss, loop._update


def lose_on_a_device_for(tokens: int, validating: bool = False):
    """The loss on a device with memory for this many tokens, in validation or always."""

    def loss(task, model, batch, by_row=False):
        if batch["input_ids"].numel() > tokens and not (validating and model.training):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return really_lose(task, model, batch, by_row)

    return loss


@pytest.mark.guarantee(
    13,
    cannot="a first out-of-memory after minute one",
    kept="Before step 1 llmtune rehearses the largest batch, a validation batch, and a save and reload. Then it "
    "restores weights, optimiser and random numbers. On a CPU a quarter of a large batch is enough if its memory, "
    "times the square of the ratio, is less than half of the free memory.",
    shows="Out of memory in the rehearsal: micro-batches shrink to ... tokens. ... Rehearsed: micro-batches of ... "
    "tokens fit, peak ... GB; a checkpoint was written and read back. ... step 1/",
    also=[
        "train/test_preflight.py::test_a_limited_address_space_shrinks_the_micro_batch_and_training_continues",
        "train/test_preflight.py::test_a_large_batch_that_may_not_fit_is_tried_completely",
        "train/test_preflight.py::test_the_rehearsal_restores_weights_optimizer_and_random_numbers",
    ],
)
def test_an_oversized_validation_batch_is_found_before_step_1(run, without, shows):
    with without("llmtune.tasks.base.Task.loss", lose_on_a_device_for(60, validating=True)):
        with without("llmtune.train.loop.run_preflight", lambda training, state, console, on_budget: None):
            said = run("train", data={"validation": 0.2})
        assert said.index("step 1/") < said.index("Out of memory in validation")
        shows(run("train", "--fresh", data={"validation": 0.2}))
    with without("llmtune.tasks.base.Task.loss", lose_on_a_device_for(5)):
        assert "does not fit alone" in run("train", "--fresh", code=5)


@pytest.mark.guarantee(
    14,
    cannot="accumulation that differs from a large batch",
    kept="The loss of a micro-batch is a sum. The total is divided once, by the count over all micro-batches and "
    "processes. A model's own mean loss is never used.",
    shows="Out of memory in step 1: micro-batches shrink to ... tokens.",
    also=["tasks/test_contract.py::test_micro_batches_padding_and_packing_change_no_loss_and_no_gradient"],
    cases=["accumulation", "two_processes", "padded_batch", "seq2seq_accumulation", "last_step_of_an_epoch"],
)
def test_micro_batches_of_one_row_give_the_gradients_of_one_large_batch(place, run, without, shows):
    def mean_loss(task, model, batch, by_row=False):
        found = really_lose(task, model, batch, by_row)
        return dataclasses.replace(found, sum=found.sum / found.count, count=1)

    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["messages"][1]["content"] += " and blue" * (i % 5)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("train", out="calm")
    with without("llmtune.tasks.base.Task.loss", mean_loss):
        training = start_training(place / "tiny.yaml", place / "means")
        (of_means, one), (_, large) = (gradient(training, budget) for budget in (1, 100_000))
    assert float((one - large).norm() / large.norm()) > 0.05, "a mean of means"
    training = start_training(place / "tiny.yaml", place / "alone")
    (loss, one), (_, large) = (gradient(training, budget) for budget in (1, 100_000))
    assert float((one - large).norm() / large.norm()) < 1e-4
    assert abs(of_means - loss) > 0.01
    with (
        without("llmtune.train.loop.run_preflight", lambda training, state, console, on_budget: None),
        without("llmtune.tasks.base.Task.loss", lose_on_a_device_for(60)),
    ):
        shows(run("train"))
    calm, pressed = (
        [(line["loss"], line["grad_norm"]) for line in read_metrics(place / out)] for out in ("calm", "run")
    )
    assert pressed == [pytest.approx(step, rel=1e-4) for step in calm]


@pytest.mark.guarantee(
    15,
    cannot="the same seed and a different model",
    kept="The recipe seeds every random draw. On a CPU, the same recipe, versions and threads give equal bytes. "
    "`reproduce` trains a run again and names the first difference; on a GPU it compares losses and scores within "
    "tolerances.",
    shows="error ...drawn-reproduced: not the same; the first difference is in training: grad_norm of step 1: was ..., "
    "is ... -> Versions, processor and threads match the lock, so something outside the lock differs.",
    also=[
        "test_pipeline.py::test_the_same_recipe_twice_gives_equal_bytes",
        "train/test_loop.py::test_the_same_seed_gives_the_same_bytes_and_another_seed_different_ones",
    ],
    cases=["seed"],
)
def test_a_run_reproduces_bit_for_bit(place, run, without, shows):
    seed = torch.manual_seed
    with without("torch.manual_seed", lambda number: seed(secrets.randbits(60))):
        run("run", out="drawn")
    said = invoke("reproduce", "drawn")
    assert said.exit_code == 6, said.stderr
    shows(said.stderr)
    run("run")
    said = invoke("reproduce", "run")
    assert said.exit_code == 0, said.stderr
    assert trained_bytes(place / "run") == trained_bytes(place / "run-reproduced")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks
@pytest.mark.guarantee(
    16,
    cannot="a target module that matches nothing; an adapter that loads as a no-op",
    kept="Targets are resolved to module names of the model. Each adapter is switched on and off on the loaded "
    "model, and loading must fill every weight.",
    shows="error adapter.target_modules: 'q_porj' matches no module of this model. Did you mean 'q_proj'? -> Modules "
    "here: q_proj (2), k_proj (2), v_proj (2), o_proj (2), gate_proj (2), up_proj (2), down_proj (2), lm_head (1).",
    also=[
        "adapter/test_wiring_check.py::test_an_adapter_that_has_no_effect_or_cannot_be_switched_off_is_found",
    ],
    cases=["unknown_module", "misspelt_module", "adapter_step", "adapter_with_checkpointing"],
)
def test_a_target_or_adapter_without_a_match_is_refused(place, run, shows):
    def plain() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(place / "model")

    half = get_peft_model(plain(), LoraConfig(target_modules=["q_porj", "v_proj"]))
    assert not any("q_p" in name for name, _ in half.named_parameters() if "lora" in name), "PEFT does not report it"
    shows(run("adapt", code=2, adapter={"target_modules": ["q_porj", "v_proj"]}))
    run("train", "--fresh", train={"max_steps": 4, "num_train_epochs": None})
    weights = place / "run/adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name.replace("layers", "blocks"): part for name, part in tensors.items()}, weights)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(plain(), weights.parent)(ids).logits
    assert torch.equal(loaded, plain()(ids).logits), "PEFT warns and returns the base model"
    go_on = {"start_from": str(weights.parent), "r": None, "lora_alpha": None}
    assert "have no counterpart" in run("adapt", code=4, out="next", adapter=go_on)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, weights)
    assert "have no counterpart" in run("adapt", code=4, out="third", adapter=go_on)


@pytest.mark.guarantee(
    17,
    cannot="a resumed run whose weights differ from an uninterrupted one",
    kept="Checkpoints contain weights, optimiser, schedule and position; random draws depend only on seed and "
    "step. A checkpoint is written under a temporary name, flushed, hashed, then renamed. On a CPU, with the same "
    "versions and threads, the weights are equal byte for byte; a GPU may round sums differently.",
    shows="Resuming from step 2 of 4",
    also=[
        "train/test_checkpoint.py::test_a_run_killed_anywhere_resumes_to_the_same_bytes",
        "torture/test_torture.py",
    ],
    cases=["resume"],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(place, run, without, shows):
    train = {"max_steps": 4, "num_train_epochs": None, "save_steps": 2, "optim": "adamw_torch"}

    def go_on() -> str:
        shutil.rmtree(place / "run")
        shutil.copytree(place / "whole", place / "run")
        shutil.rmtree(place / "run/adapter")
        shutil.rmtree(place / "run/checkpoints/step-4")
        return run("train", train=train)

    run("train", train=train)
    (place / "run").rename(place / "whole")
    (place / "run").mkdir()
    with without("llmtune.train.resume.restore_checkpoint", resume.restore_weights):
        go_on()
    assert trained_bytes(place / "run") != trained_bytes(place / "whole"), "an optimiser without its state"
    shows(go_on())
    assert trained_bytes(place / "run") == trained_bytes(place / "whole")


@pytest.mark.guarantee(
    18,
    cannot="training that continues after a NaN",
    kept="Every step checks losses, gradients and weights. Training stops with a diagnosis, and ruined weights "
    "are never saved.",
    shows="error step 3: loss nan, learning rate ..., gradient norm nan: the trained weights are not finite "
    "in step 3: the previous update was too large -> No checkpoint was saved yet. Try: lower train.learning_rate",
    also=[
        "train/test_loop.py::test_non_finite_weights_stop_the_run_with_a_diagnosis",
        "train/test_loop.py::test_an_update_that_ruins_the_weights_in_the_last_step_is_not_saved",
    ],
    cases=["loss_is_nan"],
)
def test_nan_weights_stop_training_and_are_not_saved(place, run, without, shows):
    def ruin(run, step):
        really_update(run, step)
        if step == 2:
            with torch.no_grad():
                run.training.parameters[-1][0, 0] = math.inf

    adapter = place / "run/adapter/adapter_model.safetensors"
    sections = {"train": {"max_steps": 4, "num_train_epochs": None}, "data": {"validation": 0}}
    with without("llmtune.train.loop._update", ruin):
        with (
            without("llmtune.train.accumulation.StepLoss.finite", property(lambda loss: True)),
            without("llmtune.train.loop.weights_are_numbers", lambda training: True),
            without("llmtune.train.divergence.Divergence.observe", lambda watch, loss: watch.recent.append(loss)),
        ):
            run("train", **sections)
        assert not all(part.isfinite().all() for part in load_file(adapter).values()), "done, exit code 0"
        shutil.rmtree(place / "run")
        shows(run("train", code=5, **sections))
    assert not adapter.exists()
    assert not list((place / "run/checkpoints").iterdir())
