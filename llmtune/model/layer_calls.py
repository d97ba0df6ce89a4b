"""Passes of a model whose layers are divided over processes: activations go to the process that has the layer.

Each process runs unchanged forward passes on its own rows. A call of another process's layer sends the arguments there
and returns the output; calls of consecutive layers of one process are one message. The owner has the KV cache of its
layers. Each process runs its own batch, so as many batches are in flight as there are processes, without a schedule.
"""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from itertools import chain
from typing import Any, Never, cast

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map_only

from llmtune.errors import LlmtuneError, LostProcess
from llmtune.model.layer_messages import (
    CacheMirrors,
    CacheUpdates,
    OutputOf,
    PendingOutput,
    pack_message,
    unpack_message,
)
from llmtune.model.layer_owners import IN_REFERENCE, PLACED, LayerOwners, layers_of_shards
from llmtune.store.processes import LOST_SECONDS, lost_process

REQUEST, REPLY = 1, 2
"""Tags of messages: calls, and their outputs."""
SILENCE_SECONDS = 1800
"""Timeout of a message: longer than rank 0 needs for a checkpoint."""
_SWITCH = "_disable_adapters"
"""Attribute of PEFT's modules: whether their adapter is off."""
_LayerCall = tuple[int, tuple[Any, ...], dict[str, Any], bool]
"""The number of a layer, its arguments, and whether its adapter is off."""
_Mode = tuple[bool, tuple[bool, torch.dtype], bool]
"""Whether inference mode is on, autocast (whether it is on, and its dtype), and whether the reference computes."""
_Request = tuple[Sequence[_LayerCall], Sequence[int], _Mode]
"""Calls, the numbers of those whose output the owner keeps, and the mode that they run in."""


@contextmanager
def own_passes(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, processes may run different numbers and kinds of forward passes of a divided `model`.

    A model that FSDP2 shards is divided for the length of the block. All processes must enter the block, and it ends
    when all have run their passes. An exception in one process ends the block in all: the others raise LostProcess. For
    any other model the block has no effect.
    """
    if isinstance(model, FSDPModule):
        with layers_of_shards(model) as placement, LayerCalls(model, placement).running():
            yield
    elif hasattr(model, PLACED):
        with LayerCalls(model, getattr(model, PLACED)).running():
            yield
    else:
        yield


class LayerCalls:
    """The calls of this process to layers of other processes, and the calls of those to its own layers.

    One thread per other process answers its calls. One thread computes at a time, the one with the lock `computing`: it
    is the main thread, unless that waits for a reply.
    """

    def __init__(self, model: torch.nn.Module, placement: LayerOwners) -> None:
        self.model, self.placement, self.rank = model, placement, distributed.get_rank()
        self.group, self.computing = _message_group(), threading.Lock()
        self.ended = False
        """Whether this process makes no more calls."""
        self.problem: LlmtuneError | None = None
        """Why the block ends, if another process stopped or was lost."""
        self.message: _Message | None = None
        """Calls that are not sent yet."""
        self.shape_keeping = set[tuple[int, torch.dtype]]()
        """Layers, with the dtype of their input, whose output is one tensor of the same shape and dtype."""
        self.peers = [rank for rank in range(distributed.get_world_size()) if rank != self.rank]
        self.updates = {rank: CacheUpdates() for rank in self.peers}
        self.last_sent: dict[int, _Message] = {}
        """By owner, the last message sent to it, whose outputs it still has."""
        self.forwards = [layer.forward for layer in placement.layers]
        self.indexes = [_cache_indexes(layer) for layer in placement.layers]
        self.switches = [[part for part in layer.modules() if hasattr(part, _SWITCH)] for layer in placement.layers]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Answer calls, and redirect calls of other processes' layers, until all processes have left this block."""
        threads = [threading.Thread(target=self._answer, args=(rank,), daemon=True) for rank in self.peers]
        for thread in threads:
            thread.start()
        self.computing.acquire()
        try:
            with self._redirected_layers():
                yield
                self._end(threads, failed=False)
        except Exception:
            self._end(threads, failed=True)
            raise

    @contextmanager
    def _redirected_layers(self) -> Iterator[None]:
        """Replace `forward` of other processes' layers, and of layers here whose weights are in main memory."""
        with ExitStack() as stack:
            for number, layer in enumerate(self.placement.layers):
                is_remote = self.placement.owners[number] != self.rank
                if is_remote or any(one.device != self.placement.device for one in layer.parameters()):
                    before = vars(layer).get("forward")
                    layer.forward = partial(self._call if is_remote else self._compute, number)
                    undo = (delattr, layer, "forward") if before is None else (setattr, layer, "forward", before)
                    stack.callback(*undo)
            yield

    def _end(self, threads: Sequence[threading.Thread], *, failed: bool) -> None:
        """Announce that this process makes no more calls, and answer those of the others until they end.

        If it `failed`, wait for at most half of LOST_SECONDS. Else raise the error of a process that stopped.
        """
        if self.ended:
            return
        self.ended = True
        self.computing.release()
        for rank in self.peers:
            with suppress(LostProcess):
                self._send(rank, REQUEST, pack_message(failed))
        deadline = time.monotonic() + LOST_SECONDS / 2
        for thread in threads:
            thread.join(max(0, deadline - time.monotonic()) if failed else None)
        if not failed:
            self._check_others()

    # Calls of other processes' layers

    def _call(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Call a layer of another process; may return a PendingOutput if that process also has the next layer."""
        owner, hidden = self.placement.owners[number], args[0] if args else None
        message = self.message
        if message is None or message.owner != owner or hidden is not message.last():
            self.flush()
            message = self.message = _Message(owner)
        elif message.calls:
            args = (OutputOf(len(message.calls) - 1), *args[1:])
        adapter_off = bool(self.switches[number]) and getattr(self.switches[number][0], _SWITCH)
        message.calls.append((number, args, kwargs, adapter_off))
        last = number + 1 == len(self.placement.owners) or self.placement.owners[number + 1] != owner
        if not last and isinstance(hidden, torch.Tensor) and (number, hidden.dtype) in self.shape_keeping:
            output = PendingOutput(hidden)
            output.message, output.number = message, len(message.calls) - 1
            output.read = partial(self._read, message, output.number)
            message.outputs.append(weakref.ref(output))
            return output
        value = self.flush()
        if isinstance(hidden, torch.Tensor) and _keeps_shape(value, hidden):
            self.shape_keeping.add((number, hidden.dtype))
        return value

    def flush(self) -> Any:
        """Send the calls that are not sent yet; return the output of the last one, None if there are none."""
        message, self.message = self.message, None
        if message is None:
            return None
        if (previous := self.last_sent.pop(message.owner, None)) is not None:
            for output in previous.live_outputs():
                output.read()  # the owner deletes it at the next message
        last = len(message.calls) - 1
        numbers = [output.number for output in message.live_outputs() if output.number < last]
        kind, updates = self.placement.device.type, self.updates[message.owner]
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        mode = torch.is_inference_mode_enabled(), autocast, getattr(self.model, IN_REFERENCE, False)
        value, states = self._ask(message.owner, pack_message((message.calls, numbers, mode), updates, message))
        updates.note_states(states)
        message.values[last], message.calls = value, []
        self.last_sent[message.owner] = message
        return value

    def _read(self, message: _Message, number: int) -> torch.Tensor:
        """Return the output of the call `number` of `message`, which is sent first if it was not."""
        if message is self.message:
            self.flush()
        if number not in message.values:
            message.values[number] = self._ask(message.owner, pack_message(number))
        return cast(torch.Tensor, message.values[number])

    def _ask(self, owner: int, request: torch.Tensor) -> Any:
        """Send a packed request and return its reply; raise the error that ended it there."""
        self._check_others()
        self.computing.release()
        try:
            self._send(owner, REQUEST, request)
            reply = self._receive(owner, REPLY)
        finally:
            self.computing.acquire()
        self._check_others()
        answer = unpack_message(reply, self.placement.device)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _check_others(self) -> None:
        if self.problem is not None:
            raise self.problem

    # Calls of this process's layers

    def _answer(self, rank: int) -> None:
        """Run this process's layers for the process `rank`, until that has left the block."""
        if self.placement.device.type == "cuda":
            torch.cuda.set_device(self.placement.device)
        mirrors, outputs = CacheMirrors(), dict[int, Any]()
        with suppress(LostProcess):  # the main thread raises it
            while (reply := self._reply(rank, self._receive(rank, REQUEST), mirrors, outputs)) is not None:
                self._send(rank, REPLY, reply)
                del reply

    def _reply(
        self, rank: int, packed: torch.Tensor, mirrors: CacheMirrors, outputs: dict[int, Any]
    ) -> torch.Tensor | None:
        """Return the packed reply to a request: outputs of its calls, an earlier output, or an error.

        None if the other process has left the block.
        """
        try:
            with self.computing:
                request: Any = unpack_message(packed, self.placement.device, mirrors)
                if isinstance(request, tuple):
                    return pack_message(self._run(request, mirrors, outputs))
                if not isinstance(request, bool):
                    return pack_message(outputs[request])
            if request:  # it failed
                what = f"process {rank} stopped, so the sharded model cannot be used any more"
                self._note_problem(LostProcess.of(what, None, "Its own error is the cause."))
            return None
        except Exception as error:  # noqa: BLE001 - the process that asked raises it
            try:
                return pack_message(error.with_traceback(None))
            except (pickle.PicklingError, TypeError):
                return pack_message(RuntimeError(f"{type(error).__name__}: {error}"))

    def _run(self, request: _Request, mirrors: CacheMirrors, kept_outputs: dict[int, Any]) -> tuple[Any, list[Any]]:
        """Return the last output of calls and the states of caches; put requested outputs into `kept_outputs`."""
        calls, numbers, (inference, (autocast, dtype), in_reference) = request
        outputs: list[Any] = []
        kept_outputs.clear()
        kind = self.placement.device.type
        with (
            torch.inference_mode(inference),
            torch.no_grad(),
            torch.autocast(kind, dtype, enabled=autocast),
        ):
            mirrors.repeat_changes()
            for number, args, kwargs, adapter_off in calls:
                args, kwargs = tree_map_only(
                    OutputOf, lambda one: outputs[one.number], (args, kwargs), is_leaf=lambda one: type(one) is OutputOf
                )
                with self._in_state(number, adapter_off, in_reference):
                    outputs.append(self._compute(number, *args, **kwargs))
                assert len(outputs) == len(calls) or _keeps_shape(outputs[-1], args[0]), "an output changed its shape"
        kept_outputs.update((number, outputs[number]) for number in numbers)
        return outputs[-1], [*mirrors.read_states({*chain.from_iterable(self.indexes[number] for number, *_ in calls)})]

    @contextmanager
    def _in_state(self, number: int, adapter_off: bool, in_reference: bool) -> Iterator[None]:
        """Give a layer the adapter switch and the weights that it has in the calling process."""
        switched = [(part, getattr(part, _SWITCH)) for part in self.switches[number]]
        versions = [(one, one.data, pair[in_reference]) for one, *pair in self.placement.versions.get(number, [])]
        try:
            for part, _ in switched:
                setattr(part, _SWITCH, adapter_off)
            for parameter, _, weights in versions:
                parameter.data = weights
            yield
        finally:
            for part, before in switched:
                setattr(part, _SWITCH, before)
            for parameter, weights, _ in versions:
                parameter.data = weights

    def _compute(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Run a layer of this process, on its device if its weights are in main memory."""
        device = self.placement.device
        offloaded = [(one, one.data) for one in self.placement.layers[number].parameters() if one.device != device]
        try:
            for parameter, weights in offloaded:
                parameter.data = weights.to(device)
            return self.forwards[number](*args, **kwargs)
        finally:
            for parameter, weights in offloaded:
                parameter.data = weights

    # Messages

    def _send(self, rank: int, tag: int, packed: torch.Tensor) -> None:
        try:
            distributed.send(torch.tensor([len(packed)]), rank, self.group, tag)
            distributed.send(packed, rank, self.group, tag)
        except RuntimeError as error:
            self._lose(error)

    def _receive(self, rank: int, tag: int) -> torch.Tensor:
        size = torch.zeros(1, dtype=torch.int64)
        try:
            distributed.recv(size, rank, self.group, tag)
            packed = torch.empty(int(size), dtype=torch.uint8)
            distributed.recv(packed, rank, self.group, tag)
        except RuntimeError as error:
            self._lose(error)
        return packed

    def _lose(self, error: RuntimeError) -> Never:
        problem = lost_process(error) or LostProcess.of(f"process {self.rank} lost another process: {error}")
        self._note_problem(problem)
        raise problem from error

    def _note_problem(self, problem: LlmtuneError) -> None:
        self.problem = self.problem or problem


class _Message:
    """Calls of layers of the process `owner`, to be sent together."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.calls: list[_LayerCall] = []
        self.outputs: list[weakref.ref[PendingOutput]] = []
        self.values: dict[int, Any] = {}
        """Outputs that came back, by the number of the call."""

    def last(self) -> PendingOutput | None:
        """Return the output of the last call, if it is pending."""
        return self.outputs[-1]() if self.outputs else None

    def live_outputs(self) -> list[PendingOutput]:
        """Return the pending outputs that are still referenced."""
        return [output for reference in self.outputs if (output := reference()) is not None]


def _keeps_shape(output: object, before: torch.Tensor) -> bool:
    return isinstance(output, torch.Tensor) and (output.shape, output.dtype) == (before.shape, before.dtype)


def _cache_indexes(layer: torch.nn.Module) -> set[int]:
    """Return the indexes at which a layer writes into caches (`layer_idx`)."""
    numbers: list[Any] = [getattr(part, "layer_idx", None) for part in layer.modules()]
    return {number for number in numbers if isinstance(number, int)}


@cache
def _message_group() -> distributed.ProcessGroup:
    """Return a separate gloo group for messages, so no other communication uses their tags."""
    group: distributed.ProcessGroup = distributed.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE_SECONDS))
    return group
