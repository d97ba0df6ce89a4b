"""`llmtune deploy serve`: finished runs behind an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import AsJson, Offline, Threads
from llmtune.cli.output_streams import Terminated, handled, print_json, stderr_console
from llmtune.errors import EnvironmentProblem, Problem, RecipeError, nearest
from llmtune.store.process_environment import at_once, prepare_environment

ENGINES = ("own", "vllm")
EXTRA = ("fastapi", "uvicorn", "starlette", "prometheus_client", "python_multipart")
"""Packages that the server needs and the rest of llmtune does not."""


@handled
def serve(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Run folders of one base, each under its own name.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=RUN", help="A run under a name of your choice.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; beyond this machine an API key is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with the API key (or set LLMTUNE_API_KEY).")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter into the base in memory.")] = False,
    engine: Annotated[str, typer.Option("--engine", help="own, or vllm where that is installed.")] = "own",
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=1, help="Requests that may wait; beyond them 429 is answered.")
    ] = 64,
    max_batch: Annotated[
        int | None, typer.Option("--max-batch", min=1, help="Answers written at once (default: 16, on a GPU 64).")
    ] = None,
    max_body: Annotated[
        int | None,
        typer.Option("--max-body", min=1024, help="Bytes of a request (default: 2 MiB, for recordings 32 MiB)."),
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, max=3600, help="Seconds that answers have to end in after SIGTERM.")
    ] = 30.0,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Serve tuned models with OpenAI's endpoints; other tasks have one of their own. Ctrl-C or SIGTERM stops."""
    own = {"--max-queue": max_queue != 64, "--max-batch": max_batch, "--max-body": max_body, "--grace": grace != 30.0}
    _check_engine(engine, [name for name, stated in own.items() if stated])
    prepare_environment(network=False, threads=threads)
    _import_server()
    from llmtune.serve.serve_runs import ServeOptions, name_runs, serve_by_vllm, serve_runs

    options = ServeOptions(
        host=host,
        port=port,
        key_file=api_key_file,
        merged=merged,
        max_queue=max_queue,
        max_batch=max_batch,
        max_body=max_body,
        grace_seconds=grace,
        offline=offline,
    )
    named = name_runs(runs or [], adapter or [])
    console = stderr_console()
    if engine == "vllm":
        serve_by_vllm(named, options, console)
        return
    try:
        serve_runs(named, options, console, print_json if as_json else lambda about: None)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        console.print("terminated: no requests are taken any more" if terminated else "stopped")
        raise typer.Exit(143 if terminated else 130) from None


def _import_server() -> None:
    """Import what serving needs; raises EnvironmentProblem where a package of the extra is not installed."""
    try:
        with at_once():
            import llmtune.serve.serve_runs  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        what = f"the server needs the package {error.name}, which is not installed"
        raise EnvironmentProblem.of(what, "deploy serve", "Install it: pip install 'llmtune-cli[serve]'") from error


def _check_engine(engine: str, stated: list[str]) -> None:
    """Raise RecipeError for an engine that there is not, or options that it does not have."""
    if engine not in ENGINES:
        what = f"there is no engine {engine!r}.{nearest(engine, ENGINES)}"
        raise RecipeError.of(what, "--engine", f"Choose one of: {', '.join(ENGINES)}.")
    if engine == "vllm":
        fix = "Leave it out; vLLM has settings of its own."
        RecipeError.collect(Problem("has no effect with --engine vllm", name, fix) for name in stated)
