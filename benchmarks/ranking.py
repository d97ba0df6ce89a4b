"""Is the model that knows the rows best before tuning the best one after it? `docs/model.md` shows the answer.

    python benchmarks/ranking.py OUT NAME=FOLDER NAME=FOLDER NAME=FOLDER

For each data set: `llmtune select` ranks the models by bits per byte and by short trials; then each is tuned alone, and
base and tuned model are measured on the same test rows. Writes ranking.json beside this file. Half an hour on two cores
for models of 135 to 630 million parameters. What the measured models are and where they come from stands in the docs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("ranking.json")
GERMAN = {"prompt": "English: {source}\nGerman:", "completion": " {target}"}
DATA: dict[str, dict[str, Any]] = {
    "German": {
        "data": {"train": {"path": "builtin:debian-german", "columns": GERMAN, "limit": 320}, "max_length": 256},
        "train": {"max_steps": 40, "batch_size": 4},
        "trials": 8,
    },
    "Psalms": {
        "data": {"train": {"path": "builtin:kjv-psalms", "limit": 120}, "max_length": 1024},
        "train": {"max_steps": 30, "batch_size": 2},
        "trials": 6,
    },
}
DRAWS = 10_000


def main() -> int:
    """Measure, and write what was found; returns the exit code."""
    out, models = Path(sys.argv[1]), dict(one.split("=", 1) for one in sys.argv[2:])
    found = {}
    for name, about in DATA.items():
        data = {"validation": 0.15, "test": 0.35, "deduplicate": "near", **about["data"]}
        recipe = {"recipe_version": 1, "name": name.lower(), "task": "completion", "data": data}
        recipe |= {"train": about["train"], "evaluate": {"metrics": ["loss", "bits_per_byte"]}}
        folder = out / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        among = {"candidates": [*models.values()], "trials": about["trials"]}
        ranked = run("select", recipe | {"model": among}, folder)
        ranking = {one["name"]: one for one in ranked["model"]["ranking"]["candidates"]}
        reports = {one: run("run", recipe | {"model": {"name": path}}, folder / one) for one, path in models.items()}
        bits = {when: {one: row_bits(folder / one / "run", when) for one in models} for when in ("base", "tuned")}
        rows = {}
        for one, path in models.items():
            seconds = reports[one]["steps"]["train"]["seconds"]
            rows[one] = {"ranked": ranking[path]["bits_per_byte"], "trial": ranking[path]["tuned"]}
            rows[one] |= {"steps": ranking[path]["steps"], "train_seconds": seconds}
            rows[one] |= {when: float(ratio(bits[when][one])) for when in bits}
        found[name] = {"models": rows, "rows": ranked["model"]["ranking"]["rows"], **about["train"]}
        found[name]["test_rows"] = len(next(iter(bits["base"].values())))
        found[name]["behind"] = {when: differences(bits[when]) for when in bits}
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def run(command: str, recipe: dict[str, Any], folder: Path) -> Any:
    """Run llmtune in a process of its own; return its report."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{command}.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    words = [sys.executable, "-m", "llmtune", command, str(file), "--out", str(folder / command), "--offline", "--json"]
    return json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)


def row_bits(run: Path, when: str) -> dict[str, tuple[float, int]]:
    """Return the bits of each test row's answer, and its bytes."""
    lines = (run / "evaluation" / "predictions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["origin"]: (row[f"{when}_nats"] / math.log(2), len(row["reference"].encode())) for row in rows}


def ratio(rows: dict[str, tuple[float, int]]) -> float:
    """Return bits per byte over all rows."""
    bits, size = np.array([*rows.values()]).sum(0)
    return bits / size


def differences(bits: dict[str, dict[str, tuple[float, int]]]) -> dict[str, list[float]]:
    """Return by how much each model is behind the first, with the 95 % interval of a paired bootstrap over rows."""
    order = sorted(bits, key=lambda name: ratio(bits[name]))
    origins = [*bits[order[0]]]
    drawn = np.random.default_rng(0).integers(0, len(origins), (DRAWS, len(origins)))
    behind = {}
    for name in order[1:]:
        pairs = [np.array([bits[one][origin] for origin in origins])[drawn].sum(1) for one in (name, order[0])]
        shares = [pair[:, 0] / pair[:, 1] for pair in pairs]
        low, high = np.percentile(shares[0] - shares[1], [2.5, 97.5])
        behind[name] = [ratio(bits[name]) - ratio(bits[order[0]]), float(low), float(high)]
    return behind


if __name__ == "__main__":
    sys.exit(main())
