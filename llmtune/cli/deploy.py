"""`llmtune deploy`: make something to ship out of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import AsJson, Offline, RunArgument, Threads
from llmtune.cli.output import handled, print_json, stderr_console
from llmtune.run.environment import at_once, prepare_environment

app = typer.Typer(help="Make something to ship out of a run.", no_args_is_help=True)


@app.callback()
def _deploy() -> None:
    pass


@app.command()
@handled
def merge(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write (default: RUN/merged).")] = None,
    onto: Annotated[
        str | None,
        typer.Option(
            "--onto", help="original or dequantized weights (default: those that the adapter was trained on)."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16 (auto: as trained).")] = "auto",
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Merge the adapter into the base weights; certified against the adapter, exit 6 if they differ."""
    prepare_environment(network=False, threads=threads)
    with at_once():
        from llmtune.finished import merge_run

    certificate = merge_run(run, out=out, onto=onto, dtype=dtype, offline=offline, console=stderr_console())
    if as_json:
        print_json(certificate)
