"""axolotl: `axolotl train config.yaml`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, evaluation, isolated, read_losses, rewrite, serve
from conformance.formats import as_conversation, as_messages, one_answer, with_last_marked

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
import axolotl.cli.config  # imported once, before the processes of the jobs
import axolotl.common.datasets
import axolotl.core.builders
import axolotl.core.trainers
import axolotl.train  # noqa: F401
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.cli.train import do_cli

KINDS: dict[str, dict[str, Any]] = {
    "messages": {"type": "chat_template", "field_messages": "messages"},
    "text": {"type": "completion", "field": "text"},
    "preference": {"type": "chat_template.default", "field_messages": "prompt"},
}
LORA = {"r": "lora_r", "modules_to_save": "lora_modules_to_save", "target_modules": "lora_target_modules"}


def configure(job: Job) -> Configuration:
    """Return the configuration file."""
    job = as_conversation(job)
    if job["kind"] not in KINDS or job["ask"].keys() & {"gguf", "answers"}:
        raise NotOffered(f"no setting for {job['kind']}, {job['train_on']}, {', '.join(job['ask'])}")
    micro, extra = job["micro_batch_size"], job["extra"]
    settings = {name: job[name] for name in ("learning_rate", "seed", "save_steps") if job[name]} | evaluation(job)
    settings.pop("per_device_eval_batch_size", None)
    settings |= {"eval_batch_size": micro} if "losses" in job["ask"] else {}
    settings |= {"optimizer": job["optim"], "lr_scheduler": job["schedule"], "max_steps": job["steps"]}
    settings |= {"num_epochs": 99, "micro_batch_size": micro, "sequence_len": job["max_length"], "max_grad_norm": 0.0}
    settings["gradient_accumulation_steps"] = job["batch_size"] // micro // job["processes"]
    settings |= {"warmup_steps": 0, "weight_decay": 0.0, "bf16": False}
    marked = {"message_field_training": "train"} if job["train_on"] == "last" else {}
    settings |= {"datasets": [KINDS[job["kind"]] | marked]}
    settings |= {"train_on_inputs": True} if job["train_on"] == "all" and job["kind"] != "text" else {}
    settings |= {"rl": "dpo"} if job["kind"] == "preference" else {}
    settings |= {"sample_packing": True} if job["packing"] else {}
    settings |= {"attn_implementation": "flex_attention"} if job["packing"] and job["column"] == "documented" else {}
    settings |= {"gradient_checkpointing": True} if extra.get("gradient_checkpointing") else {}
    settings |= {"val_set_size": extra["validation"]} if "validation" in extra else {}
    settings |= {"chat_template_kwargs": {"enable_thinking": extra["thinking"]}} if "thinking" in extra else {}
    settings |= {"tokens": extra["add_tokens"]} if "add_tokens" in extra else {}
    lora = {"lora_target_linear": True} if "target_modules" not in extra.get("lora", {}) else {}
    lora |= {"adapter": job["method"], "load_in_4bit": job["method"] == "qlora", "lora_r": 4, "lora_alpha": 8}
    lora |= {LORA.get(name, name): value for name, value in extra.get("lora", {}).items()}
    return settings | (lora if "lora" in job["method"] else {})


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out, model = Path(job["out"]), f"{job['out']}/model"
    last = "message_field_training" in settings["datasets"][0]
    rewrite(job, with_last_marked if last else lambda row: one_answer(as_messages(row)))
    form = settings["datasets"][0] | {"ds_type": "json" if job["file"] == "jsonl" else job["file"]}
    places = {"base_model": job["model"], "output_dir": model, "dataset_prepared_path": f"{out}/prepared"}
    places |= {"dataset_num_proc": 1, "datasets": [form | {"path": job["rows"]}]}
    tested = job["test_rows"] and "val_set_size" not in settings
    places |= {"test_datasets": [form | {"path": job["test_rows"], "split": "train"}]} if tested else {}
    checkpoint = f"{job['resume_from']}/model/checkpoint-{job['save_steps']}"
    places |= {"resume_from_checkpoint": checkpoint} if job["resume_from"] else {}
    (out / "config.yaml").write_text(json.dumps(settings | places))  # JSON is YAML
    isolated(lambda: do_cli(config=f"{out}/config.yaml"))
    if "merged" in job["ask"]:
        isolated(lambda: merge_lora(config=f"{out}/config.yaml", lora_model_dir=model))
    return {"model": model, "merged": f"{model}/merged", **read_losses(Path(model))}


if __name__ == "__main__":
    serve("axolotl", configure, train)
