"""transformers' Trainer with PEFT: a plain script, as the documentation of both shows it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from conformance import adapter
from conformance.adapter import Configuration, Job, NotOffered
from conformance.formats import as_parts
from datasets import Dataset, Image, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

KINDS = {"seq2seq": AutoModelForSeq2SeqLM, "classify": AutoModelForSequenceClassification}
KINDS |= {"pictures": AutoModelForImageTextToText}
LABELS = {"animal": 0, "colour": 1}
COLLATORS = {"seq2seq": "DataCollatorForSeq2Seq", "classify": "DataCollatorWithPadding", "pictures": "collate"}


def configure(job: Job) -> Configuration:
    """Return the training arguments. `model_init` is the documented way to a seed that covers a new adapter."""
    if job["kind"] not in ("messages", "text", "seq2seq", "classify", "pictures") or job["packing"]:
        raise NotOffered("no documented way to train on packed rows, or rows of this kind")
    settings = adapter.trainer_arguments(job) | {"tokenizer": {"truncation": True, "max_length": job["max_length"]}}
    settings["data_collator"] = COLLATORS.get(job["kind"], "DataCollatorForLanguageModeling")
    unknown = {"validation", "add_tokens", "thinking", "gguf", "answers", "qlora"}
    if "processor" in job["ask"]:
        raise NotOffered("no command that merges: a script saves the processor")
    if missing := unknown & {*job["extra"], *job["ask"], job["method"]}:
        raise NotOffered(f"no setting of the trainer for {', '.join(missing)}")
    settings |= {"model_init": True} if job["column"] == "documented" and job["method"] == "lora" else {}
    if job["kind"] == "pictures":
        settings["tokenizer"] = {}
    if job["method"] == "lora":
        settings["peft_config"] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
        settings["peft_config"] |= job["extra"].get("lora", {})
    return settings | ({"gradient_checkpointing": True} if job["extra"].get("gradient_checkpointing") else {})


def encode(row: dict[str, Any], tokenizer: Any, kind: str, cut: Configuration) -> dict[str, Any]:
    """Tokenise a row as the guides on chat templates, language modelling and translation do."""
    if kind == "seq2seq":
        return dict(tokenizer(row["source"], text_target=row["target"], **cut))
    if kind == "classify":
        return dict(tokenizer(row["text"], **cut)) | {"label": LABELS[row["label"]]}
    if kind == "text":
        return dict(tokenizer(row["text"], **cut))
    text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    return dict(tokenizer(text, add_special_tokens=False, **cut))


def collate(rows: list[dict[str, Any]], processor: Any) -> Any:
    """Encode rows with pictures as Hugging Face's notebooks do: padding and pictures are not learned."""
    texts = [processor.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    batch = processor(text=texts, images=[row["images"] for row in rows], return_tensors="pt", padding=True)
    hidden = [processor.tokenizer.pad_token_id, processor.tokenizer.image_token_id]
    return batch | {
        "labels": batch["input_ids"].masked_fill(torch.isin(batch["input_ids"], torch.tensor(hidden)), -100)
    }


def make_model(job: Job, lora: Configuration | None) -> Any:
    """Load the model, with a new adapter for LoRA."""
    named = {"id2label": dict(enumerate(LABELS)), "label2id": LABELS} if job["kind"] == "classify" else {}
    model = KINDS.get(job["kind"], AutoModelForCausalLM).from_pretrained(job["model"], dtype=torch.float32, **named)
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS" if named else "CAUSAL_LM", **lora))


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    folder, sees = f"{job['out']}/model", job["kind"] == "pictures"
    tokenizer = (AutoProcessor if sees else AutoTokenizer).from_pretrained(job["model"])
    if not sees:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = dict(settings)
    _, cut, lora = (arguments.pop(name, None) for name in ("data_collator", "tokenizer", "peft_config"))
    model = None if arguments.pop("model_init", False) else make_model(job, lora)
    rows = load_dataset("json" if job["file"] == "jsonl" else job["file"], data_files=job["rows"], split="train")
    tested = load_dataset("json", data_files=job["test_rows"], split="train") if "losses" in job["ask"] else None

    def encode_row(row: dict[str, Any]) -> dict[str, Any]:
        return encode(row, tokenizer, job["kind"], cut or {})

    if sees:
        rows = Dataset.from_list([as_parts(row) for row in rows]).cast_column("images", [Image()])
        collator: Any = partial(collate, processor=tokenizer)
    else:
        rows = rows.map(encode_row, remove_columns=rows.column_names)
        collators = {"seq2seq": DataCollatorForSeq2Seq(tokenizer, model)}
        collators |= {"classify": DataCollatorWithPadding(tokenizer)}
        collator = collators.get(job["kind"]) or DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(
        model=model,
        model_init=None if model else lambda: make_model(job, lora),
        args=TrainingArguments(output_dir=folder, remove_unused_columns=not sees, **arguments),
        train_dataset=rows,
        eval_dataset=tested and tested.map(encode_row, remove_columns=tested.column_names),
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=adapter.checkpoint(job))
    trainer.save_model(folder)
    tokenizer.save_pretrained(folder)
    if "merged" in job["ask"]:
        trainer.model.merge_and_unload().save_pretrained(f"{job['out']}/merged")
    return {"model": folder, "merged": f"{job['out']}/merged", **adapter.read_losses(Path(folder))}


if __name__ == "__main__":
    adapter.serve("transformers", configure, train)
