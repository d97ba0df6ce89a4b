"""LitGPT: `litgpt convert_to_litgpt`, `finetune_full`, `convert_from_litgpt`, for rows of one question and answer."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from conformance.adapter import Configuration, Job, NotOffered, isolated, serve
from litgpt.__main__ import main
from litgpt.config import Config, name_to_config
from safetensors.torch import save_file

STYLES = {
    "qwen2.5": ("Qwen2.5-0.5B", "qwen2.5"),
    "qwen3": ("Qwen3-0.6B", "qwen3"),
    "llama3": ("Llama-3.2-1B", "llama3"),
}


def configure(job: Job) -> Configuration:
    """Return the options of the command. The prompt's style is the model's; `mask_prompt` is documented."""
    if job["kind"] != "messages" or job["method"] != "full" or job["ask"].keys() - {"losses"}:
        raise NotOffered("rows of one question and answer only; adapters in a format of its own")
    unknown = job["packing"] or job["processes"] > 1 or job["steps"] > 1 or job["train_on"] == "last" or job["extra"]
    if unknown or job["file"] != "jsonl":
        raise NotOffered("no packing, no processes on CPUs, no schedule without warmup, no mask of earlier answers")
    style = next(style for name, (_, style) in STYLES.items() if Path(job["model"]).name.startswith(name))
    settings = {"precision": "32-true", "seed": job["seed"], "data": "JSON", "optimizer.class_path": "torch.optim.SGD"}
    settings |= {"optimizer.init_args.lr": job["learning_rate"], "train.max_seq_length": job["max_length"]}
    # the first step of its warmup has a rate of 0, and a warmup of 0 steps divides by 0
    settings |= {"train.lr_warmup_steps": 1, "train.max_steps": job["steps"] + 1, "train.epochs": 9}
    settings |= {"train.global_batch_size": job["batch_size"], "train.micro_batch_size": job["micro_batch_size"]}
    settings |= {"data.prompt_style": style, "data.num_workers": 0}
    masked = job["column"] == "documented" and job["train_on"] != "all"
    return settings | ({"data.mask_prompt": True} if masked else {})


def train(job: Job, settings: Configuration) -> dict[str, Any]:
    out = Path(job["out"])
    shutil.copytree(job["model"], out / "base")
    (out / "data").mkdir()
    for name, source in (("train", job["rows"]), ("val", job["test_rows"] or job["rows"])):
        lines = [as_instruction(json.loads(line)) for line in Path(source).read_text().splitlines()]
        (out / "data" / f"{name}.json").write_text(json.dumps(lines))
    family, own = (
        next(names for key, names in STYLES.items() if Path(job["model"]).name.startswith(key)),
        Path(job["model"]),
    )
    shape = json.loads((own / "config.json").read_text())
    sizes = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": 64, "head_size": 16, "intermediate_size": 128}
    sizes |= {"block_size": 2048, "vocab_size": shape["vocab_size"], "padded_vocab_size": shape["vocab_size"]}
    sizes |= {
        "rope_base": 10000,
        "rope_adjustments": None,
        "norm_eps": shape["rms_norm_eps"],
        "name": f"{family[0]}-tiny",
    }
    name_to_config[f"{family[0]}-tiny"] = {
        **vars(Config.from_name(family[0])),
        **sizes,
    }  # as the guide on new models does
    call("convert_to_litgpt", str(out / "base"), "--model_name", f"{family[0]}-tiny")
    options = {"data.json_path": out / "data", "out_dir": out / "tuned", "eval.final_validation": True} | settings
    call("finetune_full", str(out / "base"), *(f"--{name}={value}" for name, value in options.items()))
    call("convert_from_litgpt", str(out / "tuned" / "final"), str(out / "model"))
    weights = torch.load(out / "model" / "model.pth")
    save_file({name: value.clone() for name, value in weights.items()}, out / "model" / "model.safetensors")
    for path in (out / "tuned" / "final").glob("*.json*"):
        shutil.copy(path, out / "model")
    logged = [
        line.split("val loss: ")[1].split()[0]
        for line in (out / "log.txt").read_text().splitlines()
        if "val loss: " in line
    ]
    found = {
        "model": out / "model",
        "frozen": ["model.embed_tokens", "lm_head"] if shape["tie_word_embeddings"] else [],
    }
    return found | {"losses": [float(loss) for loss in logged]}


def as_instruction(row: dict[str, Any]) -> dict[str, str]:
    turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
    system = {"sys_prompt": turns.pop(0)[1]} if turns[0][0] == "system" else {}
    if (
        [role for role, _ in turns] != ["user", "assistant"]
        or row.get("tools")
        or not all(isinstance(t, str) for _, t in turns)
    ):
        raise NotOffered("rows of one question and answer only")
    return system | {"instruction": turns[0][1], "output": turns[1][1]}


def call(*words: str) -> None:
    sys.argv = ["litgpt", *words]
    isolated(main)


if __name__ == "__main__":
    serve("litgpt", configure, train)
