"""Is the model that knows the rows best before tuning the best one after it? `docs/model-evidence.md` shows the answer.

    python benchmarks/ranking.py OUT NAME=FOLDER NAME=FOLDER NAME=FOLDER

Each model is tuned separately. Base and tuned model are measured on the same test rows in bits per byte, as `llmtune
select` measures candidates. Writes ranking.json next to this file. Takes a quarter of an hour on one core for models of
135 to 630 million parameters. docs/model-evidence.md describes the measured models.
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
REVIEWS = {"prompt": "A {label} film review:", "completion": " {text}"}
DATA: dict[str, dict[str, Any]] = {
    "German": {
        "data": {"train": {"path": "builtin:debian-german", "columns": GERMAN, "limit": 320}, "max_length": 256},
        "train": {"max_steps": 16, "batch_size": 4},
    },
    "Reviews": {
        "data": {"train": {"path": "builtin:movie-sentences", "columns": REVIEWS, "limit": 300}, "max_length": 256},
        "train": {"max_steps": 16, "batch_size": 4},
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
        recipe |= {"train": about["train"], "evaluate": {"metrics": ["loss", "bits_per_byte"], "samples": 0}}
        folder = out / name.lower()
        for one, path in models.items():
            run(recipe | {"model": {"name": path}}, folder / one)
        bits = {when: {one: row_bits(folder / one / "run", when) for one in models} for when in ("base", "tuned")}
        rows = {one: {when: float(ratio(bits[when][one])) for when in bits} for one in models}
        found[name] = {"models": rows, **about["train"]}
        found[name]["test_rows"] = len(next(iter(bits["base"].values())))
        found[name]["behind"] = {when: differences(bits[when]) for when in bits}
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def run(recipe: dict[str, Any], folder: Path) -> None:
    """Run llmtune in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "llmtune",
        "run",
        str(folder / "run.yaml"),
        "--out",
        str(folder / "run"),
        "--offline",
    ]
    subprocess.run(words, check=True)


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
