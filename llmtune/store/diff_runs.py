"""Compares two runs of the same recipe: the first difference of each stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from safetensors import SafetensorError

from llmtune.store.atomic_files import list_folder, read_json, read_json_lines
from llmtune.store.json_shapes import read_curve

MACHINE_KEYS = {"tokens_per_second", "peak_bytes", "epoch"}
"""Keys of a metrics.jsonl line that depend on the machine, or follow from other keys."""
LOSS_KEYS = ("loss", "validation_loss")
"""Keys of a metrics.jsonl line that are compared within a tolerance."""
PATH_KEYS = {"base_model_name_or_path"}
"""Keys of an adapter's configuration that contain the folder of its base."""
Record = dict[str, object]
"""A line of a JSON Lines file."""


@dataclass(frozen=True)
class FirstDifference:
    """The first difference of one stage: rows, examples, training, weights, files, prediction or score."""

    stage: str
    where: str
    was: object
    now: object

    def __str__(self) -> str:
        was, now = (
            f"{value:.9g}" if isinstance(value, float) else str(value) if value is not None else "missing"
            for value in (self.was, self.now)
        )
        return f"{self.stage}: {self.where}: was {was}, is {now}"


def find_differences(was: Path, now: Path, trained: str) -> list[FirstDifference]:
    """Return the first difference of each stage between two run folders, in the order of the stages.

    `trained` is the subfolder of the trained weights: adapter or weights.
    """
    stages = (
        _differing_content(was, now),
        _differing_steps(was, now),
        _differing_weights(was / trained, now / trained),
        _differing_predictions(was, now),
        _differing_scores(was, now),
    )
    return [difference for stage in stages for difference in stage]


def far_apart(was: float | None, now: float | None, tolerance: float) -> bool:
    """Return whether two numbers differ by more than `tolerance`, relative to the first if that is above 1."""
    if was is None or now is None:
        return was is not now
    if not (math.isfinite(was) and math.isfinite(now)):
        return was != now and not (math.isnan(was) and math.isnan(now))
    return abs(was - now) > tolerance * max(1.0, abs(was))


def compare_losses(was: Path, now: Path) -> Iterator[tuple[str, float | None, float | None]]:
    """Yield each logged training loss with its step, in both runs."""
    for before, after in _zip_lines(read_curve(was), read_curve(now)):
        step = before.get("step", after.get("step"))
        for key in LOSS_KEYS:
            if key in before or key in after:
                losses = [value if isinstance(value, float) else None for value in (before.get(key), after.get(key))]
                yield f"{key} in step {step}", losses[0], losses[1]


def compare_scores(was: Path, now: Path) -> Iterator[tuple[str, float | None, float | None]]:
    """Yield each score of both runs, such as `tuned.exact_match`; nothing if one run was not evaluated."""
    before, after = (read_json(run / "evaluation" / "evaluation.json") for run in (was, now))
    if before is None or after is None:
        return
    for model in ("base", "tuned"):
        for metric in sorted(before[model].keys() | after[model].keys()):
            yield f"{model}.{metric}", before[model].get(metric), after[model].get(metric)


def same_but_paths(was: Path, now: Path) -> bool:
    """Return whether two files are equal, or equal JSON except for the path of the base model."""
    if was.read_bytes() == now.read_bytes():
        return True
    before, after = (read_json(path) for path in (was, now)) if was.suffix == ".json" else (None, None)
    if not isinstance(before, dict) or not isinstance(after, dict):
        return False
    return all(before.get(key) == after.get(key) for key in (before.keys() | after.keys()) - PATH_KEYS)


def _zip_lines(was: Sequence[Record], now: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """Yield pairs of lines of two JSON lines files; missing lines are empty."""
    for before, after in zip_longest(was, now):
        yield before or {}, after or {}


def _differing_content(was: Path, now: Path) -> Iterator[FirstDifference]:
    for name in ("rows", "examples"):
        before, after = (read_json(run / "data" / name / f"{name}.json") or {} for run in (was, now))
        if before and before.get("content_hash") != after.get("content_hash"):
            yield FirstDifference(
                name, f"content of data/{name}", before.get("content_hash"), after.get("content_hash")
            )


def _differing_steps(was: Path, now: Path) -> Iterator[FirstDifference]:
    last: object = 0
    for before, after in _zip_lines(read_curve(was), read_curve(now)):
        step = (before or after)["step"]
        for key in [key for key in {**before, **after} if key not in MACHINE_KEYS]:
            if before.get(key) != after.get(key):
                begin = int(str(last)) + 1
                steps = f"step {step}" if step == begin else f"steps {begin} to {step}"
                yield FirstDifference("training", f"{key} of {steps}", before.get(key), after.get(key))
                return
        last = step


def _differing_weights(was: Path, now: Path) -> Iterator[FirstDifference]:
    before, after = list_folder(was), list_folder(now)
    for name in sorted(before.keys() | after.keys(), key=lambda name: (not name.endswith(".safetensors"), name)):
        if before.get(name) == after.get(name):
            continue
        if name not in before or name not in after:
            yield FirstDifference("files", name, before.get(name), after.get(name))
        elif name.endswith(".safetensors"):
            try:
                yield from _differing_tensor(was / name, now / name)
            except SafetensorError:  # one of them is damaged
                yield FirstDifference("files", name, before[name], after[name])
        elif not same_but_paths(was / name, now / name):
            yield FirstDifference("files", name, before[name], after[name])
        else:
            continue
        return


def _differing_tensor(was: Path, now: Path) -> Iterator[FirstDifference]:
    import torch
    from safetensors import safe_open

    with safe_open(was, "pt") as before, safe_open(now, "pt") as after:
        files, keys = (before, after), (set(before.keys()), set(after.keys()))
        for name in sorted(keys[0] | keys[1]):
            slices = [file.get_slice(name) if name in names else None for file, names in zip(files, keys, strict=True)]
            shapes = [part and f"{part.get_dtype()} {list(part.get_shape())}" for part in slices]
            if shapes[0] is None or shapes[0] != shapes[1]:
                yield FirstDifference("weights", name, *shapes)
                return
            left, right = before.get_tensor(name), after.get_tensor(name)
            unequal = (left.flatten().view(torch.uint8) != right.flatten().view(torch.uint8)).nonzero()
            if len(unequal):
                at = int(unequal[0]) // left.element_size()
                index = [int(i) for i in torch.unravel_index(torch.tensor(at), left.shape or (1,))]
                values = (float(tensor.flatten()[at]) for tensor in (left, right))
                yield FirstDifference("weights", f"{name}[{', '.join(map(str, index))}]", *values)
                return
    yield FirstDifference("files", was.name, "its header", "a different header")


def _differing_predictions(was: Path, now: Path) -> Iterator[FirstDifference]:
    name = "evaluation/predictions.jsonl"
    if not ((was / name).exists() and (now / name).exists()):
        return
    for row, (before, after) in enumerate(_zip_lines(read_json_lines(was / name), read_json_lines(now / name)), 1):
        for key in [key for key in {**before, **after} if key != "origin"]:
            if before.get(key) != after.get(key):
                origin = before.get("origin", after.get("origin"))
                yield FirstDifference("prediction", f"{key} of row {row} ({origin})", before.get(key), after.get(key))
                return


def _differing_scores(was: Path, now: Path) -> Iterator[FirstDifference]:
    for name, before, after in compare_scores(was, now):
        if before != after:
            yield FirstDifference("score", name, before, after)
            return
