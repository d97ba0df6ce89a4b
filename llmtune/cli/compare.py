"""`llmtune compare`: several runs, or one recipe by several methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AsJson, Fresh, Offline, Resume, Sets, Threads, refuse_both
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.errors import Problem, RecipeError
from llmtune.launch.python_api import make_console
from llmtune.records import Json
from llmtune.store.process_environment import gc_paused, prepare_environment

if TYPE_CHECKING:
    from rich.console import Console


@handled
def compare_command(
    what: Annotated[
        list[str], typer.Argument(metavar="RUN RUN... | RECIPE", help="Run folders, or one recipe with --methods.")
    ],
    methods: Annotated[
        str | None, typer.Option("--methods", help="Methods to train the recipe with: full,lora,qlora.")
    ] = None,
    learning_rate: Annotated[
        list[str] | None,
        typer.Option(
            "--learning-rate",
            metavar="METHOD=NUMBER",
            help="Learning rate of one method, e.g. full=2e-5 (default: the recipe's; for full, a tenth).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the comparison (default: one in runs/, named by hash).")
    ] = None,
    sets: Sets = None,
    resume: Resume = False,
    fresh: Fresh = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs on their common rows, or train one recipe with several methods and compare."""
    refuse_both(resume, fresh)
    shown = make_console(stderr=False, quiet=as_json)
    if methods is None:
        stated = {"--learning-rate": learning_rate, "--set": sets, "--resume": resume, "--fresh": fresh}
        result = _compare_runs(what, out, [name for name, value in stated.items() if value], shown)
    else:
        from llmtune.compare.compare_methods import MethodOptions, compare_methods, read_methods, read_rates

        if len(what) > 1:
            raise RecipeError.of(f"--methods needs exactly one recipe, got {len(what)}", "--methods")
        chosen = read_methods(methods)
        rates = read_rates(learning_rate or [], chosen)
        prepare_environment(network=not offline, threads=threads)
        options = MethodOptions(chosen, rates, tuple(sets or ()), out, resume, fresh, threads, offline)
        result = compare_methods(what[0], options, stderr_console(), shown)
    if as_json:
        print_json(result)


def _compare_runs(what: Sequence[str], out: Path | None, stated: Sequence[str], shown: Console) -> Json:
    RecipeError.collect(
        Problem("this option needs a recipe with --methods", name, "Omit it to compare existing runs.")
        for name in stated
    )
    from llmtune.store.run_folder import MANIFEST

    if len(what) == 1 and not (Path(what[0]) / MANIFEST).exists():
        raise RecipeError.of("comparing a recipe needs methods", what[0], "Add --methods full,lora,qlora.")
    prepare_environment(network=False)
    with gc_paused():
        from llmtune.compare.compare_runs import compare_runs

    return compare_runs([Path(one) for one in what], out, shown)


COMMANDS: dict[str, Callable[..., None]] = {"compare": compare_command}
