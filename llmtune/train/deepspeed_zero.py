"""DeepSpeed's ZeRO under Accelerate: gradients and optimiser state cut over processes (zero2), and weights (zero3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch.utils import swap_tensors

from llmtune.model.memory_plan import kept_together
from llmtune.train.checkpoint import trainable_parameters
from llmtune.train.sharding import gathered

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

STAGES = {"zero2": 2, "zero3": 3}
"""What `--strategy` calls them."""


def zero_plugin(strategy: str, recipe: Recipe, dtype: torch.dtype) -> DeepSpeedPlugin:
    """Return what Accelerate wants to know of DeepSpeed.

    Weights are given up after each forward pass, as FSDP gives them up. Micro-batches and numbers of them are ours.
    """
    zero = {"stage": STAGES[strategy], "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    half = {"enabled": dtype == torch.bfloat16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.train.max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
            "torch_autocast": half,
        }
    )


class ZeroOptimizer:
    """An optimiser whose state is divided over processes, with the methods that the loop uses.

    Its state is gathered and given whole, by the number of the parameter, as torch's own optimisers have it.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, groups: list[list[torch.nn.Parameter]]) -> None:
        self.engine, self.optimizer = engine, optimizer
        self._groups = groups
        self.parameters = [parameter for group in groups for parameter in group]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups with their learning rates; their parameters are DeepSpeed's."""
        return self.optimizer.param_groups

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch; after the `last` one they are a mean over processes."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def finish_gradients(self, factor: float) -> float:
        """Multiply the gradients by `factor`, and return their length before the clipping that `step` does."""
        from deepspeed.utils import safe_get_local_grad
        from deepspeed.utils.tensor_fragment import safe_update_full_grad_vectorized

        if factor != 1:
            safe_update_full_grad_vectorized(self.parameters, lambda gradient, _: gradient.mul_(factor))
        if self.engine.zero_optimization_partition_weights():
            squares = sum(safe_get_local_grad(parameter).double().square().sum() for parameter in self.parameters)
            total = cast(torch.Tensor, squares)
            torch.distributed.all_reduce(total)
            return math.sqrt(float(total))
        norm = float(self.engine.optimizer.scaled_global_norm())
        return norm if norm >= 0 else math.nan  # -1 stands for a norm that is no number

    def step(self) -> None:
        """Clip, and update what this process has of the weights."""
        self.engine.step()
        if self.engine.zero_optimization_partition_weights():  # of weights that the next step does not use
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: `step` does it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, on the CPU of the first process; all have to call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_state()
        state: dict[int, dict[str, Any]] = {}
        first = torch.distributed.get_rank() == 0
        divided, whole = self._keys()
        for index, parameter in enumerate(self.parameters) if divided or whole else ():
            state[index] = dict(whole)
            for key in divided:
                full = safe_get_full_optimizer_state(parameter, key)
                state[index][key] = full.cpu() if first else torch.empty(0)
        numbers = iter(range(len(self.parameters)))
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        groups = [
            one | {"params": [next(numbers) for _ in group]} for one, group in zip(settings, self._groups, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take this process's part of a whole state."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for group, settings in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})
        self.optimizer.state.clear()
        if saved["state"]:
            known = saved["state"][0]
            for flat in [one for group in self.param_groups for one in group["params"]]:
                for key, value in known.items():
                    divided = torch.is_tensor(value) and value.shape == whole_shape(self.parameters[0])
                    copied = value.clone() if torch.is_tensor(value) else value
                    self.optimizer.state[flat][key] = torch.zeros_like(flat) if divided else copied
        self._link_state()
        divided_keys, _ = self._keys()
        for index, own in saved["state"].items():
            for key in divided_keys:
                safe_set_full_optimizer_state(self.parameters[index], own[key], key)

    def _keys(self) -> tuple[list[str], dict[str, Any]]:
        """Return the names of what the state holds for each weight, and what it holds once."""
        for flat, own in self.optimizer.state.items():
            divided = [key for key, value in own.items() if torch.is_tensor(value) and value.shape == flat.shape]
            whole = {key: value for key, value in own.items() if key not in divided}
            return divided, whole
        return [], {}

    def _link_state(self) -> None:
        """Let DeepSpeed find the state of each weight: it looks once, after the first group's first step."""
        if not self.engine.zero_optimization_partition_weights():
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights whole, on the CPU of the first process; all have to call it."""
        first, weights = torch.distributed.get_rank() == 0, {}
        for name, parameter in trainable_parameters(self.engine.module).items():
            whole = gathered(parameter)
            weights[name] = whole.detach().cpu() if first else torch.empty(0)
        return weights

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy whole weights, by parameter name, into the model and what the update works on."""
        from deepspeed.runtime.zero import GatheredParameters

        with torch.no_grad():
            for name, parameter in trainable_parameters(self.engine.module).items():
                with GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(weights[name])
        self.engine.optimizer.refresh_fp32_params()


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the shape that a weight has whole."""
    return getattr(parameter, "ds_shape", parameter.shape)


def use_deepspeed(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, ZeroOptimizer]:
    """Divide a model's optimiser over all processes, and its weights where the plugin says so; both in place.

    The numbers are those that the first process has: the others may have weights on `meta`.
    """
    from deepspeed.runtime.zero import Init

    groups = [list(group["params"]) for group in optimizer.param_groups]
    plugin = accelerator.deepspeed_plugin
    assert plugin is not None
    for piece in [*kept_together(model), model]:
        for parameter in piece.parameters():
            if parameter.is_meta:
                empty = torch.nn.Parameter(
                    torch.empty_like(parameter, device=accelerator.device), parameter.requires_grad
                )
                swap_tensors(parameter, empty)
        if plugin.zero_stage == 3:
            Init(module=piece, config_dict_or_path=plugin.hf_ds_config.config)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(accelerator.device))
    engine, _ = accelerator.prepare(model, optimizer)
    return engine, ZeroOptimizer(engine, optimizer, groups)
