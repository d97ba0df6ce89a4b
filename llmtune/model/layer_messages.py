"""Calls of layers as bytes: arguments, outputs, and the changes of KV caches.

A cache stays with its layers. The process that runs the passes has a Cache in which the layers of other processes are
on `meta`, with the right shapes. The owner of these layers has a mirror of the cache with their values. Not only layers
change a cache: beams are reordered, and finished rows are removed. Such calls are recorded and repeated on the mirror
before its next use.
"""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_map_only
from transformers import Cache

from llmtune.errors import EnvironmentProblem

_ALIGNED = 16
"""Tensors begin at multiples of this number of bytes."""
_CHANGES = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
"""Methods of transformers' caches, and of their layers, that are recorded."""
CHANGED = "changes"
"""Attribute of a cache: its recorded calls, as names of methods with their arguments."""
POSITION = "position"
"""Attribute of the class of a cache whose state is more than its layers: the names of these attributes."""
_BLANK = "blank"
"""Attribute of a cache: itself without contents, pickled."""
_SHAPES = {getattr(torch.Tensor, name) for name in ("dim", "size", "numel", "is_floating_point", "element_size")} | {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
}
"""Functions of a tensor whose result does not depend on its values."""


class OutputOf(NamedTuple):
    """In a message, a placeholder for the output of its call `number`."""

    number: int


class PendingOutput(torch.Tensor):
    """The output of a layer that another process runs, or will run; any use of its values fetches them."""

    read: Callable[[], torch.Tensor]
    number: int
    """The number of the call in its message."""
    message: object
    """The calls that are sent together."""

    @staticmethod
    def __new__(cls: type[PendingOutput], like: torch.Tensor) -> PendingOutput:
        """Return an output with the shape, dtype and device of the layer's input, `like`."""
        with DisableTorchFunctionSubclass():
            output = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        assert isinstance(output, PendingOutput)
        return output

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return shape, dtype and device without fetching the value; fetch it for everything else."""
        if func in _SHAPES:
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` with the values of pending outputs."""
        args, kwargs = tree_map_only(PendingOutput, lambda one: one.read(), (args, kwargs or {}))
        return func(*args, **kwargs)


# Caches


def _layer_lists(cache: Any) -> list[list[Any]]:
    """Return the lists of layers of a cache: one, or two for an encoder-decoder (self- and cross-attention)."""
    if hasattr(cache, "self_attention_cache"):
        return [cache.self_attention_cache.layers, cache.cross_attention_cache.layers]
    return [cache.layers]


class _BlankPickler(pickle.Pickler):
    """Pickle a cache without the contents of its tensors."""

    def persistent_id(self, value: object) -> object:
        """Return a mark for a tensor, None for anything else."""
        return "empty" if isinstance(value, torch.Tensor) else None


class _BlankUnpickler(pickle.Unpickler):
    def persistent_load(self, mark: object) -> torch.Tensor:
        """Return an empty tensor."""
        return torch.empty(0)


def _record_changes(cache: Any) -> None:
    """Let a cache record the calls of its methods in `_CHANGES`, and pickle it without contents."""
    file = io.BytesIO()
    _BlankPickler(file).dump(cache)
    setattr(cache, _BLANK, file.getvalue())
    if not hasattr(cache, CHANGED):
        setattr(cache, CHANGED, [])
        for name in _CHANGES:
            if hasattr(cache, name):
                setattr(cache, name, partial(_change, weakref.ref(cache), name))


def _change(reference: weakref.ref[Any], name: str, *args: Any) -> Any:
    """Record a call of the method `name`, and run it."""
    cache = reference()
    getattr(cache, CHANGED).append((name, args))
    return getattr(type(cache), name)(cache, *args)


class CacheUpdates:
    """The caches of this process, and which of their changes one other process has received."""

    def __init__(self) -> None:
        self.numbers = weakref.WeakKeyDictionary[Cache, int]()
        self.caches = weakref.WeakValueDictionary[int, Cache]()
        self.count = 0
        self.sent: dict[int, int] = {}
        """By the number of a cache, how many of its changes were sent."""
        self.used = dict[int, Cache]()
        """The caches in the next message."""
        self.forgotten: list[int] = []
        """Numbers of caches that were deleted since the last message."""

    def name(self, cache: Cache) -> int:
        """Return the number of a cache, and add the cache to the next message."""
        if cache not in self.numbers:
            if not hasattr(cache, _BLANK):
                _record_changes(cache)
            self.count += 1
            self.numbers[cache], self.caches[self.count] = self.count, cache
            weakref.finalize(cache, self.forgotten.append, self.count).atexit = False
        number = self.numbers[cache]
        self.used[number] = cache
        return number

    def take_changes(self) -> list[tuple[int, list[Any], dict[str, Any]]]:
        """Return, for each cache of the next message, its number, unsent changes, and `POSITION` attributes by name."""
        updates = []
        for number, cache in self.used.items():
            changes: list[Any] = getattr(cache, CHANGED)[self.sent.get(number, 0) :]
            position = {name: getattr(cache, name) for name in getattr(type(cache), POSITION, ())}
            updates.append((number, changes, position))
        return updates

    def take_new(self) -> tuple[list[int], dict[int, bytes]]:
        """Return the numbers of deleted caches, and new caches without contents, pickled, by number.

        Marks all changes as sent, and begins the next message.
        """
        gone = [self.forgotten.pop() for _ in range(len(self.forgotten))]
        new = {number: getattr(cache, _BLANK) for number, cache in self.used.items() if number not in self.sent}
        self.sent |= {number: len(getattr(cache, CHANGED)) for number, cache in self.used.items()}
        self.used = {}
        return gone, new

    def note_states(self, states: Iterable[tuple[int, int, int, Any]]) -> None:
        """Put the layers of the other process, with tensors on `meta`, into the caches.

        Each state is the number of a cache, the place of a list in `_layer_lists`, the layer's index and the layer.
        For a cache with `POSITION`, it has the entry of `states` instead of the layer.
        """
        for number, place, index, layer in states:
            cache: Any = self.caches[number]
            if hasattr(type(cache), POSITION):
                cache.states[index] = layer
                continue
            layers = _layer_lists(cache)[place]
            layers.extend(copy.copy(layer) for _ in range(len(layers), index + 1))
            layers[index] = layer


class CacheMirrors:
    """Mirrors of another process's caches, with the values of this process's layers."""

    def __init__(self) -> None:
        self.caches: dict[int, Any] = {}
        self.layers: dict[int, set[int]] = {}
        """By cache, the indexes of its layers that this process has."""
        self.changes: list[tuple[int, list[Any], dict[str, Any]]] = []
        """What changed in the caches of this message since their last use."""

    def replace_all(self, gone: Iterable[int], new: dict[int, bytes]) -> None:
        """Delete the caches `gone`, and make the caches `new` without contents."""
        for number in gone:
            self.caches.pop(number, None)
            self.layers.pop(number, None)
        for number, blank in new.items():
            self.caches[number], self.layers[number] = _BlankUnpickler(io.BytesIO(blank)).load(), set()

    def repeat_changes(self) -> None:
        """Repeat what changed in the caches of this message since their last use."""
        for number, calls, position in self.changes:
            cache = self.caches[number]
            vars(cache).update(position)
            for name, args in calls:
                parts = [cache] if position else self._parts(cache, self.layers[number])
                for part in parts:
                    getattr(part, name)(*args)

    def read_states(self, indexes: Iterable[int]) -> Iterator[tuple[int, int, int, Any]]:
        """Yield the layers `indexes` of the caches in this message, for `CacheUpdates.note_states`."""
        for number, *_ in self.changes:
            cache, here = self.caches[number], self.layers[number]
            for index in indexes:
                if hasattr(type(cache), POSITION):
                    if index in cache.states and index not in here:  # they keep their shapes
                        yield number, 0, index, _on_meta(cache.states[index])
                else:
                    for place, layers in enumerate(_layer_lists(cache)):
                        if index < len(layers):
                            state = copy.copy(layers[index])
                            vars(state).update(_on_meta(vars(state)))
                            yield number, place, index, state
            here.update(indexes)

    @staticmethod
    def _parts(cache: Any, indexes: Iterable[int]) -> list[Any]:
        return [layers[index] for layers in _layer_lists(cache) for index in indexes if index < len(layers)]


def _on_meta(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda one: torch.empty_like(one, device="meta"), value)


# Bytes


class _Packer(pickle.Pickler):
    """Pickle a value; its tensors are appended to `tensors` instead."""

    def __init__(
        self, file: io.BytesIO, tensors: list[torch.Tensor], updates: CacheUpdates | None, message: object
    ) -> None:
        super().__init__(file, protocol=5)
        self.tensors, self.updates, self.message = tensors, updates, message
        self.places = {id(tensor): place for place, tensor in enumerate(tensors)}

    def persistent_id(self, value: object) -> object:
        """Return a mark for a tensor, a pending output or a cache, None for anything else.

        The mark of a tensor is its index in `tensors`; on `meta`, its shape and dtype.
        """
        if isinstance(value, PendingOutput):
            if value.message is self.message:
                return OutputOf(value.number)
            value = value.read()
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                return value.shape, value.dtype
            if id(value) not in self.places:
                self.places[id(value)] = len(self.tensors)
                self.tensors.append(value)
            return self.places[id(value)]
        if isinstance(value, Cache) and self.updates is not None:
            return "cache", self.updates.name(value)
        return None

    def reducer_override(self, value: Any) -> Any:
        """Raise EnvironmentProblem for an object with tensors that a layer may change: the change would be lost."""
        state = getattr(value, "__dict__", {})
        if self.updates is not None and not isinstance(value, type | dict) and _has_tensor(state):
            what = f"layers of this model take a {type(value).__name__}, which cannot be sent to another process"
            raise EnvironmentProblem.of(what, None, "Use --strategy ddp, or evaluate the run in one process.")
        return NotImplemented


def _has_tensor(state: Any) -> bool:
    return any(isinstance(one, torch.Tensor) for one in dict(state).values())


class _Unpacker(pickle.Unpickler):
    def __init__(self, data: bytes, tensors: list[torch.Tensor], mirrors: CacheMirrors | None) -> None:
        super().__init__(io.BytesIO(data))
        self.tensors, self.mirrors = tensors, mirrors

    def persistent_load(self, mark: Any) -> Any:
        """Return the value that a mark of `_Packer.persistent_id` represents."""
        if isinstance(mark, int):
            return self.tensors[mark]
        if isinstance(mark, OutputOf):
            return mark
        if mark[0] == "cache":
            assert self.mirrors is not None
            return self.mirrors.caches[mark[1]]
        return torch.empty(mark[0], dtype=mark[1], device="meta")


def pack_message(value: object, updates: CacheUpdates | None = None, message: object = None) -> torch.Tensor:
    """Return a value as uint8 [N] in main memory; pending outputs of `message` become OutputOf.

    With `updates`, which are then marked as sent, the bytes also contain the changes of the value's caches. Raises
    EnvironmentProblem for an object that cannot be sent.
    """
    tensors: list[torch.Tensor] = []

    def dump(part: object) -> bytes:
        file = io.BytesIO()
        _Packer(file, tensors, updates, message).dump(part)
        return file.getvalue()

    parts = [dump(value)]
    if updates is not None:
        parts.append(dump(updates.take_changes()))  # before take_new, because it may name further caches
        parts.append(dump(updates.take_new()))
    flat = [one.detach().contiguous().reshape(-1).view(torch.uint8) if one.numel() else None for one in tensors]
    sizes = [0 if one is None else one.numel() for one in flat]
    head = pickle.dumps((parts, [(one.shape, one.dtype, one.device.type != "cpu") for one in tensors]))
    starts, end = [], _align(8 + len(head))
    for size in sizes:
        starts.append(end)
        end = _align(end + size)
    packed = torch.empty(end, dtype=torch.uint8)
    packed[:8].view(torch.int64)[0] = len(head)
    packed[8 : 8 + len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for start, one in zip(starts, flat, strict=True):
        if one is not None:
            packed[start : start + one.numel()] = one
    return packed


def unpack_message(packed: torch.Tensor, device: torch.device, mirrors: CacheMirrors | None = None) -> Any:
    """Return the value of `pack_message`; tensors that were not in main memory are on `device`.

    Also applies the sender's deleted and new caches to `mirrors`, and keeps their changes for `repeat_changes`.
    """
    size = int(packed[:8].view(torch.int64)[0])
    (first, *updates), specs = pickle.loads(packed[8 : 8 + size].numpy().tobytes())  # noqa: S301 - of this run
    tensors, end = [], _align(8 + size)
    for shape, dtype, moves in specs:
        count = shape.numel() * dtype.itemsize
        tensor = packed[end : end + count].view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
        tensors.append(tensor.to(device) if moves else tensor)
        end = _align(end + count)

    def load(part: bytes) -> Any:
        return _Unpacker(part, tensors, mirrors).load()

    if mirrors is not None and updates:
        changes, new = updates
        mirrors.replace_all(*load(new))
        mirrors.changes = load(changes)
    return load(first)


def _align(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
