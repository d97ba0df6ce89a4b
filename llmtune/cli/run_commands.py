"""`run` and its five steps: the same options, a different place to stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.cli.options import AsJson, DryRun, Fresh, Lock, Offline, Out, RecipeArgument, Resume, Sets, Threads
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.errors import RecipeError
from llmtune.store.process_environment import at_once, names_remote, prepare_environment, studies_remote

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
        from llmtune.recipe import load_recipe

        refuse_both(resume, fresh)
        if name == "evaluate" and Path(recipe).is_dir():
            if out or resume or fresh or lock or dry_run:
                raise RecipeError.of("of these options a run folder takes only --set, --threads, --offline and --json")
            result = _evaluate_run(Path(recipe), sets or [], threads, offline)
        else:
            loaded = load_recipe(recipe, sets or [])
            prepare_environment(network=names_remote(loaded.recipe) and not offline, threads=threads)
            with at_once():
                from llmtune.pipeline import run_pipeline
                from llmtune.session import Options

            options = Options(out, resume, fresh, lock, offline, dry_run, until=name)
            result = run_pipeline(loaded, options, stderr_console())
        if as_json:
            print_json(result)

    command.__doc__ = SUMMARIES[name]
    return handled(command)


def refuse_both(resume: bool, fresh: bool) -> None:
    """Raise RecipeError for --resume beside --fresh."""
    if resume and fresh:
        raise RecipeError.of("--resume and --fresh exclude each other", fix="leave one of them away")


def _evaluate_run(run: Path, sets: list[str], threads: int | None, offline: bool) -> dict[str, Any]:
    from llmtune.store.run_folder import read_run, recipe_of_run

    loaded = recipe_of_run(read_run(run), sets)
    prepare_environment(network=studies_remote(loaded.recipe) and not offline, threads=threads)
    with at_once():
        from llmtune.pipeline import evaluate_run

    return evaluate_run(loaded, run, stderr_console(), offline=offline)


COMMANDS = {name: _command(name) for name in SUMMARIES}
