"""Whether a migrated recipe trains as the other tool does: TRL, LLaMA-Factory and axolotl next to llmtune.

    python benchmarks/migration.py --llamafactory PYTHON --axolotl PYTHON --json migration.json

Each tool trains a tiny Llama with SmolLM2's tokenizer on the same 400 rows by a configuration of its own, packed and
not packed, with a stated and with its default adapter. `llmtune recipes migrate` turns that file into a recipe. It is
trained twice. The first run draws its own steps: their number and tokens are compared. The second run begins with the
other tool's adapter and is given the rows that the other tool had in each step: the losses are compared. All in float32
on the CPU, without dropout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS, SEED, LENGTH, WORDS = 400, 7, 256, 50
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Without a line break after a turn, which the other tools learn and llmtune does not."""
SHARED = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 1,
    "learning_rate": 2e-3,
    "bf16": False,
    "logging_steps": 1,
    "output_dir": "out",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}
TRL = {"model_name_or_path": "model", "dataset_name": "rows", "use_peft": True, "max_length": LENGTH}
FACTORY = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "model_name_or_path": "model",
    "template": "no_line_break",
    "dataset": "rows",
    "dataset_dir": ".",
    "cutoff_len": LENGTH,
    "overwrite_output_dir": True,
    "flash_attn": "sdpa",
}
AXOLOTL = {
    "base_model": "model",
    "datasets": [{"path": "rows/train.jsonl", "ds_type": "json", "type": "chat_template"}],
    "chat_template": "tokenizer_default",
    "adapter": "lora",
    "sequence_len": LENGTH,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_epochs": 1,
    "learning_rate": 2e-3,
    "optimizer": "adamw_torch",
    "warmup_steps": 0,
    "bf16": False,
    "logging_steps": 1,
    "output_dir": "out",
    "sdp_attention": True,
}
FEWER = {"gradient_accumulation_steps": 2}
"""Packed sequences hold more tokens than rows do: with fewer of them an epoch still has 20 steps."""
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "trl": {
        "not packed, stated": {**TRL, **SHARED, "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.0},
        "not packed, default": {**TRL, **SHARED, "lora_dropout": 0.0},
        "packed, stated": {
            **TRL,
            **SHARED,
            "lora_r": 8,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "packing": True,
            **FEWER,
        },
        "packed, default": {**TRL, **SHARED, "lora_dropout": 0.0, "packing": True, **FEWER},
    },
    "llamafactory": {
        "not packed, stated": {**FACTORY, **SHARED, "lora_rank": 16, "lora_alpha": 32, "lora_target": "q_proj,v_proj"},
        "not packed, default": {**FACTORY, **SHARED},
        "packed, stated": {**FACTORY, **SHARED, "lora_rank": 16, "lora_alpha": 32, "neat_packing": True, **FEWER},
        "packed, default": {**FACTORY, **SHARED, "lora_rank": 64, "neat_packing": True, **FEWER},
    },
    "axolotl": {
        "not packed, stated": {**AXOLOTL, "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
        "packed, stated": {
            **AXOLOTL,
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_linear": True,
            "sample_packing": True,
            **FEWER,
        },
    },
}


def main() -> int:
    """Run the cases and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamafactory", help="python of an environment with LLaMA-Factory")
    parser.add_argument("--axolotl", help="python of an environment with axolotl")
    parser.add_argument("--only", default="", help="cases whose tool and name contain this")
    parser.add_argument("--json", type=Path, help="write what was found, with all losses")
    asked = parser.parse_args()
    pythons = {"trl": sys.executable, "llamafactory": asked.llamafactory, "axolotl": asked.axolotl}
    found = []
    with TemporaryDirectory() as folder:
        prepare(Path(folder))
        for tool, cases in CASES.items():
            for name, config in cases.items():
                if pythons[tool] and asked.only in f"{tool} {name}":
                    found.append({"tool": tool, "case": name, **compare(Path(folder), tool, pythons[tool], config)})
                    print(describe(found[-1]), flush=True)
                    if asked.json:
                        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


def prepare(folder: Path) -> None:
    """Write the rows, their listing for LLaMA-Factory, and a tiny model with a real tokenizer."""
    import torch
    from rich.console import Console
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from workload import chat_rows

    from llmtune.model.builtin_models import resolve_builtin

    rows = (row for row in chat_rows(ROWS * 4, SEED) if sum(len(m["content"].split()) for m in row["messages"]) < WORDS)
    lines = [json.dumps(row) for row, _ in zip(rows, range(ROWS), strict=False)]
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {
        "file_name": "rows/train.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags,
    }
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(resolve_builtin("smollm2-135m-instruct", Console()))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **shape, **ends, pad_token_id=tokenizer.pad_token_id)
    )
    model.save_pretrained(folder / "model")


def compare(folder: Path, tool: str, python: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train by the other tool, migrate, train twice by llmtune."""
    case = folder / f"{tool}-{len(list(folder.iterdir()))}"
    case.mkdir()
    for name in ("rows", "dataset_info.json", "model"):
        (case / name).symlink_to(folder / name)
    (case / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    call([python, HERE / "run_migration_peer.py", tool, "config.yaml", "theirs.json", "start"], case)
    theirs = json.loads((case / "theirs.json").read_text(encoding="utf-8"))
    llmtune = [sys.executable, "-m", "llmtune"]
    call([*llmtune, "recipes", "migrate", "config.yaml", "--tool", tool, "--out", "recipe.yaml"], case)
    exact = ["--set", "model.dtype=float32", "--offline"]
    call([*llmtune, "train", "recipe.yaml", "--out", "own", *exact], case)
    replay = [sys.executable, HERE / "migration_replay.py", "recipe.yaml", "own", "theirs.json", "start"]
    call(replay, case)
    own, replayed = (read_steps(case / name / "metrics.jsonl") for name in ("own", "replayed"))
    adapter = json.loads(next((case / "own").rglob("adapter_config.json")).read_text(encoding="utf-8"))
    ours = {"r": adapter["r"], "alpha": adapter["lora_alpha"], "steps": own}
    return {"recipe": (case / "recipe.yaml").read_text("utf-8"), "theirs": theirs, "ours": ours, "replayed": replayed}


def call(command: list[Any], folder: Path) -> None:
    """Run a command in a folder; show its output if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(HERE), "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_DISABLED": "true"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


def read_steps(file: Path) -> list[dict[str, Any]]:
    """Read the training steps of a run; tokens and learned tokens are those of each step."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps, before = [], {"tokens": 0, "supervised_tokens": 0}
    for line in lines:
        if "loss" in line and "tokens" in line:
            step = {"loss": line["loss"], "tokens": line["tokens"] - before["tokens"]}
            steps.append({**step, "learned": line["supervised_tokens"] - before["supervised_tokens"]})
            before = line
    return steps


def describe(found: dict[str, Any]) -> str:
    """Return a line of the table."""
    theirs, ours, again = found["theirs"], found["ours"], found["replayed"]
    adapters = [f"r {one['r']}, alpha {one['alpha']}" for one in (theirs["adapter"], ours)]
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(theirs["steps"][:20], again[:20], strict=True)]
    both = (theirs["steps"], ours["steps"])
    cells = [
        *(found["tool"], found["case"], " / ".join(adapters)),
        " / ".join(f"{fmean(step['tokens'] for step in steps[:-1]):,.0f}" for steps in both),
        " / ".join(str(len(steps)) for steps in both),
        " / ".join(f"{sum(step['learned'] for step in steps):,}" for steps in both),
        f"{theirs['steps'][0]['loss']:.4f} to {theirs['steps'][19]['loss']:.4f}",
        f"{max(apart):.6f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
