"""Two runs of the same recipe side by side: the first thing in which they differ, in the order in which it came about.

A safetensors file is read by its own format (https://github.com/huggingface/safetensors#format), without torch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune.store.atomic_files import list_folder, read_json

MADE_ANEW = {"tokens_per_second", "peak_bytes", "epoch"}
"""What a line of metrics.jsonl says of the machine, or twice."""
JUDGED = ("loss", "validation_loss")
"""What of such a line is held against a tolerance."""
PLACES = {"base_model_name_or_path"}
"""What an adapter says of where its base lies."""
NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
"""numpy's formats; of others the bytes are compared."""


@dataclass(frozen=True)
class Difference:
    """The first difference of one stage: rows, examples, step, weights, prediction, score."""

    stage: str
    where: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.stage}: {self.where}: was {_told(self.was)}, is {_told(self.now)}"

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def _told(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value) if value is not None else "not there"


def find_differences(was: Path, now: Path, trained: str) -> list[Difference]:
    """Return the first difference of each stage in which two run folders differ, in the order of the stages.

    `trained` is the subfolder with what was trained: adapter or weights.
    """
    stages = (
        _differing_content(was, now),
        _differing_steps(was, now),
        _differing_weights(was / trained, now / trained),
        _differing_predictions(was, now),
        _differing_scores(was, now),
    )
    return [found for stage in stages for found in stage]


def far_apart(was: float | None, now: float | None, tolerance: float) -> bool:
    """Whether two numbers differ by more than `tolerance`, or than so much of the first where that is above 1."""
    if was is None or now is None:
        return was is not now
    if not (math.isfinite(was) and math.isfinite(now)):
        return was != now and not (math.isnan(was) and math.isnan(now))
    return abs(was - now) > tolerance * max(1.0, abs(was))


def compare_losses(was: Path, now: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yield each loss that was noted in training, with its step, in both runs."""
    for before, after in _side_by_side(was / "metrics.jsonl", now / "metrics.jsonl"):
        step = before.get("step", after.get("step"))
        for key in JUDGED:
            if key in before or key in after:
                yield f"{key} in step {step}", before.get(key), after.get(key)


def compare_scores(was: Path, now: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yield each score of both runs, as `tuned.exact_match`; nothing where one of them was not evaluated."""
    before, after = (read_json(run / "evaluation" / "evaluation.json") for run in (was, now))
    if before is None or after is None:
        return
    for side in ("base", "tuned"):
        for metric in sorted(before[side].keys() | after[side].keys()):
            yield f"{side}.{metric}", before[side].get(metric), after[side].get(metric)


def _side_by_side(was: Path, now: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the lines of two files of JSON; an empty one where one of them is shorter."""
    for before, after in zip_longest(_lines(was), _lines(now)):
        yield before or {}, after or {}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _differing_content(was: Path, now: Path) -> Iterator[Difference]:
    for name in ("rows", "examples"):
        before, after = (read_json(run / "data" / name / f"{name}.json") or {} for run in (was, now))
        if before and before.get("content_hash") != after.get("content_hash"):
            yield Difference(name, f"content of data/{name}", before.get("content_hash"), after.get("content_hash"))


def _differing_steps(was: Path, now: Path) -> Iterator[Difference]:
    last = 0
    for before, after in _side_by_side(was / "metrics.jsonl", now / "metrics.jsonl"):
        step: int = (before or after)["step"]
        for key in [key for key in {**before, **after} if key not in MADE_ANEW]:
            if before.get(key) != after.get(key):
                steps = f"step {step}" if step == last + 1 else f"steps {last + 1} to {step}"
                yield Difference("training", f"{key} of {steps}", before.get(key), after.get(key))
                return
        last = step


def _differing_weights(was: Path, now: Path) -> Iterator[Difference]:
    before, after = list_folder(was), list_folder(now)
    for name in sorted(before.keys() | after.keys(), key=lambda name: (not name.endswith(".safetensors"), name)):
        if before.get(name) == after.get(name):
            continue
        if name not in before or name not in after:
            yield Difference("files", name, before.get(name), after.get(name))
        elif name.endswith(".safetensors"):
            yield from _differing_tensor(was / name, now / name)
        elif not same_but_places(was / name, now / name):
            yield Difference("files", name, before[name], after[name])
        else:
            continue
        return


def same_but_places(was: Path, now: Path) -> bool:
    """Whether two files are equal, or JSON that says the same but for where the base model lies."""
    if was.read_bytes() == now.read_bytes():
        return True
    before, after = (read_json(path) for path in (was, now)) if was.suffix == ".json" else (None, None)
    if not isinstance(before, dict) or not isinstance(after, dict):
        return False
    return all(before.get(key) == after.get(key) for key in (before.keys() | after.keys()) - PLACES)


def _differing_tensor(was: Path, now: Path) -> Iterator[Difference]:
    before, after = read_header(was), read_header(now)
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if one is None or other is None or (one["dtype"], one["shape"]) != (other["dtype"], other["shape"]):
            told = [tensor and f"{tensor['dtype']} {tensor['shape']}" for tensor in (one, other)]
            yield Difference("weights", name, *told)
            return
        left, right = read_numbers(was, one), read_numbers(now, other)
        unequal = np.flatnonzero(left.view(np.uint8) != right.view(np.uint8))
        if unequal.size:
            at = int(unequal[0]) // left.dtype.itemsize
            place = np.unravel_index(at, one["shape"] or [1]) if one["dtype"] in NUMBERS else [at]
            where = f"{name}[{', '.join(map(str, place))}]"
            yield Difference("weights", where, number(left[at], one["dtype"]), number(right[at], one["dtype"]))
            return
    yield Difference("files", was.name, "its header", "another one")


def read_header(path: Path) -> dict[str, Any]:
    """Return what a safetensors file says of each of its tensors; `start` is where the numbers begin in the file."""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    return {name: {**entry, "start": 8 + size} for name, entry in header.items() if name != "__metadata__"}


def read_numbers(path: Path, tensor: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Return a tensor's numbers in one line; formats that numpy does not have as their bytes or bits."""
    begin, end = tensor["data_offsets"]
    kind = np.dtype(NUMBERS.get(tensor["dtype"], "u1"))
    return np.fromfile(path, kind, (end - begin) // kind.itemsize, offset=tensor["start"] + begin)


def number(value: Any, dtype: str) -> float:
    """Return a number of a tensor; those of bfloat16 are the upper half of a float32."""
    if dtype == "BF16":
        return float(np.array([int(value) << 16], dtype=np.uint32).view(np.float32)[0])
    return float(value)


def _differing_predictions(was: Path, now: Path) -> Iterator[Difference]:
    name = "evaluation/predictions.jsonl"
    if not ((was / name).exists() and (now / name).exists()):
        return
    for row, (before, after) in enumerate(_side_by_side(was / name, now / name), 1):
        for key in [key for key in {**before, **after} if key != "origin"]:
            if before.get(key) != after.get(key):
                place = before.get("origin", after.get("origin"))
                yield Difference("prediction", f"{key} of row {row} ({place})", before.get(key), after.get(key))
                return


def _differing_scores(was: Path, now: Path) -> Iterator[Difference]:
    for name, before, after in compare_scores(was, now):
        if before != after:
            yield Difference("score", name, before, after)
            return
