"""Compare automatic epochs, rate and batch with one epoch at 2e-4 in batches of 16, on the same held-out rows.

    python benchmarks/defaults.py --packages FOLDER [--only NAME...] [--work build/bench/defaults]

Nine data sets, each cut short: six that ship, and three out of packages that `pip download --no-deps` leaves in FOLDER
(llamafactory 0.9.5 and vaderSentiment 3.3.2, both as sdist). Both runs of a data set have the same rows; `llmtune
compare` pairs them row by row. A data set that was measured before is not measured again; the table goes to stdout.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OLD = {"learning_rate": 2e-4, "num_train_epochs": 1, "batch_size": 16}
SMOLLM, MINILM = "builtin:smollm2-135m-instruct", "builtin:minilm-l6-v2"
SENTIMENT = "hutto_ICWSM_2014"


@dataclass(frozen=True)
class DataSet:
    """A data set; without `read` the rows ship under this name."""

    task: str
    model: str
    rows: int
    metric: str
    max_length: int = 256
    max_new_tokens: int = 1
    validation: float = 0
    """A share of rows by whose loss the best checkpoint is taken: what a recipe has by default is 0.05."""
    read: Callable[[Path], Iterator[dict[str, Any]]] | None = None


def read_alpaca(packages: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of at most 600 letters in all."""
    with tarfile.open(packages / "llamafactory-0.9.5.tar.gz") as archive:
        rows = json.loads(read_member(archive, "data/alpaca_en_demo.json"))
    yield from (row for row in rows if sum(map(len, row.values())) <= 600)


def read_reviews(packages: Path) -> Iterator[dict[str, Any]]:
    """Yield sentences of product reviews that people found clearly good or bad (mean score beyond 1 of 4)."""
    for score, text in read_sentiment(packages, "amazonReviewSnippets"):
        if abs(score) > 1:
            yield {"text": text, "label": "good" if score > 0 else "bad"}


def read_tweets(packages: Path) -> Iterator[dict[str, Any]]:
    """Yield short messages with their mean score, a number from -4 to 4."""
    yield from ({"text": text, "label": score} for score, text in read_sentiment(packages, "tweets"))


def read_sentiment(packages: Path, name: str) -> Iterator[tuple[float, str]]:
    """Yield the scores and texts of one of the four collections that come with VADER."""
    with tarfile.open(packages / "vaderSentiment-3.3.2.tar.gz") as outer:
        inner = io.BytesIO(read_member(outer, f"additional_resources/{SENTIMENT}.tar.gz"))
    with tarfile.open(fileobj=inner) as archive:
        lines = read_member(archive, f"{SENTIMENT}/{name}_GroundTruth.txt").decode("utf-8", "replace").splitlines()
    for line in lines:
        _, score, text = line.split("\t", 2)
        yield float(score), text


def read_member(archive: tarfile.TarFile, ending: str) -> bytes:
    """Return the content of the one file whose path ends so."""
    (name,) = (name for name in archive.getnames() if name.endswith(ending))
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a file"
    return file.read()


SETS = {
    "debian-sections": DataSet("chat", SMOLLM, 300, "exact_match", max_new_tokens=8),
    "debian-short": DataSet("summarize", SMOLLM, 240, "rougeL", max_new_tokens=24),
    "debian-german": DataSet("translate", SMOLLM, 240, "chrf", max_new_tokens=32),
    "movie-sentences": DataSet("classify", MINILM, 700, "accuracy"),
    "debian-mentions": DataSet("token-classify", MINILM, 450, "f1"),
    "debian-facts": DataSet("qa", MINILM, 450, "f1", max_length=384),
    "alpaca": DataSet("chat", SMOLLM, 240, "loss", max_length=320, read=read_alpaca),
    "alpaca-validated": DataSet("chat", SMOLLM, 240, "loss", max_length=320, validation=0.05, read=read_alpaca),
    "reviews": DataSet("classify", MINILM, 700, "accuracy", read=read_reviews),
    "tweets": DataSet("classify", MINILM, 700, "spearman", read=read_tweets),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--work", type=Path, default=Path("build/bench/defaults"))
    asked = parser.parse_args()
    print("| data | task | test rows | steps, old / rules | metric | base | old | rules | difference, 95 % interval |")
    print("|---|---|---:|---:|---|---:|---:|---:|---|")
    for name in asked.only:
        result = asked.work / f"{name}.json"
        if not result.exists():
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(json.dumps(measure(name, SETS[name], asked.work / name, asked.packages)))
        print(table_row(name, json.loads(result.read_text())), flush=True)
    return 0


def measure(name: str, data: DataSet, folder: Path, packages: Path) -> dict[str, Any]:
    """Train with the old defaults and with the rules; return the document of `llmtune compare`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = f"builtin:{name}"
    if data.read is not None:
        source = str((folder / "rows.jsonl").resolve())
        lines = [json.dumps(row, ensure_ascii=False) for row in data.read(packages)]
        Path(source).write_text("\n".join(lines) + "\n", encoding="utf-8")
    runs = []
    for kind, train in (("old", OLD), ("rules", {})):
        recipe = folder / f"{kind}.yaml"
        recipe.write_text(json.dumps(describe_recipe(f"{name}-{kind}", data, source, train)))  # JSON is YAML
        runs.append(folder / kind)
        call("run", str(recipe), "--out", str(runs[-1]))
    found: dict[str, Any] = json.loads(call("compare", *map(str, runs), "--out", str(folder / "compared"), "--json"))
    return found


def table_row(name: str, found: dict[str, Any]) -> str:
    """Return the line of the table for a data set."""
    data, (old, rules) = SETS[name], found["runs"]
    metric = data.metric
    difference = found["pairs"][0]["difference"][metric]
    low, high = difference["interval"]
    scores = [old["base"][metric], old["tuned"][metric], rules["tuned"][metric]]
    cells = [name, data.task, found["rows"], f"{old['steps']} / {rules['steps']}", metric]
    cells += [f"{score:.3f}" for score in scores]
    return f"| {' | '.join(map(str, cells))} | {difference['value']:+.3f}, {low:+.3f} to {high:+.3f} |"


def describe_recipe(name: str, data: DataSet, source: str, train: dict[str, float]) -> dict[str, Any]:
    """Return a recipe that leaves all of training open but for what `train` states."""
    recipe: dict[str, Any] = {
        "recipe_version": 1,
        "name": name,
        "task": data.task,
        "data": {"train": {"path": source, "limit": data.rows}, "validation": data.validation, "test": 0.3},
        "model": {"name": data.model},
        "train": train,
        "evaluate": {"metrics": [data.metric]},
    }
    recipe["data"]["max_length"] = data.max_length
    if data.max_new_tokens > 1:
        recipe["generation"] = {"max_new_tokens": data.max_new_tokens}
    return recipe


def call(*arguments: str) -> str:
    """Run llmtune in its own process; return its stdout, and show its log if it fails."""
    command = [sys.executable, "-m", "llmtune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 6, 7):  # a gate that fails is a finding
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
