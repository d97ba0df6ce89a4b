"""Train a run again from its lock, into another folder, and report whether the result is the same or what differs."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from llmtune.data.sources import hash_sources
from llmtune.errors import DataError, EnvironmentProblem, Problem, RecipeError
from llmtune.evaluate.evaluation_file import answered_by_vllm
from llmtune.evaluate.suites.judge_client import check_evaluation
from llmtune.model.device import describe_device, pick_device
from llmtune.pipeline import run_pipeline
from llmtune.recipe.data_section import Source
from llmtune.recipe.evaluate_section import is_own_metric
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import change_paths
from llmtune.records import Json
from llmtune.store.atomic_files import hash_file, list_folder, write_json
from llmtune.store.diff_runs import (
    compare_losses,
    compare_scores,
    far_apart,
    find_differences,
    same_but_paths,
)
from llmtune.store.processes import rank
from llmtune.store.release_store import is_stored
from llmtune.store.run_folder import RunFolder, read_run, recipe_of_run
from llmtune.store.run_listing import RUNS
from llmtune.store.run_lock import LOCK, Lock, Pins, hardware, package_versions, read_lock, read_pins
from llmtune.store.run_origin import list_model_code, name_code
from llmtune.store.run_request import RunRequest
from llmtune.store.seed_runs import kept_findings, single_run
from llmtune.store.verification import Verification, relocated, split_pattern, verify_run

RESULT = "reproduction.json"
DECISIVE = ("machine", "processor", "python", "device", "card", "vector_units")
"""Hardware facts that affect the last bits of a result."""


@dataclass(frozen=True)
class Tolerances:
    """How far losses and scores may differ if bytes cannot be equal: absolute up to 1, relative above."""

    loss: float = 0.05
    score: float = 0.02


def reproduce(
    run: Path,
    console: Console,
    *,
    out: Path | None = None,
    fresh: bool = False,
    offline: bool = False,
    tolerances: Tolerances | None = None,
) -> Json:
    """Run the resolved recipe of `run` again with everything pinned to its lock, and return the comparison.

    Raises:
        RecipeError: not a trained run, its recipe was changed, or `out` is the run itself.
        DataError, EnvironmentProblem: data or model differ from the lock.
    """
    folder = read_run(run)
    folder.require_trained()
    whole = run.absolute()
    place = RUNS / f"{whole.parent.name}-{whole.name}" if is_stored(whole) else whole
    target = out or place.with_name(f"{place.name}-reproduced")
    if target.resolve() == run.resolve():
        raise RecipeError.of("this is the folder of the run itself", "--out", "Choose another folder.")
    verification = verify_run(run)
    refuse_changed(verification)
    lock = read_lock(run / LOCK)
    loaded = move_recipe(recipe_of_run(folder), lock, run)
    name_code(run, list_model_code(loaded.recipe), console)
    check_evaluation(run, loaded.recipe, console)
    if answered_by_vllm(run):
        console.print("its scores are not reproduced: vLLM generated the answers")
    request = RunRequest(
        out=target,
        fresh=fresh,
        offline=offline,
        until="evaluate" if folder.is_done("evaluate") and not answered_by_vllm(run) else "train",
        pins=hold(read_pins(run / LOCK), loaded.recipe, lock, run),
        findings={**kept_findings(folder), "reproduces": str(run)},
    )
    loaded = single_run(replace(loaded, recipe=at_commits(loaded.recipe, lock)))
    run_pipeline(loaded, request, console)  # without gates: only equality with the run counts
    if rank():
        return {}
    result = compare_with_original(folder, target, lock, verification, tolerances or Tolerances())
    write_json(target / RESULT, result)
    console.print(f"written: {escape(str(target / RESULT))}")
    return result


def refuse_changed(verification: Verification) -> None:
    """Raise if the lock, the recipe, the data, the model or the `start_from` adapter has changed since the run."""
    failed = list(zip(verification.failed, verification.problems(), strict=True))
    for kinds, error in ((("recipe", "lock"), RecipeError), (("data",), DataError)):
        error.collect(problem for finding, problem in failed if finding.kind in kinds)
    EnvironmentProblem.collect(problem for finding, problem in failed if finding.kind in {"model", "start_from"})


def move_recipe(loaded: LoadedRecipe, lock: Lock, run: Path) -> LoadedRecipe:
    """Return the recipe with each missing path replaced by its new location; see `relocated`."""

    def find(path: str) -> str:
        if not os.path.isabs(path):
            return path
        if is_own_metric(path):
            file, _, function = path.rpartition(":")
            return f"{find(file)}:{function}"
        below, pattern = split_pattern(path)
        return str(relocated(str(below), lock.get("folder"), run) / pattern)

    return replace(loaded, recipe=change_paths(loaded.recipe, lambda key, path, resolve: find(path)))


def at_commits(recipe: Recipe, lock: Lock) -> Recipe:
    """Return the recipe with hub data sets pinned to the commits in the lock."""
    commits = {entry["source"]: entry["commit"] for entry in lock["data"].get("files", []) if "commit" in entry}
    if not commits:
        return recipe
    update: dict[str, tuple[Source, ...]] = {}
    for _, place, source in recipe.data.named_sources():
        pinned = source.model_copy(update={"revision": commits.get(source.path, source.revision)})
        update[place] = (*update.get(place, ()), pinned)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})


def hold(pins: Pins, recipe: Recipe, lock: Lock, run: Path) -> Pins:
    """Return the lock's pins, with paths adjusted to this machine."""
    if os.path.isabs(pins.model):
        pins = replace(pins, model=str(relocated(pins.model, lock.get("folder"), run)))
    pinned = at_commits(recipe, lock)
    if pinned is not recipe:  # with a commit as revision the sources have another hash
        pins = replace(pins, data_hash=hash_sources(pinned.data, recipe.task))
    return pins


def compare_with_original(
    folder: RunFolder, now: Path, lock: Lock, verification: Verification, tolerances: Tolerances
) -> Json:
    """Compare the reproduction with the run: by bytes if they can be equal, else by losses and scores."""
    was = folder.path
    trained = next(name for name in ("adapter", "weights") if name in folder.manifest["steps"]["train"]["outputs"])
    settings = differing_settings(folder, lock, now)
    files = list(compare_trained(folder, now, lock, trained))
    losses = [judge_numbers(*numbers, tolerances.loss) for numbers in compare_losses(was, now)]
    scores = [judge_numbers(*numbers, tolerances.score) for numbers in compare_scores(was, now)]
    if folder.is_done("evaluate") and not scores and not answered_by_vllm(was):
        scores = [{"name": "evaluation", "was": None, "now": None, "equal": False, "within": False}]
    by_bytes = not settings and device_of(folder, lock) == "cpu"
    judged = files + scores if by_bytes else losses + scores
    differences = find_differences(was, now, trained)
    return {
        "run": str(was),
        "reproduction": str(now),
        "equal": all(item["equal"] if by_bytes else item["within"] for item in judged),
        "judged_by": "bytes" if by_bytes else "tolerance",
        "same_bytes": all(file["equal"] for file in files),
        "tolerances": vars(tolerances),
        "settings": settings,
        "files": files,
        "losses": losses,
        "scores": scores,
        "first_difference": vars(differences[0]) | {"told": str(differences[0])} if differences else None,
        "differences": [vars(difference) for difference in differences],
        "altered_since": sorted({finding.name for finding in verification.failed}),
    }


def judge_numbers(name: str, was: Any, now: Any, tolerance: float) -> Json:
    """Return whether two numbers are equal, and whether they are within the tolerance."""
    return {"name": name, "was": was, "now": now, "equal": was == now, "within": not far_apart(was, now, tolerance)}


def compare_trained(folder: RunFolder, now: Path, lock: Lock, trained: str) -> list[Json]:
    """Compare each trained file with its original hash; the path of the base model does not count."""
    original_hashes = lock.get("trained", {}).get(trained) or list_folder(folder.path / trained)
    new_hashes = list_folder(now / trained)
    files = []
    for name in sorted(original_hashes.keys() | new_hashes.keys()):
        before, after = folder.path / trained / name, now / trained / name
        equal = original_hashes.get(name) == new_hashes.get(name)
        intact = before.is_file() and hash_file(before) == original_hashes.get(name)
        if not equal and intact and after.is_file():
            equal = name.endswith(".json") and same_but_paths(before, after)
        files.append(
            {"name": f"{trained}/{name}", "was": original_hashes.get(name), "now": new_hashes.get(name), "equal": equal}
        )
    return files


def device_of(folder: RunFolder, lock: Lock) -> str:
    """Return the device that the run was trained on."""
    plan = folder.facts("select").get("plan", {})
    return str(lock["hardware"].get("device") or plan.get("device") or "cpu")


def differing_settings(folder: RunFolder, lock: Lock, now: Path) -> list[Json]:
    """List the versions, hardware, threads and processes that differ from the lock; they can change bytes."""
    machine = hardware() | describe_device(pick_device())
    then = dict(lock["packages"]) | {name: lock["hardware"][name] for name in DECISIVE if name in lock["hardware"]}
    here = {**package_versions(tuple(lock["packages"])), **machine}
    then |= {"threads": lock.get("threads"), "processes": processes_of(folder), "device": device_of(folder, lock)}
    here |= {"threads": torch.get_num_threads(), "processes": processes_of(read_run(now))}
    budget = "micro_batch_tokens"
    then[budget], here[budget] = (run.findings.get(budget) for run in (folder, read_run(now)))
    return [{"name": name, "was": was, "now": here.get(name)} for name, was in then.items() if was != here.get(name)]


def processes_of(folder: RunFolder) -> int:
    """Return the number of processes that trained."""
    return int(folder.facts("train").get("processes", 1))


def explain_difference(result: Json) -> Problem:
    """Describe the first difference and its likely cause."""
    settings = [f"{setting['name']} was {setting['was']}, is {setting['now']}" for setting in result["settings"]]
    first = result["first_difference"]
    place = first["told"] if first else "the hashes of the trained files: the run's own files were changed since"
    if result["judged_by"] == "bytes":
        why = "Versions, processor and threads match the lock, so something outside the lock differs."
    else:
        why = f"Differs from the lock: {'; '.join(settings)}." if settings else "A GPU does not sum in a fixed order."
    return Problem(f"not the same; the first difference is in {place}", result["reproduction"], why)
