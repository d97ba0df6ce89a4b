"""Check that a migrated recipe trains like the other tool: TRL, LLaMA-Factory and axolotl compared with llmtune.

    python benchmarks/migration.py --llamafactory PYTHON --axolotl PYTHON --json migration.json

Each tool trains a tiny Llama on the same 400 rows by a configuration of its own, packed and
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
    "learning_rate": 1e-2,
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
    "learning_rate": 1e-2,
    "optimizer": "adamw_torch",
    "warmup_steps": 0,
    "bf16": False,
    "logging_steps": 1,
    "output_dir": "out",
    "sdp_attention": True,
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False),
}
FEWER = {"gradient_accumulation_steps": 2}
"""Packed sequences have more tokens than rows; with fewer of them per step an epoch still has 20 steps."""
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
    parser.add_argument("--only", default="", help="only this tool")
    parser.add_argument("--json", type=Path, help="write the results, with all losses")
    asked = parser.parse_args()
    pythons = {"trl": sys.executable, "llamafactory": asked.llamafactory, "axolotl": asked.axolotl}
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        prepare(Path(folder))
        for tool, cases in CASES.items():
            if pythons[tool] and (not asked.only or tool == asked.only):
                found += compare(Path(folder), tool, pythons[tool], cases)
    print("\n".join(map(describe, found)))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


def prepare(folder: Path) -> None:
    """Write the rows, their listing for LLaMA-Factory, and a tiny model with a real tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from workload import chat_rows

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
    tokenizer = train_tokenizer(lines)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.1,
    }
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **shape, **ends, pad_token_id=tokenizer.pad_token_id)
    )
    model.save_pretrained(folder / "model")


def train_tokenizer(lines: list[str]) -> Any:
    """Return a byte-level BPE tokenizer of 2,000 tokens, learned from the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )


def compare(folder: Path, tool: str, python: str, cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Train all cases by the other tool, then each twice by llmtune."""
    folders = []
    for number, config in enumerate(cases.values()):
        case = folder / f"{tool}-{number}"
        case.mkdir()
        for name in ("rows", "dataset_info.json", "model"):
            (case / name).symlink_to(folder / name)
        (case / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        folders.append(case)
    call([python, HERE / "run_migration_peer.py", tool, *folders], folder)
    call([sys.executable, HERE / "run_migrated.py", tool, *folders], folder)
    return [{"tool": tool, "case": name, **read(case)} for name, case in zip(cases, folders, strict=True)]


def read(case: Path) -> dict[str, Any]:
    """Read the results of both tools from the folder of a case."""
    theirs = json.loads((case / "theirs.json").read_text(encoding="utf-8"))
    for step in theirs["steps"]:
        step["rows"] = len(step["rows"])
    own = json.loads((case / "own.json").read_text(encoding="utf-8"))
    lines = (case / "replayed" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    replayed = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    adapter = json.loads(next((case / "own").rglob("adapter_config.json")).read_text(encoding="utf-8"))
    ours = {"r": adapter["r"], "alpha": adapter["lora_alpha"], "targets": adapter["target_modules"], "steps": own}
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


def describe(found: dict[str, Any]) -> str:
    """Return a line of the table."""
    theirs, ours, again = found["theirs"], found["ours"], found["replayed"]
    adapters = [f"r {one['r']}, alpha {one['alpha']}" for one in (theirs["adapter"], ours)]
    apart = [abs(a["loss"] - b) for a, b in zip(theirs["steps"][:20], again[:20], strict=True)]
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
