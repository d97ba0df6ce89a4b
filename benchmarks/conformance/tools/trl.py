"""TRL: SFTTrainer, DPOTrainer and GRPOTrainer, with rows as its documentation describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conformance import adapter
from conformance.adapter import Configuration, Job, NotOffered
from conformance.formats import as_parts
from datasets import Dataset, Image, load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import remove_none_values

SAME = {"bf16": False, "save_only_model": False}
MODULES = {"gemma3": {"target_modules": "all-linear"}}
"""PEFT chooses no modules for it: https://huggingface.co/docs/trl/lora_without_regret"""


def configure(job: Job) -> Configuration:
    """Return the arguments of the trainer's configuration."""
    if job["kind"] not in ("messages", "prompt_completion", "text", "preference", "pictures", "prompts"):
        raise NotOffered(f"no trainer for {job['kind']}")
    if "processor" in job["ask"]:
        raise NotOffered("no command that merges: a script saves the processor")
    if missing := {"validation", "add_tokens", "thinking", "gguf", "answers"} & {*job["extra"], *job["ask"]}:
        raise NotOffered(f"no setting of the trainer for {', '.join(missing)}")
    settings = adapter.trainer_arguments(job) | SAME
    if job["kind"] == "prompts":
        return settings | sampling(job)
    settings |= {"max_length": job["max_length"]}
    settings |= {"packing": True} if job["packing"] else {}
    documented, family = job["column"] == "documented", Path(job["model"]).name.partition("-")[0]
    if documented and job["kind"] == "pictures":
        settings["max_length"] = None  # https://huggingface.co/docs/trl/sft_trainer#training-vision-language-models
    if documented and job["file"] == "parquet":
        settings["remove_none_values"] = True
    if documented and job["kind"] in ("messages", "pictures") and job["train_on"] == "assistant":
        settings["assistant_only_loss"] = True
    if job["method"] != "full":
        settings["peft_config"] = {"r": 4, "lora_alpha": 8, **MODULES.get(family, {}), **job["extra"].get("lora", {})}
    if job["method"] == "qlora":
        settings["quantization_config"] = {"load_in_4bit": True}
    return settings | ({"gradient_checkpointing": True} if job["extra"].get("gradient_checkpointing") else {})


def sampling(job: Job) -> Configuration:
    """Return the settings of GRPO, by the names of TRL."""
    extra = job["extra"]
    settings = {"num_generations": extra["samples"], "max_completion_length": extra["max_new_tokens"]}
    settings |= {"mask_truncated_completions": extra["mask_truncated"]} if "mask_truncated" in extra else {}
    return settings | ({"loss_type": extra["loss"]} if "loss" in extra else {}) | extra["sampling"]


def reinforce(job: Job, settings: Configuration) -> dict[str, Any]:
    def score(completions: list[Any], completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        return adapter.reward(job, number, [messages[0]["content"] for messages in completions], completion_ids)

    folder, rows = f"{job['out']}/model", adapter.read_lines(Path(job["rows"]))
    training = GRPOTrainer(
        model=job["model"],
        args=GRPOConfig(output_dir=folder, model_init_kwargs={"dtype": torch.float32}, **settings),
        train_dataset=Dataset.from_list([{"prompt": row["messages"], "number": i} for i, row in enumerate(rows)]),
        reward_funcs=score,
    )
    training.train()
    training.save_model(folder)
    return {"model": folder, **adapter.read_samples(job)}


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    if job["kind"] == "prompts":
        return reinforce(job, settings)
    settings, folder = dict(settings), f"{job['out']}/model"
    config, trainer = (DPOConfig, DPOTrainer) if job["kind"] == "preference" else (SFTConfig, SFTTrainer)
    rows = load_dataset("json" if job["file"] == "jsonl" else job["file"], data_files=job["rows"], split="train")
    if settings.pop("remove_none_values", False):
        # https://github.com/huggingface/trl/blob/main/MIGRATION.md, https://huggingface.co/docs/trl/dataset_formats
        rows = Dataset.from_list([remove_none_values(row) for row in rows], on_mixed_types="use_json")
    if job["kind"] == "pictures":  # https://huggingface.co/docs/trl/dataset_formats#vision-datasets
        rows = Dataset.from_list([as_parts(row) for row in rows]).cast_column("images", [Image()])
    lora, quantized = settings.pop("peft_config", None), settings.pop("quantization_config", None)
    tested = load_dataset("json", data_files=job["test_rows"], split="train") if "losses" in job["ask"] else None
    loading: dict[str, Any] = {"dtype": torch.float32}
    loading |= {"quantization_config": BitsAndBytesConfig(**quantized)} if quantized else {}
    training = trainer(
        model=job["model"],
        args=config(output_dir=folder, model_init_kwargs=loading, **settings),
        train_dataset=rows,
        eval_dataset=tested,
        peft_config=LoraConfig(**lora) if lora else None,
    )
    training.train(resume_from_checkpoint=adapter.checkpoint(job))
    training.save_model(folder)
    if "merged" in job["ask"]:
        AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(f"{job['out']}/merged")
    return {"model": folder, "merged": f"{job['out']}/merged", **adapter.read_losses(Path(folder))}


if __name__ == "__main__":
    adapter.serve("trl", configure, train)
