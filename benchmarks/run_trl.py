"""One training by TRL's SFTTrainer, packed or padded: `python run_trl.py ASKED.json ANSWER.json`, by the harness.

The loss covers only the answers, as in the other tools: from rows of prompt and completion TRL learns the latter.
A micro-batch has one pack, since TRL concatenates the packs of a micro-batch, and one mask over several packs costs
more than separate masks. The padded variant follows TRL's quick start: eight rows, padded to the longest.
"""

from __future__ import annotations

import tempfile
from dataclasses import fields

import torch
from clock import Clock, answer, read_asked
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer
from watch import describe_training, read_pairs, watch


def main() -> None:
    asked, path = read_asked()
    packed = asked.tool == "trl-packed"
    clock = Clock(sums=False)
    loaded = watch(clock)
    with tempfile.TemporaryDirectory() as folder:
        settings = describe_training(asked, folder, packed=packed)
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype)),
            args=SFTConfig(**settings, **keep_activations(), packing=packed, max_length=asked.pack),
            train_dataset=Dataset.from_list(read_pairs(asked.rows)),
            processing_class=AutoTokenizer.from_pretrained(asked.model),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[loaded],
        )
        trainer.remove_callback(PrinterCallback)
        assert trainer.completion_only_loss, "rows are prompts with their completions"
        trainer.train()
        assert not trainer.accelerator.unwrap_model(trainer.model).is_gradient_checkpointing, "it costs time"
    answer(path, clock.found())


def keep_activations() -> dict[str, bool]:
    """Return the option that turns off TRL's default gradient checkpointing, by its name in transformers."""
    names = {field.name for field in fields(SFTConfig)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": False}


if __name__ == "__main__":
    main()
