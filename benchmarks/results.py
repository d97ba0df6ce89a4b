"""Write all results as one page: `python benchmarks/results.py build/bench --out benchmarks/RESULTS.md`.

Each JSON file of the folder becomes a section. Medians are shown with their range. A ratio is computed within each
turn, in which the tools ran one after the other; the page shows the median of these ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from startup import find_key

OURS, SETTLED = "llmtune", "llmtune-settled"
NAMES = {
    "llmtune": "llmtune",
    "llmtune-settled": "llmtune, automatic micro-batches",
    "trl-packed": "TRL, packed",
    "trl-padded": "TRL, padded",
    "trainer": "Trainer + PEFT, padded",
    "llamafactory": "LLaMA-Factory, packed",
}
Found = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="the page; default: print it")
    asked = parser.parse_args()
    page = write_page({file.stem: json.loads(file.read_text()) for file in sorted(asked.folder.glob("*.json"))})
    if asked.out:
        asked.out.write_text(page)
    else:
        print(page, end="")
    return 0


def write_page(found: dict[str, Found]) -> str:
    """Return the page in Markdown; `found` has the JSON documents by file name."""
    machine = find_key(found, "machine") or {}
    parts = [HEAD, table(["", ""], [[key.replace("_", " "), shown(value)] for key, value in machine.items()])]
    for name, (title, write) in SECTIONS.items():
        if name in found:
            parts.append(f"## {title}\n\n{write_conditions(found[name])}\n\n{write(found[name])}")
    for name in found:
        if name not in SECTIONS:
            parts.append(f"## {name.capitalize()}\n\n{write_conditions(found[name])}\n\n{write_any(found[name])}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write_conditions(found: Found) -> str:
    """Return version, date and processor of a document."""
    machine = find_key(found, "machine")
    return f"llmtune {machine['llmtune']} on {machine['date']}, {machine['processor']}, {machine['instructions']}."


def write_training(found: Found) -> str:
    """Return speed and memory of all tools, and the share of the machine's limit that llmtune reaches."""
    asked, runs = found["asked"], found["runs"]
    settings = (
        f"{asked['dtype']}, {asked['threads']} thread(s), about {asked['tokens']:,} real tokens a step, packs of "
        f"{asked['pack']:,}, padded micro-batches of {asked['padded_rows']} rows; {asked['steps']} timed steps after "
        f"one warm-up step, {len(next(iter(runs.values())))} turns; instructions: "
        f"{found['machine'].get('instructions', 'all of the processor')}."
    )
    head = ["tool", "tokens per cpu-s", "llmtune / tool", "tokens per s", "llmtune / tool", "peak memory"]
    head += ["above the loaded model", "supervised", "trainable"]
    rows = []
    for tool, measured in runs.items():
        row = [NAMES.get(tool, tool)]
        for rate in ("tokens_per_cpu_second", "tokens_per_second"):
            row += [spread(values(measured, rate), "{:.0f}"), against(runs, tool, rate)]
        row += [spread([value / 1e6 for value in values(measured, key)], "{:.0f}", " MB") for key in MEMORY]
        row += [f"{median(values(measured, 'supervised_share')):.0%}", f"{measured[0]['trainable']:,}"]
        rows.append(row)
    parts = [settings, table(head, rows), write_settled(runs), write_limit(runs.get(OURS, [])), write_versions(runs)]
    return "\n\n".join(part for part in parts if part)


def write_settled(runs: dict[str, list[Found]]) -> str:
    """Compare llmtune with automatic micro-batches with the other tools."""
    others = [tool for tool in runs if tool not in {OURS, SETTLED}]
    if SETTLED not in runs or not others:
        return ""
    told = [
        f"{against(runs, tool, 'tokens_per_cpu_second', SETTLED)} the tokens per cpu-s of {NAMES.get(tool, tool)}, "
        f"with {against(runs, tool, 'peak_bytes', SETTLED)} its peak memory"
        for tool in others
    ]
    return f"With automatic micro-batches llmtune processes {'; '.join(told)}."


def write_limit(ours: Sequence[Found]) -> str:
    """Return the share of the machine's limit that llmtune reaches; the limit is measured in the first turn."""
    limits = [run["limit"] for run in ours if "limit" in run]
    if not limits:
        return ""
    unit = limits[0]["unit"]
    rate = "tokens_per_second" if unit == "second" else "tokens_per_cpu_second"
    shares = [run[rate] / run["limit"]["tokens_per_second"] for run in ours if "limit" in run]
    parts = {part: median(limit["microseconds_a_token"][part] for limit in limits) for part in limits[0][PARTS]}
    needed = ", ".join(f"{part} {value:.0f}" for part, value in parts.items())
    rates = spread([limit["tokens_per_second"] for limit in limits], "{:.0f}")
    return (
        f"The limit of the machine, with only the matrix products of a step, each at its own peak: {rates} tokens per "
        f"{unit.replace('cpu_second', 'cpu-s').replace('second', 's')} (microseconds a token: {needed}). llmtune "
        f"reaches **{spread([100 * share for share in shares], '{:.0f}', ' %')}** of this limit."
    )


def write_versions(runs: dict[str, list[Found]]) -> str:
    """Return the versions of tools that run in a separate environment."""
    lines = []
    own = runs.get(OURS, [{}])[0].get("versions", {})
    for tool, measured in runs.items():
        other = {
            key: value for key, value in measured[0].get("versions", {}).items() if value and own.get(key) != value
        }
        if own and other:
            lines.append(f"{NAMES.get(tool, tool)}: {', '.join(f'{key} {value}' for key, value in other.items())}.")
    return "\n".join(lines)


def write_losses(found: Found) -> str:
    """Return the picture of the losses, and their first and last values."""
    rows = []
    for tool, measured in found["runs"].items():
        losses = [step["loss"] for step in measured[0]["steps"]]
        quarter = max(1, len(losses) // 4)
        first, last = (sum(part) / quarter for part in (losses[:quarter], losses[-quarter:]))
        rows.append([NAMES.get(tool, tool), str(len(losses)), f"{first:.3f}", f"{last:.3f}"])
    head = ["tool", "steps", "mean loss of the first quarter", "of the last quarter"]
    about = "Each tool shuffles and packs the rows in its own way, so its steps have other rows."
    return f"{about}\n\n![Loss of every step, a line for each tool](losses.svg)\n\n{table(head, rows)}"


def write_curve(found: Found) -> str:
    """Return the difference between llmtune's packed losses and a plain Trainer's."""
    return (
        f"With the same rows in the same {found['steps']} steps, float32 and the same initial adapter, llmtune's "
        f"packed loss and a plain Trainer's unpacked loss differ by at most **{found['largest_difference']:.1e}** "
        f"(first step {found['llmtune'][0]:.5f} and {found['trainer'][0]:.5f}, last step {found['llmtune'][-1]:.5f} "
        f"and {found['trainer'][-1]:.5f})."
    )


def write_memory(found: Found) -> str:
    """Return peak memory, a table for each case."""
    parts = []
    for case, measured in found.items():
        runs, asked = measured["runs"], measured["asked"]
        rows = []
        for tool, each in runs.items():
            row = [NAMES.get(tool, tool)]
            for key in MEMORY:
                row += [spread([value / 1e6 for value in values(each, key)], "{:.0f}", " MB")]
                row += [against(runs, tool, key)]
            rows.append(row)
        head = ["tool", "peak", "llmtune / tool", "above the loaded model", "llmtune / tool"]
        parts.append(f"{case.capitalize()}, packs of {asked['pack']:,}:\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def write_startup(found: Found) -> str:
    """Return the seconds to the first step, and those of commands that do not train."""
    rows = []
    for name, measured in found["runs"].items():
        rehearsal = [run["rehearsal_seconds"] for run in measured if run.get("rehearsal_seconds") is not None]
        row = [f"`{name}`", spread(values(measured, "seconds"), "{:.2f}", " s")]
        row += [spread(values(measured, "cpu_seconds"), "{:.2f}", " s"), spread(rehearsal, "{:.2f}", " s")]
        rows.append(row)
    about = (
        "`train` and `sft`: from the command to the end of the first optimiser step, with the data already prepared."
    )
    return f"{about}\n\n{table(['command', 'wall time', 'CPU time', 'rehearsal, included'], rows)}"


def write_any(found: Found) -> str:
    """Return a table of medians if the document has runs by name, else a list of all numbers."""
    runs = found.get("runs")
    if isinstance(runs, dict) and all(isinstance(each, list) and each for each in runs.values()):
        keys = [key for key, value in next(iter(runs.values()))[0].items() if is_number(value)]
        rows = []
        for name, each in runs.items():
            cells = [[run[key] for run in each if is_number(run.get(key))] for key in keys]
            rows.append([NAMES.get(name, name), *(spread(cell, "{:,.4g}") for cell in cells)])
        rest = {key: value for key, value in found.items() if key not in {"runs", "medians", "machine"}}
        return "\n\n".join([table(["", *(key.replace("_", " ") for key in keys)], rows), listing(rest)])
    return listing({key: value for key, value in found.items() if key != "machine"})


def listing(found: Any) -> str:
    """Return every number and text in nested dictionaries and lists, one per line."""
    return "\n".join(f"- {path}: {shown(value)}" for path, value in leaves(found))


def leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the path and value of each leaf in nested dictionaries and lists; a list of numbers is one leaf.

    None is skipped.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}, {key.replace('_', ' ')}".removeprefix(", "))
    elif isinstance(value, list) and value and all(map(is_number, value)):
        yield path, spread(value, "{:,.4g}")
    elif isinstance(value, list):
        for number, item in enumerate(value, 1):
            yield from leaves(item, f"{path} {number}")
    elif value is not None:
        yield path, value


def values(runs: Sequence[Found], key: str) -> list[float]:
    return [run[key] for run in runs]


def against(runs: dict[str, list[Found]], tool: str, key: str, ours: str = OURS) -> str:
    """Return llmtune's figure divided by a tool's, turn by turn."""
    if tool in {OURS, SETTLED} or ours not in runs:
        return ""
    ratios = [own[key] / theirs[key] for own, theirs in zip(runs[ours], runs[tool], strict=True)]
    return spread(ratios, "{:.2f}", "x")


def spread(numbers: Sequence[float], form: str, unit: str = "") -> str:
    """Return the median, with the lowest and highest in brackets if there are several numbers."""
    if not numbers:
        return ""
    middle = form.format(median(numbers)) + unit
    return middle if len(numbers) == 1 else f"{middle} ({form.format(min(numbers))}–{form.format(max(numbers))})"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if is_number(value) else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PARTS = "microseconds_a_token"
MEMORY = ("peak_training_bytes", "above_loaded_bytes")
HEAD = """# Side by side

Written by `benchmarks/results.py`; `make bench` runs the benchmarks. Each section states its settings and number of
turns. All tools train on the same workload (English words of the shipped texts, in rows as long as Alpaca's) with
one packaged model of 135M parameters, LoRA of rank 16 on all linear layers, and the same number format, optimiser
and learning rate. Each tool runs in its own process, in turns. Figures are medians, with the lowest and highest in
brackets; ratios are computed within each turn. "Supervised" is the share of tokens that count in the loss: tools
differ in whether the line break after an answer counts. No tool recomputes activations, which is not TRL's default.
"""
SECTIONS: dict[str, tuple[str, Callable[[Found], str]]] = {
    "training": ("Training, one thread", write_training),
    "training-padded": ("Training compared with padded tools, one thread", write_training),
    "training-cores": ("Training, all cores", write_training),
    "training-float32": ("Training in float32, one thread", write_training),
    "training-float32-cores": ("Training in float32, all cores", write_training),
    "losses": ("Losses", write_losses),
    "curve": ("Packed against unpacked", write_curve),
    "memory": ("Memory in training", write_memory),
    "startup": ("Start-up", write_startup),
    "preparation": ("Data preparation", write_any),
    "generation": ("Generation for evaluation", write_any),
}


if __name__ == "__main__":
    sys.exit(main())
