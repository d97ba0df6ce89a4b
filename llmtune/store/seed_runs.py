"""Runs inside a run's folder, each with its recipe: additional seeds (`train.seeds`), and a control run."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from llmtune.recipe.control_run import ControlRun
from llmtune.recipe.evaluate_section import GATE_KEYS
from llmtune.recipe.loader import LoadedRecipe, find_idle_defaults
from llmtune.recipe.schema import DeploySection
from llmtune.records import Until
from llmtune.store.atomic_files import explained, hash_value, staged, write_json
from llmtune.store.run_folder import MANIFEST, RunFolder, read_manifest, read_run, recipe_of_run

FOLDER, CONTROLS = "seeds", "controls"
SHARED = ("prepare", "mine", "answer", "encode", "teach")
"""Steps whose results do not depend on the seed."""
SEEDS_UNTIL: dict[Until, Until] = {"train": "train", "evaluate": "evaluate", "run": "evaluate"}
"""Last step of the run -> last step of the runs in its folder."""


def seed_folder(run: Path, seed: int) -> Path:
    """Return the run folder of an additional seed."""
    return run / FOLDER / str(seed)


def control_folder(run: Path, control: ControlRun) -> Path:
    """Return the run folder of a control run."""
    return run / CONTROLS / control.name


def without_seeds(loaded: LoadedRecipe) -> LoadedRecipe:
    """Return the recipe without its additional seeds; its training and fingerprint are the same."""
    train = loaded.recipe.train.model_copy(update={"seeds": ()})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"train": train}))


def without_gates(loaded: LoadedRecipe) -> LoadedRecipe:
    """Return the recipe without gates and the keys that only gates use."""
    section = loaded.recipe.evaluate
    defaults = {key: type(section).model_fields[key].default for key in GATE_KEYS}
    recipe = loaded.recipe.model_copy(update={"evaluate": section.model_copy(update=defaults)})
    return replace(
        loaded, recipe=recipe, without_effect=loaded.without_effect | {f"evaluate.{key}" for key in GATE_KEYS}
    )


def single_run(loaded: LoadedRecipe) -> LoadedRecipe:
    """Return the recipe without gates, additional seeds and control run, to repeat its training and scores."""
    single, control = without_gates(without_seeds(loaded)), loaded.recipe.control_run
    if control is None:
        return single
    name, _, key = control.key.partition(".")
    section = getattr(single.recipe, name).model_copy(update={key: False})
    return replace(single, recipe=single.recipe.model_copy(update={name: section}))


def as_control(loaded: LoadedRecipe, control: ControlRun) -> LoadedRecipe:
    """Return the recipe of a control run, without gates, additional seeds and deployment."""
    single = without_gates(without_seeds(loaded))
    recipe = single.recipe.model_copy(update={**control.changes, "deploy": DeploySection()})
    idle = {key for key in find_idle_defaults(recipe) if key.partition(".")[0] in control.changes}
    return replace(
        single,
        recipe=recipe,
        without_effect=single.without_effect | idle,
        fingerprint=hash_value([loaded.fingerprint, control.name]),
    )


def scored_as(run: Path, loaded: LoadedRecipe) -> LoadedRecipe:
    """Return the recipe of a finished run, to be scored as another recipe says; without gates."""
    trained, scored = recipe_of_run(read_run(run)), without_gates(loaded)
    sections = {name: getattr(scored.recipe, name) for name in ("evaluate", "generation")}
    prefixes = tuple(f"{name}." for name in sections)
    origins = {key: origin for key, origin in scored.origins.items() if key.startswith(prefixes)}
    idle = {key for key in scored.without_effect if key.startswith(prefixes)}
    return replace(
        trained,
        recipe=trained.recipe.model_copy(update=sections),
        origins=trained.origins | origins,
        without_effect=frozenset(idle | {key for key in trained.without_effect if not key.startswith(prefixes)}),
    )


def with_seed(loaded: LoadedRecipe, seed: int) -> LoadedRecipe:
    """Return the recipe for one additional seed, without gates and deployment, which only the main run has."""
    single = without_gates(without_seeds(loaded))
    recipe = single.recipe.model_copy(update={"seed": seed, "deploy": DeploySection()})
    origins = {**loaded.origins, "seed": loaded.origins.get("train.seeds", "train.seeds")}
    return replace(single, recipe=recipe, origins=origins, fingerprint=hash_value([loaded.fingerprint, seed]))


def share_rows(folder: RunFolder, out: Path, fingerprint: str) -> None:
    """Create the folder of a further run with the run's rows and examples, which both share."""
    if (out / MANIFEST).exists():
        return
    steps = {name: folder.manifest["steps"][name] for name in SHARED if name in folder.manifest["steps"]}
    findings = {name: value for name, value in folder.findings.items() if name == "ranking"}
    with explained(out):
        out.parent.mkdir(exist_ok=True)
        with staged(out) as target:
            shutil.copytree(folder.path / "data", target / "data", copy_function=hard_link)
            write_json(target / MANIFEST, {"fingerprint": fingerprint, "steps": steps, "findings": findings})


def kept_findings(folder: RunFolder) -> dict[str, object]:
    """Return the findings of a run that its additional seeds and its reproduction reuse."""
    names = ("micro_batch_tokens", "gradient_checkpointing")
    return {name: folder.findings[name] for name in names if name in folder.findings}


def hard_link(source: str, target: str) -> None:
    """Hard-link a file, or copy it if the file system has no links; steps never change a file in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def is_done(run: Path, step: str) -> bool:
    """Return whether a run folder exists and its step is done."""
    manifest = read_manifest(run)
    return manifest is not None and RunFolder(run, manifest).is_done(step)


def is_scored_alike(run: RunFolder, further: Path) -> bool:
    """Return whether an additional seed was trained and scored on the run's present data, with its present settings.

    If not, it is still to be run again, because the run was changed and stopped.
    """
    manifest = read_manifest(further)
    if manifest is None or not (seed := RunFolder(further, manifest)).is_done("evaluate"):
        return False
    data = {one.manifest["steps"]["encode"]["inputs"] for one in (run, seed) if one.is_done("encode")}
    same_start = run.findings.get("start_from") == seed.findings.get("start_from")
    same_settings = run.facts("evaluate").get("recipe") == seed.facts("evaluate").get("recipe")
    return len(data) <= 1 and same_start and same_settings
