"""One training by a plain script, transformers' Trainer and PEFT: `python run_trainer.py ASKED.json ANSWER.json`.

It is a typical script: rows tokenised with the chat template, labels on the answer, a padding collator.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from clock import Clock, answer, read_asked
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from watch import describe_training, read_pairs, watch


def main() -> None:
    asked, path = read_asked()
    clock = Clock(sums=False)
    loaded = watch(clock)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    torch.manual_seed(asked.seed)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype))
    shape = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=get_peft_model(model, shape),
            args=TrainingArguments(**describe_training(asked, folder, packed=False)),
            train_dataset=Dataset.from_list([encode(tokenizer, pair, asked.pack) for pair in read_pairs(asked.rows)]),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[loaded],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    answer(path, clock.found())


def encode(tokenizer: Any, pair: dict[str, Any], longest: int) -> dict[str, list[int]]:
    """Tokenise a row; only the answer and its end are learned."""
    prompt = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(pair["prompt"] + pair["completion"], tokenize=False)
    asked, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
    labels = [-100] * len(asked) + ids[len(asked) :]
    return {"input_ids": ids[:longest], "attention_mask": [1] * len(ids[:longest]), "labels": labels[:longest]}


if __name__ == "__main__":
    main()
