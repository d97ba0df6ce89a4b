"""Check whether a code change affects results: run the same recipes at two commits, and compare bytes and digits.

    python benchmarks/same.py --base COMMIT [--commit COMMIT] [--only NAME_OR_PACKAGE ...]

Each commit runs in its own work tree, on one thread. Its results are cached in `build/same/COMMIT.json`, so a base is
measured only once. `.` is the current tree. The comparison covers the sha256 of each file of the adapter or the
weights, every score to its last digit, the keys of `report.json`, the certificates of exports without times and paths,
one response of each endpoint, exit codes, the schema and the fingerprints of the recipes, and the text of every
`--help`. `--only` takes names of cases, and packages of llmtune, which stand for the cases that exercise them. The CPU
seconds of both commits are printed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from commits import ROOT, git, work_tree


@dataclass(frozen=True)
class Run:
    """A shipped recipe with settings to change, how it runs, and what is made of the finished run."""

    recipe: str
    settings: tuple[str, ...]
    command: tuple[str, ...] = ("run",)
    stop_after: int | None = None
    """Steps after which the run is stopped by SIGTERM, to be resumed."""
    exports: tuple[str, ...] = ()
    served: bool = True


STEPS = ("train.max_steps=6", "train.num_train_epochs=null", "evaluate.gates=[]")
OFFLINE_RECIPES = (
    *("chat-tools", "chat-reasoning", "classify", "token-classify", "qa", "translate", "summarize", "speech"),
    *("preference", "completion", "embed", "rerank"),
)
FULL = ("adapter.method=full", "adapter.r=null", "adapter.lora_alpha=null")
LOGGED = ("train.logging_steps=1", "train.save_steps=1", "evaluate.limit=20")
RUNS = {
    "quickstart-lora": Run("quickstart", STEPS, exports=("merge", "gguf", "onnx --int8", "quantize --scheme w4a16")),
    "quickstart-qlora": Run("quickstart", (*STEPS, "adapter.method=qlora"), served=False),
    "quickstart-full": Run("quickstart", (*STEPS, *FULL), served=False),
    **{f"{task}-offline": Run(f"{task}-offline", (*STEPS, "data.test=0.1")) for task in OFFLINE_RECIPES},
    "two-processes": Run(
        "quickstart", (*STEPS, *LOGGED), command=("launch", "local", "--processes", "2"), served=False
    ),
    "resumed": Run("quickstart", (*STEPS, *LOGGED), stop_after=3, served=False),
}
STATIC = ("recipes", "help")
"""Cases without a run: the schema and the fingerprints of the shipped recipes, and all help texts."""
CLASSIFIERS = ("classify-offline", "token-classify-offline", "qa-offline", "rerank-offline")
QUICKSTARTS = tuple(name for name, case in RUNS.items() if case.recipe == "quickstart")
PACKAGES: dict[str, tuple[str, ...]] = {
    "adapter": QUICKSTARTS,
    "cli": ("quickstart-lora", *STATIC),
    "compare": ("quickstart-lora", "help"),
    "data": tuple(RUNS),
    "deploy": ("quickstart-lora",),
    "display": ("quickstart-lora", *STATIC),
    "evaluate": tuple(RUNS),
    "explain": ("help",),
    "launch": ("two-processes", "quickstart-lora", "help"),
    "model": (*QUICKSTARTS, *CLASSIFIERS, "speech-offline", "embed-offline"),
    "recipe": ("quickstart-lora", *STATIC),
    "report": ("quickstart-lora", *CLASSIFIERS, "speech-offline"),
    "serve": tuple(name for name, case in RUNS.items() if case.served),
    "store": ("quickstart-lora", "two-processes", "resumed"),
    "tasks": tuple(name for name in RUNS if name.endswith("-offline")),
    "train": tuple(RUNS),
}
"""Package of llmtune -> the cases that exercise it."""
TEXT = "Puzzle game with penguins, written for children in Python."
RECORDING = ROOT / "recipes" / "data" / "asterisk-prompts" / "agent-loginok.flac"
ANSWERS = {"max_tokens": 8, "temperature": 0}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}], **ANSWERS},
    "/v1/completions": {"prompt": TEXT, **ANSWERS},
    "/v1/embeddings": {"input": [TEXT, "Text editor"], "input_type": "query"},
    "/v1/rerank": {"query": "a game", "documents": [TEXT, "Text editor for the terminal."]},
}
"""Path of an endpoint -> its request; for others the fields below that the endpoint requires."""
FIELDS: dict[str, Any] = {
    "text": TEXT,
    "context": TEXT,
    "prompt": "What is this?",
    "question": "Who is it written for?",
    "answer": "A game.",
    "audio": base64.b64encode(RECORDING.read_bytes()).decode(),
}
VOLATILE = re.compile(r"second|bytes|^(id|created|time|date|made|machine|versions?)$")
"""Keys of certificates and responses that differ from run to run."""
TIMED = (
    "import atexit, os, runpy, sys\n"
    "atexit.register(lambda: print('CPU', sum(os.times()[:4]), file=sys.stderr))\n"
    "runpy.run_module('llmtune', run_name='__main__', alter_sys=True)"
)
"""`python -m llmtune` that writes the CPU seconds of it and its children last."""
GROUPS = tuple((name,) for name in ("recipes", "deploy", "explain", "launch", "models", "release"))


def main() -> int:
    """Measure both commits and print what differs; exit 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the commit to compare with")
    parser.add_argument("--commit", default=".", help="the commit to compare; default: the current tree")
    names = [*RUNS, *STATIC]
    parser.add_argument(
        "--only", nargs="*", choices=[*names, *PACKAGES], help="only these cases, or those of a package"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "same")
    options = parser.parse_args()
    if options.only:
        selected = {name for word in options.only for name in PACKAGES.get(word, (word,))}
        names = [name for name in names if name in selected]
    before, after = (measured(commit, names, options.jobs, options.out) for commit in (options.base, options.commit))
    differing = 0
    for name in names:
        seconds = [side[name].pop("cpu", 0.0) for side in (before, after)]
        lines = list(differences(before[name], after[name], name))
        differing += bool(lines)
        took = f", CPU seconds {seconds[0]:.0f} -> {seconds[1]:.0f}" if name in RUNS else ""
        print(f"{name}: {'equal' if not lines else f'{len(lines)} differ'}{took}")
        print("\n".join(f"  {line}" for line in lines[:40]) + "\n" * bool(lines), end="")
    return 1 if differing else 0


def measured(commit: str, names: Iterable[str], jobs: int, out: Path) -> dict[str, Any]:
    """Return the results of a commit; cached ones are not made again, except for the current tree."""
    cache = out / f"{revision(commit)}.json"
    results = json.loads(cache.read_text()) if commit != "." and cache.is_file() else {}
    missing = [name for name in names if name not in results]
    if not missing:
        return dict(results)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="same-") as scratch, work_tree(commit) as tree, ThreadPoolExecutor(jobs) as pool:
        made = pool.map(lambda name: measure(tree, name, Path(scratch)), missing)
        for name, result in zip(missing, made, strict=True):
            results[name] = result
            cache.write_text(json.dumps(results, indent=1, sort_keys=True))
    return dict(results)


def measure(tree: Path, name: str, scratch: Path) -> dict[str, Any]:
    """Return the results of one case."""
    if name == "help":
        return help_texts(tree)
    return recipe_texts(tree) if name == "recipes" else run(tree, name, scratch)


def revision(commit: str) -> str:
    """Return the name under which a commit's results are kept."""
    return "tree" if commit == "." else git("rev-parse", "--short=12", commit)


def command_line(tree: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs a commit's own command line in this environment, and its variables."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}
    return [sys.executable, "-c", TIMED, *arguments], environment


def llmtune(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command, environment = command_line(tree, *arguments)
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def run(tree: Path, name: str, scratch: Path) -> dict[str, Any]:
    """Run one recipe; return its exit code, hashes, scores, certificates, responses and the keys of its report."""
    case, folder = RUNS[name], scratch / name
    settings = [word for value in case.settings for word in ("--set", value)]
    arguments = [*case.command, case.recipe, "--out", str(folder), "--threads", "1", *settings]
    if case.stop_after is not None:
        stop_after(case.stop_after, folder, tree, arguments)
        arguments.append("--resume")
    done = llmtune(tree, *arguments)
    seconds = cpu_seconds(done.stderr)
    print(f"{tree.name} {name}: exit {done.returncode}, {seconds:.0f} CPU seconds", file=sys.stderr)
    result: dict[str, Any] = {"exit": done.returncode, "keys": [], "scores": {}, "sha256": {}, "cpu": seconds}
    if not (folder / "report.json").is_file():
        return result | {"error": done.stderr[-2000:]}
    report = json.loads((folder / "report.json").read_text())
    evaluation = report["evaluation"] or {}
    for part in ("weights", "adapter"):
        result["sha256"] |= {
            f"{part}/{path.relative_to(folder / part)}": hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / part).rglob("*"))
            if path.is_file()
        }
    result["scores"] = {side: evaluation.get(side) for side in ("base", "tuned", "difference")}
    result["losses"] = [report["train"].get(key) for key in ("first_loss", "train_loss", "validation_loss")]
    result["keys"] = sorted(set(key_paths(report)))
    result["certificates"] = {export: certificate(tree, folder, export) for export in case.exports}
    if case.served:
        result["responses"] = responses(tree, folder)
    return result


def stop_after(steps: int, folder: Path, tree: Path, arguments: list[str]) -> None:
    """Start a run, and terminate it once it has logged this many steps."""
    command, environment = command_line(tree, *arguments)
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / "metrics.jsonl"
    while process.poll() is None and (not log.is_file() or log.read_text().count("\n") < steps):
        time.sleep(0.05)
    process.terminate()
    process.wait()


def certificate(tree: Path, folder: Path, export: str) -> Any:
    """Export a run; return the exit code and the certificate without times and paths."""
    verb, *options = export.split()
    out = folder.parent / f"{folder.name}-{verb}"
    done = llmtune(tree, "deploy", verb, str(folder), *options, "--out", str(out), "--threads", "1")
    written = [
        stable(json.loads(file.read_text()), folder.parent, tree) for file in sorted(out.rglob("certificate.json"))
    ]
    return {"exit": done.returncode, "certificate": written, "error": None if written else done.stderr[-2000:]}


def responses(tree: Path, folder: Path) -> dict[str, Any]:
    """Serve a run; return the status and the body of one response of each endpoint."""
    command, environment = command_line(tree, "deploy", "serve", str(folder), "--port", "0", "--json", "--threads", "1")
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    try:
        text = ""
        for line in process.stdout or ():
            text += line
            if line.startswith("}"):
                break
        if not text:
            return {"error": "the server did not start"}
        url = json.loads(text)["url"]
        api = json.loads(urllib.request.urlopen(f"{url}/openapi.json").read())
        bodies = {path: request_body(path, api) for path, methods in api["paths"].items() if "post" in methods}
        return {
            path: stable(respond(f"{url}{path}", bodies.get(path)), folder.parent, tree)
            for path in sorted([*bodies, "/v1/models", "/health/live", "/health/ready"])
        }
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def request_body(path: str, api: dict[str, Any]) -> dict[str, Any]:
    """Return a request for an endpoint: the stated one, or the fields that its schema requires."""
    if path in REQUESTS:
        return REQUESTS[path]
    content = api["paths"][path]["post"].get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    return {name: FIELDS[name] for name in schema.get("required", ()) if name in FIELDS}


def respond(url: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """Send a request; return the status and the body of the response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return {"status": response.status, "body": json.loads(response.read())}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": error.read().decode()}


def stable(value: Any, *places: Path) -> Any:
    """Return a JSON value without what differs from run to run: times, identifiers and paths."""
    if isinstance(value, dict):
        return {key: stable(item, *places) for key, item in value.items() if not VOLATILE.search(key)}
    if isinstance(value, list):
        return [stable(item, *places) for item in value]
    for place in places if isinstance(value, str) else ():
        value = value.replace(str(place), "PLACE")
    return value


def recipe_texts(tree: Path) -> dict[str, Any]:
    """Return the JSON Schema of recipes, and the exit code and fingerprint of each shipped one."""
    schema = json.loads(llmtune(tree, "recipes", "schema").stdout)
    checked = {
        file.stem: llmtune(tree, "recipes", "check", file.stem, "--json") for file in tree.glob("recipes/*.yaml")
    }
    fingerprints = {name: json.loads(done.stdout or "{}").get("fingerprint") for name, done in sorted(checked.items())}
    return {
        "schema": schema,
        "fingerprints": fingerprints,
        "exits": {name: one.returncode for name, one in checked.items()},
    }


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
        if command in ((), *GROUPS):
            waiting += [(*command, name) for name in re.findall(r"^│ ([a-z][a-z-]+) {2,}", text, re.MULTILINE)]
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
