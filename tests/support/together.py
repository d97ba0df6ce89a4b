"""A training in several processes, held against the same in one."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from llmtune.launch.local_processes import launch
from llmtune.launch.topology import Topology
from support.training import read_metrics

TRAIN = {"batch_size": 6, "learning_rate": 1e-3, "save_steps": 4, "save_total_limit": 5, "max_steps": 12}
METHODS = {
    "lora": {},
    "full": {"method": "full"},
    "added": {"modules_to_save": ["norm"], "use_dora": True},
    "scalar": {"method": "delora", "r": 3, "lora_alpha": None},
}


def launch_work(
    name: str, words: Sequence[object], topology: Topology, console: Console, threads: int | None = None
) -> Any:
    """Run a function of `support.workers` in several processes; return what the first one returns."""
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.json"
        launch(["-m", "support.workers", str(result), name, *map(str, words)], topology, console, threads=threads)
        return json.loads(result.read_text())


def train(folder: Path, run: str, processes: int, strategy: str, console: Console) -> Path:
    """Train the recipe in `folder` in so many processes; return the run folder."""
    launch_work("train_tiny", [folder, folder / run, strategy], Topology(processes, strategy), console, 2)
    return folder / run


def leave_step_4(run: Path) -> None:
    """Make a finished run one that ended after its first checkpoint."""
    result = [run / name for name in ("adapter", "weights") if (run / name).is_dir()]
    for gone in [*result, *(path for path in (run / "checkpoints").iterdir() if path.name != "step-4")]:
        shutil.rmtree(gone)
    assert (run / "checkpoints" / "step-4").is_dir()


def losses(run: Path) -> list[float]:
    return [line[key] for line in read_metrics(run) for key in ("loss", "validation_loss") if key in line]


def weights(run: Path) -> dict:
    (folder,) = [run / name for name in ("adapter", "weights") if (run / name).is_dir()]
    return load_file(next(folder.glob("*.safetensors")))


def assert_same(run: Path, other: Path) -> None:
    assert losses(other) == pytest.approx(losses(run), rel=1e-5)
    expected, found = weights(run), weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert float((found[name] - tensor).abs().max()) < 1e-4, name
