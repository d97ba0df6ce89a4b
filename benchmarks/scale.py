"""Tables of docs/sizes.md and docs/scale-evidence.md: planned memory, counted operations, simulated efficiency.

python benchmarks/scale.py          write the tables
python benchmarks/scale.py --link   measure the link between two processes of this machine; the page has LOOPBACK
python benchmarks/scale.py --weak   two processes of a core each against one, the same work a process, in turns
python benchmarks/scale.py --memory the highest memory of each process under fsdp, against the plan
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from memory_plan import write_recipe, write_rows
from transformers import LlamaConfig, Qwen2Config

from llmtune.model.config import build_skeleton, find_class, linear_shapes
from llmtune.model.memory_plan import plan_skeleton
from llmtune.model.sharded_plan import divide_plan, plan_evaluation
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import ALONE, Layout, MemoryPlan, ModelRef
from llmtune.tasks.registry import get_task

ROOT = Path(__file__).resolve().parents[1]
SIZES, EVIDENCE = ROOT / "docs/sizes.md", ROOT / "docs/scale-evidence.md"
PAGES = {"memory": SIZES, "places": SIZES, "time": SIZES, "efficiency": EVIDENCE}
"""Where a table is kept, by its name."""
GIB = 2**30
CARDS = (24, 48, 80, 141)
"""GiB of the cards that are common."""
USABLE = 0.85
TOKENS = 2048
PROCESSES = 8
PEAK, EFFICIENCY, PRICE = 989e12, 0.4, 3.0
"""An H100's dense bfloat16 operations a second (data sheet), the share of them that is assumed, dollars an hour."""
LINKS = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 10e9 / 8, "100 Gbit/s": 100e9 / 8}
LATENCY = 50e-6
"""Seconds a message of the simulated links takes at least."""
LOOPBACK = (8e-5, 8e8)
"""Seconds a message, bytes a second: gloo between two processes of a machine under other load."""
SPEEDS, ADAPTER = (228.0, 237.0, 252.0), 4_884_480
"""Tokens a second of one thread with 0.1.0 (lowest, median, highest; TOKENS a step), and the numbers it trains."""
STEP_TOKENS = 65_536
MACHINES = (1, 2, 4, 8, 16, 32)
DRAWS = 2000

RECIPE = """
recipe_version: 1
task: chat
data: {{train: "builtin:debian-sections", max_length: 2048}}
model: {{name: {folder}, dtype: bfloat16}}
adapter: {{method: {method}}}
train: {{gradient_checkpointing: true, optim: adamw_torch}}
"""
Rows = list[Sequence[str]]
PLACES = {
    "8 GB": (8, ALONE),
    "24 GB": (24, ALONE),
    "2 x 24 GB": (24, Layout(2, sharded=True)),
    "8 x 80 GB": (80, Layout(8, sharded=True)),
}
"""Cards: GiB of each, and the processes that share the model."""


def llama(hidden: int, layers: int, heads: int, intermediate: int, tie: bool = False) -> LlamaConfig:
    """Return the shape of a Llama 3."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        intermediate_size=intermediate,
        tie_word_embeddings=tie,
        architectures=["LlamaForCausalLM"],
    )


def qwen(hidden: int, layers: int, heads: int, kv: int, intermediate: int, vocabulary: int, tie: bool) -> Qwen2Config:
    """Return the shape of a Qwen 2.5."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=intermediate,
        tie_word_embeddings=tie,
        architectures=["Qwen2ForCausalLM"],
    )


MODELS = {
    "Qwen2.5 0.5B": qwen(896, 24, 14, 2, 4864, 151_936, True),
    "Llama 3.2 1B": llama(2048, 16, 32, 8192, True),
    "Llama 3.2 3B": llama(3072, 28, 24, 8192, True),
    "Llama 3.1 8B": llama(4096, 32, 32, 14_336),
    "Qwen2.5 14B": qwen(5120, 48, 40, 8, 13_824, 152_064, False),
    "Qwen2.5 32B": qwen(5120, 64, 40, 8, 27_648, 152_064, False),
    "Llama 3.1 70B": llama(8192, 80, 64, 28_672),
}


def skeleton_of(name: str, method: str) -> tuple[Any, Recipe]:
    """Return the model without weights, and a recipe for it."""
    with tempfile.TemporaryDirectory() as folder:
        MODELS[name].save_pretrained(folder)
        (Path(folder) / "recipe.yaml").write_text(RECIPE.format(folder=folder, method=method))
        recipe, task = load_recipe(Path(folder) / "recipe.yaml").recipe, get_task("chat")
        ref = ModelRef(name, Path(folder), None, "")
        return build_skeleton(*find_class(ref, recipe, task), recipe), recipe


def place_plan(name: str, method: str, layout: Layout) -> MemoryPlan:
    """Plan training and evaluation of rows of TOKENS tokens on one of the cards of a layout."""
    skeleton, recipe = skeleton_of(name, method)
    plan = plan_skeleton(skeleton, recipe, get_task("chat"), TOKENS, "cuda", None)
    plan = plan_evaluation(plan, skeleton, recipe, TOKENS)
    return plan if layout == ALONE else divide_plan(plan, skeleton, recipe, layout, TOKENS)


def places_table() -> Rows:
    """Return what each of PLACES can train and evaluate, by model; a star needs shards in main memory."""
    rows: Rows = [["model", *(f"{name}: {what}" for name in PLACES for what in ("train", "evaluate"))]]
    for model in MODELS:
        cells = [model]
        for size, layout in PLACES.values():
            trains, evaluates = [], []
            for method, dtype in (("full", ""), ("lora", "16 bits"), ("qlora", "4 bits")):
                near, far = (place_plan(model, method, replace(layout, offload_params=one)) for one in (False, True))
                room = USABLE * size * GIB
                for found, needs, what in ((trains, "total", method), (evaluates, "evaluated", dtype)):
                    if getattr(near, needs) <= room:
                        found.append(what)
                    elif layout.sharded and getattr(far, needs) <= room:
                        found.append(f"{what}\\*")
            cells += [", ".join(trains) or "none", ", ".join(one for one in evaluates if one.strip("\\*")) or "none"]
        rows.append(cells)
    return rows


@dataclass(frozen=True)
class Shape:
    """The facts about a model and a method that the tables need."""

    plan: MemoryPlan
    forward: float
    """Operations of a forward pass, a token."""
    sharded: MemoryPlan
    """The plan of one of PROCESSES cards under fsdp."""

    def operations(self, method: str) -> float:
        """Operations of training, a token: a backward pass counts two forward ones, one where weights are held still.

        One more forward pass is for gradient checkpointing.
        """
        return self.forward * (4 if method == "full" else 3)


def shape(name: str, method: str) -> Shape:
    """Plan a training of rows of TOKENS tokens on a card, with gradient checkpointing."""
    config, (skeleton, recipe) = MODELS[name], skeleton_of(name, method)
    plan = plan_skeleton(skeleton, recipe, get_task("chat"), TOKENS, "cuda", None)
    sharded = divide_plan(plan, skeleton, recipe, Layout(PROCESSES, sharded=True), TOKENS)
    linear = sum(rows * columns for rows, columns in linear_shapes(skeleton).values())
    attention = 2 * config.num_hidden_layers * config.hidden_size * TOKENS  # half of the square: causal
    return Shape(plan, 2 * linear + attention, sharded)


def card(bytes_needed: float) -> str:
    """Return the smallest common card that a plan uses up to 85 % of."""
    fits = [size for size in CARDS if bytes_needed <= USABLE * size * GIB]
    return f"{fits[0]} GB" if fits else "none"


def memory_table() -> Rows:
    """Return memory and card by model and method; the last columns are for fsdp."""
    rows: Rows = [["model", "qlora", "card", "lora", "card", "full", "card", f"full, fsdp on {PROCESSES}", "cards"]]
    for name in MODELS:
        cells = [name]
        for method in ("qlora", "lora", "full"):
            found = shape(name, method)
            cells += [f"{found.plan.total / GIB:.1f}", card(found.plan.total)]
        needed = found.sharded.total
        rows.append([*cells, f"{needed / GIB:.1f}", card(needed)])
    return rows


def time_table() -> Rows:
    """Return hours and dollars for 100 million tokens on one card, by the operations of a token."""
    rows: Rows = [
        ["model", "lora: GFLOP a token", "tokens/s", "hours", "$", "full: GFLOP a token", "tokens/s", "hours", "$"]
    ]
    for name in MODELS:
        cells = [name]
        for method in ("lora", "full"):
            operations = shape(name, method).operations(method)
            speed = PEAK * EFFICIENCY / operations
            hours = 1e8 / speed / 3600
            cells += [f"{operations / 1e9:,.1f}", f"{speed:,.0f}", f"{hours:,.1f}", f"{hours * PRICE:,.0f}"]
        rows.append(cells)
    return rows


def simulate(steps: Sequence[float], gradient_bytes: float, latency: float, bandwidth: float) -> list[float]:
    """Return the efficiency for each of MACHINES: every step waits for the slowest, then sums gradients in a ring.

    `steps` are the seconds of single steps, drawn with replacement. Gradient sums do not overlap the backward pass.
    """
    draws, alone = np.random.default_rng(0), statistics.fmean(steps)
    found = []
    for count in MACHINES:
        slowest = draws.choice(steps, (DRAWS, count)).max(axis=1).mean()
        ring = 2 * (count - 1) * (latency + gradient_bytes / count / bandwidth)
        found.append(alone / (slowest + ring))
    return found


def efficiency_table() -> Rows:
    """Return simulated efficiencies: of the training measured here, and of computed ones on one card a machine."""
    rows: Rows = [["training", "link", "step", "gradients", *(f"{count}" for count in MACHINES)]]

    def row(what: str, link: str, steps: Sequence[float], size: float, latency: float, bandwidth: float) -> None:
        shares = [f"{share:.0%}" for share in simulate(steps, size, latency, bandwidth)]
        rows.append([what, link, f"{statistics.fmean(steps):.2f} s", f"{size / 1e6:,.0f} MB", *shares])

    steps = [TOKENS / speed for speed in SPEEDS]
    spread = np.array(steps) / statistics.fmean(steps)
    what = "SmolLM2 135M, lora, one core"
    row(what, "loopback", steps, 4 * ADAPTER, *LOOPBACK)
    row(what, "1 Gbit/s", steps, 4 * ADAPTER, LATENCY, LINKS["1 Gbit/s"])
    for method in ("lora", "full"):
        found = shape("Llama 3.1 8B", method)
        seconds = STEP_TOKENS * found.operations(method) / (PEAK * EFFICIENCY)
        for link in ("10 Gbit/s", "100 Gbit/s"):
            what = f"Llama 3.1 8B, {method}, an H100"
            row(what, link, list(seconds * spread), found.plan.parts["gradients"], LATENCY, LINKS[link])
    return rows


def link() -> None:
    """Print seconds a message and bytes a second of gloo's sums between two processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_sum, (folder,), 2)
        seconds = json.loads((Path(folder) / "found").read_text())
    small, *large = [(float(size), found) for size, found in seconds.items()]
    # A ring of two: two rounds, each of half of the bytes.
    slope, _ = np.polyfit(*np.array(large).T, 1)
    print(f"LOOPBACK = ({small[1] / 2:.1e}, {1 / slope:.1e})")


def _sum(rank: int, folder: str) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for size in (4, 2**20, 2**22, 2**24, 2**25):
        value, times = torch.ones(size // 4), []
        for _ in range(15):
            torch.distributed.barrier()
            started = time.perf_counter()
            torch.distributed.all_reduce(value)
            times.append(time.perf_counter() - started)
        found[size] = statistics.median(times[3:])
    if rank == 0:
        (Path(folder) / "found").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def train(
    folder: Path, method: str, processes: int, strategy: str, steps: int, rows: int, length: int
) -> tuple[Path, list[int]]:
    """Train SmolLM2 in so many processes, with a core and `rows` each; return the run and each one's highest memory."""
    case = {"model": "smollm2", "method": method, "length": length, "rows": rows * processes, "dtype": "float32"}
    recipe = write_recipe(case, folder)
    recipe["train"] |= {"max_steps": steps, "save_steps": steps}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")
    run = folder / "run"
    options = {"out": str(run), "until": "train", "processes": processes, "strategy": strategy, "threads": processes}
    call = f"import llmtune; llmtune.run({str(folder / 'recipe.yaml')!r}, fresh=True, quiet=True, **{options})"
    cores = {*[*os.sched_getaffinity(0)][:processes]}
    started = subprocess.Popen([sys.executable, "-c", call], preexec_fn=lambda: os.sched_setaffinity(0, cores))
    peaks: dict[int, int] = {}
    while started.poll() is None:
        for one in [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]:
            try:
                works = processes == 1 or "llmtune" in one.cmdline()
                status = Path(f"/proc/{one.pid}/status").read_text("utf-8") if works else ""
            except (psutil.Error, OSError):
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM"):
                    peaks[one.pid] = int(line.split()[1]) * 1024
        time.sleep(0.2)
    assert started.returncode == 0, "the training failed"
    return run, [peaks[pid] for pid in sorted(peaks)]


def weak() -> None:
    """Print tokens a second of one process on a core, of two on a core each, in turns, and the efficiency."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name) / "rows.txt")
        for processes in (1, 2, 1, 2):
            run, _ = train(Path(name), "lora", processes, "ddp", 6, rows=4, length=512)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
            speeds[processes].append(statistics.median(line["tokens_per_second"] for line in lines[2:]))
            print(f"{processes} process(es): {speeds[processes][-1]:.1f} tokens/s", flush=True)
    one, two = (statistics.fmean(speeds[processes]) for processes in (1, 2))
    print(f"efficiency: {two / (2 * one):.3f}")


def memory() -> None:
    """Print the highest memory of each process against the plan, in GB, by method and number of processes."""
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name) / "rows.txt")
        for method in ("full", "lora"):
            for processes in (1, 2, 4):
                run, peaks = train(Path(name), method, processes, "fsdp", 1, rows=1, length=128)
                plan = json.loads((run / "run.json").read_text("utf-8"))["steps"]["select"]["facts"]["plan"]
                shown = " ".join(f"{peak / 1e9:.2f}" for peak in peaks)
                print(f"{method}, {processes} process(es): planned {plan['total'] / 1e9:.2f}, {shown}", flush=True)


def lines_of(rows: Rows) -> Iterator[str]:
    """Yield a table as Markdown, numbers to the right."""
    for index, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if index == 0:
            yield f"|---|{'---:|' * (len(row) - 1)}"


def main() -> None:
    """Write the tables between their marks."""
    parser = argparse.ArgumentParser()
    works = {"link": link, "weak": weak, "memory": memory}
    for name in works:
        parser.add_argument(f"--{name}", action="store_true")
    for name, given in vars(parser.parse_args()).items():
        if given:
            return works[name]()
    tables = {
        "memory": memory_table(),
        "places": places_table(),
        "time": time_table(),
        "efficiency": efficiency_table(),
    }
    for name, rows in tables.items():
        text = PAGES[name].read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: made by `python benchmarks/scale.py` -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = "\n".join([f"{before}{begin}", *lines_of(rows), "", end]) + rest.split(end, 1)[1]
        PAGES[name].write_text(text, encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
