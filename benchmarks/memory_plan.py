"""Compare the memory plan with actual training: `python benchmarks/memory_plan.py [--only WORD] [--out FILE]`.

Each case trains a step on the CPU by `llmtune train` in its own process, and measures the peak resident memory of that
process. `docs/generate.py` makes the table of docs/memory.md from the file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEASURED = HERE / "memory_plan.json"
TRAIN = "from llmtune.train import preflight; preflight.PARTS = 1; from llmtune.cli import main; main()"
"""The command, with a rehearsal of the complete largest batch, however much memory is free."""
SMOL = "builtin:smollm2-135m-instruct"
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 49152},
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 49152},
    "words": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 150_000},
}
"""Llamas with random weights and SmolLM2's tokenizer: 3, 50 and 42 million parameters."""
CASES: list[dict[str, Any]] = [
    *({"model": "smollm2", "method": "lora", "length": n, "rows": k} for n, k in ((128, 1), (128, 8), (512, 1))),
    *({"model": "smollm2", "method": "lora", "length": n, "rows": k} for n, k in ((512, 4), (1024, 2), (2048, 1))),
    *(
        {"model": "smollm2", "method": "lora", "length": n, "rows": k, "dtype": "float32"}
        for n, k in ((512, 4), (2048, 1))
    ),
    *({"model": "smollm2", "method": "full", "length": n, "rows": k} for n, k in ((128, 8), (512, 4), (2048, 1))),
    *({"model": "smollm2", "method": "qlora", "length": n, "rows": k} for n, k in ((128, 8), (512, 4), (2048, 1))),
    {"model": "smollm2", "method": "lora", "length": 2048, "rows": 1, "checkpointing": True},
    {"model": "smollm2", "method": "full", "length": 1024, "rows": 2, "checkpointing": True},
    {"model": "smollm2", "method": "full", "length": 512, "rows": 4, "dtype": "float32"},
    *({"model": "small", "method": "lora", "length": n, "rows": k} for n, k in ((512, 4), (2048, 1))),
    *({"model": "small", "method": "full", "length": n, "rows": k} for n, k in ((512, 4), (2048, 1))),
    {"model": "small", "method": "qlora", "length": 512, "rows": 4},
    {"model": "small", "method": "full", "length": 1024, "rows": 2, "dtype": "float32"},
    *({"model": "tiny", "method": method, "length": 512, "rows": 4} for method in ("lora", "full")),
    *({"model": "words", "method": method, "length": 2048, "rows": 1} for method in ("lora", "full")),
    *({"recipe": name} for name in ("quickstart", "classify-offline", "chat-tools-offline", "qa-offline")),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=MEASURED)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.txt")
        for case in CASES:
            if options.only in json.dumps(case):
                found.append(case | measure(case, folder))
                print(json.dumps(found[-1]), flush=True)
                options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0


def write_rows(file: Path) -> None:
    """Write a text from the documentation that is long enough for the largest case."""
    pages = sorted((HERE.parent / "docs").glob("*.md"))
    words = re.findall(r"[A-Za-z]+", " ".join(page.read_text("utf-8") for page in pages))
    file.write_text(" ".join(words), "utf-8")


def write_model(name: str, folder: Path) -> str:
    import torch
    from rich.console import Console
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llmtune.model.builtin_models import resolve_builtin

    if not folder.is_dir():
        torch.manual_seed(0)
        config = LlamaConfig(
            **SHAPES[name],
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(
            resolve_builtin(SMOL.removeprefix("builtin:"), Console(stderr=True))
        ).save_pretrained(folder)
    return str(folder)


def write_recipe(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the recipe of a case, as plain values."""
    model = SMOL if case["model"] == "smollm2" else write_model(case["model"], folder / case["model"])
    return {
        "recipe_version": 1,
        "task": "completion",
        "data": {
            "train": str(folder / "rows.txt"),
            "validation": 0,
            "test": 0,
            "deduplicate": "none",
            "max_length": case["length"],
            "on_overlong": "split",
        },
        "model": {"name": model, "dtype": case.get("dtype", "bfloat16")},
        "adapter": {"method": case["method"]},
        "train": {
            "max_steps": 1,
            "batch_size": case["rows"],
            "learning_rate": 1e-4,
            "gradient_checkpointing": case.get("checkpointing", False),
            "save_steps": 1,
            "logging_steps": 1,
            "load_best_model_at_end": False,
        },
    }


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a step; return its plan and the peak resident memory, in bytes."""
    run = folder / "run"
    recipe = folder / "recipe.yaml"
    if "recipe" not in case:
        recipe.write_text(json.dumps(write_recipe(case, folder)), "utf-8")
    words = [str(case.get("recipe", recipe)), "--out", str(run), "--fresh", "--json"]
    more = ["--set", "train.max_steps=2"] if "recipe" in case else []
    done = subprocess.run([sys.executable, "-c", TRAIN, "train", *words, *more], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-600:]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    manifest = json.loads((run / "run.json").read_text("utf-8"))
    facts = manifest["steps"]["select"]["facts"]
    stated = re.search(r"^  method: (\w+)", (run / "recipe.yaml").read_text("utf-8"), re.MULTILINE)
    measured = max(line.get("peak_bytes", 0) for line in lines)
    return {"method": stated[1] if stated else "lora", "planned": facts["plan"]["total"], "measured": measured}


if __name__ == "__main__":
    sys.exit(main())
