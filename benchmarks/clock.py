"""Measure a training process from inside, for any tool: time, tokens, loss and memory, step by step.

A step ends when the optimiser has updated the weights; torch has a hook for every optimiser. Everything between two
updates (reading rows, forward, backward, clipping, logging) belongs to the step. The first step is the warm-up.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import PACKAGES, package_version
from torch.optim.optimizer import register_optimizer_step_post_hook

Amount = int | float | torch.Tensor


@dataclass(frozen=True)
class Asked:
    """The harness's request to a tool; every tool reads the same."""

    tool: str
    model: str
    """Folder of the model."""
    rows: str
    """File with `workload.chat_rows`."""
    steps: int
    """Timed steps, after the warm-up."""
    tokens: int
    """Real tokens a step."""
    pack: int
    """Tokens of a pack, and the longest row."""
    padded_rows: int
    """Rows of a padded micro-batch."""
    mean_tokens: float
    """Mean tokens of a row, from which padded tools take their rows a step."""
    attended_tokens: float
    """Mean length of the row of a token, in tokens: the span of its attention."""
    learning_rate: float
    threads: int
    dtype: str
    seed: int
    measure_limit: bool = False

    @property
    def accumulation(self) -> int:
        """Packs in a step, each of which is a micro-batch."""
        return max(1, self.tokens // self.pack)

    @property
    def padded_accumulation(self) -> int:
        """Padded micro-batches in a step, for about the same number of real tokens."""
        return max(1, round(self.tokens / (self.padded_rows * self.mean_tokens)))


@dataclass
class Clock:
    """Collects marks; `tick` is called by torch after each step of any optimiser."""

    sums: bool
    """Whether losses are counted as sums over tokens; otherwise as parts of the step's mean."""
    marks: list[tuple[float, float]] = field(default_factory=list)
    steps: list[list[tuple[Amount, Amount, Amount]]] = field(default_factory=list)
    pending: list[tuple[Amount, Amount, Amount]] = field(default_factory=list)
    highest: int = 0
    resident: int = 0
    trainable: int = 0

    def __post_init__(self) -> None:
        self.hook = register_optimizer_step_post_hook(lambda *_: self.tick())

    def stop(self) -> None:
        """Remove the optimiser hook."""
        self.hook.remove()

    def loaded(self, model: torch.nn.Module) -> None:
        """Record resident memory and trainable weights once `model` is loaded, and restart the peak."""
        self.trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        self.highest = peak_resident()
        self.resident = resident()
        reset_peak()

    def restart(self) -> None:
        """Discard earlier measurements, such as those of a rehearsal."""
        self.marks.clear()
        self.steps.clear()
        self.pending = []

    def count(self, tokens: Amount, supervised: Amount, loss: Amount) -> None:
        """Add a micro-batch: real tokens, supervised tokens, loss."""
        self.pending.append((tokens, supervised, loss))

    def tick(self) -> None:
        """End a step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.process_time(), time.perf_counter()))
        self.steps.append(self.pending)
        self.pending = []

    def found(self) -> dict[str, Any]:
        """Return the measurements, ready for JSON; times and rates exclude the warm-up step."""
        steps = [self._step(number) for number in range(len(self.marks))]
        timed = steps[1:]
        tokens, cpu, wall = (sum(step[key] for step in timed) for key in ("tokens", "cpu_seconds", "wall_seconds"))
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()
        return {
            "steps": steps,
            "versions": {name: package_version(name) for name in PACKAGES},
            "trainable": self.trainable,
            "tokens_per_cpu_second": tokens / cpu,
            "tokens_per_second": tokens / wall,
            "supervised_share": sum(step["supervised"] for step in steps) / sum(step["tokens"] for step in steps),
            "peak_bytes": max(peak, self.highest),
            "peak_training_bytes": peak,
            "loaded_bytes": self.resident,
            "above_loaded_bytes": peak - self.resident,
        }

    def _step(self, number: int) -> dict[str, Any]:
        parts = self.steps[number]
        tokens, supervised, loss = (float(sum(float(part[place]) for part in parts)) for place in range(3))
        before = self.marks[number - 1] if number else self.marks[0]
        return {
            "tokens": int(tokens),
            "supervised": int(supervised),
            "loss": loss / max(1.0, supervised) if self.sums else loss,
            "cpu_seconds": self.marks[number][0] - before[0],
            "wall_seconds": self.marks[number][1] - before[1],
        }


def resident() -> int:
    """Return the resident bytes of this process; on CUDA those of its tensors."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return read_status("VmRSS") or peak_resident()


def peak_resident() -> int:
    """Return the peak of resident bytes since `reset_peak` (since the start if the system cannot reset it)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return read_status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> None:
    """Reset the peak: loading weights makes copies that training does not need."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")  # resets VmHWM, see proc(5)


def read_status(key: str) -> int:
    """Return a byte count that the kernel reports for this process, or 0."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def read_asked() -> tuple[Asked, Path]:
    """Read the request and the path of the answer from the command line."""
    asked = Asked(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(asked.threads)
    return asked, Path(sys.argv[2])


def answer(path: Path, found: dict[str, Any]) -> None:
    """Hand the measured figures to the harness."""
    path.write_text(json.dumps(found))


def write_asked(asked: Asked, path: Path) -> Path:
    """Write the request for `read_asked`."""
    path.write_text(json.dumps(asdict(asked)))
    return path
