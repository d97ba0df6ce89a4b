"""Where a recipe runs: in how many processes of how many machines, and what each process has of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.errors import Problem, RecipeError, nearest
from llmtune.records import Layout

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

STRATEGIES = ("ddp", "fsdp")
SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop", "sgd")
"""Optimisers whose update of a number depends on no other number, so that each process updates its own."""
UNCUT = {
    "qlora": "weights in 4 bits are kept as packed bytes, which are not cut over processes",
    "osf": "its gradients are projected by hooks on whole weights, which are lost where weights are cut over processes",
    **dict.fromkeys(
        ("lily", "tinylora", "unilora", "vblora"), "layers share its weights, which cannot be cut with each"
    ),
    **dict.fromkeys(
        ("prompt_tuning", "p_tuning", "prefix_tuning"), "PEFT saves its vectors by computing them from whole weights"
    ),
}
"""Methods that need whole weights, each with the reason."""
INSTEAD = {
    "fsdp2": "fsdp is FSDP2 here.",
    **dict.fromkeys(
        ("cp", "sp", "context-parallel"),
        "torch's ring attention has kernels for CUDA alone and takes no packed rows. Use --strategy fsdp.",
    ),
}


@dataclass(frozen=True)
class Topology:
    """The options of `llmtune launch local`; never part of a recipe."""

    processes: int = 1
    """Of each machine."""
    strategy: str = "ddp"
    """What each process has of the model: all of it (ddp) or a part (fsdp)."""
    machines: int = 1
    rank: int = 0
    """Of this machine."""
    address: str | None = None
    """HOST:PORT of machine 0, for all machines the same."""
    max_restarts: int = 0
    """How often all processes are started again, from the last checkpoint, when one of them died."""

    def __post_init__(self) -> None:
        """Raise RecipeError for options that cannot be, or do not go together."""
        RecipeError.collect(self._problems())

    @property
    def layout(self) -> Layout:
        """What the memory plan has to know of it."""
        total = self.processes * self.machines
        return Layout(total, self.machines, self.strategy == "fsdp" and total > 1)

    @property
    def host(self) -> str:
        """The name or number of machine 0."""
        return str(self.address).rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Where machine 0 listens."""
        return int(str(self.address).rpartition(":")[2])

    def _problems(self) -> Iterator[Problem]:
        yield from unknown_strategy(self.strategy)
        if self.processes < 1:
            yield Problem(f"{self.processes}, and there has to be one at least", "--processes", "Set it to 1 or more.")
        if self.rank >= self.machines:
            what = f"{self.rank}, and there are {self.machines} machines, counted from 0"
            yield Problem(what, "--rank", f"Set it to a number from 0 to {self.machines - 1}.")
        host, _, port = (self.address or "").rpartition(":")
        if self.machines > 1 and self.address is None:
            fix = "Give HOST:PORT of machine 0, the same on each machine: --address 10.0.0.1:29500"
            yield Problem("several machines have to find machine 0", "--address", fix)
        elif self.address is not None and not (host and port.isdecimal() and 0 < int(port) < 65536):
            yield Problem(f"{self.address!r} is not HOST:PORT", "--address", "For example 10.0.0.1:29500")
        elif self.machines == 1 and self.address is not None:
            yield Problem("has no effect with one machine", "--address", "Omit it, or set --machines.")


def unknown_strategy(strategy: str) -> Iterator[Problem]:
    """Yield what is wrong with the name of a strategy."""
    from llmtune.recipe.retired import RETIRED, refuse_retired  # not for --help

    if (option := f"--strategy {strategy}") in RETIRED:
        yield from refuse_retired(option).problems
    elif strategy not in STRATEGIES:
        instead = INSTEAD.get(strategy, f"Use one of {', '.join(STRATEGIES)}.{nearest(strategy, STRATEGIES)}")
        yield Problem(f"there is no strategy {strategy!r}", "--strategy", instead)


def why_not(strategy: str, recipe: Recipe) -> list[Problem]:
    """Return what of a recipe a strategy cannot do, as far as the recipe alone tells; or why there is no such one."""
    if strategy != "fsdp":
        return [*unknown_strategy(strategy)]
    problems, adapter, optim = [], recipe.adapter, recipe.train.optim
    instead = "Use --strategy ddp"
    if what := UNCUT.get(adapter.method):
        problems.append(Problem(what, "adapter.method", f"{instead} with {adapter.method}, or adapter.method: lora."))
    if optim not in SHARDED_OPTIMIZERS:
        what = f"{optim} cannot update weights that are cut over processes"
        problems.append(Problem(what, "train.optim", f"{instead}, or one of {', '.join(SHARDED_OPTIMIZERS)}."))
    if recipe.train.torch_compile:
        what = "compiled layers cannot be cut over processes"
        problems.append(Problem(what, "train.torch_compile", f"{instead}, or remove it."))
    if recipe.train.eval_metrics:
        what = "a model that is cut over processes does not answer while it trains"
        problems.append(Problem(what, "train.eval_metrics", f"{instead}, or remove it."))
    return problems
