"""llmtune: one recipe per job, run by `llmtune.run`."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, read_lines, rewrite, serve
from conformance.environments import HERE
from conformance.formats import as_parts

import llmtune
from llmtune.errors import LlmtuneError
from llmtune.model import memory_plan

CHAT = dict.fromkeys(("messages", "prompt_completion", "pictures"), "chat")
TASKS = CHAT | {"text": "completion", "seq2seq": "translate"}
TASKS |= {"preference": "preference", "classify": "classify", "rerank": "rerank", "prompts": "reinforce"}


def configure(job: Job) -> Configuration:
    """Return the recipe. Its defaults learn the answers only, so both columns are the same."""
    if job["kind"] not in TASKS:
        raise NotOffered(f"no task for {job['kind']}")
    if "label_smoothing" in job["extra"]:
        raise NotOffered("no label smoothing but that of DPO")
    data = {"train": job["rows"], "validation": 0, "test": job["test_rows"] or 0, "max_length": job["max_length"]}
    data |= {"test": job["extra"]["validation"]} if "validation" in job["extra"] else {"deduplicate": "none"}
    data |= {"train_on": "all"} if job["train_on"] == "all" and job["kind"] in CHAT else {}
    data |= {"packing": job["packing"]} if TASKS[job["kind"]] in ("chat", "completion") else {}
    adapter = {"method": job["method"]}
    adapter |= {"r": 4, "lora_alpha": 8, **job["extra"].get("lora", {})} if "lora" in job["method"] else {}
    adapter |= {"num_virtual_tokens": job["extra"]["virtual_tokens"]} if "virtual_tokens" in job["extra"] else {}
    train = {name: job[name] for name in ("learning_rate", "optim", "batch_size", "save_steps") if job[name]}
    train |= {name: job[name] for name in ("warmup_steps", "max_grad_norm", "weight_decay")}
    train |= {"num_train_epochs": job["epochs"]} if job["epochs"] else {"max_steps": job["steps"]}
    train |= {"lr_scheduler_type": job["schedule"]}
    train |= {"gradient_checkpointing": True} if job["extra"].get("gradient_checkpointing") else {}
    # Micro-batches follow from the memory and have no key: one row each, as on a machine with very little.
    tokens = 1 if job["micro_batch_size"] < job["batch_size"] else 2048
    model = {"name": job["model"], "dtype": "float32"}
    model |= {"add_tokens": job["extra"]["add_tokens"]} if "add_tokens" in job["extra"] else {}
    model |= {"chat_template_kwargs": {"enable_thinking": False}} if "thinking" in job["extra"] else {}
    recipe = {"recipe_version": 1, "task": TASKS[job["kind"]], "seed": job["seed"], "data": data, "adapter": adapter}
    recipe |= {"deploy": products} if (products := [name for name in ("merged", "gguf") if name in job["ask"]]) else {}
    recipe |= {"generation": {"max_new_tokens": job["ask"]["answers"]}} if "answers" in job["ask"] else {}
    recipe |= {"evaluate": {"metrics": ["recall@1"]}} if "rankings" in job["ask"] else {}
    recipe |= {"reinforce": sampling(job)} if job["kind"] == "prompts" else {}
    return recipe | {"train": train, "model": model, "patched": {"llmtune.model.memory_plan._CPU_TOKENS": tokens}}


def sampling(job: Job) -> Configuration:
    """Return the section `reinforce`. There is no penalty of repetitions to state."""
    settings = {name: value for name, value in job["extra"].items() if name != "sampling"}
    settings |= {name: value for name, value in job["extra"]["sampling"].items() if name != "repetition_penalty"}
    return settings | {"rewards": {f"{HERE / 'reward.py'}:score": 1.0}}


def train(job: Job, recipe: Configuration) -> dict[str, Any]:
    folder, run = Path(job["out"]), Path(job["out"]) / "run"
    [memory_plan._CPU_TOKENS] = recipe["patched"].values()
    recipe = {name: value for name, value in recipe.items() if name != "patched"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    until: Any = "run" if "deploy" in recipe else "evaluate" if job["ask"] else "train"
    options: dict[str, Any] = {"out": run, "until": until, "threads": 1, "offline": True}
    if job["kind"] == "pictures":
        rewrite(job, as_parts)
    if job["resume_from"]:
        threading.Thread(target=stop_after, args=(run / "checkpoints", job["save_steps"]), daemon=True).start()
        try:
            llmtune.run(folder / "recipe.yaml", **options)
        except LlmtuneError as stopped:
            print("stopped:", stopped)
            options["resume"] = True
        assert "resume" in options, "the run ended before it was stopped"
    llmtune.run(folder / "recipe.yaml", processes=job["processes"], **options)
    found: dict[str, Any] = {"merged": run / "merged", "gguf": next(run.glob("gguf/*/*.gguf"), None)}
    if "answers" in job["ask"]:
        lines = (run / "evaluation" / "predictions.jsonl").read_text().splitlines()
        found["answers"] = [json.loads(line)["tuned"] for line in lines]
    if "rankings" in job["ask"]:
        found |= read_rankings(run, Path(job["test_rows"]))
    if job["kind"] == "prompts":
        files = sorted((run / "rollouts").glob("*.jsonl"), key=lambda file: int(file.stem))
        found["samples"] = [line for file in files for line in read_lines(file)[1:]]
    if "losses" in job["ask"]:
        scores = json.loads((run / "report.json").read_text())["evaluation"]
        found["losses"] = [scores[side]["loss"] for side in ("base", "tuned")]
    return found | {"model": run / ("weights" if job["method"] == "full" else "adapter")}


def read_rankings(run: Path, rows: Path) -> dict[str, Any]:
    """Return the reported recall, and each query's passages with their scores and relevance, as the rows name them."""
    predicted = {}
    for line in (run / "evaluation" / "predictions.jsonl").read_text().splitlines():
        entry = json.loads(line)
        predicted[int(entry["origin"].rpartition(":")[2])] = entry["tuned_prediction"]["scores"]
    rankings: dict[str, list[Any]] = {}
    for number, line in enumerate(rows.read_text().splitlines(), start=1):
        row = json.loads(line)
        passages = [row["passage"], *row["negatives"]]
        scored = zip(passages, predicted[number], [1, *[0] * len(row["negatives"])], strict=True)
        rankings.setdefault(row["query"], []).extend(scored)
    reported = json.loads((run / "report.json").read_text())["evaluation"]["tuned"]["recall@1"]
    return {"recall@1": reported, "rankings": list(rankings.values())}


def stop_after(checkpoints: Path, step: int) -> None:
    """Send SIGTERM to this process when the checkpoint of a step is written."""
    while not any(int(found.name.rpartition("-")[2]) >= step for found in checkpoints.glob("step-*")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    serve("llmtune-cli", configure, train, torchrun=False)
