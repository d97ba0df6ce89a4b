"""`llmtune compare RUN RUN...`: runs that exist, held against one another on the rows that all of them answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from llmtune import __version__
from llmtune.compare.compare_files import write_comparison
from llmtune.compare.compare_tables import print_comparison
from llmtune.compare.run_pairs import check_alike, compare_pairs, differing
from llmtune.compare.run_scores import OpenedRun, open_runs
from llmtune.errors import RecipeError
from llmtune.report import verdict
from llmtune.report.assembly import difference_json
from llmtune.store.atomic_files import explained, hash_value

FEWEST = 2


def compare_runs(paths: Sequence[Path], out: Path | None, console: Console) -> dict[str, Any]:
    """Compare runs, write the comparison into `out` (default: `runs/compare-<hash>`) and return it.

    Raises:
        RecipeError: fewer than two runs, one that is none or has no scores, other tasks or settings of measurement.
        DataError: they were not measured on the same rows.
        EnvironmentProblem: scores are damaged, or `out` cannot be written.
    """
    if len(paths) < FEWEST:
        fix = "Name two run folders or more; or a recipe with --methods full,lora,qlora."
        raise RecipeError.of("one run alone cannot be compared", str(paths[0]) if paths else None, fix)
    runs = open_runs(paths)
    check_alike(runs)
    made = describe(runs) | {"kind": "runs", "name": " and ".join(run.name for run in runs)}
    target = out or Path("runs") / f"compare-{hash_value([str(path.absolute()) for path in paths])[:8]}"
    return finish(made, target, console)


def finish(made: Mapping[str, Any], out: Path, console: Console) -> dict[str, Any]:
    """Print a comparison, write its files and return it with the folder that they are in."""
    result = {"llmtune": __version__, **made, "folder": str(out)}
    print_comparison(result, console)
    with explained(out):
        write_comparison(result, out)
    console.print(f"comparison: {escape(str(out / 'compare.html'))}")
    return result


def describe(runs: Sequence[OpenedRun]) -> dict[str, Any]:
    """Return what is known of each run, of each pair, and of what differs between the recipes."""
    first, *others = runs
    keys = dict.fromkeys(key for one in others for key in differing(first, one))
    return {
        "task": first.recipe.task,
        "rows": len(first.measures.rows),
        "runs": [describe_run(run) for run in runs],
        "pairs": compare_pairs(runs),
        "settings": [{"key": key, "values": [run.settings.get(key) for run in runs]} for key in keys],
        "notes": notes(runs),
    }


def describe_run(run: OpenedRun) -> dict[str, Any]:
    """Return what one run cost and what it scored, against its own base."""
    train, adapt, evaluation = run.facts("train"), run.facts("adapt"), run.evaluation
    steps = run.folder.manifest["steps"]
    difference = {metric: difference_json(found) for metric, found in evaluation.difference.items()}
    about: dict[str, Any] = {"base": evaluation.base, "tuned": evaluation.tuned, "difference": difference}
    return {
        "name": run.name,
        "folder": str(run.path),
        "method": run.recipe.adapter.method,
        "model": run.facts("select").get("name"),
        "seed": run.recipe.seed,
        "learning_rate": run.recipe.train.learning_rate,
        "batch": run.recipe.train.batch_tokens or run.recipe.train.batch_size,
        "steps": train.get("steps"),
        "tokens": train.get("tokens"),
        "train_seconds": train.get("wall_seconds"),
        "run_seconds": sum(step.get("seconds") or 0 for step in steps.values()),
        "peak_bytes": steps["train"].get("peak_bytes"),
        "trainable": adapt.get("trainable"),
        "parameters": adapt.get("total"),
        "share": adapt["trainable"] / adapt["total"] if adapt.get("total") else None,
        "disk_bytes": run.disk_bytes,
        "baseline": evaluation.baseline,
        **about,
        "verdict": verdict({"evaluation": {**about, "baseline": evaluation.baseline}}),
    }


def notes(runs: Sequence[OpenedRun]) -> list[str]:
    """Say what has to be known to read the numbers rightly."""
    found = []
    for run in runs:
        train = run.facts("train")
        if train.get("resumed_from"):
            found.append(f"{run.name} was resumed at step {train['resumed_from']}: its seconds are those since then.")
        if train.get("stopped_early"):
            found.append(f"{run.name} stopped early: {train['stopped_early']}.")
    if len({run.facts("train").get("steps") for run in runs}) > 1:
        found.append("The runs were not trained for the same number of steps.")
    if len({str(sorted(run.evaluation.base.items())) for run in runs}) > 1:
        found.append(
            "The base scores differ: each run is held against the base that it was trained on, with qlora that is the "
            "model in 4 bits. The pairs compare the tuned models themselves."
        )
    return found
