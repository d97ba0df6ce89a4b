"""The optimiser and the learning-rate schedule, by their names in transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.config import head_names, in_heads
from llmtune.recipe.schema import Recipe

MakeOptimizer = Callable[..., torch.optim.Optimizer]
_TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
_UNPAGED = {"adamw_32bit": "adamw_torch", "ademamix_32bit": "ademamix"}


def updates_elementwise(optim: str) -> bool:
    """Whether the update of a number looks at no other, so that each process can update its shard of a matrix."""
    return optim in (*_TORCH_ADAMW, "adagrad", "rmsprop", "sgd") or optim.startswith("schedule_free")


def build_optimizer(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Build `train.optim` over the trainable parameters; matrices decay, biases and norms (one dimension) do not.

    With `loraplus_lr_ratio` the groups are those of PEFT's LoRA+ (Hayou et al. 2024): B matrices and one-dimensional
    weights learn that many times faster. The first group has `learning_rate` in either case.

    Raises EnvironmentProblem for a paged optimiser without a GPU (bitsandbytes would silently use another one), and
    for a bitsandbytes optimiser if bitsandbytes is not installed.
    """
    train = recipe.train
    if train.optim.startswith("paged_") and device.type != "cuda":
        plain = train.optim.removeprefix("paged_")
        raise EnvironmentProblem.of(
            f"{train.optim} pages its state between GPU and host, and this machine computes on {device.type}",
            "train.optim",
            f"Set train.optim to {_UNPAGED.get(plain, plain)}.",
        )
    optimizer_class, options = _optimizer_class(model, recipe)
    if train.loraplus_lr_ratio is not None:
        from peft.optimizers import create_loraplus_optimizer

        made: torch.optim.Optimizer = create_loraplus_optimizer(
            model,
            optimizer_class,
            loraplus_lr_ratio=train.loraplus_lr_ratio,
            loraplus_lr_embedding=train.learning_rate,  # its own default is a rate that follows no setting
            loraplus_weight_decay=train.weight_decay,
            **options,
        )
        set_mode(made, "train")
        return made
    if "params" in options:  # GaLore and APOLLO name the matrices that they project
        _admit_projectors()
        options |= {"no_deprecation_warning": True} if train.optim == "galore_adamw" else {}
        low_rank: torch.optim.Optimizer = optimizer_class(weight_decay=train.weight_decay, **options)
        return low_rank
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    apart = _find_tables(model) if train.optim == "muon" else set()
    groups: list[dict[str, object]] = [
        {"params": [p for p in trainable if p.ndim >= 2 and id(p) not in apart], "weight_decay": train.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    if apart:
        tables = [p for p in trainable if p.ndim >= 2 and id(p) in apart]
        groups.append({"params": tables, "weight_decay": train.weight_decay, "muon": False})
    optimizer: torch.optim.Optimizer = optimizer_class([group for group in groups if group["params"]], **options)
    set_mode(optimizer, "train")
    return optimizer


def _find_tables(model: torch.nn.Module) -> set[int]:
    """Return the ids of the weights of embeddings and heads, which Muon should not update."""
    inner = unwrap(model)
    heads = head_names(inner)
    weights = [p for module in inner.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()]
    return {id(p) for p in [*weights, *(p for name, p in inner.named_parameters() if in_heads(name, heads))]}


def set_mode(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Switch a schedule-free optimiser's weights to the trained ones (`train`) or their average (`eval`)."""
    if hasattr(optimizer, "eval"):
        getattr(optimizer, mode)()


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Use a schedule-free optimiser's averaged weights inside the block; afterwards restore the weights bit by bit."""
    if not hasattr(optimizer, "eval"):
        yield
        return
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [weight.detach().clone() for weight in weights]
    set_mode(optimizer, "eval")
    try:
        yield
    finally:
        set_mode(optimizer, "train")
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


def _write_setting(value: float | str) -> str:
    """Format a value for transformers: integral numbers without a decimal point."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _admit_projectors() -> None:
    """Allow the projector objects of GaLore and APOLLO in checkpoints, which otherwise contain tensors only."""
    for package, names in (
        ("galore_torch.galore_projector", ("GaLoreProjector",)),
        ("apollo_torch.random_projector", ("GradientProjector",)),
    ):
        if find_spec(package.partition(".")[0]):
            module = import_module(package)
            torch.serialization.add_safe_globals([getattr(module, name) for name in names])


def _optimizer_class(model: torch.nn.Module, recipe: Recipe) -> tuple[MakeOptimizer, dict[str, object]]:
    """Return the class that `train.optim` names in transformers, and the options that it takes from the recipe."""
    train = recipe.train
    if train.optim in _TORCH_ADAMW:
        options: dict[str, object] = {
            "lr": train.learning_rate,
            "betas": (train.adam_beta1, train.adam_beta2),
            "eps": train.adam_epsilon,
        }
        return torch.optim.AdamW, options | ({"fused": True} if train.optim == "adamw_torch_fused" else {})
    if train.optim == "muon":
        from llmtune.train.optimizer import MuonWithAdamW

        betas = (train.adam_beta1, train.adam_beta2)
        return MuonWithAdamW, {"lr": train.learning_rate, "betas": betas, "eps": train.adam_epsilon}
    from transformers import Trainer  # imports datasets and pandas, which most trainings do not need

    arguments = SimpleNamespace(
        optim=train.optim,
        optim_args=",".join(f"{name}={_write_setting(value)}" for name, value in train.optim_args.items()) or None,
        optim_target_modules="all-linear",
        parallel_mode=None,
        weight_decay=train.weight_decay,
        warmup_steps=0,  # the schedule's
        learning_rate=train.learning_rate,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
    )
    try:
        class_and_options: tuple[MakeOptimizer, dict[str, object]] = Trainer.get_optimizer_cls_and_kwargs(
            arguments, model
        )
    except ImportError as error:
        fix = "pip install bitsandbytes 'llmtune-cli[optimizers]', or set train.optim to adamw_torch."
        raise EnvironmentProblem.of(f"{train.optim} is not available here: {error}", "train.optim", fix) from error
    except (KeyError, ValueError) as error:
        what = f"cannot build {train.optim} with {', '.join(train.optim_args) or 'no arguments'}: {error}"
        raise RecipeError.of(what, "train.optim_args", "Use the names of transformers' `optim_args`.") from error
    return class_and_options


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> LambdaLR:
    """Build `train.lr_scheduler_type` over `total_steps`; `warmup_steps` below 1 is a share of them, rounded up.

    A warm-up skips the first step of transformers' schedule, whose learning rate is 0.

    Raises RecipeError if `lr_scheduler_kwargs` do not fit the schedule.
    """
    train = recipe.train
    share = train.warmup_steps < 1
    warmup = math.ceil(total_steps * train.warmup_steps) if share else int(train.warmup_steps)
    if share:
        warmup = min(warmup, total_steps - 1)
    elif warmup >= total_steps:
        what = f"{warmup} warm-up steps, but training has {total_steps}: it would never reach the full learning rate"
        raise RecipeError.of(
            what, "train.warmup_steps", "Set it below the number of steps, or to a share such as 0.03."
        )
    options = {
        name: int(value) if float(value).is_integer() else value for name, value in train.lr_scheduler_kwargs.items()
    }
    try:
        schedule: LambdaLR = get_scheduler(
            train.lr_scheduler_type, optimizer, warmup, total_steps + bool(warmup), scheduler_specific_kwargs=options
        )
    except (TypeError, ValueError) as error:
        given = ", ".join(train.lr_scheduler_kwargs) or "no arguments"
        raise RecipeError.of(
            f"cannot build the schedule {train.lr_scheduler_type} with {given}: {error}",
            "train.lr_scheduler_kwargs",
            "Use the argument names of transformers.get_scheduler's functions, e.g. num_cycles, min_lr_rate.",
        ) from error
    if not warmup:
        return schedule
    return LambdaLR(optimizer, [partial(_one_step_on, rate) for rate in schedule.lr_lambdas])


def _one_step_on(rate: Callable[[int], float], step: int) -> float:
    return rate(step + 1)


# Muon


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for groups of matrices, and torch's AdamW for the others.

    Muon's steps are scaled to the size of AdamW's (`match_rms_adamw`; Liu et al., "Muon is Scalable for LLM Training",
    2025), so one learning rate fits both.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        """Assign two-dimensional weights to Muon, unless their group says `muon: False`, and the others to AdamW.

        Raises EnvironmentProblem for a torch before 2.9.
        """
        if not hasattr(torch.optim, "Muon"):
            what = f"torch {torch.__version__} has no Muon"
            raise EnvironmentProblem.of(what, "train.optim", "pip install 'torch>=2.9', or set it to adamw_torch.")
        parts = (
            {
                **group,
                "params": [one for one in group["params"] if (one.ndim == 2 and group.get("muon", True)) is matrix],
                "muon": matrix,
            }
            for group in groups
            for matrix in (True, False)
        )
        super().__init__([part for part in parts if part["params"]], {"lr": lr})
        matrices, others = self._split()
        self.muon = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw") if matrices else None
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps) if others else None
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights from their gradients."""
        self._share()
        for part in (self.muon, self.adamw):
            if part is not None:
                part.step()  # type: ignore[no-untyped-call]

    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        whole: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for group in self.param_groups:
            whole[not group["muon"]].append(group)
        return whole

    def _share(self) -> None:
        """Point both optimisers at this one's groups and state, which loading a checkpoint replaces."""
        for part, groups in zip((self.muon, self.adamw), self._split(), strict=True):
            if part is not None:
                for group in groups:
                    for name, value in part.defaults.items():
                        group.setdefault(name, value)
                part.param_groups, part.state = groups, self.state
