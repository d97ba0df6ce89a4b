"""A run in a notebook: independent of the settings that the process has, and without a trace in them."""

import gc
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import constants
from support.runs import write_recipe, write_sums

from llmtune.store.process_environment import prepare_environment
from llmtune.store.process_state import as_in_new_process

START = """
import json, os, random, sys
from pathlib import Path
model, recipe, out = map(Path, sys.argv[1:])
def tune(name="run"):
    import llmtune
    return llmtune.run(recipe, out=out / name, quiet=True).scores
def make_trainer():
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "attention_mask": [1] * 4}
    arguments = TrainingArguments(str(out), bf16=True, max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    return Trainer(AutoModelForCausalLM.from_pretrained(model), arguments, train_dataset=[row] * 8)
"""
AFTER_TRAINER = """
trainer = make_trainer()
trainer.train()
scores = tune()
assert trainer.accelerator.mixed_precision == "bf16"
trainer.train()
assert make_trainer().accelerator.state is not None
print(json.dumps(scores))
"""
BEFORE_TRAINER = """
environment, state = dict(os.environ), random.getstate()
scores = tune()
import gc, huggingface_hub, numpy, torch, transformers
first = numpy.random.random(), torch.rand(1).item()
tune("second")
assert not huggingface_hub.is_offline_mode()
assert dict(os.environ) == environment, {*os.environ.items()} ^ {*environment.items()}
assert random.getstate() == state
assert not gc.get_freeze_count()
assert transformers.logging.get_verbosity() == transformers.logging.WARNING
assert (numpy.random.random(), torch.rand(1).item()) != first
make_trainer().train()
print(json.dumps(scores))
"""
IN_A_LOOP_AND_A_THREAD = """
import asyncio, datasets, torch
from accelerate import Accelerator
os.environ["ACCELERATE_USE_FSDP"] = os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
datasets.disable_caching()
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.use_deterministic_algorithms(True)
async def inside():
    with torch.no_grad():
        return tune("loop"), await asyncio.to_thread(tune, "thread")
in_loop, in_thread = asyncio.run(inside())
assert in_loop == in_thread
assert torch.get_default_dtype() == torch.float64 and os.environ["ACCELERATE_USE_FSDP"] == "true"
print(json.dumps(in_loop))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    write_sums(folder / "rows.jsonl")
    return write_recipe(
        folder / "tiny.yaml", tiny_llama, "rows.jsonl", train={"max_steps": 2, "num_train_epochs": None}
    )


def run_program(program: str, model: Path, recipe: Path, out: Path) -> str:
    """Run a program of a user in a process without the tests' switches; return the last line that it prints."""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    words = [sys.executable, "-c", START + program, model, recipe, out]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_run_works_between_two_trainings_of_a_bfloat16_trainer(
    tiny_llama: Path, recipe: Path, tmp_path: Path
) -> None:
    run_program(AFTER_TRAINER, tiny_llama, recipe, tmp_path)


@pytest.mark.slow
def test_scores_depend_on_no_setting_of_the_process(tiny_llama: Path, recipe: Path, tmp_path: Path) -> None:
    programs = {"after": AFTER_TRAINER, "before": BEFORE_TRAINER, "inside": IN_A_LOOP_AND_A_THREAD}
    scores = {run_program(program, tiny_llama, recipe, tmp_path / name) for name, program in programs.items()}
    assert len(scores) == 1


def test_the_block_has_the_settings_of_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with _unusual_settings(), as_in_new_process():
        assert torch.get_default_dtype() == torch.float32
        assert torch.zeros(1).device.type == "cpu"
        assert torch.is_grad_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
        assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"
        assert "ACCELERATE_USE_FSDP" not in os.environ


def test_the_block_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with _unusual_settings():
        before = _settings()
        frozen = gc.get_freeze_count()
        with as_in_new_process():
            prepare_environment(network=False, threads=3)
            assert constants.HF_HUB_OFFLINE
            Accelerator(cpu=True, mixed_precision="no")
            for draw in (random.random, np.random.random, lambda: torch.rand(1)):
                draw()
            transformers.logging.set_verbosity_debug()
            torch.use_deterministic_algorithms(True)
        assert _settings() == before
        assert bool(gc.get_freeze_count()) == bool(frozen)


def test_settings_are_restored_after_an_error() -> None:
    threads = torch.get_num_threads()
    with suppress(KeyboardInterrupt), as_in_new_process():
        prepare_environment(network=True, threads=threads + 3)
        raise KeyboardInterrupt
    assert torch.get_num_threads() == threads


class _unusual_settings:  # noqa: N801 - used as a context manager
    """A process as a user's: Accelerate in bfloat16, float64 by default on another device, without gradients."""

    def __enter__(self) -> None:
        self.states = {one: one._shared_state for one in (AcceleratorState, GradientState, PartialState)}
        for one in self.states:
            one._shared_state = {}
        Accelerator(cpu=True, mixed_precision="bf16")
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        torch.use_deterministic_algorithms(True)
        self.verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_info()

    def __exit__(self, *_: object) -> None:
        transformers.logging.set_verbosity(self.verbosity)
        torch.use_deterministic_algorithms(False)
        torch.set_grad_enabled(True)
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        for one, state in self.states.items():
            one._shared_state = state


def _settings() -> dict[str, object]:
    return {
        "environment": dict(os.environ),
        "accelerate": (AcceleratorState().mixed_precision, id(AcceleratorState._shared_state)),
        "torch": (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        "strict": (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "hub": constants.HF_HUB_OFFLINE,
        "transformers": (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()),
    }
