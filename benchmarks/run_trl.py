"""One training by TRL's SFTTrainer, packed or padded: `python run_trl.py ASKED.json ANSWER.json`, by the harness.

The loss is that of the answers alone, as in the other tools: TRL learns the completion of rows with a prompt and one.
Packs stand one in a micro-batch, since TRL joins the packs of a micro-batch end to end, and a mask over several packs
costs more than as many masks. Padded is how its quick start runs it: eight rows, padded to the longest.
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
    """Return what turns off TRL's default of computing activations twice, by the name that transformers has for it."""
    names = {field.name for field in fields(SFTConfig)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": False}


if __name__ == "__main__":
    main()
