"""Where a recipe runs: in how many processes of how many machines, and what each process has of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.errors import Problem, RecipeError, nearest

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

STRATEGIES = ("ddp", "fsdp")
SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop", "sgd")
"""Optimisers whose update of a number depends on no other number, so that each process updates its own."""
INSTEAD = {
    "deepspeed": "fsdp cuts weights, gradients and optimiser state over the processes as ZeRO-3 does.",
    "fsdp2": "fsdp is FSDP2 here.",
}


@dataclass(frozen=True)
class Topology:
    """The options of `llmtune launch local`; never part of a recipe."""

    processes: int = 1
    """Of each machine."""
    strategy: str = "ddp"
    """Whether each process has all of the model (ddp) or a part of it (fsdp)."""
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
    def host(self) -> str:
        """The name or number of machine 0."""
        return str(self.address).rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Where machine 0 listens."""
        return int(str(self.address).rpartition(":")[2])

    def _problems(self) -> Iterator[Problem]:
        if self.strategy not in STRATEGIES:
            instead = INSTEAD.get(
                self.strategy, f"Use one of {', '.join(STRATEGIES)}.{nearest(self.strategy, STRATEGIES)}"
            )
            yield Problem(f"there is no strategy {self.strategy!r}", "--strategy", instead)
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


def why_not_sharded(recipe: Recipe) -> list[Problem]:
    """Return what of a recipe `--strategy fsdp` cannot do."""
    problems = []
    if recipe.adapter.method == "qlora":
        what = "weights in 4 bits are kept as packed bytes, which FSDP2 does not cut over processes"
        problems.append(Problem(what, "adapter.method", "Use --strategy ddp with qlora, or adapter.method: lora."))
    if recipe.train.optim not in SHARDED_OPTIMIZERS:
        what = f"{recipe.train.optim} cannot update weights that are cut over processes"
        problems.append(Problem(what, "train.optim", f"Use --strategy ddp, or one of {', '.join(SHARDED_OPTIMIZERS)}."))
    if recipe.train.torch_compile:
        what = "compiled layers cannot be cut over processes"
        problems.append(Problem(what, "train.torch_compile", "Use --strategy ddp, or remove it."))
    return problems
