"""ms-swift: `swift sft`, `swift pt` and `swift rlhf` with their command-line arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, isolated, serve
from swift import rlhf_main, sft_main
from swift.pipelines import pretrain_main as pt_main

COMMANDS = {"messages": sft_main, "prompt_completion": sft_main, "text": pt_main, "preference": rlhf_main}
COMMANDS |= {"classify": sft_main, "pairs": sft_main}
TYPES = {"qwen2.5": "qwen2", "qwen3": "qwen3", "llama3": "llama3"}
"""The documentation asks for `model_type` where the name of the folder does not tell it."""
LORA = {"r": "lora_rank"}


def configure(job: Job) -> Configuration:
    """Return the arguments."""
    if job["kind"] not in COMMANDS:
        raise NotOffered(f"no command for {job['kind']}")
    micro = job["micro_batch_size"]
    settings = {name: job[name] for name in ("learning_rate", "optim", "seed", "max_length", "save_steps") if job[name]}
    settings |= {"tuner_type": job["method"], "max_steps": job["steps"], "lr_scheduler_type": job["schedule"]}
    settings |= {"max_grad_norm": 0.0, "warmup_ratio": 0.0, "weight_decay": 0.0, "torch_dtype": "float32"}
    settings |= {"per_device_train_batch_size": micro, "use_cpu": True, "report_to": "none"}
    settings |= {"gradient_accumulation_steps": job["batch_size"] // micro // job["processes"]}
    settings |= {"model_type": t for name, t in TYPES.items() if Path(job["model"]).name.startswith(name)}
    settings |= {"loss_scale": "last_round"} if job["train_on"] == "last" else {}
    settings |= {"loss_scale": "all"} if job["train_on"] == "all" and job["kind"] != "text" else {}
    settings |= {"packing": True} if job["packing"] else {}
    if job["method"] == "lora":
        settings |= {LORA.get(k, k): v for k, v in {"r": 4, "lora_alpha": 8, **job["extra"].get("lora", {})}.items()}
    settings |= {"rlhf_type": "dpo"} if job["kind"] == "preference" else {}
    return settings | job["extra"].get("swift", {})


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out = Path(job["out"])
    given = {"model": job["model"], "dataset": job["rows"], "output_dir": out / "model", "add_version": False, **settings}
    given |= {"resume_from_checkpoint": max(Path(job["resume_from"]).glob("model/checkpoint-*"))} if job["resume_from"] else {}
    arguments = [str(part) for name, value in given.items() for part in (f"--{name}", *as_words(value))]
    isolated(lambda: COMMANDS[job["kind"]](arguments))
    return {"model": max((out / "model").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))}


def as_words(value: Any) -> list[str]:
    return [str(part) for part in value] if isinstance(value, list) else [str(value)]


if __name__ == "__main__":
    serve("ms-swift", configure, train)
