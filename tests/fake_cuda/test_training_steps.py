"""A step of every task on CUDA, without a GPU: devices and number formats go together, nothing waits for a value."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda.device import HiddenRead, fake_cuda, move, set_up_there
from support.pairs import prepare_training, recipe_of
from support.task_cases import CASES, Case
from support.training import with_methods
from torch._subclasses.fake_tensor import FakeTensor

from llmtune.evaluate.generation import FEW_PROMPTS, generate_completions
from llmtune.model.packed_attention import _agrees_with_sdpa
from llmtune.records import Loss, Prompt
from llmtune.tasks.registry import VARIANTS
from llmtune.train.accumulation import step_gradients, validation_loss

READS = {"step_gradients": 1.0, "_finish_gradients": 1.0, "_forward": 1.0, "step_statistics": 1.0}
"""Where a step may wait for the device: its loss, its gradient's length, what some losses know of a step beforehand."""
VERDICT = {"_agrees_with_sdpa": False}
"""No element of flash attention's output is further from SDPA's than allowed."""
BUDGET = 100
"""Tokens of a micro-batch: a step has several."""


@pytest.fixture(autouse=True)
def fresh_verdicts() -> None:
    _agrees_with_sdpa.cache_clear()


def prepare(case: Case, folder: Path, clips: Path, dtype: str, packing: bool | None, method: str) -> Any:
    model = case.build(folder / "model", **case.config)
    data: dict[str, Any] = {"max_length": 64 if case.task == "qa" and case.variant == 0 else 128}
    data |= {} if packing is None else {"packing": packing}
    data |= {"train": str(clips)} if case.task == "speech" else {}
    adapter = {"method": method} | ({} if method == "full" else {"lora_dropout": 0.0})
    sections = {**case.sections, "adapter": adapter, "model": {"dtype": dtype}}
    path = recipe_of(folder, model, case.rows, case.task, **sections, data=data)
    return prepare_training(path, folder / "run")


def packings(case: Case) -> list[bool | None]:
    return [True, False] if VARIANTS[case.task][case.variant].packs else [None]


STEPS = [
    pytest.param(name, dtype, packing, id=f"{name}-{dtype}" + {None: "", True: "-packed", False: "-padded"}[packing])
    for name, case in CASES.items()
    if not name.startswith("ctc")  # how much room that loss takes depends on values: torch has it not without
    for dtype in ("float32", "bfloat16")
    for packing in packings(case)
]


@pytest.mark.parametrize(("name", "dtype", "packing"), STEPS)
def test_a_step_stays_on_the_device_and_waits_for_its_losses_alone(name, dtype, packing, tmp_path, clips):
    prepared = prepare(CASES[name], tmp_path, clips, dtype, packing, CASES[name].method)
    with fake_cuda(READS | VERDICT) as mode:
        training = set_up_there(*prepared, tmp_path / "run", mode)
        before = [parameter.dtype for parameter in training.parameters]
        step_gradients(training, 1, BUDGET, 1.0)
        reads = Counter(mode.reads)
        assert all(isinstance(p.grad, FakeTensor) and p.grad.is_cuda for p in training.parameters)
        assert [parameter.grad.dtype for parameter in training.parameters] == before
        training.optimizer.step()
        assert validation_loss(training, BUDGET) is not None
    micro_batches = reads["step_gradients"]
    assert micro_batches > 1
    assert reads["_finish_gradients"] == 1
    assert "_forward" not in reads


@pytest.mark.parametrize("prompts", [[[5, 6, 7], [8, 9], [5, 6, 7, 8, 9], [4], [4, 5]], [[5, 6, 7], [8, 9]]])
def test_prompts_are_answered_on_the_device(prompts, tmp_path, clips):
    """Many by llmtune's own greedy loop, few by `generate` of transformers."""
    adapted, _, _, recipe = prepare(CASES["chat"], tmp_path, clips, "bfloat16", True, "lora")
    reads = {"write_greedily": 7, "column_bytes_of": 1, "_generate": 1, "ignores_padding": 1, "generate_batch": 7}
    with fake_cuda(VERDICT | reads) as mode, torch.no_grad():
        adapted.model.eval()
        move(adapted.model, mode)
        outputs = generate_completions(
            adapted.model, [*map(Prompt, prompts)], adapted.selected.processor, recipe, device="cuda"
        )
    assert [set(output.token_ids) for output in outputs] == [{7}] * len(prompts)
    assert ("write_greedily" in mode.reads) == (len(prompts) > FEW_PROMPTS)


def test_a_tensor_on_the_other_device_is_named(tmp_path, clips):
    adapted, examples, task, recipe = prepare(CASES["chat"], tmp_path, clips, "float32", True, "lora")

    def loss(*args: Any) -> Loss:
        found = task.loss(*args)
        return Loss(found.sum * torch.ones(2), found.count)

    with fake_cuda(READS | VERDICT) as mode:
        training = set_up_there(adapted, examples, with_methods(task, loss=loss), recipe, tmp_path / "run", mode)
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            step_gradients(training, 1, BUDGET, 1.0)


READERS = {"item": torch.Tensor.item, "tolist": lambda it: it.tolist(), "bool": bool, "nonzero": torch.nonzero}
READERS["cpu"] = torch.Tensor.cpu


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_value_that_a_loss_reads_is_found(read, tmp_path, clips):
    adapted, examples, task, recipe = prepare(CASES["chat"], tmp_path, clips, "float32", True, "lora")

    def loss(*args: Any) -> Loss:
        found = task.loss(*args)
        read(found.sum)
        return found

    with fake_cuda(READS | VERDICT) as mode:
        training = set_up_there(adapted, examples, with_methods(task, loss=loss), recipe, tmp_path / "run", mode)
        with pytest.raises(HiddenRead, match="the host waits"):
            step_gradients(training, 1, BUDGET, 1.0)
