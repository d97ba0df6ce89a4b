"""Scores of a reward model by the plain classes of transformers and PEFT; as a script, from JSON to JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer


def score(folder: str, conversations: list[list[dict[str, str]]]) -> list[float]:
    """Score the answers that conversations end with, in one padded batch; an adapter's folder holds the config, too."""
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (config.num_labels, config.id2label) == (1, {0: "reward"})
    assert config.pad_token_id == tokenizer.pad_token_id is not None
    model: Any
    if folder.endswith("adapter"):
        own = {"num_labels": config.num_labels, "pad_token_id": config.pad_token_id}
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, **own)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    if tokenizer.chat_template:
        texts = [tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n") for turns in conversations]
    else:
        texts = ["\n".join(turn["content"] for turn in turns) + tokenizer.eos_token for turns in conversations]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return [float(value) for value in logits[:, 0]]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps([score(folder, asked["conversations"]) for folder in asked["folders"]]))
    assert "llmtune" not in sys.modules
