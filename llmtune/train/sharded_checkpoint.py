"""Checkpoints of a sharded model: written by all processes at once, readable by any number of them, even one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from inspect import signature
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from llmtune.train.checkpoint import disk_problems, named_trainable
from llmtune.train.distributed import run_on_main
from llmtune.train.setup import TrainContext
from llmtune.train.sharding import cut_like
from llmtune.train.whole_updates import WholeUpdates

_BY_ALL = next(name for name in signature(HuggingFaceStorageWriter).parameters if name.startswith("save_"))
"""torch's option to let every process write its own file: `save_distributed`, in 2.8 `save_sharded`."""
FILE_BYTES, FEWEST_FILES = 2**28, 32
"""Approximate size of one file, in bytes of unsharded tensors, and the number of files of a small checkpoint.

The writer holds two copies of a file in memory.
"""
WEIGHTS, OPTIMIZER = "weights.", "optimizer."
"""Prefixes of tensor names: `weights.PARAMETER`, `optimizer.KEY.PARAMETER`."""


def write_shards(training: TrainContext, checkpoint: Path) -> Path:
    """Write weights and optimiser state from all processes to a folder next to `checkpoint`, and return that folder.

    Raises EnvironmentProblem in every process if one of them cannot write.
    """
    folder = checkpoint.with_name(f".tmp-shards-{checkpoint.name}")
    run_on_main(training.accelerator, lambda: shutil.rmtree(folder, ignore_errors=True))
    parameters = named_trainable(training.adapted.model)
    tensors: dict[str, torch.Tensor] = {WEIGHTS + name: parameter for name, parameter in parameters.items()}
    optimizer = training.optimizer.optimizer
    spread = dict(optimizer.spread_state()) if isinstance(optimizer, WholeUpdates) else optimizer.state
    for name, parameter in parameters.items():
        for key, value in spread.get(parameter, {}).items():
            tensors[f"{OPTIMIZER}{key}.{name}"] = value if torch.is_tensor(value) else _as_tensor(value)
    del spread
    ends = [*accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())]
    size = min(FILE_BYTES, max(FILE_BYTES // FEWEST_FILES, ends[-1] // FEWEST_FILES))
    files = {name: 1 + end // size for name, end in zip(tensors, ends, strict=True)}
    with disk_problems(checkpoint):
        try:
            save(tensors, storage_writer=cast(Any, HuggingFaceStorageWriter)(str(folder), files, **{_BY_ALL: True}))
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
    return folder


def read_shards(training: TrainContext, folder: Path) -> dict[int, dict[str, Any]]:
    """Read weights in place; return the optimiser state by the index of the parameter in its groups."""
    parameters = named_trainable(training.adapted.model)
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, torch.Tensor] = {WEIGHTS + name: parameter for name, parameter in parameters.items()}
    for stored, metadata in reader.read_metadata().state_dict_metadata.items():
        if stored.startswith(OPTIMIZER) and isinstance(metadata, TensorStorageMetadata):
            like = parameters[stored.removeprefix(OPTIMIZER).split(".", 1)[1]]
            tensors[stored] = (
                torch.zeros_like(like, dtype=metadata.properties.dtype)
                if metadata.size == like.shape
                else torch.zeros(metadata.size, dtype=metadata.properties.dtype)
            )
    load(tensors, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    names = {id(parameter): name for name, parameter in parameters.items()}
    keys = {key.removeprefix(OPTIMIZER).split(".", 1)[0] for key in tensors if key.startswith(OPTIMIZER)}
    state = {}
    for index, parameter in enumerate(_number_parts(training)):
        tensor_of_key = {key: tensors.get(f"{OPTIMIZER}{key}.{names[id(parameter)]}") for key in sorted(keys)}
        if parameter_state := {key: _as_number(value) for key, value in tensor_of_key.items() if value is not None}:
            state[index] = parameter_state
    return state


def _as_tensor(value: float) -> torch.Tensor:
    """Return a number of an optimiser's state as a tensor, in a dtype that tensors of such states do not have."""
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _as_number(value: torch.Tensor) -> torch.Tensor | float:
    return value.item() if value.ndim == 0 and value.dtype in (torch.int64, torch.float64) else value


def cut_state(training: TrainContext, state: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return this process's shard of an unsharded optimiser state."""
    parameters = _number_parts(training)
    return {
        index: {
            key: cut_like(value, parameters[index]) if torch.is_tensor(value) else value
            for key, value in parameter_state.items()
        }
        for index, parameter_state in state.items()
    }


def _number_parts(training: TrainContext) -> list[torch.Tensor]:
    """Return the parameters in the order in which the optimiser numbers them."""
    return [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
