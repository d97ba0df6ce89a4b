"""Seconds from a command to its first optimiser step, and of commands that do not train: llmtune compared with TRL.

    python benchmarks/startup.py [--pairs 5] [--rows-a-step 4] [--json FILE]

Both commands train the same rows and model with LoRA in the same number format; the data are prepared before (llmtune
skips finished steps, datasets reads its cache). The first step ends when its loss is reported: llmtune writes it to
`metrics.jsonl`, TRL prints it. llmtune rehearses its heaviest step before the first one; those seconds are shown
separately if the run reports them. CPU seconds count all threads up to that moment.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from clock import Asked
from machine import describe_machine
from run_llmtune import describe_recipe
from training import ask, environment, read_options, tell
from watch import read_pairs

LOOKS = {
    "llmtune run --help": ["llmtune", "run", "--help"],
    "llmtune recipes check": ["llmtune", "recipes", "check", "quickstart"],
    "trl sft --help": ["trl", "sft", "--help"],
}
POLL_SECONDS = 0.005
Measured = dict[str, Any]


def main() -> int:
    parser = read_options(__doc__)
    parser.set_defaults(steps=0, pack=256)
    parser.add_argument("--rows-a-step", type=int, default=4)
    options = parser.parse_args()
    options.tokens = options.rows_a_step * options.pack
    runs: dict[str, list[Measured]] = {name: [] for name in ("llmtune train", "trl sft", *LOOKS)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = replace(ask(options, folder), padded_rows=options.rows_a_step)
        start = {"llmtune train": prepare_llmtune(asked, folder), "trl sft": prepare_trl(asked, folder)}
        start["trl sft"]()  # fills the cache of datasets
        for _ in range(options.pairs):
            for tool, begin in start.items():
                runs[tool].append(begin())
            for look, command in LOOKS.items():
                runs[look].append(time_command(command, folder, options.threads))
    tell({"runs": runs, "machine": describe_machine()}, options.json)
    return 0


def prepare_llmtune(asked: Asked, folder: Path) -> Callable[[], Measured]:
    """Prepare the rows; return a function that trains one step in its own run folder and times it."""
    keys = describe_recipe(asked)
    del keys["train"]["batch_tokens"]
    keys["train"] |= {"batch_size": asked.padded_rows, "max_steps": 1}
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(keys))
    run = folder / "run"
    command = [script("llmtune"), "train", str(recipe), "--out", str(run), "--offline"]
    prepare = [script("llmtune"), "prepare", *command[2:], "--fresh"]

    def begin() -> Measured:
        subprocess.run(prepare, cwd=folder, env=environment(asked.threads), check=True, capture_output=True)
        metrics = run / "metrics.jsonl"
        found = watch_command(
            command, folder, asked.threads, lambda _: metrics.exists() and b"\n" in metrics.read_bytes()
        )
        facts = json.loads((run / "run.json").read_text())["steps"]["train"]
        return found | {"rehearsal_seconds": find_key(facts, "rehearsal_seconds")}

    return begin


def prepare_trl(asked: Asked, folder: Path) -> Callable[[], Measured]:
    """Write the rows in TRL's format; return a function that trains one step and times it."""
    data = folder / "trl"
    data.mkdir()
    lines = [json.dumps(pair) for pair in read_pairs(asked.rows)]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    options = {
        "model_name_or_path": asked.model,
        "dataset_name": data,
        "dtype": asked.dtype,
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "max_length": asked.pack,
        "per_device_train_batch_size": asked.padded_rows,
        "learning_rate": asked.learning_rate,
        "max_steps": 1,
        "logging_steps": 1,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": folder / "trl-out",
    }
    if "accelerator" not in describe_machine():
        options["use_cpu"] = True
    command = [script("trl"), "sft", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
    return lambda: watch_command(command, folder, asked.threads, lambda printed: "'loss'" in printed)


def script(name: str) -> str:
    """Return the path of a command of this environment."""
    return str(Path(sys.executable).parent / name)


def watch_command(command: list[str], folder: Path, threads: int, reached: Callable[[str], bool]) -> Measured:
    """Run a command; return wall and CPU seconds until `reached` accepts its output."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**environment(threads), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed: list[str] = []
    output = process.stdout
    assert output is not None, "it is piped"
    reader = threading.Thread(target=lambda: printed.extend(iter(lambda: output.read(1), "")))
    reader.start()
    seen, handle = None, psutil.Process(process.pid)
    while process.poll() is None:
        if seen is None and reached("".join(printed)):
            seen = {"seconds": time.perf_counter() - began, "cpu_seconds": own_seconds(handle)}
        time.sleep(POLL_SECONDS)
    reader.join()
    if process.returncode or seen is None:
        raise SystemExit(f"{command[0]} failed:\n{''.join(printed)[-6000:]}")
    return seen


def own_seconds(process: psutil.Process) -> float:
    """Return the CPU seconds of a process and its children: TRL's command starts another process."""
    every = [process, *process.children(recursive=True)]
    return float(sum(times.user + times.system for times in (one.cpu_times() for one in every)))


def time_command(command: list[str], folder: Path, threads: int) -> Measured:
    """Run a command to its end; return its seconds."""
    began, before = time.perf_counter(), children_seconds()
    subprocess.run(
        [script(command[0]), *command[1:]], cwd=folder, env=environment(threads), check=True, capture_output=True
    )
    return {"seconds": time.perf_counter() - began, "cpu_seconds": children_seconds() - before}


def children_seconds() -> float:
    """Return the CPU seconds of all ended children."""
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def find_key(value: Any, key: str) -> Any:
    """Return the first value under `key` in nested dictionaries, or None."""
    if not isinstance(value, dict):
        return None
    return value[key] if key in value else next(filter(None, (find_key(item, key) for item in value.values())), None)


if __name__ == "__main__":
    sys.exit(main())
