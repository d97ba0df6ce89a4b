"""A CUDA device that is not there: tensors on it have shapes, a number format and a device, but no values.

What two devices or formats would not do together fails as it would on a GPU; a value that is read from the device, for
which the host would wait, is refused unless it is expected.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)

import llmtune
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel, Examples
from llmtune.tasks.base import AnyTask
from llmtune.train.setup import TrainContext, set_up

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.allclose.default)
OURS = Path(llmtune.__file__).parent
COPY = torch.ops.aten._to_copy.default
MEMORY_BYTES = 80 << 30
PRELOADED = next((part for part in os.environ.get("LD_PRELOAD", "").split(":") if part.endswith("fake_cuda.so")), None)
"""What stands in for the driver: tests/fake_cuda/device.cpp, compiled."""
ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "a fake card",
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(total_memory=MEMORY_BYTES, major=9, minor=0),
    "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
    "is_bf16_supported": lambda including_emulation=True: True,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "synchronize": lambda device=None: None,
    "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
    "get_rng_state_all": list,
    "set_rng_state": lambda state, device="cuda": None,
    "set_rng_state_all": lambda states: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "_lazy_init": lambda: None,
}
"""What the driver would answer, by the name in torch.cuda."""


class HiddenRead(AssertionError):
    """The host waits for a value of the device where nobody expects it to."""


class FakeCuda(FakeTensorMode):
    """Tensors without values; what the functions of llmtune named in `expected` read from the device is as given there.

    `reads` names the function of each read.
    """

    avoid_device_init = True

    def __init__(self, expected: Mapping[str, float]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.expected, self.reads = expected, list[str]()

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = bool(args) and isinstance(args[0], torch.Tensor) and args[0].device.type == "cuda"
        if there and func in READS:
            self.reads.append(self._reader())
            value, dtype = self.expected[self.reads[-1]], args[0].dtype
            if func is not READS[0] or dtype == torch.bool:
                return bool(value)
            return float(value) if dtype.is_floating_point else int(value)
        if there and func is COPY and str((kwargs or {}).get("device")) == "cpu":
            self.reads.append(self._reader())
        try:
            return super().dispatch(func, types, args, kwargs or {})
        except DynamicOutputShapeException:  # how large the result is depends on values
            self._reader()
            raise

    def _reader(self) -> str:
        """Return the function of llmtune that a read happens in; raise HiddenRead where it is not expected there."""
        frame, stack = sys._getframe(), []
        while frame is not None:
            stack.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}")
            if OURS in Path(frame.f_code.co_filename).parents:
                name = frame.f_code.co_qualname.split(".")[0]
                if name in self.expected:
                    return name
                break
            frame = frame.f_back
        raise HiddenRead("the host waits for the device:\n" + "\n".join(stack[-4:]))


def install(patch: pytest.MonkeyPatch) -> None:
    """Let torch take the machine for one with a GPU."""
    ctypes.CDLL(PRELOADED).install_device_guard()
    for name, answer in ANSWERS.items():
        patch.setattr(torch.cuda, name, answer)
    own = torch.Tensor.tolist
    patch.setattr(
        torch.Tensor, "tolist", lambda tensor: _list(tensor) if isinstance(tensor, FakeTensor) else own(tensor)
    )
    # Accelerate moves the model once more; weights without values cannot be exchanged, and are there already.
    patch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)


def _list(tensor: torch.Tensor) -> Any:
    return [_list(part) for part in tensor] if tensor.ndim else tensor.item()


def move(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Move a model that was loaded for real to the fake device, in place; tied weights stay tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = _move_parameter(parameter, mode)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer).to("cuda")


def _move_parameter(parameter: torch.nn.Parameter, mode: FakeTensorMode) -> torch.nn.Parameter:
    there = mode.from_tensor(parameter.detach().as_subclass(torch.Tensor)).to("cuda")
    moved = torch.nn.Parameter(there, parameter.requires_grad)
    state = getattr(parameter, "quant_state", None)
    if state is not None:  # of bitsandbytes: what its 4 bits are multiplied by
        state.to("cuda")
        moved.quant_state = state
    return moved


def set_up_there(
    adapted: AdaptedModel, examples: Examples, task: AnyTask, recipe: Recipe, folder: Path, mode: FakeTensorMode
) -> TrainContext:
    """Set up a training on the fake device; its batches are made of real numbers, as they are on the CPU."""
    move(adapted.model, mode)
    training = set_up(adapted, examples, task, recipe, folder, Console(quiet=True), "inputs")

    def collate(*args: Any) -> Any:
        with unset_fake_temporarily():
            return training.collate(*args)

    return replace(training, collate=collate)


@contextmanager
def fake_cuda(expected: Mapping[str, float]) -> Iterator[FakeCuda]:
    """Compute on the fake device, gradients in this thread; it reads as `FakeCuda` has it."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        with FakeCuda(expected) as mode, torch.autograd.set_multithreading_enabled(False):
            yield mode
