"""Small trainings on a tiny model: random rows written as prepared examples, without text or templates."""

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from safetensors.torch import load_file

from llmtune.adapter.injection import inject
from llmtune.data.example import Example
from llmtune.data.examples import example_schema, record_batch
from llmtune.launch.local_processes import launch
from llmtune.launch.topology import Topology
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel, Examples
from llmtune.store.atomic_files import hash_value
from llmtune.tasks.base import AnyTask
from llmtune.tasks.registry import get_task
from llmtune.train.distributed import join_processes
from llmtune.train.loop import train
from llmtune.train.metrics_log import TrainedRun
from llmtune.train.sharding import share_model
from support.adapting import open_model, quiet
from support.runs import write_recipe


def write_examples(folder: Path, seed: int = 0, longest: int = 40, **counts: int) -> Examples:
    """Write random rows of 8 to `longest` tokens, `counts` for each split; the second half of a row is predicted."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    tokens, supervised = {}, {}
    for side, count in counts.items():
        lengths = generator.integers(8, longest + 1, count).tolist()
        rows = [(i, Example(generator.integers(4, 60, n).tolist(), [n // 2, n], n)) for i, n in enumerate(lengths)]
        table = pa.Table.from_batches([record_batch(rows)])
        with (
            pa.OSFile(str(folder / f"{side}.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, example_schema(Example)) as writer,
        ):
            writer.write_table(table)
        tokens[side], supervised[side] = sum(lengths), sum(n - n // 2 for n in lengths)
    record = {"counts": counts, "tokens": tokens, "supervised": supervised, "longest": dict.fromkeys(counts, longest)}
    (folder / "record.json").write_text(json.dumps({**record, "dropped": {}, "content_hash": f"random {seed}"}))
    return read_examples(folder)


def make_recipe(folder: Path, model: Path, /, **sections: Any) -> Recipe:
    """Make the tiny recipe with changes, as `write_recipe` takes them."""
    folder.mkdir(parents=True, exist_ok=True)
    if "max_steps" in sections.get("train", {}):
        sections["train"] = {"num_train_epochs": None, **sections["train"]}
    if sections.get("adapter", {}).get("method") == "full":
        sections["adapter"] = {"r": None, "lora_alpha": None, **sections["adapter"]}
    rows = folder / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    return load_recipe(str(write_recipe(folder / "recipe.yaml", model, rows, **sections))).recipe


def adapt(recipe: Recipe, device: str = "cpu") -> AdaptedModel:
    """Load the model of `recipe` and add the adapter."""
    return inject(open_model(recipe, device=device), recipe, quiet())


def run_training(
    folder: Path,
    recipe: Recipe,
    examples: Examples,
    *,
    budget: int = 128,
    console: Console | None = None,
    adapted: AdaptedModel | None = None,
    task: AnyTask | None = None,
    on_budget: Callable[[int], None] = lambda tokens: None,
    inputs: str | None = None,
    sharded: bool = False,
) -> TrainedRun:
    """Train as the pipeline does; `folder` is the run folder."""
    sharded = sharded and join_processes("cpu") > 1
    if adapted is None:
        adapted = share_model(partial(adapt, recipe)) if sharded else adapt(recipe)
    return train(
        adapted,
        examples,
        task or get_task(recipe.task),
        recipe,
        folder,
        console or Console(file=io.StringIO(), width=200),
        budget=budget,
        on_budget=on_budget,
        inputs=inputs or hash_value([recipe.model_dump(mode="json"), examples.content_hash]),
        sharded=sharded,
    )


def with_methods(task: AnyTask, **methods: Callable[..., Any]) -> AnyTask:
    """Return a copy of a task with other methods."""
    changed = copy(task)
    vars(changed).update(methods)
    return changed


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained_bytes(folder: Path) -> bytes:
    """Return the bytes of the final adapter."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def read_examples(folder: Path) -> Examples:
    """Read the output of `write_examples`, in another process."""
    record = json.loads((folder / "record.json").read_text())
    return Examples(folder, {side: folder / f"{side}.arrow" for side in record["counts"]}, **record)


TRAIN = {"batch_size": 6, "learning_rate": 1e-3, "save_steps": 4, "save_total_limit": 5, "max_steps": 12}
METHODS = {
    "lora": {},
    "full": {"method": "full"},
    "added": {"modules_to_save": ["norm"], "use_dora": True},
    "qlora": {"method": "qlora"},
    "qlora, plain scales": {"method": "qlora", "bnb_4bit_use_double_quant": False},
    "qlora, dora": {"method": "qlora", "use_dora": True},
    "scalar": {"method": "delora", "r": 3, "lora_alpha": None},
}


def launch_work(
    name: str, words: Sequence[object], topology: Topology, console: Console, threads: int | None = None
) -> Any:
    """Run a function of `support.workers` in several processes; return the result of the first one."""
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.json"
        launch(["-m", "support.workers", str(result), name, *map(str, words)], topology, console, threads=threads)
        return json.loads(result.read_text())


def train_together(folder: Path, run: str, processes: int, strategy: str, console: Console) -> Path:
    """Train the recipe in `folder` in `processes` processes; return the run folder."""
    launch_work("train_tiny", [folder, folder / run, strategy], Topology(processes, strategy), console, 2)
    return folder / run


def leave_step_4(run: Path) -> None:
    """Turn a finished run into one that ended after its first checkpoint."""
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
    np.testing.assert_allclose(losses(other), losses(run), rtol=1e-5)
    expected, found = weights(run), weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert float((found[name] - tensor).abs().max()) < 1e-4, name
