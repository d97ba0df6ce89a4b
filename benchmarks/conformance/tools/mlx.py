"""mlx-lm: `mlx_lm.lora` and `mlx_lm.fuse`, on MLX's CPU backend."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, isolated, rewrite, serve
from conformance.formats import as_conversation, as_messages
from mlx_lm import fuse, lora

FORMATS = ("messages", "text")
FROZEN = ["model.embed_tokens", "model.norm", "lm_head"]
FULL = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md#fine-tune"
"""`full` trains the last `num_layers` layers, and nothing else."""
MASK = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md#prompt-masking"


def configure(job: Job) -> Configuration:
    """Return the configuration file. Tools for masks and packing: `mask_prompt` only."""
    job = as_conversation(job)
    if job["kind"] not in FORMATS or job["ask"] or job["file"] != "jsonl":
        raise NotOffered(f"no format for {job['kind']} in {job['file']}")
    if job["packing"] or job["processes"] > 1 or job["method"] == "qlora" or job["resume_from"]:
        raise NotOffered(
            "no packing, no processes without MPI, no 4-bit base without `mlx_lm.convert`, no optimiser state"
        )
    if job["extra"].keys() - {"lora", "gradient_checkpointing"} or "modules_to_save" in job["extra"].get("lora", {}):
        raise NotOffered(f"no setting for {', '.join(job['extra'])}")
    micro = job["micro_batch_size"]
    optim = {"sgd": "sgd", "adamw_torch": "adamw"}[job["optim"]]
    settings = {name: job[name] for name in ("learning_rate", "seed")} | {"optimizer": optim, "num_layers": -1}
    settings |= {"fine_tune_type": job["method"], "batch_size": micro, "max_seq_length": job["max_length"]}
    settings |= {
        "grad_accumulation_steps": job["batch_size"] // micro,
        "iters": job["steps"] * job["batch_size"] // micro,
    }
    settings |= {"grad_checkpoint": True} if job["extra"].get("gradient_checkpointing") else {}
    if job["column"] == "documented" and job["train_on"] != "all":
        settings["mask_prompt"] = True
    if job["method"] == "lora":
        given = {"r": 4, "lora_alpha": 8, **job["extra"].get("lora", {})}
        settings["lora_parameters"] = {"rank": given["r"], "scale": given["lora_alpha"] / given["r"], "dropout": 0.0}
        settings["lora_parameters"] |= {"keys": given["target_modules"]} if "target_modules" in given else {}
    return settings


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out = Path(job["out"])
    rewrite(job, as_messages)
    (out / "data").mkdir()
    for name in ("train", "valid"):
        shutil.copy(job["test_rows"] or job["rows"] if name == "valid" else job["rows"], out / "data" / f"{name}.jsonl")
    places = {"model": job["model"], "train": True, "data": f"{out}/data", "adapter_path": f"{out}/adapter"}
    (out / "config.yaml").write_text(json.dumps(settings | places))  # JSON is YAML
    call(lora.main, "mlx_lm.lora", "--config", f"{out}/config.yaml")
    call(
        fuse.main,
        "mlx_lm.fuse",
        "--model",
        job["model"],
        "--adapter-path",
        f"{out}/adapter",
        "--save-path",
        f"{out}/model",
    )
    return {"model": out / "model", "frozen": FROZEN if job["method"] == "full" else []}


def call(main: Any, *words: str) -> None:
    sys.argv = list(words)
    isolated(main)


if __name__ == "__main__":
    serve("mlx-lm", configure, train, {"the embeddings are not trained": FULL, "the whole text": MASK})
