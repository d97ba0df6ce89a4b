"""Check whether a code change affects results: run the same recipes at two commits, and compare bytes and digits.

Each commit runs in its own work tree, on one thread. Its results are cached in `build/same/COMMIT.json`, so a base is
measured only once. `.` is the current tree. The comparison covers the sha256 of each file of the adapter or the
weights, every score to its last digit, the keys of `report.json`, exit codes, and the text of every `--help`. The CPU
seconds of both commits are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from commits import ROOT, git, work_tree

FEW = ["train.max_steps=6", "train.num_train_epochs=null", "evaluate.gates=[]"]
SHORT = [*FEW, "data.test=0.1"]
RUNS: dict[str, tuple[str, list[str]]] = {
    **{f"quickstart-{method}": ("quickstart", [*FEW, f"adapter.method={method}"]) for method in ("lora", "qlora")},
    "quickstart-full": ("quickstart", [*FEW, "adapter.method=full", "adapter.r=null", "adapter.lora_alpha=null"]),
    **{
        f"{task}-offline": (f"{task}-offline", SHORT)
        for task in (
            *("chat-tools", "chat-reasoning", "classify", "token-classify", "qa", "translate", "summarize", "speech"),
            *("preference", "completion"),
        )
    },
}
"""Name -> a shipped recipe and the settings to change."""
TIMED = (
    "import atexit, os, runpy, sys\n"
    "atexit.register(lambda: print('CPU', sum(os.times()[:4]), file=sys.stderr))\n"
    "runpy.run_module('llmtune', run_name='__main__', alter_sys=True)"
)
"""`python -m llmtune` that writes the CPU seconds of it and its children last."""
GROUPS = ("recipes", "deploy", "explain", "launch", "compare", "models")


def main() -> int:
    """Measure both commits and print what differs; exit 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", required=True, help="the commit to compare with")
    parser.add_argument("--commit", default=".", help="the commit to compare; default: the current tree")
    parser.add_argument("--only", nargs="*", choices=sorted(RUNS), help="only these runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "same")
    wanted = parser.parse_args()
    names = wanted.only or list(RUNS)
    before, after = (measured(commit, names, wanted.jobs, wanted.out) for commit in (wanted.base, wanted.commit))
    differing = 0
    for name in [*names, "help"]:
        seconds = [side[name].pop("cpu", 0.0) for side in (before, after)]
        lines = list(differences(before[name], after[name], name))
        differing += bool(lines)
        took = f", CPU seconds {seconds[0]:.0f} -> {seconds[1]:.0f}" if name != "help" else ""
        print(f"{name}: {'equal' if not lines else f'{len(lines)} differ'}{took}")
        print("\n".join(f"  {line}" for line in lines[:40]) + "\n" * bool(lines), end="")
    return 1 if differing else 0


def measured(commit: str, names: list[str], jobs: int, out: Path) -> dict[str, Any]:
    """Return the results of a commit; cached runs are not repeated, except for the current tree."""
    known_file = out / f"{revision(commit)}.json"
    known = json.loads(known_file.read_text()) if commit != "." and known_file.is_file() else {}
    missing = [name for name in names if name not in known]
    if missing or "help" not in known:
        with TemporaryDirectory(prefix="same-") as scratch, work_tree(commit) as tree, ThreadPoolExecutor(jobs) as pool:
            made = pool.map(lambda name: run(tree, name, Path(scratch)), missing)
            known |= dict(zip(missing, made, strict=True))
            known["help"] = help_texts(tree)
        out.mkdir(parents=True, exist_ok=True)
        known_file.write_text(json.dumps(known, indent=1, sort_keys=True))
    return known


def revision(commit: str) -> str:
    """Return the name under which a commit's results are kept."""
    return "tree" if commit == "." else git("rev-parse", "--short=12", commit)


def llmtune(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a commit's own command line with the packages of this environment."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    command = [sys.executable, "-c", TIMED, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def run(tree: Path, name: str, scratch: Path) -> dict[str, Any]:
    """Run one recipe; returns its exit code, hashes, scores and the keys of its report."""
    recipe, values = RUNS[name]
    folder = scratch / name
    settings = [word for value in values for word in ("--set", value)]
    done = llmtune(tree, "run", recipe, "--out", str(folder), "--threads", "1", "--fresh", *settings)
    seconds = cpu_seconds(done.stderr)
    print(f"{tree.name} {name}: exit {done.returncode}, {seconds:.0f} CPU seconds", file=sys.stderr)
    found: dict[str, Any] = {"exit": done.returncode, "keys": [], "scores": {}, "sha256": {}, "cpu": seconds}
    if not (folder / "report.json").is_file():
        return found | {"error": done.stderr[-2000:]}
    report = json.loads((folder / "report.json").read_text())
    evaluation = report["evaluation"] or {}
    for part in ("weights", "adapter"):
        files = sorted(path for path in (folder / part).rglob("*") if path.is_file())
        found["sha256"] |= {
            f"{part}/{path.relative_to(folder / part)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }
    found["scores"] = {side: evaluation.get(side) for side in ("base", "tuned", "difference")}
    found["losses"] = [report["train"].get(key) for key in ("first_loss", "train_loss", "validation_loss")]
    found["keys"] = sorted(set(key_paths(report)))
    return found


def cpu_seconds(stderr: str) -> float:
    """Read the last output of `TIMED`."""
    return float(stderr.rpartition("CPU ")[2].split()[0])


def key_paths(value: Any, path: str = "") -> list[str]:
    """List the paths of all keys in a JSON value; all items of a list share one path."""
    if isinstance(value, dict):
        return [inner for key, item in value.items() for inner in [f"{path}.{key}", *key_paths(item, f"{path}.{key}")]]
    return [inner for item in value for inner in key_paths(item, f"{path}[]")] if isinstance(value, list) else []


def help_texts(tree: Path) -> dict[str, str]:
    """Return every `--help`, by command."""
    texts: dict[str, str] = {}
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        command = waiting.pop()
        text = llmtune(tree, *command, "--help").stdout
        texts[" ".join(("llmtune", *command))] = text
        section = text.partition("Commands")[2]
        if len(command) < 2 and section:
            inner = re.findall(r"^\W*([a-z][a-z-]+) {2,}", section, re.MULTILINE)
            waiting += [(*command, name) for name in inner if not command or command[0] in GROUPS]
    return texts


def differences(before: Any, after: Any, path: str) -> list[str]:
    """List the differences between two JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        return [line for key in keys for line in differences(before.get(key), after.get(key), f"{path} {key}")]
    if path.endswith(" keys"):
        gone, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
        return [*(f"{path}: gone {key}" for key in gone), *(f"{path}: new {key}" for key in new)]
    if before == after:
        return []
    return [f"{path}: {str(before)[:90]!r} -> {str(after)[:90]!r}"]


if __name__ == "__main__":
    sys.exit(main())
