"""llmtune: one recipe per job, trained by `llmtune.run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, serve

import llmtune

TASKS = {
    "messages": "chat",
    "prompt_completion": "chat",
    "text": "completion",
    "seq2seq": "translate",
    "preference": "preference",
    "classify": "classify",
    "pairs": "embed",
}


def configure(job: Job) -> Configuration:
    """Return the recipe. Its defaults learn the answers only, so both columns are the same."""
    if job["kind"] not in TASKS:
        raise NotOffered(f"no task for {job['kind']}")
    data = {"train": job["rows"], "validation": 0, "test": 0, "max_length": job["max_length"]}
    data |= {"test": job["test_rows"]} if job["test_rows"] else {}
    data |= {"packing": job["packing"], "deduplicate": "none", "on_overlong": job["extra"].get("overlong", "error")}
    if "validation" in job["extra"]:  # held out and scored; copies are dropped by default
        data["test"] = job["extra"]["validation"]
        del data["deduplicate"]
    if job["kind"] in ("messages", "prompt_completion") and job["train_on"] != "assistant":
        data["train_on"] = job["train_on"]
    adapter: dict[str, Any] = {"method": job["method"]}
    if job["method"] != "full":
        adapter |= {"r": 4, "lora_alpha": 8, **job["extra"].get("lora", {})}
    train = {name: job[name] for name in ("learning_rate", "optim", "batch_size", "save_steps") if job[name]}
    train |= {"gradient_checkpointing": True} if job["extra"].get("gradient_checkpointing") else {}
    train |= {"max_steps": job["steps"], "lr_scheduler_type": job["schedule"], "warmup_steps": 0, "max_grad_norm": 0}
    task = TASKS[job["kind"]]
    model = {"name": job["model"], "dtype": "float32"}
    model |= {"add_tokens": job["extra"]["add_tokens"]} if "add_tokens" in job["extra"] else {}
    model |= {"chat_template_kwargs": {"enable_thinking": False}} if "thinking" in job["extra"] else {}
    recipe = {"recipe_version": 1, "task": task, "seed": job["seed"], "data": data, "adapter": adapter, "train": train}
    recipe |= {"deploy": products} if (products := [name for name in ("merged", "gguf") if name in job["ask"]]) else {}
    recipe |= {"generation": {"max_new_tokens": job["ask"]["answers"]}} if "answers" in job["ask"] else {}
    return recipe | {"model": model}


def train(job: Job, recipe: Configuration) -> dict[str, Any]:
    folder = Path(job["out"])
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    run = folder / "run"
    until: Any = "run" if "deploy" in recipe else "evaluate" if job["ask"] else "train"
    started = {"until": until, "processes": job["processes"], "threads": 1, "offline": True, "quiet": False}
    llmtune.run(folder / "recipe.yaml", out=run, **started)
    found: dict[str, Any] = {"merged": run / "merged", "gguf": next(run.glob("gguf/*.gguf"), None)}
    if "answers" in job["ask"]:
        lines = (run / "evaluation" / "predictions.jsonl").read_text().splitlines()
        found["answers"] = [json.loads(line)["tuned"] for line in lines]
    if "losses" in job["ask"]:
        scores = json.loads((run / "report.json").read_text())["evaluation"]
        found["losses"] = [scores[side]["loss"] for side in ("base", "tuned")]
    return found | {"model": run / ("weights" if job["method"] == "full" else "adapter")}


if __name__ == "__main__":
    serve("llmtune-cli", configure, train, torchrun=False)
