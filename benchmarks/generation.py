"""Compare generation for evaluation: llmtune, `model.generate` row by row, and `model.generate` in padded batches.

    python benchmarks/generation.py [--rows 124] [--pairs 5] [--threads 1] [--new-tokens 32] [--adapter] [--json FILE]

One process, one model, the prompts of the quickstart; the three take turns. A row of the loop costs the same each time,
so the loop answers `--loop-rows` of the prompts, spread evenly, the others all of them. Tokens are those that answers
hold, their end counted, padding not. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from clock import peak_resident, reset_peak, resident
from machine import describe_machine
from rich.console import Console
from transformers import GenerationConfig

from llmtune.adapter.injection import inject
from llmtune.data.preparation import prepare_rows
from llmtune.data.row_store import read_rows
from llmtune.evaluate.generation import answer_ends, column_bytes_of, generate_batch, only_these_settings
from llmtune.evaluate.greedy_decoding import decode_greedily
from llmtune.evaluate.token_batches import cut_evenly, release_memory
from llmtune.model.device import compute_context, pick_device, resolve_dtype
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import Prompt
from llmtune.tasks.registry import get_task

Prompts = list[list[int]]
Answers = list[list[int]]


def main() -> int:
    """Measure, and print what was found."""
    asked = read_arguments()
    torch.set_num_threads(asked.threads)
    device = pick_device()
    recipe = load_recipe("quickstart").recipe
    dtype = resolve_dtype(asked.dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        model, processor, prompts = prepare(recipe, asked, Path(folder), device)
    stops = set(answer_ends(model, processor, recipe))
    tools = build_tools(model, stops, processor.pad_token_id, asked, device, dtype)
    shown = {
        "llmtune": prompts,
        "generate, a row at a time": [prompts[i] for i in cut_evenly(len(prompts), asked.loop_rows)],
    }
    shown["generate, padded batches"] = prompts
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in tools}
    with torch.inference_mode(), only_these_settings(model):
        for name, work in tools.items():  # warm up, each once
            work(shown[name][:3])
        for _ in range(asked.pairs):
            for name, work in tools.items():
                runs[name].append(measure(work, shown[name], stops, device))
    found = {"asked": vars(asked) | {"json": None}, "machine": describe_machine(), **summarise(runs)}
    text = json.dumps(found, indent=2)
    if asked.json:
        asked.json.write_text(text)
    print(text)
    return 0


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=124, help="prompts; 124 are the quickstart's test rows")
    parser.add_argument("--loop-rows", type=int, default=12, help="number of these prompts for the row-by-row loop")
    parser.add_argument("--pairs", type=int, default=5, help="turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch-rows", type=int, default=32, help="rows of a padded batch")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--adapter", action="store_true", help="with a LoRA adapter on all linear layers, as tuned models"
    )
    parser.add_argument("--json", type=Path, help="write the document here too")
    return parser.parse_args()


def prepare(recipe: Recipe, asked: argparse.Namespace, folder: Path, device: str) -> tuple[Any, Any, Prompts]:
    """Return the quickstart's model and tokenizer, and its prompts as token ids: test rows first."""
    console = Console(stderr=True)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": asked.dtype})})
    place = resolve_model(str(recipe.model.name), recipe.model, console, True)
    processor, task = load_processor(place, recipe.model), get_task(recipe.task)
    rows = prepare_rows(recipe, folder, console)
    taken = [row for side in ("test", "train") for row in read_rows(rows, side, range(rows.counts[side]))][: asked.rows]
    assert task.prompt_ids is not None, "a chat goes on from its prompt"
    prompts = [[int(i) for i in task.prompt_ids(task.split_answer(row)[0], processor, recipe)] for row in taken]
    selected = load_model(place, recipe, task, processor, device=device, training=False)
    model = inject(selected, recipe, console).model.eval() if asked.adapter else selected.model
    return model, processor, prompts


def build_tools(
    model: Any, stops: set[int], pad_id: int, asked: argparse.Namespace, device: str, dtype: torch.dtype
) -> dict[str, Callable[[Prompts], Answers]]:
    """Return each tool's generate function; transformers' loop gets the same end tokens, and nothing else."""
    new = asked.new_tokens
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=sorted(stops), pad_token_id=pad_id)

    def ours(prompts: Prompts) -> Answers:
        with compute_context(dtype, device):  # as in an evaluation
            assert column_bytes_of(model, device), "the loop that is measured is not the one that would be used"
            return decode_greedily(model, prompts, new, stops, device)

    def by_row(prompts: Prompts) -> Answers:
        return [generate_batch(model, [Prompt(prompt)], settings, device)[0] for prompt in prompts]

    def padded(prompts: Prompts) -> Answers:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), asked.batch_rows):
            part = order[start : start + asked.batch_rows]
            answers = generate_batch(model, [Prompt(prompts[i]) for i in part], settings, device)
            found |= dict(zip(part, answers, strict=True))
        return [found[i] for i in range(len(prompts))]

    return {"llmtune": ours, "generate, a row at a time": by_row, "generate, padded batches": padded}


def measure(work: Callable[[Prompts], Answers], prompts: Prompts, stops: set[int], device: str) -> dict[str, Any]:
    """Return tokens per CPU second and per second, and the peak memory above that before."""
    release_memory()
    reset_peak()
    held, began = resident(), (time.process_time(), time.perf_counter())
    answers = work(prompts)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    cpu_seconds, seconds = time.process_time() - began[0], time.perf_counter() - began[1]
    tokens = sum(count(answer, stops) for answer in answers)
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else peak_resident()
    return {
        "rows": len(prompts),
        "tokens": tokens,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak,
        "above_loaded_bytes": peak - held,
    }


def count(answer: Sequence[int], stops: set[int]) -> int:
    """Count the tokens of an answer up to its end, and that."""
    return next((at + 1 for at, token in enumerate(answer) if token in stops), len(answer))


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians of each tool, and of llmtune's ratio to each other one in the same turn."""
    rates = ("tokens_per_cpu_second", "tokens_per_second")
    names = (*rates, "tokens", "peak_bytes", "above_loaded_bytes")
    medians = {
        tool: {name: statistics.median(run[name] for run in found) for name in names} for tool, found in runs.items()
    }
    ratios = {
        f"{rate}, against {tool}": round(
            statistics.median(a[rate] / b[rate] for a, b in zip(runs["llmtune"], found, strict=True)), 2
        )
        for tool, found in runs.items()
        if tool != "llmtune"
        for rate in rates
    }
    return {"medians": medians, "ratios": ratios, "runs": runs}


if __name__ == "__main__":
    sys.exit(main())
