"""transformers' Trainer with PEFT: a plain script, as the documentation of both shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conformance import adapter
from conformance.adapter import Configuration, Job, NotOffered
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

KINDS = {"seq2seq": AutoModelForSeq2SeqLM, "classify": AutoModelForSequenceClassification}
LABELS = {"animal": 0, "colour": 1}
DOCUMENTED = {
    "the whole text": "https://huggingface.co/docs/transformers/chat_templating#model-training",
    "an answer cut off": "https://huggingface.co/docs/transformers/pad_truncation",
    **adapter.TEMPLATES,
    **adapter.MODULES,
}


def configure(job: Job) -> Configuration:
    """Return the training arguments. `model_init` is the documented way to a seed that covers a new adapter."""
    if job["kind"] not in ("messages", "text", "seq2seq", "classify") or job["packing"]:
        raise NotOffered("no documented way to train on packed rows, or rows of this kind")
    settings = adapter.trainer_arguments(job) | {"weight_decay": 0.0, "warmup_steps": 0}
    unknown = {"validation", "add_tokens", "thinking", "gguf", "answers", "qlora"}
    if missing := unknown & {*job["extra"], *job["ask"], job["method"]}:
        raise NotOffered(f"no setting of the trainer for {', '.join(missing)}")
    settings |= {"model_init": True} if job["column"] == "documented" and job["method"] == "lora" else {}
    return settings | ({"gradient_checkpointing": True} if job["extra"].get("gradient_checkpointing") else {})


def encode(row: dict[str, Any], tokenizer: Any, job: Job) -> dict[str, Any]:
    """Tokenise a row as the guides on chat templates, language modelling and translation do."""
    if job["kind"] == "seq2seq":
        return dict(tokenizer(row["source"], text_target=row["target"], max_length=job["max_length"], truncation=True))
    if job["kind"] == "classify":
        return dict(tokenizer(row["text"], truncation=True)) | {"label": LABELS[row["label"]]}
    if job["kind"] == "text":
        return dict(tokenizer(row["text"], truncation=True, max_length=job["max_length"]))
    text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    return dict(tokenizer(text, add_special_tokens=False, truncation=True, max_length=job["max_length"]))


def make_model(job: Job) -> Any:
    """Load the model, with a new adapter for LoRA."""
    named = {"id2label": dict(enumerate(LABELS)), "label2id": LABELS} if job["kind"] == "classify" else {}
    model = KINDS.get(job["kind"], AutoModelForCausalLM).from_pretrained(job["model"], dtype=torch.float32, **named)
    if job["method"] == "full":
        return model
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **job["extra"].get("lora", {})}
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS" if named else "CAUSAL_LM", **lora))


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    folder, tokenizer = f"{job['out']}/model", AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = None if "model_init" in settings else make_model(job)
    arguments = {name: value for name, value in settings.items() if name != "model_init"}
    rows = load_dataset("json" if job["file"] == "jsonl" else job["file"], data_files=job["rows"], split="train")
    collators = {"seq2seq": DataCollatorForSeq2Seq(tokenizer, model), "classify": DataCollatorWithPadding(tokenizer)}
    tested = load_dataset("json", data_files=job["test_rows"], split="train") if "losses" in job["ask"] else None
    trainer = Trainer(
        model=model,
        model_init=None if model else lambda: make_model(job),
        args=TrainingArguments(output_dir=folder, **arguments),
        train_dataset=rows.map(lambda row: encode(row, tokenizer, job), remove_columns=rows.column_names),
        eval_dataset=tested and tested.map(lambda row: encode(row, tokenizer, job), remove_columns=rows.column_names),
        data_collator=collators.get(job["kind"]) or DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=adapter.checkpoint(job))
    trainer.save_model(folder)
    tokenizer.save_pretrained(folder)
    if "merged" in job["ask"]:
        trainer.model.merge_and_unload().save_pretrained(f"{job['out']}/merged")
    return {"model": folder, "merged": f"{job['out']}/merged", **adapter.read_losses(Path(folder))}


if __name__ == "__main__":
    adapter.serve("transformers", configure, train, DOCUMENTED)
