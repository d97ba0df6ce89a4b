"""Where a recipe runs: the number of processes and machines, and whether the model is replicated or sharded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

from llmtune.errors import Problem, RecipeError, nearest

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe
    from llmtune.records import Layout

MOST_PROCESSES, MOST_MACHINES = 1024, 65_536
"""Far more than any machine or cluster has; starting them would only use up this machine's memory."""
PORT, LABEL = re.compile(r"[0-9]{1,5}"), re.compile(r"[A-Za-z0-9_-]{1,63}")
STRATEGIES = ("ddp", "fsdp")
UNSHARDED_OPTIMIZERS = {
    "paged": ("its state moves between one card and main memory", "Omit `paged_`, or add --fsdp-offload-params"),
    **dict.fromkeys(
        ("apollo", "galore"),
        ("its projections cannot be saved in shards", "Use adamw_torch, muon, adafactor or others"),
    ),
}
"""Name prefixes of optimisers that cannot update sharded weights, each with the reason and the fix."""
UNCUT = {
    "osf": "hooks on full weights project its gradients, and sharding loses these hooks",
    **dict.fromkeys(
        ("tinylora", "unilora", "vblora"),
        "its weights are shared by layers, so they cannot be sharded by layer",
    ),
    **dict.fromkeys(
        ("prompt_tuning", "p_tuning", "prefix_tuning"), "PEFT computes the vectors that it saves from full weights"
    ),
}
"""Methods that need unsharded weights, each with the reason."""
INSTEAD = {
    "fsdp2": "fsdp is FSDP2 here.",
    **dict.fromkeys(
        ("cp", "sp", "context-parallel"),
        "torch's ring attention needs CUDA and does not support packed rows. Use --strategy fsdp.",
    ),
}


@dataclass(frozen=True)
class Topology:
    """The options of `llmtune launch local`; never part of a recipe."""

    processes: int = 1
    """Processes on each machine."""
    strategy: str = "ddp"
    """`ddp` gives each process the full model, `fsdp` a shard of it."""
    machines: int = 1
    rank: int = 0
    """Rank of this machine."""
    address: str | None = None
    """HOST:PORT of machine 0, the same on all machines."""
    max_restarts: int = 0
    """How often all processes restart from the last checkpoint after one of them died."""
    offload_params: bool = False
    """Whether shards are in main memory while they do not compute."""

    def __post_init__(self) -> None:
        """Raise RecipeError for options that are invalid or do not go together."""
        RecipeError.collect(self._problems())

    @property
    def layout(self) -> Layout:
        """The facts that the memory plan needs."""
        total = self.processes * self.machines
        sharded = self.strategy == "fsdp" and total > 1
        from llmtune.records import Layout  # late: `--help` does not need it

        return Layout(total, self.machines, sharded, sharded and self.offload_params)

    @property
    def host(self) -> str:
        """The host name or IP address of machine 0."""
        return str(self.address).rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port at which machine 0 listens."""
        return int(str(self.address).rpartition(":")[2])

    def _problems(self) -> Iterator[Problem]:
        yield from unknown_strategy(self.strategy)
        if self.offload_params and (self.strategy != "fsdp" or self.processes * self.machines == 1):
            fix = "Omit it, or add --strategy fsdp and --processes 2 or more."
            yield Problem("shards are offloaded, and no model is sharded here", "--fsdp-offload-params", fix)
        limits = (("processes", self.processes, MOST_PROCESSES), ("machines", self.machines, MOST_MACHINES))
        for name, count, most in limits:
            if count > most:
                yield Problem(
                    f"{count if count < 10**15 else 'it'} is more than {most:,}",
                    f"--{name}",
                    "Set it to what the machines have.",
                )
        if self.processes < 1:
            yield Problem(f"{self.processes} is less than 1", "--processes", "Set it to 1 or more.")
        if self.rank >= self.machines:
            what = f"{self.rank} is too high: there are {self.machines} machines, counted from 0"
            yield Problem(what, "--rank", f"Set it to a number from 0 to {self.machines - 1}.")
        host, _, port = (self.address or "").rpartition(":")
        if self.machines > 1 and self.address is None:
            fix = "Give HOST:PORT of machine 0, the same on each machine: --address 10.0.0.1:29500"
            yield Problem("several machines need the address of machine 0", "--address", fix)
        elif self.address is not None and not (is_host(host) and PORT.fullmatch(port) and 0 < int(port) < 65536):
            yield Problem(f"{self.address!r} is not HOST:PORT", "--address", "For example 10.0.0.1:29500")
        elif self.machines == 1 and self.address is not None:
            yield Problem("has no effect with one machine", "--address", "Omit it, or set --machines.")


def is_host(text: str) -> bool:
    """Return whether a text can be the name of a machine, or an IP address; an IPv6 address has brackets or none."""
    bare = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
    if ":" in bare or bare != text:
        try:
            return IPv6Address(bare).version == 6
        except ValueError:
            return False
    return all(LABEL.fullmatch(part) for part in bare.split(".")) and len(bare) < 254


def unknown_strategy(strategy: str) -> Iterator[Problem]:
    """Yield what is wrong with the name of a strategy."""
    from llmtune.recipe.retired import RETIRED, refuse_retired  # not for --help

    if (option := f"--strategy {strategy}") in RETIRED:
        yield from refuse_retired(option).problems
    elif strategy not in STRATEGIES:
        instead = INSTEAD.get(strategy, f"Use one of {', '.join(STRATEGIES)}.{nearest(strategy, STRATEGIES)}")
        yield Problem(f"unknown strategy {strategy!r}", "--strategy", instead)


def why_not(strategy: str, recipe: Recipe) -> list[Problem]:
    """Return the settings of a recipe that a strategy does not support, or the problem of an unknown strategy."""
    if strategy != "fsdp":
        return [*unknown_strategy(strategy)]
    problems, adapter, optim = [], recipe.adapter, recipe.train.optim
    instead = "Use --strategy ddp"
    if what := UNCUT.get(adapter.method):
        problems.append(Problem(what, "adapter.method", f"{instead} with {adapter.method}, or adapter.method: lora."))
    for prefix, (what, fix) in UNSHARDED_OPTIMIZERS.items():
        if optim.startswith(prefix):
            problems.append(Problem(f"{optim}: {what}", "train.optim", f"{fix}, or {instead[0].lower()}{instead[1:]}."))
    return problems
