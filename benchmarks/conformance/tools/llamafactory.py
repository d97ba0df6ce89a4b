"""LLaMA-Factory: `llamafactory-cli train` with a configuration file, and rows listed in dataset_info.json."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, isolated, serve

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # it is built for CUDA; LLaMA-Factory uses it for recordings only
    sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))
from llamafactory.cli import main

STAGES = {"messages": "sft", "prompt_completion": "sft", "text": "pt", "preference": "dpo"}
TEMPLATES = {"qwen2.5": "qwen", "qwen3": "qwen3", "llama3": "llama3"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
TAGS |= {"observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}
LORA = {"r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "lora_target"}
LORA |= {"modules_to_save": "additional_target", "use_rslora": "use_rslora", "use_dora": "use_dora"}


def configure(job: Job) -> Configuration:
    """Return the configuration file. The documentation names a template for each family of models."""
    if job["kind"] not in STAGES:
        raise NotOffered(f"no stage for {job['kind']}")
    settings = {name: job[name] for name in ("learning_rate", "optim", "seed")} | job["extra"].get("llamafactory", {})
    settings |= {"stage": STAGES[job["kind"]], "do_train": True, "finetuning_type": job["method"], "report_to": "none"}
    settings |= {"max_steps": job["steps"], "lr_scheduler_type": job["schedule"], "max_grad_norm": 0.0}
    micro = job["micro_batch_size"]
    settings |= {"per_device_train_batch_size": micro, "cutoff_len": job["max_length"]}
    settings |= {"gradient_accumulation_steps": job["batch_size"] // micro // job["processes"]}
    family = next((name for name in TEMPLATES if Path(job["model"]).name.startswith(name)), None)
    if job["column"] == "documented" and family:
        settings["template"] = TEMPLATES[family]
    settings |= {"mask_history": True} if job["train_on"] == "last" else {}
    settings |= {"train_on_prompt": True} if job["train_on"] == "all" and settings["stage"] == "sft" else {}
    if job["packing"]:
        settings |= {"packing": True} | ({"neat_packing": True} if job["column"] == "documented" else {})
    if job["method"] == "lora":
        given = {"r": 4, "lora_alpha": 8, "target_modules": "all", **job["extra"].get("lora", {})}
        settings |= {LORA[k]: ",".join(v) if isinstance(v, list) else v for k, v in given.items()}
    return settings | {"save_steps": job["save_steps"] or 1000}


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out = Path(job["out"])
    columns = {"messages": {"messages": "messages"}, "text": {"prompt": "text"}}
    columns["prompt_completion"] = {"prompt": "prompt", "response": "completion"}
    columns["preference"] = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    entry: dict[str, Any] = {"file_name": job["rows"], "columns": columns[job["kind"]]}
    entry |= {"formatting": "sharegpt", "tags": TAGS} if job["kind"] == "messages" else {}
    entry |= {"ranking": True} if job["kind"] == "preference" else {}
    if '"tools"' in Path(job["rows"]).read_bytes().decode(errors="ignore"):
        entry["columns"]["tools"] = "tools"
    (out / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    settings = settings | {"model_name_or_path": job["model"], "dataset": "rows", "dataset_dir": str(out), "use_cpu": True}
    settings |= {"output_dir": str(out / "model"), "overwrite_output_dir": True, "resume_from_checkpoint": job["resume_from"]}
    (out / "train.yaml").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))  # JSON is YAML
    sys.argv = ["llamafactory-cli", "train", str(out / "train.yaml")]
    isolated(main)
    return {"model": out / "model"}


if __name__ == "__main__":
    serve("llamafactory", configure, train)
