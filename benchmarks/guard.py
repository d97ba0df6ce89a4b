"""Fail if llmtune became slower: each speed as a ratio to a peer in the same run, compared with `ratios.json`.

    python benchmarks/guard.py [--turns 4] [--only preparation start-up] [--update] [--ratios FILE]

| case | llmtune | peer |
| --- | --- | --- |
| training | tokens trained, packed | TRL, packed |
| preparation | rows read, checked, encoded, masked and packed | the tokenizer alone, on the same texts |
| evaluation | losses of test rows | a forward pass over padded batches |
| generation | greedy answers | `model.generate` in padded batches |
| start-up | `llmtune run --help` and `recipes check` | a script that imports Typer, Pydantic and PyYAML |

llmtune and peer take turns on one thread. A ratio is the peer's time divided by llmtune's, each the lowest of all
turns, once in CPU seconds and once in wall seconds. A case that is more than 10 % below its committed ratio is measured
again. If it still is, the guard fails and lists the commits since then. Each instruction set has its own ratios:
bfloat16 products are several times faster with AVX512-BF16. A run takes about ten minutes on two idle cores. `--update`
writes the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commits import git
from machine import describe_machine
from startup import time_command
from training import HERE, ask, environment, read_options, take_turns

Seconds = dict[str, float]
"""`cpu_seconds` and `seconds` (wall time). Per token in training and generation, where token counts can differ."""
Pair = tuple[Seconds, Seconds]
"""The seconds of llmtune, and those of its peer, in one turn."""
TOLERANCE = 0.1
"""Share by which a ratio may be below the committed one."""
RATES = {"cpu_seconds": "tokens_per_cpu_second", "seconds": "tokens_per_second"}
"""Clock -> the key of the rate in the runs of other benchmarks."""
RATIOS = HERE / "ratios.json"
CODE = ("llmtune", "pyproject.toml")
"""Paths whose commits are listed."""
IMPORTS = "import typer, pydantic, yaml"
"""Script that start-up is compared with."""


def main() -> int:
    """Measure, compare, and return the exit code."""
    options = read_arguments()
    machine = describe_machine()
    kind = f"{machine['instructions']}{machine['processor'].partition('model')[2].partition(',')[2]}"
    entries: dict[str, Any] = json.loads(options.ratios.read_text()) if options.ratios.exists() else {}
    committed: dict[str, Any] = entries.get(kind, {})
    others = committed.get("ratios", {}).keys()
    if options.update and (lost := others - set(options.only)):
        print(f"--update replaces all ratios of {kind}. Add to --only: {' '.join(sorted(lost))}")
        return 1
    if not options.update and (missing := set(options.only) - others):
        cases = "" if missing == CASES.keys() else f" of {' '.join(sorted(missing))}"
        print(
            f"{options.ratios.name} has no ratios{cases} for {kind}. Measure them at an earlier commit with --update."
        )
        return 1
    pairs = {name: measure(name, options.turns) for name in options.only}
    if not options.update:
        suspects = [name for name in pairs if list_losses({name: compute_ratios(pairs[name])}, committed["ratios"])]
        pairs |= {name: pairs[name] + measure(name, options.turns) for name in suspects}
    ratios = {name: compute_ratios(turns) for name, turns in pairs.items()}
    print(json.dumps(ratios, indent=1))
    if options.update:
        conditions = {
            key: machine[key] for key in ("date", "processor", "llmtune", "torch", "transformers", "peft", "trl")
        }
        entry = {"commit": git("rev-parse", "HEAD"), **conditions, "turns": options.turns, "ratios": ratios}
        options.ratios.write_text(json.dumps(entries | {kind: entry}, indent=1) + "\n")
        return 0
    losses = list_losses(ratios, committed["ratios"])
    if losses:
        since = git("log", "--oneline", f"{committed['commit']}..HEAD", "--", *CODE)
        print("\n".join([*losses, f"Commits since {committed['commit'][:8]} ({committed['date']}):", since]))
    return int(bool(losses))


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--update", action="store_true", help="write the ratios instead of comparing them")
    parser.add_argument("--ratios", type=Path, default=RATIOS)
    return parser.parse_args()


def measure(name: str, turns: int) -> list[Pair]:
    """Measure a case; each turn runs llmtune and its peer."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = CASES[name](Path(folder), turns)
    for turn, (ours, peer) in enumerate(pairs):
        print(f"{name}, turn {turn + 1}: {ours} and {peer}", file=sys.stderr, flush=True)
    return pairs


def compute_ratios(pairs: list[Pair]) -> dict[str, float]:
    """Return by clock the peer's time divided by llmtune's, each the lowest of all turns."""
    clocks = pairs[0][0]
    return {
        clock: round(min(peer[clock] for _, peer in pairs) / min(ours[clock] for ours, _ in pairs), 3)
        for clock in clocks
    }


def list_losses(ratios: dict[str, dict[str, float]], committed: dict[str, dict[str, float]]) -> list[str]:
    """Return a line for each ratio that is more than the tolerance below the committed one."""
    return [
        f"{name} became slower: {ratio:.3f} of its peer's speed in {clock.replace('_', ' ')}, was {before:.3f}"
        for name, clocks in ratios.items()
        for clock, ratio in clocks.items()
        if ratio < (1 - TOLERANCE) * (before := committed[name][clock])
    ]


def train(folder: Path, turns: int) -> list[Pair]:
    """Train on packed rows in the dtype that `model.dtype: auto` selects."""
    from llmtune.model.device import resolve_dtype

    dtype = str(resolve_dtype("auto", "cpu")).removeprefix("torch.")
    options = read_options(None).parse_args(["--steps", "1", "--tokens", "1024", "--dtype", dtype])
    tools = ("llmtune", "trl-packed")
    return pair_runs(take_turns(ask(options, folder), tools, turns, None, folder)["runs"], tools)


def pair_runs(runs: dict[str, Any], tools: tuple[str, str]) -> list[Pair]:
    """Return the seconds per token of the runs of llmtune and its peer, by turn."""
    ours, peer = ([{clock: 1 / run[rate] for clock, rate in RATES.items()} for run in runs[tool]] for tool in tools)
    return list(zip(ours, peer, strict=True))


def prepare(folder: Path, turns: int) -> list[Pair]:
    """Prepare 5,000 chat rows from a file, packing included."""
    from preparation import run_apart
    from workload import write_rows

    file = write_rows(folder / "rows.jsonl", 5000, seed=0)
    options = argparse.Namespace(threads=1, seed=0, deduplicate="none")
    runs = [run_apart("llmtune", file, options) for _ in range(turns)]
    return [
        (
            {"cpu_seconds": run["cpu_s"], "seconds": run["seconds"]},
            {"cpu_seconds": run["tokenizer_cpu_s"], "seconds": run["tokenizer_seconds"]},
        )
        for run in runs
    ]


def evaluate(folder: Path, turns: int) -> list[Pair]:
    """Score the answers of test rows."""
    runs = run_script(folder, "likelihood.py", "--pairs", str(turns))["runs"]
    return list(zip(runs["llmtune"], runs["transformers, padded"], strict=True))


def generate(folder: Path, turns: int) -> list[Pair]:
    """Answer 32 prompts greedily."""
    document = run_script(folder, "generation.py", "--pairs", str(turns), "--rows", "32", "--loop-rows", "1")
    return pair_runs(document["runs"], ("llmtune", "generate, padded batches"))


def start(folder: Path, turns: int) -> list[Pair]:
    """Start two commands that load no model."""
    commands = [["llmtune", "run", "--help"], ["llmtune", "recipes", "check", "quickstart"]]
    script = folder / "imports.py"
    script.write_text(IMPORTS)
    pairs = []
    for _ in range(turns):
        ours = [time_command(command, folder, 1) for command in commands]
        peer = time_command(["python", str(script)], folder, 1)
        pairs.append(({clock: sum(one[clock] for one in ours) for clock in peer}, peer))
    return pairs


def run_script(folder: Path, script: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark in a process with one thread; return its JSON document."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(1), check=True, stdout=subprocess.PIPE, text=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


CASES: dict[str, Callable[[Path, int], list[Pair]]] = {
    "training": train,
    "preparation": prepare,
    "evaluation": evaluate,
    "generation": generate,
    "start-up": start,
}


if __name__ == "__main__":
    sys.exit(main())
