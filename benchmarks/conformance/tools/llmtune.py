"""llmtune: one recipe per job, trained by `llmtune.run`."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, serve

import llmtune
from llmtune.model import memory_plan

CHAT = {"messages": "chat", "prompt_completion": "chat"}
TASKS = CHAT | {"text": "completion", "seq2seq": "translate", "preference": "preference", "classify": "classify"}


def configure(job: Job) -> Configuration:
    """Return the recipe. Its defaults learn the answers only, so both columns are the same."""
    if job["kind"] not in TASKS:
        raise NotOffered(f"no task for {job['kind']}")
    data = {"train": job["rows"], "validation": 0, "test": 0, "deduplicate": "none", "max_length": job["max_length"]}
    if TASKS[job["kind"]] in ("chat", "completion"):
        data["packing"] = job["packing"]
    adapter = {"method": job["method"]}
    if job["method"] == "lora":
        adapter |= {"r": 4, "lora_alpha": 8, **job["extra"].get("lora", {})}
    train = {name: job[name] for name in ("learning_rate", "optim", "batch_size", "save_steps") if job[name]}
    train |= {"gradient_checkpointing": True} if job["extra"].get("gradient_checkpointing") else {}
    train |= {"max_steps": job["steps"], "lr_scheduler_type": job["schedule"], "warmup_steps": 0, "max_grad_norm": 0}
    recipe = {"recipe_version": 1, "task": TASKS[job["kind"]], "seed": job["seed"], "data": data, "adapter": adapter}
    return recipe | {"train": train, "model": {"name": job["model"], "dtype": "float32"}}


def train(job: Job, recipe: Configuration) -> dict[str, Any]:
    folder = Path(job["out"])
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    # The size of micro-batches follows from the memory and has no key: one row for a machine with very little.
    memory_plan._CPU_TOKENS = 1 if job["micro_batch_size"] < job["batch_size"] else 2048
    options: dict[str, Any] = {"out": folder / "run", "until": "train", "threads": 1, "offline": True}
    if job["resume_from"]:
        threading.Thread(target=stop_after, args=(folder / "run" / "checkpoints", job["save_steps"]), daemon=True).start()
        try:
            llmtune.run(folder / "recipe.yaml", **options)
        except BaseException as stopped:
            print("stopped:", repr(stopped))
            options["resume"] = True
        assert "resume" in options, "the run ended before it was stopped"
    llmtune.run(folder / "recipe.yaml", processes=job["processes"], **options)
    return {"model": folder / "run" / ("weights" if job["method"] == "full" else "adapter")}


def stop_after(checkpoints: Path, step: int) -> None:
    """Send SIGTERM to this process when the checkpoint of a step is written."""
    while not any(int(found.name.rpartition("-")[2]) >= step for found in checkpoints.glob("step-*")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    serve("llmtune-cli", configure, train, torchrun=False)
