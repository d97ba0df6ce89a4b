"""Calls of layers as bytes: arguments, outputs, and the changes of KV caches.

A cache stays with its layers. The process that runs the passes has a Cache whose layers elsewhere are on `meta`, with
the right shapes. The owner of these layers has a mirror of the cache with their values. Layers are not all that changes
a cache: beams change their order, and rows leave. Such calls are recorded, and repeated on the mirror before its next
use.
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


class OutputOf(NamedTuple):
    """In a message, the output of an earlier call in it."""

    number: int


class PendingOutput(torch.Tensor):
    """The output of a layer that another process runs, or will run; any use of it fetches its value."""

    read: Callable[[], torch.Tensor]
    number: int
    """The number of the call in its message."""
    message: object
    """The calls that are sent together."""

    @staticmethod
    def __new__(cls: type[PendingOutput], like: torch.Tensor) -> PendingOutput:
        """Make an output of the shape and dtype of the layer's input."""
        with DisableTorchFunctionSubclass():
            output = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        assert isinstance(output, PendingOutput)
        return output

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer questions of shape and dtype; use the value for everything else."""
        if func in _SHAPES:
            with DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Use the value."""
        args, kwargs = tree_map_only(PendingOutput, lambda one: one.read(), (args, kwargs or {}))
        return func(*args, **kwargs)


# Caches


def _layer_lists(cache: Any) -> list[list[Any]]:
    """Return the lists of layers of a cache: two of an encoder-decoder."""
    if hasattr(cache, "self_attention_cache"):
        return [cache.self_attention_cache.layers, cache.cross_attention_cache.layers]
    return [cache.layers]


class _BlankPickler(pickle.Pickler):
    """Pickle a cache without the contents of its tensors."""

    def persistent_id(self, value: object) -> object:
        """Return a mark for a tensor, and None for anything else."""
        return "empty" if isinstance(value, torch.Tensor) else None


class _BlankUnpickler(pickle.Unpickler):
    def persistent_load(self, mark: object) -> torch.Tensor:
        """Return an empty tensor."""
        return torch.empty(0)


def _record_changes(cache: Any) -> None:
    """Record the calls of methods that change a cache of transformers."""
    file = io.BytesIO()
    _BlankPickler(file).dump(cache)
    setattr(cache, _BLANK, file.getvalue())
    if not hasattr(cache, CHANGED):
        setattr(cache, CHANGED, [])
        for name in _CHANGES:
            if hasattr(cache, name):
                setattr(cache, name, partial(_change, weakref.ref(cache), name))


def _change(reference: weakref.ref[Any], name: str, *args: Any) -> Any:
    cache = reference()
    getattr(cache, CHANGED).append((name, args))
    return getattr(type(cache), name)(cache, *args)


class CacheUpdates:
    """The caches of the passes here, as one other process has seen them."""

    def __init__(self) -> None:
        self.numbers = weakref.WeakKeyDictionary[Cache, int]()
        self.caches = weakref.WeakValueDictionary[int, Cache]()
        self.count = 0
        self.sent: dict[int, int] = {}
        """By the number of a cache, how many of its changes were sent."""
        self.used = dict[int, Cache]()
        """The caches in the next message."""
        self.forgotten: list[int] = []

    def name(self, cache: Cache) -> int:
        """Return the number of a cache, which takes part in the next message."""
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
        """Return what changed in the caches of the next message."""
        updates = []
        for number, cache in self.used.items():
            changes: list[Any] = getattr(cache, CHANGED)
            names = getattr(type(cache), POSITION, ())
            updates.append(
                (number, changes[self.sent.get(number, 0) :], {name: getattr(cache, name) for name in names})
            )
        return updates

    def take_new(self) -> tuple[list[int], dict[int, bytes]]:
        """Return the numbers of caches that are gone, and new caches without contents."""
        gone = [self.forgotten.pop() for _ in range(len(self.forgotten))]
        new = {number: getattr(cache, _BLANK) for number, cache in self.used.items() if number not in self.sent}
        self.sent |= {number: len(getattr(cache, CHANGED)) for number, cache in self.used.items()}
        self.used = {}
        return gone, new

    def note_states(self, states: Iterable[tuple[int, int, int, Any]]) -> None:
        """Take over the shapes of layers that the other process has."""
        for number, place, index, state in states:
            cache: Any = self.caches[number]
            if hasattr(type(cache), POSITION):
                cache.states[index] = state
                continue
            layers = _layer_lists(cache)[place]
            layers.extend(copy.copy(state) for _ in range(len(layers), index + 1))
            layers[index] = state


class CacheMirrors:
    """Another process's caches, with the layers of this one."""

    def __init__(self) -> None:
        self.caches: dict[int, Any] = {}
        self.layers: dict[int, set[int]] = {}
        """By cache, the indexes of its layers that are here."""
        self.changes: list[tuple[int, list[Any], dict[str, Any]]] = []
        """What changed in the caches of this message since their last use."""

    def replace_all(self, gone: Iterable[int], new: dict[int, bytes]) -> None:
        """Forget and make caches."""
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
        """Yield the layers `indexes` of the caches in this message, with tensors on `meta`."""
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
    """Pickle a value, with its tensors apart."""

    def __init__(
        self, file: io.BytesIO, tensors: list[torch.Tensor], updates: CacheUpdates | None, message: object
    ) -> None:
        super().__init__(file, protocol=5)
        self.tensors, self.updates, self.message = tensors, updates, message
        self.places = {id(tensor): place for place, tensor in enumerate(tensors)}

    def persistent_id(self, value: object) -> object:
        """Return the place of a tensor, and the number of a pending output or of a cache; else None."""
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
        """Refuse an object that a layer may change: the change would be lost."""
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
        """Return what `_Packer.persistent_id` describes."""
        if isinstance(mark, int):
            return self.tensors[mark]
        if isinstance(mark, OutputOf):
            return mark
        if mark[0] == "cache":
            assert self.mirrors is not None
            return self.mirrors.caches[mark[1]]
        return torch.empty(mark[0], dtype=mark[1], device="meta")


def pack_message(value: object, updates: CacheUpdates | None = None, message: object = None) -> torch.Tensor:
    """Return a value as bytes [N] in main memory; pending outputs of `message` become OutputOf."""
    tensors: list[torch.Tensor] = []

    def dump(part: object) -> bytes:
        file = io.BytesIO()
        _Packer(file, tensors, updates, message).dump(part)
        return file.getvalue()

    parts = [dump(value)]
    if updates is not None:
        parts = [*parts, dump(updates.take_changes())]  # first, because it may name further caches
        parts = [*parts, dump(updates.take_new())]
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
    """Return the value of `pack_message`; tensors that were not in main memory are on `device`."""
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
