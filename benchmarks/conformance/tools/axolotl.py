"""axolotl: `axolotl train` and `axolotl merge-lora` with a configuration file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from conformance import adapter
from conformance.adapter import Configuration, Job, NotOffered
from conformance.formats import as_conversation, one_answer, with_last_marked

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
import axolotl.cli.config  # imported once, before the processes of the jobs
import axolotl.common.datasets
import axolotl.core.builders
import axolotl.core.trainers
import axolotl.train  # noqa: F401
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.cli.train import do_cli
from datasets import Dataset

adapter.in_this_process(Dataset, "map", "filter", "save_to_disk")

KINDS: dict[str, dict[str, Any]] = {
    "messages": {"type": "chat_template", "field_messages": "messages"},
    "text": {"type": "completion", "field": "text"},
    "preference": {"type": "chat_template.default", "field_messages": "prompt"},
}
LORA = {"r": "lora_r", "modules_to_save": "lora_modules_to_save", "target_modules": "lora_target_modules"}
KERNELS = "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"  # for CUDA only
EXTRA = {"validation": "val_set_size", "add_tokens": "tokens", "gradient_checkpointing": "gradient_checkpointing"}


def configure(job: Job) -> Configuration:
    """Return the configuration file."""
    job, extra, micro = as_conversation(job), job["extra"], job["micro_batch_size"]
    if job["kind"] not in KINDS or job["ask"].keys() & {"gguf", "answers"}:
        raise NotOffered(f"no type of dataset for {job['kind']}, or no such export or batch of answers")
    settings = {name: job[name] for name in ("learning_rate", "seed", "save_steps", "warmup_steps")}
    settings |= {"num_epochs": job["epochs"]} if job["epochs"] else {"max_steps": job["steps"], "num_epochs": 99}
    settings |= {"optimizer": job["optim"], "lr_scheduler": job["schedule"], "weight_decay": job["weight_decay"]}
    settings |= {"micro_batch_size": micro, "sequence_len": job["max_length"], "bf16": False}
    settings |= {"max_grad_norm": job["max_grad_norm"]}
    settings |= {"gradient_accumulation_steps": job["batch_size"] // micro // job["processes"]}
    marked = {"message_field_training": "train"} if job["train_on"] == "last" else {}
    settings |= {"datasets": [KINDS[job["kind"]] | marked], "rl": "dpo" if job["kind"] == "preference" else None}
    settings |= {"train_on_inputs": (job["train_on"] == "all" and job["kind"] == "messages") or None}
    if job["packing"]:
        settings |= {"sample_packing": True}
        settings |= {"attn_implementation": "flex_attention"} if job["column"] == "documented" else {}
    if "losses" in job["ask"]:
        settings |= {"eval_strategy": "steps", "eval_steps": job["steps"], "save_steps": job["steps"]}
        settings |= {"eval_batch_size": micro, "eval_on_start": True}
    settings |= {EXTRA[name]: value for name, value in extra.items() if name in EXTRA}
    settings |= {"dataset_exact_deduplication": True} if "validation" in extra and job["column"] == "documented" else {}
    settings |= {"chat_template_kwargs": {"enable_thinking": extra["thinking"]}} if "thinking" in extra else {}
    if "lora" in job["method"]:
        lora = {"r": 4, "lora_alpha": 8, "lora_target_linear": "target_modules" not in extra.get("lora", {})}
        settings |= {LORA.get(name, name): value for name, value in (lora | extra.get("lora", {})).items()}
        settings |= {"adapter": job["method"], "load_in_4bit": job["method"] == "qlora"}
        settings |= dict.fromkeys(KERNELS, False)
        if "add_tokens" in extra and job["column"] == "documented":
            settings["lora_modules_to_save"] = ["embed_tokens", "lm_head"]
    return adapter.given(settings)


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    config, model = f"{job['out']}/config.yaml", f"{job['out']}/model"
    adapter.rewrite(job, with_last_marked if "message_field_training" in settings["datasets"][0] else one_answer)
    form = settings["datasets"][0] | {"ds_type": "json" if job["file"] == "jsonl" else job["file"]}
    places = {"base_model": job["model"], "output_dir": model, "dataset_prepared_path": f"{job['out']}/prepared"}
    places |= {"dataset_num_proc": 1, "datasets": [form | {"path": job["rows"]}]}
    if job["test_rows"] and "val_set_size" not in settings:
        places |= {"test_datasets": [form | {"path": job["test_rows"], "split": "train"}]}
    places |= adapter.given({"resume_from_checkpoint": adapter.checkpoint(job)})
    Path(config).write_text(json.dumps(settings | places))  # JSON is YAML
    adapter.isolated(lambda: do_cli(config=config))
    if "merged" in job["ask"]:
        adapter.isolated(lambda: merge_lora(config=config, lora_model_dir=model))
    return {"model": model, "merged": f"{model}/merged", **adapter.read_losses(Path(model))}


if __name__ == "__main__":
    adapter.serve("axolotl", configure, train)
