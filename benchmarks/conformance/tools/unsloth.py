"""unsloth: FastLanguageModel with TRL's SFTTrainer, as its notebooks show it, on its CPU backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conformance import adapter
from conformance.adapter import Configuration, Job, NotOffered
from conformance.formats import as_conversation, as_messages
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel
from unsloth.chat_templates import train_on_responses_only

PARTS = {
    "qwen": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "llama": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
}
"""Where questions and answers begin: the arguments of `train_on_responses_only`."""


def configure(job: Job) -> Configuration:
    """Return the trainer's arguments, and those of the functions of unsloth that the documentation names."""
    job, extra = as_conversation(job), job["extra"]
    if job["kind"] not in ("messages", "text") or job["file"] != "jsonl" or job["ask"].keys() & {"gguf", "answers"}:
        raise NotOffered(f"no notebook for rows of {job['kind']}; an export to GGUF needs a clone of llama.cpp")
    if extra.keys() - {"lora", "gradient_checkpointing"} or job["processes"] > 1:
        raise NotOffered(f"no setting of the trainer for {', '.join(extra) or 'several processes on CPUs'}")
    settings = adapter.trainer_arguments(job) | {"max_length": job["max_length"], "packing": job["packing"]}
    settings |= {"dataset_num_proc": 1}
    if job["column"] == "documented" and job["kind"] == "messages" and job["train_on"] != "all":
        settings["train_on_responses_only"] = {"last_response_only": True} if job["train_on"] == "last" else {}
    return settings


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    adapter.rewrite(job, as_messages)
    adapter.isolated(lambda: run(job, dict(settings)))
    found = {"model": f"{job['out']}/model", "merged": f"{job['out']}/merged"}
    # SFTTrainer adds the end token to a text, which Qwen's conversation has before its last line break.
    found |= {"after": 2} if "qwen" in Path(job["model"]).name and job["kind"] != "text" else {}
    return found | adapter.read_losses(Path(job["out"]))


def run(job: Job, settings: Configuration) -> None:
    out, lora = job["out"], "lora" in job["method"]
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"],
        max_seq_length=job["max_length"],
        dtype=torch.float32,
        load_in_4bit=job["method"] == "qlora",
        full_finetuning=not lora,
    )
    if lora:
        given = {"r": 4, "lora_alpha": 8, **job["extra"].get("lora", {})}
        model = FastLanguageModel.get_peft_model(model, lora_dropout=0.0, **given)

    def read(path: str) -> Dataset:
        rows = adapter.read_lines(Path(path))
        texts = [row["text"] if "text" in row else render(tokenizer, row) for row in rows]
        return Dataset.from_dict({"text": texts})

    masked = settings.pop("train_on_responses_only", None)
    tested = read(job["test_rows"]) if "losses" in job["ask"] else None
    config = SFTConfig(output_dir=f"{out}/runs", dataset_text_field="text", bf16=False, fp16=False, **settings)
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=read(job["rows"]), eval_dataset=tested, args=config
    )
    if masked is not None:
        question, answer = PARTS["llama" if "llama" in Path(job["model"]).name else "qwen"]
        trainer = train_on_responses_only(trainer, instruction_part=question, response_part=answer, **masked)
    resumed = f"{job['resume_from']}/runs/checkpoint-{job['save_steps']}" if job["resume_from"] else None
    trainer.train(resume_from_checkpoint=resumed)
    model.save_pretrained(f"{out}/model")
    tokenizer.save_pretrained(f"{out}/model")
    if "merged" in job["ask"]:
        model.save_pretrained_merged(f"{out}/merged", tokenizer, save_method="merged_16bit")


def render(tokenizer: Any, row: dict[str, Any]) -> str:
    text: str = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    return text


if __name__ == "__main__":
    adapter.serve("unsloth", configure, train, torchrun=False)
