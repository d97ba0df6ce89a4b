"""TRL: SFTTrainer and DPOTrainer, with rows as its documentation describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conformance.adapter import Configuration, Job, NotOffered, evaluation, read_losses, serve
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

SAME = {
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "save_only_model": False,
}
DOCUMENTED = {
    "the whole text": "https://huggingface.co/docs/trl/sft_trainer#train-on-assistant-messages-only",
    "an answer cut off": "https://huggingface.co/docs/trl/reducing_memory_usage#truncation",
    "a quoted string": "https://huggingface.co/docs/transformers/chat_extras",
    "the misspelt module": "https://huggingface.co/docs/peft/developer_guides/troubleshooting",
}


def configure(job: Job) -> Configuration:
    """Return the arguments of the trainer's configuration."""
    if job["kind"] not in ("messages", "prompt_completion", "text", "preference"):
        raise NotOffered(f"no trainer for {job['kind']}")
    if missing := {"validation", "add_tokens", "thinking", "gguf", "answers"} & {*job["extra"], *job["ask"]}:
        raise NotOffered(f"no setting of the trainer for {', '.join(missing)}")
    micro, processes = job["micro_batch_size"], job["processes"]
    settings = {name: job[name] for name in ("learning_rate", "optim", "max_length", "seed")} | SAME
    settings |= {"max_steps": job["steps"], "lr_scheduler_type": job["schedule"]}
    settings |= {"per_device_train_batch_size": micro}
    settings |= {"gradient_accumulation_steps": job["batch_size"] // micro // processes}
    settings |= {"save_steps": job["save_steps"]} if job["save_steps"] else {}
    settings |= evaluation(job) or ({} if job["save_steps"] else {"save_strategy": "no"})
    settings |= {"packing": True} if job["packing"] else {}
    if job["column"] == "documented" and job["kind"] == "messages" and job["train_on"] == "assistant":
        settings["assistant_only_loss"] = True
    return settings | ({"gradient_checkpointing": True} if job["extra"].get("gradient_checkpointing") else {})


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    config, trainer = (DPOConfig, DPOTrainer) if job["kind"] == "preference" else (SFTConfig, SFTTrainer)
    rows = load_dataset("json" if job["file"] == "jsonl" else job["file"], data_files=job["rows"], split="train")
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, **job["extra"].get("lora", {})})
    tested = load_dataset("json", data_files=job["test_rows"], split="train") if "losses" in job["ask"] else None
    loading: dict[str, Any] = {"dtype": torch.float32}
    loading |= {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if job["method"] == "qlora" else {}
    training = trainer(
        model=job["model"],
        args=config(output_dir=job["out"], model_init_kwargs=loading, **settings),
        train_dataset=rows,
        eval_dataset=tested,
        peft_config=lora if job["method"] != "full" else None,
    )
    training.train(resume_from_checkpoint=find_checkpoint(job))
    folder = Path(job["out"]) / "model"
    training.save_model(str(folder))
    if "merged" in job["ask"]:
        AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(f"{job['out']}/merged")
    return {"model": folder, "merged": f"{job['out']}/merged", **read_losses(Path(job["out"]))}


def find_checkpoint(job: Job) -> str | None:
    return str(Path(job["resume_from"]) / f"checkpoint-{job['save_steps']}") if job["resume_from"] else None


if __name__ == "__main__":
    serve("trl", configure, train, DOCUMENTED)
