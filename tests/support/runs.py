"""Recipes for tests, and functions to run them: in this process, or as a user would."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from llmtune.cli.app import app
from llmtune.pipeline import run_pipeline
from llmtune.recipe.builtin import recipes_folder
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest

FAST = {"max_steps": 2, "num_train_epochs": None}
TINY: dict[str, Any] = {
    "recipe_version": 1,
    "name": "tiny",
    "task": "chat",
    "seed": 7,
    "data": {"validation": 0.1, "test": 0.2, "deduplicate": "exact", "max_length": 128},
    "model": {"dtype": "float32"},
    "adapter": {"r": 4, "lora_alpha": 8},
    "train": {"learning_rate": 1.0e-2, "batch_size": 8, "num_train_epochs": 2, "logging_steps": 1},
    "generation": {"max_new_tokens": 8},
    "evaluate": {"metrics": ["loss", "accuracy", "exact_match"]},
}


def write_recipe(path: Path, model: Path | str, rows: Path | str, /, **sections: Any) -> Path:
    """Write the tiny recipe with changes; a section given as a mapping is merged, a value None removes a key."""
    recipe = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    recipe["model"]["name"] = str(model)
    recipe["data"]["train"] = str(rows)
    for name, value in sections.items():
        recipe[name] = {**recipe.get(name, {}), **value} if isinstance(value, dict) else value
    for section in recipe.values():
        if isinstance(section, dict):
            for key in [key for key, value in section.items() if value is None]:
                del section[key]
    with path.open("w") as file:
        YAML(typ="safe").dump(recipe, file)
    return path


def write_colours(path: Path) -> Path:
    """Write forty different chat rows in OpenAI's messages format."""
    things = ["cat", "dog", "bird", "fish", "fox", "house", "river", "stone"]
    with path.open("w") as file:
        for i, thing in enumerate(things):
            for j, colour in enumerate(["red", "green", "blue", "black", "white"]):
                question = f"Which colour has the {thing} number {i * 7 + j * 13}?"
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": colour}]
                file.write(json.dumps({"messages": turns}) + "\n")
    return path


def invoke(*arguments: object, stdin: str | None = None) -> Result:
    """Run the llmtune command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def llmtune(
    *arguments: object, cwd: Path, timeout: float = 300, stdin: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the llmtune command in its own process, with one thread."""
    return subprocess.run(
        [sys.executable, "-m", "llmtune", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "pyarrow", "bitsandbytes")
ROWS = ("numpy", "pyarrow")
"""Libraries needed to deduplicate and split rows."""


def heavy_imports(*commands: Sequence[str]) -> dict[str, list[str]]:
    """Run llmtune commands one after the other in a new interpreter; return the heavy libraries that each imported."""
    code = f"""
import sys
from llmtune.cli import main
for command in {commands!r}:
    known, sys.argv = {{*sys.modules}}, ["llmtune", *command]
    try:
        main()
    except SystemExit as end:
        print("exit", end.code, file=sys.stderr)
    print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules and name not in known])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [eval(line.removeprefix("HEAVY")) for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    return {" ".join(command): names for command, names in zip(commands, found, strict=True)}


def write_sums(path: Path, count: int = 40) -> Path:
    """Write different chat rows."""
    with path.open("w") as file:
        for i in range(count):
            question = f"What comes after {i} and before {i + 2}?"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": str(i + 1)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def finish_run(folder: Path, model: Path, /, **sections: Any) -> Path:
    """Write rows and recipe into `folder`, run it, and return the run folder: `folder/runs/tiny`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sums(folder / "rows.jsonl")
    recipe = write_recipe(folder / "tiny.yaml", model, "rows.jsonl", **sections)
    run = folder / "runs" / "tiny"
    torch.set_num_threads(1)
    run_pipeline(load_recipe(recipe), RunRequest(out=run), Console(file=io.StringIO()))
    return run


def load_script(name: str) -> ModuleType:
    """Import a script by its path below the folder of recipes; its `main` does not run."""
    path = recipes_folder() / name
    spec = importlib.util.spec_from_file_location(Path(name).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def list_weights(run: Path) -> list[Path]:
    """List the weight files of a run, relative to its folder; raises if it has none."""
    files = [path.relative_to(run) for part in ("adapter", "weights") for path in (run / part).glob("*.safetensors")]
    assert files
    return files


def expect_equal_run(again: Path, run: Path) -> None:
    """Check that two runs have the same bytes in their weights, and the same scores."""
    for path in list_weights(run):
        assert (again / path).read_bytes() == (run / path).read_bytes()
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (again, run))
    assert first["evaluation"]["tuned"] == second["evaluation"]["tuned"]


def expect_every_change_named(run: Path, files: Sequence[Path]) -> None:
    """Change a byte of each file in turn, and check that `verify` names the file."""
    assert invoke("verify", run).exit_code == 0
    unnoticed = []
    for file in files:
        if content := file.read_bytes():
            changed = bytearray(content)
            changed[len(changed) // 2] ^= 1
            file.write_bytes(changed)
            done = invoke("verify", run)
            if done.exit_code != 6 or file.name not in done.stderr.replace("\n", ""):
                unnoticed.append((file.relative_to(run).as_posix(), done.exit_code))
            file.write_bytes(content)
    assert unnoticed == []
