"""Let each process run its own passes of a sharded model (FSDP2): layers are gathered when any process needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache, partial

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from llmtune.errors import EnvironmentProblem, LostProcess
from llmtune.model.device import MEMORY_ERRORS, is_out_of_memory
from llmtune.model.tensor_parallel import lockstep

NONE_LEFT = 2**31
"""The request of a process that has run all its passes."""
_MANAGED = "_is_fsdp_managed_module"
"""Attribute of torch by which transformers makes all processes generate the same number of tokens."""
SILENCE_SECONDS = 1800
"""How long a process waits for the others before it gives up: longer than rank 0 needs for a checkpoint."""


@contextmanager
def own_passes(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, processes may run different numbers and kinds of forward passes of a sharded `model`.

    All processes must enter the block, and it ends when all have run their passes. An exception in one process ends
    the block in all: LostProcess is raised in the others. A model that is not sharded needs none of this. If it is
    split (`llmtune.model.tensor_parallel`), all processes must run the same passes.
    """
    if not isinstance(model, FSDPModule):
        with lockstep(model):
            yield
        return
    requests = LayerRequests(model)
    try:
        with requests.before_each_layer():
            yield
            requests.serve()
        requests.forget_passes()
    except LostProcess:
        raise
    except Exception:
        requests.fail()
        raise


class LayerRequests:
    """The requests for the layers of a sharded model.

    FSDP2 gathers a layer in all processes at once. So before each layer, all processes state which layer they need
    next, and all gather the first of these, in the model's order. A process that needs a later one asks again. Those
    that began a pass late catch up this way, and from then on all gather each layer once.
    """

    def __init__(self, model: FSDPModule) -> None:
        assert isinstance(model, torch.nn.Module)
        self.model = model
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        """The parts of the model that are gathered at once; the first has everything outside layers."""
        self.held = set[int]()
        """The units that are gathered because this process computes with them."""
        self.depth = 0
        """How many modules outside layers this process is inside of."""
        self.in_step = True
        """Whether this process knows what the others do next."""
        model._get_fsdp_state()._lazy_init()  # a pass may begin inside the model, as `generate` of PEFT does

    @contextmanager
    def before_each_layer(self) -> Iterator[None]:
        """Request the units as passes reach them, by hooks on their modules."""
        inside = {part for unit in self.units[1:] for part in unit.modules()}
        outside = [part for part in self.model.modules() if part not in inside and any(True for _ in part.parameters())]
        with ExitStack() as stack:
            for part in outside:
                if getattr(part, _MANAGED, False):
                    setattr(part, _MANAGED, False)
                    stack.callback(setattr, part, _MANAGED, True)
                stack.callback(part.register_forward_pre_hook(self._enter, prepend=True).remove)
                stack.callback(part.register_forward_hook(self._leave, always_call=True).remove)
            for number, unit in enumerate(self.units[1:], start=1):
                assert isinstance(unit, torch.nn.Module)
                request, release = partial(self._request, number), partial(self._release, number)
                stack.callback(unit.register_forward_pre_hook(request, prepend=True).remove)
                stack.callback(unit.register_forward_hook(release, always_call=True).remove)
            yield

    def serve(self) -> None:
        """Gather layers for the other processes until all have run their passes."""
        while self._gather_next(NONE_LEFT) != NONE_LEFT:
            pass

    def forget_passes(self) -> None:
        """Clear torch's list of the layers that ran.

        The next backward pass would prefetch by it, and the processes' lists differ.
        """
        order = self.model._get_fsdp_state()._comm_ctx.post_forward_order
        for group in order:
            group._post_forward_indices.clear()
        order.clear()

    def fail(self) -> None:
        """Tell the other processes that this one stops."""
        if self.in_step:
            with suppress(RuntimeError):  # they may be gone
                self._agree(-1 - distributed.get_rank())

    def _enter(self, *_: object) -> None:
        self.depth += 1
        if self.depth == 1:
            self._request(0)

    def _leave(self, module: torch.nn.Module, inputs: object, output: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._release(0)
            if output is None and hasattr(self.model, "reset_iter_state"):  # it raised; method of newer torch
                self.model.reset_iter_state()

    def _request(self, number: int, *_: object) -> None:
        """Gather the unit for this process, after those that others need first."""
        while self._gather_next(number) != number:
            pass
        self.held.add(number)

    def _release(self, number: int, *_: object) -> None:
        self.held.discard(number)
        self.units[number].reshard()

    def _gather_next(self, wanted: int) -> int:
        """Gather the first unit that any process needs, and return its number."""
        self.in_step = False
        number = self._agree(wanted)
        if number == NONE_LEFT:
            return number
        unit = self.units[number]
        try:
            unit.reshard()  # its owner takes part too
            with torch.inference_mode(False), torch.no_grad():  # its buffers outlive this pass's mode
                unit.unshard()
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            what = "out of memory while a layer of the sharded model was gathered"
            fix = "Use more processes or cards with more memory, or lower data.max_length."
            raise EnvironmentProblem.of(what, f"process {distributed.get_rank()}", fix) from error
        self.in_step = True
        if number != wanted and number not in self.held:
            unit.reshard()
        return number

    def _agree(self, wanted: int) -> int:
        """Return the least of all processes' numbers; raises LostProcess if one of them failed."""
        first = torch.tensor(wanted)
        distributed.all_reduce(first, distributed.ReduceOp.MIN, _message_group())
        number = int(first)
        if number < 0 <= wanted:
            what = f"process {-1 - number} stopped, so the sharded model cannot be used any more"
            raise LostProcess.of(what, None, "Its own error is the cause.")
        return number


@cache
def _message_group() -> distributed.ProcessGroup | None:
    """Return a group for numbers in main memory: reading them must not wait for a card."""
    if distributed.get_backend() == "gloo":
        return None
    group: distributed.ProcessGroup = distributed.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE_SECONDS))
    return group
