"""ms-swift: `swift sft`, `swift pt`, `swift rlhf` and `swift export` with their command-line arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, evaluation, isolated, read_losses, rewrite, serve
from conformance.formats import as_conversation, as_numbered, as_two_conversations
from swift.pipelines import export_main, infer_main, pretrain_main, rlhf_main, sft_main

COMMANDS = {"messages": sft_main, "text": pretrain_main, "preference": rlhf_main}
COMMANDS |= {"classify": sft_main}
TYPES = {"qwen2.5": "qwen2", "qwen3": "qwen3", "llama3": "llama3"}
"""The documentation asks for `model_type` where the name of the folder does not tell it."""


def configure(job: Job) -> Configuration:
    """Return the arguments."""
    job = as_conversation(job)
    if job["kind"] not in COMMANDS or "gguf" in job["ask"]:
        raise NotOffered(f"no command for {job['kind']}, or no export to {', '.join(job['ask'])}")
    micro, extra = job["micro_batch_size"], job["extra"]
    settings = {name: job[name] for name in ("learning_rate", "optim", "seed", "max_length")} | evaluation(job)
    settings |= {"tuner_type": job["method"].removeprefix("q"), "max_steps": job["steps"]}
    settings |= {"max_grad_norm": 0.0, "warmup_ratio": 0.0, "weight_decay": 0.0, "torch_dtype": "float32"}
    settings |= {"per_device_train_batch_size": micro, "lr_scheduler_type": job["schedule"], "use_cpu": True}
    settings |= {"gradient_accumulation_steps": job["batch_size"] // micro // job["processes"], "report_to": "none"}
    settings |= {"save_steps": job["save_steps"] or job["steps"]}
    family = next((name for name in TYPES if Path(job["model"]).name.startswith(name)), None)
    settings |= {"model_type": TYPES[family]} if family else {}
    settings |= {"loss_scale": "last_round"} if job["train_on"] == "last" else {}
    settings |= {"loss_scale": "all"} if job["train_on"] == "all" and job["kind"] != "text" else {}
    settings |= {"packing": True} if job["packing"] else {}
    settings |= {"rlhf_type": "dpo"} if job["kind"] == "preference" else {}
    settings |= {"quant_method": "bnb", "quant_bits": 4} if job["method"] == "qlora" else {}
    settings |= {"split_dataset_ratio": extra["validation"]} if "validation" in extra else {}
    settings |= {"task_type": "seq_cls", "num_labels": 2} if job["kind"] == "classify" else {}
    settings |= {"enable_thinking": extra["thinking"]} if "thinking" in extra else {}
    settings |= {"new_special_tokens": extra["add_tokens"]} if "add_tokens" in extra else {}
    lora = {"lora_rank": 4, "lora_alpha": 8, **extra.get("lora", {})} if "lora" in job["method"] else {}
    return settings | {{"r": "lora_rank"}.get(name, name): value for name, value in lora.items()}


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out = Path(job["out"])
    rewrite(job, as_numbered if job["kind"] == "classify" else as_two_conversations)
    given = {
        "model": job["model"],
        "dataset": job["rows"],
        "output_dir": out / "model",
        "add_version": False,
    } | settings
    given |= {"val_dataset": job["test_rows"]} if job["test_rows"] and "split_dataset_ratio" not in settings else {}
    checkpoint = f"{job['resume_from']}/model/checkpoint-{job['save_steps']}"
    given |= {"resume_from_checkpoint": checkpoint} if job["resume_from"] else {}
    isolated(lambda: COMMANDS[as_conversation(job)["kind"]](as_arguments(given)))
    last = out / "model" / f"checkpoint-{job['steps']}"
    if "merged" in job["ask"]:
        merge = {"adapters": last, "merge_lora": True, "output_dir": out / "merged"}
        isolated(lambda: export_main(as_arguments(merge)))
    found = {"model": last, "merged": out / "merged", **read_losses(out)}
    if "answers" in job["ask"]:
        asked = {"model": last, "val_dataset": job["test_rows"], "max_batch_size": 4, "temperature": 0}
        asked |= {"max_new_tokens": job["ask"]["answers"], "result_path": out / "answers.jsonl"}
        isolated(lambda: infer_main(as_arguments(asked)))
        found["answers"] = [json.loads(line)["response"] for line in (out / "answers.jsonl").read_text().splitlines()]
    return found


def as_arguments(values: Configuration) -> list[str]:
    words = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [str(word) for name, several in words.items() for word in (f"--{name}", *several)]


if __name__ == "__main__":
    serve("ms-swift", configure, train)
