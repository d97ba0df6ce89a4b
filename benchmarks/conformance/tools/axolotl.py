"""axolotl: `axolotl train config.yaml`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from conformance.adapter import Configuration, Job, NotOffered, isolated, serve

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
import axolotl.core.builders  # noqa: E402, F401  # imported once, before the processes of the jobs
import axolotl.train  # noqa: E402, F401
from axolotl.cli.train import do_cli  # noqa: E402

CUSTOM = {"field_instruction": "prompt", "field_output": "completion", "format": "{instruction}"}
KINDS: dict[str, dict[str, Any]] = {
    "messages": {"type": "chat_template", "field_messages": "messages"},
    "prompt_completion": {"type": CUSTOM | {"no_input_format": "{instruction}"}},
    "text": {"type": "completion", "field": "text"},
    "preference": {"type": {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}},
}
LORA = {"r": "lora_r", "modules_to_save": "lora_modules_to_save", "target_modules": "lora_target_modules"}


def configure(job: Job) -> Configuration:
    """Return the configuration file."""
    if job["kind"] not in KINDS:
        raise NotOffered(f"no type of dataset for {job['kind']}")
    if job["train_on"] == "last":
        raise NotOffered("no setting for the last answer; a `training` field in each message does it")
    settings = {name: job[name] for name in ("learning_rate", "seed", "save_steps") if job[name]}
    settings |= {"optimizer": job["optim"], "lr_scheduler": job["schedule"], "max_steps": job["steps"], "num_epochs": 1}
    settings |= {"micro_batch_size": job["micro_batch_size"], "sequence_len": job["max_length"], "max_grad_norm": 0.0}
    settings["gradient_accumulation_steps"] = job["batch_size"] // job["micro_batch_size"] // job["processes"]
    settings |= {"warmup_steps": 0, "weight_decay": 0.0, "bf16": False, "datasets": [KINDS[job["kind"]]]}
    settings |= {"train_on_inputs": True} if job["train_on"] == "all" and job["kind"] != "text" else {}
    settings |= {"rl": "dpo"} if job["kind"] == "preference" else {}
    if job["packing"]:
        settings |= {"sample_packing": True} | ({"attn_implementation": "sdpa"} if job["column"] == "documented" else {})
    if job["method"] == "lora":
        lora = {"r": 4, "lora_alpha": 8, **job["extra"].get("lora", {})}
        settings |= {"adapter": "lora"} | {LORA.get(name, name): value for name, value in lora.items()}
        settings |= {} if "target_modules" in lora else {"lora_target_linear": True}
    return settings | job["extra"].get("axolotl", {})


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out = Path(job["out"])
    rows = settings["datasets"][0] | {"path": job["rows"], "ds_type": "json" if job["file"] == "jsonl" else job["file"]}
    places = {"base_model": job["model"], "output_dir": f"{out}/model", "dataset_prepared_path": f"{out}/prepared"}
    places |= {"resume_from_checkpoint": job["resume_from"]} if job["resume_from"] else {}
    (out / "config.yaml").write_text(json.dumps(settings | places | {"datasets": [rows]}))  # JSON is YAML
    isolated(lambda: do_cli(config=str(out / "config.yaml")))
    return {"model": out / "model"}


if __name__ == "__main__":
    serve("axolotl", configure, train)
