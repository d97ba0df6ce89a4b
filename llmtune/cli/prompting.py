"""`llmtune generate` and `llmtune chat`: ask the model of a finished run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from llmtune.cli.options import AsJson, Offline, RunArgument, Threads
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.store.process_environment import gc_paused, prepare_environment

COMMANDS_OF_CHAT = "[dim]/reset forgets the conversation, /quit (or Ctrl-D) ends.[/]"
System = Annotated[str | None, typer.Option("--system", help="A system message before everything else (chat).")]
Base = Annotated[bool, typer.Option("--base", help="Use the base model without the adapter.")]


@handled
def generate(
    run: RunArgument,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="A message, a question, or the text to go on from or to work on.")
    ] = None,
    context: Annotated[str | None, typer.Option("--context", help="The text that holds the answer (qa).")] = None,
    pair: Annotated[str | None, typer.Option("--pair", help="The second text of a pair (classify).")] = None,
    audio: Annotated[Path | None, typer.Option("--audio", help="A recording: wav, flac, mp3, ogg (speech).")] = None,
    answer: Annotated[str | None, typer.Option("--answer", help="The answer to score (preference, reward).")] = None,
    system: System = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Overrules the recipe's generation section.")
    ] = None,
    base: Base = False,
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Answer once with the tuned model of a run: each task is given what it asks for."""
    prepare_environment(network=False, threads=threads)
    with gc_paused():
        from llmtune.serve.generate import answer_once

    given = {"prompt": prompt, "context": context, "pair": pair, "answer": answer, "system": system}
    given["audio"] = None if audio is None else str(audio)
    with stderr_console().status("answering"):
        said = answer_once(run, given, stderr_console(), base=base, max_new_tokens=max_new_tokens, offline=offline)
    if as_json:
        stated = {name: value for name, value in given.items() if value is not None}
        print_json({**stated, **said, "model": "base" if base else "tuned", "run": str(run)})
    else:
        typer.echo(said["text"])


@handled
def chat(
    run: RunArgument, system: System = None, base: Base = False, threads: Threads = None, offline: Offline = False
) -> None:
    """Talk to the tuned model of a run. /reset forgets the conversation, /quit ends."""
    prepare_environment(network=False, threads=threads)
    with gc_paused():
        from llmtune.serve.generate import open_session

    console = stderr_console()
    with console.status("loading the model"):
        session = open_session(run, console, base=base, offline=offline)
    prompt = "[bold green]you[/] " if sys.stdin.isatty() else ""
    if prompt:
        console.print(COMMANDS_OF_CHAT)
    while True:
        try:
            line = console.input(prompt).strip()
        except EOFError:
            console.print()
            return
        if line in {"/quit", "/exit"}:
            return
        if line == "/reset":
            session.reset()
            console.print("[dim]The conversation is forgotten.[/]")
        elif line.startswith("/"):
            console.print(COMMANDS_OF_CHAT)
        elif line:
            for piece in session.answer(line, system=system, keep=True):
                typer.echo(piece, nl=False)
            typer.echo("")


COMMANDS: dict[str, Callable[..., None]] = {"generate": generate, "chat": chat}
