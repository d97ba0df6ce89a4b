"""Run a recipe, evaluate a run again, open a finished run: the functions behind `import llmtune` and the CLI."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune import __version__
from llmtune.errors import LlmtuneError, Problem, RecipeError
from llmtune.launch.topology import Topology, why_not
from llmtune.records import Json, Until
from llmtune.store.atomic_files import hash_value
from llmtune.store.process_environment import (
    LOCAL_TRACKERS,
    gc_paused,
    is_remote_model,
    prepare_environment,
    refuse_network,
)
from llmtune.store.process_state import as_in_new_process
from llmtune.store.processes import once, rank
from llmtune.store.processes import strategy as stated_strategy
from llmtune.store.run_request import RunRequest

if TYPE_CHECKING:
    from rich.console import Console

    from llmtune.data.sources import Detected
    from llmtune.recipe.loader import LoadedRecipe
    from llmtune.recipe.schema import Recipe
    from llmtune.serve.finished_run import FinishedRun


OnBegin = Callable[["LoadedRecipe", Path], object]
TRAINING = ("train", "evaluate", "run")
"""Values of `until` that include training."""
FILE_WIDTH = 160
"""Width in columns of output to a file or a pipe: enough for every table."""


def _ignore(loaded: LoadedRecipe, folder: Path) -> None:
    pass


def run(
    recipe: str | Path,
    *,
    out: str | Path | None = None,
    set: Mapping[str, object] | None = None,
    until: Until = "run",
    processes: int = 1,
    strategy: str = "ddp",
    resume: bool = False,
    fresh: bool = False,
    lock: str | Path | None = None,
    threads: int | None = None,
    offline: bool = False,
    quiet: bool = False,
) -> FinishedRun:
    """Run a recipe and return the finished run; steps that are still valid in its folder are skipped.

    Args:
        recipe: a recipe file, or the name of a recipe that ships with llmtune.
        out: the run folder; by default `runs/<name>-<hash>`.
        set: values that replace those of the recipe, such as `{"train.learning_rate": 1e-4}`.
        until: the last step to run: prepare, select, adapt, train, evaluate, or run for all steps and deployment.
        processes: number of processes that train and evaluate.
        strategy: `ddp` gives each process the full model, `fsdp` a shard of it.
        resume: resume in the run folder; raise an error if there is nothing to resume.
        fresh: start over in the run folder.
        lock: an `llmtune.lock` that model and data must match.
        threads: CPU threads; by default torch's own choice.
        offline: forbid any access to the network.
        quiet: print no progress to stderr.

    Raises:
        LlmtuneError: one of its subclasses, with all problems in one message. After a `GateFailed` the run folder is
            complete, and `load_run` opens it.

    Example:
        run = llmtune.run("quickstart", set={"train.max_steps": 20}, out="runs/trial", quiet=True)
    """
    _check_types("llmtune.run", locals())
    from llmtune.recipe.loader import load_recipe

    texts = {
        key: value if isinstance(value, str) else json.dumps(value, default=str) for key, value in (set or {}).items()
    }
    sets = [f"{key}={value}" for key, value in texts.items()]
    out, lock = None if out is None else Path(out), None if lock is None else Path(lock)
    request = RunRequest(out=out, until=until, resume=resume, fresh=fresh, lock=lock, threads=threads, offline=offline)
    with as_in_new_process():
        console = make_console(quiet=quiet)
        request = locate_run(load_recipe(recipe, sets), request, console)
        if (processes, strategy) == (1, "ddp"):
            run_recipe(recipe, sets, request, console)
        else:
            topology = Topology(processes, strategy)
            from llmtune.launch.local_processes import launch_run

            if request.reason:
                console.print(request.reason, markup=False)
            launch_run(recipe, sets, request, topology, console, ["--quiet"] if quiet else [])
    return load_run(request.folder, offline=offline)


def load_run(folder: str | Path, *, offline: bool = False) -> FinishedRun:
    """Open a trained run or a release by its folder or address; its model is loaded at its first use.

    Addresses are those of the command line: `NAME`, `NAME@HASH`, `latest`, `release:NAME`.

    Raises:
        RecipeError: not a run folder, not trained yet, or no such run or release.

    Example:
        run = llmtune.load_run("runs/support-chat-1a2b3c4d")
    """
    _check_types("llmtune.load_run", locals())
    with as_in_new_process():
        prepare_environment(network=False)
        with gc_paused():
            from llmtune.serve.finished_run import FinishedRun

        from llmtune.store.run_listing import find_run

        return FinishedRun(find_run(Path(folder)), offline)


def _check_types(function: str, given: Mapping[str, object]) -> None:
    from llmtune.recipe.arguments import check_arguments  # keep --help fast: it imports pydantic

    check_arguments(function, given)


def run_recipe(
    recipe: str | Path, sets: Sequence[str], request: RunRequest, console: Console, on_begin: OnBegin = _ignore
) -> Json:
    """Run a recipe in this process and those started with it; return the content of report.json in rank 0.

    `on_begin` gets the recipe and the run folder, before anything is written there.
    """
    from llmtune.recipe.loader import load_recipe

    loaded = load_recipe(recipe, sets)
    RecipeError.collect(why_not(stated_strategy(), loaded.recipe))
    prepare_environment(network=names_remote(loaded.recipe) and not request.offline, threads=request.threads)
    _agree(loaded)
    from llmtune.display.console import phase, spinner
    from llmtune.launch.unchanged_run import finish_noted
    from llmtune.report.junit import failures_in_junit

    request = locate_run(loaded, request, console)
    path = request.folder
    on_begin(loaded, path)
    once(lambda: _peek(loaded, path, request))  # before anything is written there
    notes = rank() == 0 and not request.dry_run
    with phase(console, request.until), failures_in_junit(path, loaded.recipe.name) if notes else nullcontext():
        result: Json = {}
        if once(lambda: bool(result.update(_look_first(loaded, path, request, console)) or result)):
            return result
        with spinner(console, "loading the libraries"), gc_paused():
            from llmtune.launch.dry_run import dry_run
            from llmtune.pipeline import run_pipeline

        if request.dry_run:
            return {} if rank() else dry_run(loaded, request, console)
        with finish_noted(loaded, path, request.until) if notes else nullcontext():
            return run_pipeline(loaded, request, console)


def locate_run(loaded: LoadedRecipe, request: RunRequest, console: Console) -> RunRequest:
    """Return the request with its run folder: `--out`, else the default one, with the reason if that is a new one.

    All processes call this; rank 0 reads the data. Raises what `check_recipe` raises if the data cannot be read.
    """
    if request.out is not None:
        return request
    prepare_environment(network=names_remote(loaded.recipe) and not request.offline, threads=request.threads)
    path, reason = once(lambda: _name_folder(loaded, request, console))
    return replace(request, out=Path(path), reason=reason)


def _name_folder(loaded: LoadedRecipe, request: RunRequest, console: Console) -> tuple[str, str]:
    from llmtune.data.run_naming import default_folder, explain_new, rowless_folder
    from llmtune.report.junit import failures_in_junit
    from llmtune.store.run_folder import MANIFEST

    try:
        refuse_network(loaded.recipe, offline=request.offline)
        path = default_folder(loaded)
    except LlmtuneError:
        with nullcontext() if request.dry_run else failures_in_junit(rowless_folder(loaded), loaded.recipe.name):
            _check_request(loaded, request, console)  # names all problems, not only those of the data's content
            raise
    reason = "" if (path / MANIFEST).exists() else explain_new(loaded)
    if request.resume and reason:
        raise RecipeError.of(f"nothing to resume: {reason}", str(path), "Omit --resume to start.")
    return str(path), reason


def _agree(loaded: LoadedRecipe) -> None:
    """Raise RecipeError in a process whose version, recipe or strategy differs from that of rank 0."""
    ours = {
        "version of llmtune": __version__,
        "recipe with its --set": hash_value(loaded.recipe.model_dump(mode="json"))[:8],
        "strategy": stated_strategy(),
    }
    theirs = once(lambda: ours)
    RecipeError.collect(
        Problem(f"{value} here, {theirs[name]} in process 0", name, "Run the same command on each machine.")
        for name, value in ours.items()
        if value != theirs[name]
    )


def _peek(loaded: LoadedRecipe, path: Path, request: RunRequest) -> None:
    from llmtune.store.run_folder import peek_run
    from llmtune.store.run_lock import read_pins

    peek_run(path, loaded.fingerprint, resume=request.resume, fresh=request.fresh)
    if request.lock is not None:
        read_pins(request.lock)


def _look_first(loaded: LoadedRecipe, path: Path, request: RunRequest, console: Console) -> Json:
    """Run the checks that do not need torch; return the report of a run that has nothing left to do."""
    from llmtune.launch.recipe_check import try_recipe_rows
    from llmtune.launch.unchanged_run import find_unchanged, print_unchanged

    if again := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        console.print(f"[yellow]Restarting all processes ({again} times so far).[/]")
    detected = _check_request(loaded, request, console)
    if request.dry_run:
        from llmtune.data.ingest import TRIED_ROWS

        try_recipe_rows(loaded, detected, split_up_to=TRIED_ROWS)
    if request.fresh or request.dry_run or request.lock:
        return {}
    report = find_unchanged(loaded, path, request.until)
    if report is not None:
        print_unchanged(report, path, console)
    return report or {}


def _check_request(loaded: LoadedRecipe, request: RunRequest, console: Console) -> list[Detected]:
    from llmtune.launch.recipe_check import check_recipe, marks_left

    for line in marks_left(loaded):
        console.print(f"still the starter's value: {line}", style="yellow", markup=False)
    return check_recipe(loaded, trains=request.until in TRAINING)


def write_test_file(recipe: str, sets: Sequence[str], out: Path | None, file: Path, console: Console) -> None:
    """Write the test rows of a prepared recipe to a file, and print the line to add to the recipe."""
    from llmtune.data.preparation import write_test_rows
    from llmtune.data.row_store import load_rows
    from llmtune.data.run_naming import default_folder
    from llmtune.recipe.loader import load_recipe

    loaded = load_recipe(recipe, sets)
    rows = load_rows((out or default_folder(loaded)) / "data" / "rows")
    stated = Path(recipe)
    line = write_test_rows(loaded.recipe, rows, file, stated.parent if stated.is_file() else Path())
    console.print(f"test rows written to {file}. Set in data: {line}", highlight=False, markup=False)


def evaluate_folder(
    run: Path, sets: Sequence[str], request: RunRequest, console: Console, on_begin: OnBegin = _ignore
) -> Json:
    """Score a finished run again, with some settings changed; return the content of report.json.

    `on_begin` is as in `run_recipe`.
    """
    from llmtune.display.console import phase, spinner
    from llmtune.evaluate.champion import open_champion
    from llmtune.evaluate.suites.judge_client import check_evaluation
    from llmtune.store.run_folder import read_run, recipe_of_run

    loaded = recipe_of_run(read_run(run), sets)
    on_begin(loaded, run)
    check_evaluation(run, loaded.recipe, console)
    open_champion(loaded.recipe, run)
    prepare_environment(network=studies_remote(loaded.recipe) and not request.offline, threads=request.threads)
    with spinner(console, "loading the libraries"), gc_paused():
        from llmtune.pipeline import evaluate_run

    with phase(console, request.until):
        return evaluate_run(loaded, run, console, offline=request.offline, engine=request.engine)


def make_console(*, quiet: bool = False, stderr: bool = True) -> Console:
    """Return the console of progress (stderr) or results: with colours and bars in a terminal, else plain lines."""
    import sys

    from llmtune.display.console import VisibleConsole

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal or os.environ.get("COLUMNS") else FILE_WIDTH
    options = {"stderr": stderr, "soft_wrap": not terminal, "highlight": False, "quiet": quiet, "width": width}
    return VisibleConsole(beats=rank() == 0, **options)


def names_remote(recipe: Recipe) -> bool:
    """Whether the recipe needs the network: a model, data or a kernel on a hub, a remote address or tracker."""
    from llmtune.model.catalogue import candidate_names  # keep --help fast
    from llmtune.recipe.section import STORES

    models = [recipe.model.name] if recipe.model.name else [*candidate_names(recipe)]
    models += [mined.model] if (mined := recipe.data.negatives) and mined.model else []
    sources = [source for _, _, source in recipe.data.named_sources()]
    remote_data = any(source.path.startswith(("hub:", *STORES)) for source in sources) or studies_remote(recipe)
    remote_trackers = set(recipe.train.report_to) - LOCAL_TRACKERS
    hub_kernel = "/" in recipe.model.attn_implementation
    return any(map(is_remote_model, models)) or remote_data or bool(remote_trackers) or hub_kernel


def studies_remote(recipe: Recipe) -> bool:
    """Whether a benchmark of the evaluation reads data from a hub, or its judge is on another machine."""
    from llmtune.recipe.eval_suites_section import is_local

    judge = recipe.evaluate.judge
    has_remote_judge = judge is not None and not is_local(judge.endpoint)
    return has_remote_judge or any(benchmark.needs_network for benchmark in recipe.evaluate.benchmarks)
