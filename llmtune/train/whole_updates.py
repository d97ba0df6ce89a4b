"""Any optimiser over sharded matrices: each matrix is gathered in one process, which keeps its state and updates it.

An update of Muon or Adafactor depends on all numbers of a matrix, and the 8-bit states of bitsandbytes on blocks of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from llmtune.adapter.reference_model import own_part

State = dict[str, Any]


class WholeUpdates(torch.optim.Optimizer):
    """An optimiser of sharded parameters that updates unsharded ones with another optimiser.

    Process i of N updates every N-th parameter: a round gathers N of them, one for each process. The state of a
    parameter is in its process only.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        """Take over the parameters of `inner`, which gets empty ones in their place."""
        super().__init__([{**group} for group in inner.param_groups], inner.defaults)
        self.inner = inner
        self.owned: list[tuple[DTensor, torch.nn.Parameter]] = []
        """Sharded parameters, each with the parameter that `inner` updates: empty, except while it is updated."""
        for group in inner.param_groups:
            pairs = [(one, torch.nn.Parameter(own_part(one).new_empty(0))) for one in group["params"]]
            group["params"] = [whole for _, whole in pairs]
            self.owned += pairs
        self.state = inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for inner_group, group in zip(self.inner.param_groups, self.param_groups, strict=True):
            inner_group.update({name: value for name, value in group.items() if name != "params"})
        size, rank = distributed.get_world_size(), distributed.get_rank()
        for start in range(0, len(self.owned), size):
            turn = self.owned[start : start + size]
            for owner, (parameter, whole) in enumerate(turn):
                if parameter.grad is not None:
                    value, gradient = parameter.full_tensor(), _full(parameter.grad)
                    if owner == rank:
                        whole.data, whole.grad = value, gradient
            self.inner.step()
            for owner, (parameter, whole) in enumerate(turn):
                if parameter.grad is not None:
                    cut = _cut(whole.data if owner == rank else None, parameter, parameter.dtype, owner)
                    parameter.to_local().copy_(cut.to_local())
                whole.data, whole.grad = whole.data.new_empty(0), None

    def state_dict(self) -> dict[str, Any]:
        """Return the groups; `spread_state` has the state."""
        self.state = defaultdict(dict)
        try:
            return super().state_dict()
        finally:
            self.state = self.inner.state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups, and the state of sharded parameters; all processes must call it."""
        super().load_state_dict({**state_dict, "state": {}})
        self.state = self.inner.state
        self.state.clear()
        size, rank = distributed.get_world_size(), distributed.get_rank()
        for index, (_, whole) in enumerate(self.owned):
            for key, value in sorted(state_dict["state"].get(index, {}).items()):
                complete = value.full_tensor() if isinstance(value, DTensor) else value
                if index % size == rank:
                    moved = complete.to(whole.device) if torch.is_tensor(complete) and complete.ndim else complete
                    self.state[whole][key] = moved

    @torch.no_grad()
    def spread_state(self) -> Iterator[tuple[DTensor, State]]:
        """Yield each parameter with its state, cut like the parameter if shapes agree; all processes must call it."""
        size, rank = distributed.get_world_size(), distributed.get_rank()
        local_descriptions = {
            index: {key: _describe(value) for key, value in self.state[whole].items()}
            for index, (_, whole) in enumerate(self.owned)
            if index % size == rank and whole in self.state
        }
        descriptions: dict[int, dict[str, Any]] = {}
        for one in gather_object([local_descriptions]):
            descriptions |= one
        for index, (parameter, whole) in enumerate(self.owned):
            parameter_state = {}
            for key, described in descriptions.get(index, {}).items():
                value = self.state[whole][key] if index % size == rank else None
                parameter_state[key] = (
                    described if not isinstance(described, tuple) else _send(value, parameter, described, index)
                )
            yield parameter, parameter_state


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return cast(DTensor, tensor).full_tensor()


def _describe(value: Any) -> Any:
    """Return shape and dtype of a tensor, and anything else unchanged."""
    return (value.shape, value.dtype) if torch.is_tensor(value) else value


def _send(value: torch.Tensor | None, parameter: DTensor, described: tuple[Any, ...], index: int) -> torch.Tensor:
    """Return the value of its owner: cut like the parameter if it has the same shape, else complete."""
    shape, dtype = described
    owner = index % distributed.get_world_size()
    if shape == parameter.shape:
        return _cut(value, parameter, dtype, owner)
    device = parameter.device_mesh.device_type
    sent = torch.empty(shape, dtype=dtype, device=device) if value is None else value.to(device)
    shared = distribute_tensor(sent.contiguous(), parameter.device_mesh, [Replicate()], src_data_rank=owner)
    return shared.to_local().clone()  # bitsandbytes' states share tensors, and files of tensors must not


def _cut(value: torch.Tensor | None, parameter: DTensor, dtype: torch.dtype, owner: int) -> DTensor:
    """Return this process's part of the `value` that `owner` has, in the place of the parameter's own part."""
    device = parameter.device_mesh.device_type
    sent = torch.empty(parameter.shape, dtype=dtype, device=device) if value is None else value.to(device)
    cut = distribute_tensor(sent.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=owner)
    shard = cast(DTensor, torch.empty_like(parameter, dtype=dtype, requires_grad=False))
    shard.to_local().copy_(cut.to_local())
    return shard
