"""LitGPT: `litgpt convert_to_litgpt`, `finetune_full`, `convert_from_litgpt`, for rows of one question and answer."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from conformance import adapter
from conformance.adapter import Configuration, Job, NotOffered
from litgpt.__main__ import main
from litgpt.config import Config, name_to_config
from safetensors.torch import save_file

STYLES = {
    "qwen2.5": ("Qwen2.5-0.5B", "qwen2.5"),
    "qwen3": ("Qwen3-0.6B", "qwen3"),
    "llama3": ("Llama-3.2-1B", "llama3"),
}
SHAPE = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 64, "head_size": 16, "intermediate_size": 128}


def configure(job: Job) -> Configuration:
    """Return the options. The prompt's style is the model's; `mask_prompt` is documented."""
    if job["kind"] != "messages" or job["method"] != "full" or job["ask"].keys() - {"losses"} or job["file"] != "jsonl":
        raise NotOffered("rows of one question and answer only; adapters in a format of its own")
    if job["packing"] or job["processes"] > 1 or job["steps"] > 1 or job["train_on"] == "last" or job["extra"]:
        raise NotOffered("no packing, no processes on CPUs, no schedule without warmup, no such setting")
    if job["max_grad_norm"] or job["weight_decay"] or job["warmup_steps"] or job["epochs"]:
        raise NotOffered("no clipping on one device; the adapter sets no decay, warm-up or epochs")
    settings = {"precision": "32-true", "seed": job["seed"], "data": "JSON", "train.max_seq_length": job["max_length"]}
    settings["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": job["learning_rate"]}}
    # the first step of its warmup has a rate of 0, and a warmup of 0 steps divides by 0
    settings |= {"train.lr_warmup_steps": 1, "train.max_steps": job["steps"] + 1, "train.epochs": 9}
    settings |= {"train.global_batch_size": job["batch_size"], "train.micro_batch_size": job["micro_batch_size"]}
    settings |= {"data.prompt_style": name_style(job)[1], "data.num_workers": 0, "eval.final_validation": True}
    masked = job["column"] == "documented" and job["train_on"] != "all"
    return settings | ({"data.mask_prompt": True} if masked else {})


def name_style(job: Job) -> tuple[str, str]:
    return next(names for key, names in STYLES.items() if Path(job["model"]).name.startswith(key))


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out, name, model = Path(job["out"]), f"{name_style(job)[0]}-tiny", Path(job["out"]) / "model"
    shutil.copytree(job["model"], out / "base")
    (out / "data").mkdir()
    for part, rows in (("train", job["rows"]), ("val", job["test_rows"] or job["rows"])):
        (out / "data" / f"{part}.json").write_text(
            json.dumps([as_instruction(row) for row in adapter.read_lines(Path(rows))])
        )
    config = json.loads((out / "base" / "config.json").read_text())
    sizes = SHAPE | {"name": name, "block_size": 2048, "rope_base": 10000, "rope_adjustments": None}
    sizes |= {"vocab_size": config["vocab_size"], "padded_vocab_size": config["vocab_size"]}
    family = asdict(Config.from_name(name_style(job)[0]))  # a new size of it, as the guide on new models does
    name_to_config[name] = family | sizes | {"norm_eps": config["rms_norm_eps"]}
    adapter.call(main, "litgpt", "convert_to_litgpt", str(out / "base"), "--model_name", name)
    options = settings | {"data.json_path": out / "data", "out_dir": out / "tuned"}
    adapter.call(
        main,
        "litgpt",
        "finetune_full",
        str(out / "base"),
        *(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in options.items()),
    )
    adapter.call(main, "litgpt", "convert_from_litgpt", str(out / "tuned" / "final"), str(model))
    weights = {key: value.clone() for key, value in torch.load(model / "model.pth").items()}
    save_file(weights, model / "model.safetensors")
    for path in (out / "tuned" / "final").glob("*.json*"):
        shutil.copy(path, model)
    losses = re.findall(r"val loss: ([0-9.]+)", (out / "log.txt").read_text(errors="replace"))
    frozen = ["model.embed_tokens", "lm_head"] if config["tie_word_embeddings"] else []  # has a case of its own
    return {"model": model, "frozen": frozen, "losses": [float(loss) for loss in losses]}


def as_instruction(row: dict[str, Any]) -> dict[str, str]:
    turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
    system = {"sys_prompt": turns.pop(0)[1]} if turns[0][0] == "system" else {}
    texts = all(isinstance(text, str) for _, text in turns)
    if [role for role, _ in turns] != ["user", "assistant"] or row.get("tools") or not texts:
        raise NotOffered("rows of one question and answer only")
    return system | {"instruction": turns[0][1], "output": turns[1][1]}


if __name__ == "__main__":
    adapter.serve("litgpt", configure, train, torchrun=False)
