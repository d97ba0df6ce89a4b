"""DeepSpeed's ZeRO under Accelerate: gradients and optimiser state cut over processes (zero2), and weights (zero3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch.nn.functional import pad

from llmtune.adapter.reference_model import KEPT, keep_reference, own_part
from llmtune.model.memory_plan import BUCKET_SIZE, kept_together
from llmtune.recipe.schema import Recipe
from llmtune.train.checkpoint import trainable_parameters
from llmtune.train.sharding import gathered

STAGES = {"zero2": 2, "zero3": 3}
"""What `--strategy` calls them."""


def zero_plugin(strategy: str, recipe: Recipe, dtype: torch.dtype) -> DeepSpeedPlugin:
    """Return what Accelerate has to know of DeepSpeed.

    Weights are given up after each pass, as FSDP gives them up, and none are fetched ahead: what is fetched ahead stays
    until the step is over, and may be under way still when a validation ends.
    """
    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 1,  # has to be there; micro-batches are the loop's
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.train.max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": STAGES[strategy],
                "reduce_bucket_size": BUCKET_SIZE,
                "stage3_prefetch_bucket_size": 0,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
            },
            # Within its engine DeepSpeed switches off what is around it.
            "torch_autocast": {
                "enabled": dtype == torch.bfloat16,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }
    )


def use_deepspeed(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, ZeroOptimizer]:
    """Cut what an optimiser works on over all processes, and under ZeRO-3 the weights of `model`, in place.

    The numbers are those that the first process has: the others may have weights on `meta`.
    """
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime.zero import Init

    __compatible_ops__["deepspeed_shm_comm"] = False  # for inference; a C++ compiler would have to make it first
    groups = [list(group["params"]) for group in optimizer.param_groups]
    plugin, swap = accelerator.deepspeed_plugin, cast(Any, torch.utils.swap_tensors)
    for piece in [*kept_together(model), model]:
        for parameter in piece.parameters():
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device=accelerator.device)
                swap(parameter, torch.nn.Parameter(empty, parameter.requires_grad))
        if plugin.zero_stage == 3:
            Init(module=piece, config_dict_or_path=plugin.hf_ds_config.config)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(accelerator.device))
    engine, _ = accelerator.prepare(model, optimizer)
    if hasattr(model, KEPT):
        keep_reference(model)
    return engine, ZeroOptimizer(engine, optimizer, groups)


class ZeroOptimizer:
    """An optimiser whose state is cut over processes, with the methods that the loop calls.

    State and weights are given and taken whole, so that a checkpoint goes on in any number of processes.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, groups: list[list[torch.nn.Parameter]]) -> None:
        self.optimizer = optimizer
        self.parameters = [parameter for group in groups for parameter in group]
        """Those that are trained, as a checkpoint numbers them."""
        self._engine, self._zero, self._groups = engine, engine.optimizer, groups
        self._cuts_weights: bool = engine.zero_optimization_partition_weights()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups with their learning rates; what stands in them as parameters is DeepSpeed's."""
        return self.optimizer.param_groups

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch; after the `last` one they are a mean over processes."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def finish_gradients(self, factor: float) -> float:
        """Multiply the gradients by `factor`; return their length before the clipping, which `step` does."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad
        from deepspeed.utils.tensor_fragment import safe_update_full_grad_vectorized

        if not self._cuts_weights:
            if factor != 1:
                safe_update_full_grad_vectorized(self.parameters, lambda gradient, _: gradient.mul_(factor))
            norm = float(self._zero.scaled_global_norm())
            return norm if norm >= 0 else math.nan  # -1 stands for what is no number
        for parameter in self.parameters if factor != 1 else ():
            safe_set_local_grad(parameter, safe_get_local_grad(parameter) * factor)
        squares = [safe_get_local_grad(parameter).float().square().sum() for parameter in self.parameters]
        total = torch.stack(squares).sum()
        torch.distributed.all_reduce(total)
        return math.sqrt(float(total))

    def step(self) -> None:
        """Clip the gradients, and update."""
        self._engine.step()
        if self._cuts_weights:  # else weights that the next step does not use keep their gradient
            self._zero.grad_partitions_flat_buffer.zero_()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: `step` has done it."""

    def state_dict(self) -> dict[str, Any]:
        """Return what torch's optimiser of one process would, on the CPU of the first; all have to call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_state()
        first, state = torch.distributed.get_rank() == 0, {}
        kept: dict[str, Any] = next(iter(self.optimizer.state.values()), {})
        for index, parameter in enumerate(self.parameters if kept else ()):
            state[index] = {key: deepcopy(value) for key, value in kept.items() if not _is_cut(value)}
            for key in [key for key in kept if key not in state[index]]:  # all processes in one order
                whole = safe_get_full_optimizer_state(parameter, key)
                state[index][key] = whole.cpu() if first else torch.empty(0)
        numbers = iter(range(len(self.parameters)))
        groups = [
            {**settings, "params": [next(numbers) for _ in group]}
            for settings, group in zip(self.param_groups, self._groups, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take this process's part of a whole state."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for group, settings in zip(self.param_groups, saved["param_groups"], strict=True):
            group |= {key: value for key, value in settings.items() if key != "params"}
        self.optimizer.state.clear()
        kept: dict[str, Any] = next(iter(saved["state"].values()), {})
        zero = self._zero
        flat = zero.fp32_partitioned_groups_flat if self._cuts_weights else zero.single_partition_of_fp32_groups
        for part in flat if kept else ():
            self.optimizer.state[part] = {
                key: torch.zeros_like(part) if _is_cut(value) else deepcopy(value) for key, value in kept.items()
            }
        self._link_state()
        for index, own in saved["state"].items():
            parameter = self.parameters[index]
            for key, value in own.items():
                if _is_cut(value) and self._cuts_weights:
                    # What does not divide by the processes is padded, which DeepSpeed leaves to its caller.
                    size, rank = own_part(parameter).numel(), torch.distributed.get_rank()
                    padded = pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
                    safe_set_local_optimizer_state(parameter, padded[size * rank : size * (rank + 1)], key)
                elif _is_cut(value):
                    safe_set_full_optimizer_state(parameter, value, key)

    def _link_state(self) -> None:
        """Let ZeRO-2 find the state of each weight: it looks once, when only the first group has one."""
        if not self._cuts_weights:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights whole, on the CPU of the first process; all have to call it."""
        first, weights = torch.distributed.get_rank() == 0, {}
        for name, parameter in trainable_parameters(self._engine.module).items():
            whole = gathered(parameter)
            weights[name] = whole.detach().cpu() if first else torch.empty(0)
        return weights

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy whole weights, by parameter name, into the model and into what is updated."""
        from deepspeed.runtime.zero import GatheredParameters

        with torch.no_grad():
            for name, parameter in trainable_parameters(self._engine.module).items():
                with GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(weights[name])
        self._zero.refresh_fp32_params()


def _is_cut(value: Any) -> bool:
    """Whether a part of an optimiser's state has a number for each one of a weight, unlike the number of the step."""
    return torch.is_tensor(value) and value.ndim > 0


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape that a weight has whole."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
