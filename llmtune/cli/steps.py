"""`run` and its five steps: the same options, a different place to stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmtune.cli.options import AsJson, DryRun, Fresh, Lock, Offline, Out, RecipeArgument, Resume, Sets, Threads
from llmtune.cli.output import handled, print_json, stderr_console
from llmtune.errors import RecipeError
from llmtune.recipe import LoadedRecipe, load_recipe
from llmtune.run.environment import names_remote, prepare_environment

SUMMARIES = {
    "run": "Run all five steps: prepare, select, adapt, train, evaluate (and deploy).",
    "prepare": "Step 1: read, check, deduplicate and split the rows; encode, mask and pack them.",
    "select": "Step 2: choose a model, plan its memory.",
    "adapt": "Step 3: put the adapter in and prove that it is wired.",
    "train": "Step 4: train, with checkpoints.",
    "evaluate": "Step 5: score base and tuned model on the same held-out rows. Takes a run folder as well.",
}


def _command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        out: Out = None,
        sets: Sets = None,
        resume: Resume = False,
        fresh: Fresh = False,
        lock: Lock = None,
        threads: Threads = None,
        dry_run: DryRun = False,
        offline: Offline = False,
        as_json: AsJson = False,
    ) -> None:
        if resume and fresh:
            raise RecipeError.of("--resume and --fresh exclude each other", fix="leave one of them away")
        loaded, out = read_recipe(recipe, out, sets or [], run_allowed=name == "evaluate")
        prepare_environment(network=names_remote(loaded.recipe) and not offline, threads=threads)
        from llmtune.pipeline import run_pipeline
        from llmtune.work import Options

        options = Options(out=out, resume=resume, fresh=fresh, lock=lock, offline=offline, dry_run=dry_run, until=name)
        result = run_pipeline(loaded, options, stderr_console())
        if as_json:
            print_json(result)

    command.__doc__ = SUMMARIES[name]
    return handled(command)


def read_recipe(
    name: str, out: Path | None, sets: list[str], *, run_allowed: bool = False
) -> tuple[LoadedRecipe, Path | None]:
    """Load a recipe; or, where a run folder is allowed, the recipe of that run and the folder itself as `out`."""
    folder = Path(name)
    if not (run_allowed and folder.is_dir()):
        return load_recipe(name, sets), out
    from llmtune.run.folder import read_run, recipe_of_run

    return recipe_of_run(read_run(folder), sets), folder


COMMANDS = {name: _command(name) for name in SUMMARIES}
