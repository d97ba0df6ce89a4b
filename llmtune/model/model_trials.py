"""Tune candidates for a few steps; the better half continues with more, until one is left (successive halving).

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016. Each round
trains from scratch, with a schedule of its own length.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from llmtune.data.examples import ExampleReader, load_examples
from llmtune.errors import LlmtuneError, Stopped
from llmtune.model.model_selection import (
    ChooseTask,
    ModelRanking,
    RankedModel,
    none_left,
    rank_candidates,
    read_ranking,
    resolve_candidates,
    show_ranking,
)
from llmtune.recipe.loader import LoadedRecipe
from llmtune.recipe.schema import DeploySection, Recipe
from llmtune.recipe.training_rule import with_length
from llmtune.records import Json, Rows
from llmtune.store.atomic_files import hash_file, hash_value, plain
from llmtune.store.run_folder import RunFolder, read_run
from llmtune.store.seed_runs import single_run

FOLDER = "trials"


def successive_halving(
    ranking: ModelRanking, steps: int, tune: Callable[[RankedModel, int], float], console: Console
) -> ModelRanking:
    """Return the ranking by trials: `tune` returns a candidate's bits per byte after a number of steps.

    A candidate whose trial fails is dropped, with the reason. Raises EnvironmentProblem if none remains; Stopped.
    """
    running = [candidate for candidate in ranking.candidates if candidate.reason is None]
    out = [candidate for candidate in ranking.candidates if candidate.reason is not None]
    behind: list[RankedModel] = []
    while len(running) > 1:
        tuned: list[RankedModel] = []
        for candidate in running:
            console.rule(f"trial of {candidate.name}: {steps} steps", align="left")
            try:
                tuned.append(replace(candidate, tuned=tune(candidate, steps), steps=steps))
            except Stopped:
                raise
            except LlmtuneError as error:
                out.append(replace(candidate, reason=f"its trial failed: {error.problems[0].what}"))
        tuned.sort(key=lambda one: (math.isnan(one.tuned or 0), one.tuned or 0))
        kept = math.ceil(len(tuned) / 2)
        running, behind = tuned[:kept], [*tuned[kept:], *behind]
        steps *= 2
    if not running:
        raise none_left(out)
    return replace(ranking, chosen=ranking.model_refs[running[0].name], candidates=(*running, *behind, *out))


def known_or_ranked(
    recipe: Recipe, choose: ChooseTask, rows: Rows, console: Console, run: RunFolder, device: str, offline: bool
) -> Json:
    """Return the hash of a choice's inputs, with the model chosen earlier from the same inputs, or a ranking of all."""
    model = recipe.model
    there, _ = resolve_candidates(recipe, choose, console, device, offline)
    template = hash_file(Path(model.chat_template)) if model.chat_template else None
    settings = [model.model_dump(mode="json"), [one.content_hash for one in there], template]
    section = recipe.task_section() or {}
    inputs = hash_value([rows.content_hash, [*settings, recipe.data.max_length, device, section]])
    record = run.findings.get("ranking")
    if record is not None and record["inputs"] == inputs:
        return {"inputs": inputs, "chosen": record["chosen"]}
    ranking = rank_candidates(recipe, choose, rows, console, run.path / "model", device, offline)
    return {"inputs": inputs, "chosen": None, "ranking": plain(ranking)}


def choose_candidate(
    loaded: LoadedRecipe,
    record: Json,
    run: RunFolder,
    console: Console,
    run_trial: Callable[[LoadedRecipe, Path], None],
    once: Callable[[Callable[[], None]], None],
) -> str:
    """Return the best candidate of a ranking by name, after trials if the recipe asks for them.

    `record` comes from `known_or_ranked`. `run_trial` trains a recipe in a folder. `once` runs its argument on rank 0
    only.
    """
    ranking, steps = read_ranking(record["ranking"]), loaded.recipe.model.trials

    def tune(candidate: RankedModel, steps: int) -> float:
        out = candidate_folder(run.path, candidate.name, steps)
        run_trial(with_candidate(loaded, candidate, steps), out)
        return validation_bits(out)

    if steps:
        ranking = successive_halving(ranking, steps, tune, console)
    once(lambda: note_ranking(ranking, record["inputs"], run, console))
    return ranking.chosen.name


def note_ranking(ranking: ModelRanking, inputs: str, run: RunFolder, console: Console) -> None:
    """Record the choice and its inputs; after trials, show their ranking and remove them."""
    if any(candidate.steps for candidate in ranking.candidates):
        show_ranking(ranking, console, run.path / "model")
    run.note(ranking={"inputs": inputs, "chosen": ranking.chosen.name, "ranking": ranking.to_dict()})
    shutil.rmtree(run.path / "model" / FOLDER, ignore_errors=True)


def candidate_folder(run: Path, name: str, steps: int) -> Path:
    """Return the run folder of a trial."""
    return run / "model" / FOLDER / f"{hash_value(name)[:8]}-{steps}"


def with_candidate(loaded: LoadedRecipe, candidate: RankedModel, steps: int) -> LoadedRecipe:
    """Return the recipe of a trial: one model and number of steps, no gates, further seeds, trackers or deployment."""
    alone, name = single_run(loaded), candidate.name
    if candidate.context is not None and candidate.context < loaded.recipe.data.max_length:
        alone = with_length(alone, candidate.context, name)
    model = {"name": name, "candidates": None, "licences": (), "trials": 0}
    train = {"max_steps": steps, "report_to": ()}
    sections = {
        "model": alone.recipe.model.model_copy(update=model),
        "train": alone.recipe.train.model_copy(update=train),
    }
    recipe = alone.recipe.model_copy(update={**sections, "deploy": DeploySection()})
    return replace(alone, recipe=recipe, fingerprint=hash_value([loaded.fingerprint, name, steps]))


def validation_bits(run: Path) -> float:
    """Return bits per byte of the validation rows, from the loss that a run recorded."""
    reader = ExampleReader(load_examples(run / "data" / "examples"), "validation")
    nats = read_run(run).facts("train")["validation_loss"] * int(reader.supervised.sum())
    return float(nats / math.log(2) / max(1, sum(example.target_bytes for example in reader)))
