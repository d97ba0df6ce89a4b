"""mlx-lm: `mlx_lm.lora` and `mlx_lm.fuse`, on MLX's CPU backend."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from conformance import adapter
from conformance.adapter import Configuration, Job, NotOffered
from conformance.formats import as_conversation, as_messages
from mlx_lm import fuse, lora

BLOCKS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn.")
BLOCKS |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp.")
OPTIMIZERS = {"sgd": "sgd", "adamw_torch": "adamw"}
FROZEN = ["model.embed_tokens", "model.norm", "lm_head"]
"""`full` trains the layers only, which has a case of its own; the other cases compare the layers."""


def configure(job: Job) -> Configuration:
    """Return the configuration file."""
    job, extra, micro = as_conversation(job), job["extra"], job["micro_batch_size"]
    if (
        job["kind"] not in ("messages", "text")
        or job["file"] != "jsonl"
        or job["ask"].keys() - {"gguf", "losses", "merged", "processor"}
    ):
        raise NotOffered(f"no format for {job['kind']} in {job['file']}, or no such export")
    if job["packing"] or job["processes"] > 1 or job["resume_from"] or job["method"] == "qlora":
        raise NotOffered(
            "no packing, no processes without MPI, no optimiser state to resume; a 4-bit base is another model"
        )
    if job["max_grad_norm"] or job["epochs"] or job["warmup_steps"]:
        raise NotOffered("no clipping, no epochs; warm-up by a schedule, which has no steps without it")
    known = {"lora", "gradient_checkpointing", "split_special_tokens"}
    if extra.keys() - known or extra.get("lora", {}).keys() & {"modules_to_save", "use_rslora"}:
        raise NotOffered(f"no setting for {', '.join(extra)}")
    settings = {name: job[name] for name in ("learning_rate", "seed")} | {"optimizer": OPTIMIZERS[job["optim"]]}
    settings |= {"fine_tune_type": job["method"], "batch_size": micro, "num_layers": -1, "iters": job["steps"]}
    settings |= {"grad_accumulation_steps": job["batch_size"] // micro, "max_seq_length": job["max_length"]}
    settings["iters"] *= settings["grad_accumulation_steps"]
    settings |= {"grad_checkpoint": True} if "gradient_checkpointing" in extra else {}
    settings |= {"mask_prompt": True} if job["column"] == "documented" and job["train_on"] != "all" else {}
    if job["weight_decay"]:
        settings["optimizer_config"] = {settings["optimizer"]: {"weight_decay": job["weight_decay"]}}
    if job["schedule"] == "linear":
        schedule = [job["learning_rate"], 0.0, job["steps"]]
        settings["lr_schedule"] = {"name": "linear_schedule", "arguments": schedule}
    if job["method"] == "lora":
        given = {"r": 4, "lora_alpha": 8, **extra.get("lora", {})}
        settings["lora_parameters"] = {"rank": given["r"], "scale": given["lora_alpha"] / given["r"], "dropout": 0.0}
        if "target_modules" in given:
            keys = [f"{BLOCKS.get(name, '')}{name}" for name in given["target_modules"]]
            settings["lora_parameters"] |= {"keys": keys}
    return settings


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out, data = Path(job["out"]), Path(job["out"]) / "data"
    adapter.rewrite(job, as_messages)
    data.mkdir()
    shutil.copy(job["rows"], data / "train.jsonl")
    for name in ("valid", "test"):
        shutil.copy(job["test_rows"] or job["rows"], data / f"{name}.jsonl")
    if Path(job["model"]).name.startswith("gemma3"):  # it takes the released model's size of vocabulary
        model = shutil.copytree(job["model"], out / "base")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({"vocab_size": config["text_config"]["vocab_size"]} | config))
        job["model"] = str(model)
    places = {"model": job["model"], "train": True, "data": str(data), "adapter_path": f"{out}/adapter"}
    (out / "config.yaml").write_text(json.dumps(settings | places | {"test": "losses" in job["ask"]}))  # JSON is YAML
    adapter.call(lora.main, "mlx_lm.lora", "--config", f"{out}/config.yaml")
    merge = ["--model", job["model"], "--adapter-path", f"{out}/adapter"]
    if job["method"] == "lora" and "gguf" not in job["ask"]:
        if "merged" in job["ask"]:
            adapter.call(fuse.main, "mlx_lm.fuse", *merge, "--save-path", f"{out}/merged")
        # In a process of its own, as MLX's threads do not survive the next fork.
        adapter.isolated(lambda: as_peft(out / "adapter", settings["lora_parameters"]))
        return {"model": out / "peft", "merged": out / "merged", "after": 0}
    adapter.call(
        fuse.main,
        "mlx_lm.fuse",
        *merge,
        "--save-path",
        f"{out}/model",
        *(["--export-gguf"] if "gguf" in job["ask"] else []),
    )
    found = {"model": out / "model", "gguf": out / "model" / "ggml-model-f16.gguf"}
    losses = re.findall(r"Test loss ([0-9.]+[0-9])", (out / "log.txt").read_text(errors="replace"))
    found |= {"losses": [float(loss) for loss in losses], "after": 0}
    return found | {"frozen": FROZEN if job["method"] == "full" else []}


def as_peft(folder: Path, lora: dict[str, Any]) -> None:
    """Save an adapter under the names of PEFT, which has both matrices transposed."""
    weights = mx.load(str(folder / "adapters.safetensors"))
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    (peft := folder.parent / "peft").mkdir()
    renamed = {f"base_model.model.{name[:-6]}{names[name[-6:]]}": weight.T for name, weight in weights.items()}
    mx.save_safetensors(str(peft / "adapter_model.safetensors"), {k: mx.contiguous(v) for k, v in renamed.items()})
    config = {"r": lora["rank"], "lora_alpha": lora["scale"] * lora["rank"]}
    (peft / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    adapter.serve("mlx-lm", configure, train, torchrun=False)
