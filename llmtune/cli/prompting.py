"""`llmtune generate` and `llmtune chat`: ask the model of a finished run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AnswerEngine, AsJson, Offline, RunArgument, Threads
from llmtune.cli.output_streams import (
    Terminated,
    WordWrap,
    handled,
    handled_by_all,
    print_json,
    print_text,
    stderr_console,
)
from llmtune.errors import DataError, LlmtuneError, RecipeError, visible
from llmtune.store.process_environment import gc_paused, prepare_environment
from llmtune.store.processes import world_size

if TYPE_CHECKING:
    from rich.console import Console

    from llmtune.serve.finished_run import ChatSession, FinishedRun

COMMANDS_OF_CHAT = (
    "[dim]/image FILE adds a picture to the next message, /reset forgets the conversation, /quit (or Ctrl-D) ends; "
    "Ctrl-C stops an answer.[/]"
)
ONCE_MORE = "[dim]Press Ctrl-C again to quit.[/]"
YOU = "\001\033[1;32m\002you\001\033[0m\002 "
"""The prompt, with zero-width sequences marked for readline."""
STDIN = "-"
System = Annotated[str | None, typer.Option("--system", help="A system message before all others (chat).")]
Pictures = Annotated[
    list[str] | None,
    typer.Option(
        "--image", metavar="FILE", help="A picture before the text, or at an <image> in it (chat); may be repeated."
    ),
]
RowFile = Annotated[
    Path | None, typer.Option("--input", metavar="FILE", help="Answer every row of a file (CSV, JSON lines, ...).")
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="JSON lines, one per row (default: standard output).")
]
Base = Annotated[bool, typer.Option("--base", help="Use the base model without the adapter.")]


@handled_by_all
def generate_command(
    run: RunArgument,
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="A message, a question, or the text to process; - reads standard input."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The same as TEXT.")] = None,
    context: Annotated[str | None, typer.Option("--context", help="The text with the answer (qa).")] = None,
    pair: Annotated[str | None, typer.Option("--pair", help="The second text of a pair (classify).")] = None,
    audio: Annotated[Path | None, typer.Option("--audio", help="A recording: wav, flac, mp3, ogg (speech).")] = None,
    image: Pictures = None,
    passages: Annotated[Path | None, typer.Option("--passages", help="A file of passages to rank or encode.")] = None,
    answer: Annotated[str | None, typer.Option("--answer", help="The answer to score (preference, reward).")] = None,
    source_language: Annotated[str | None, typer.Option(help="The text's language (translate).")] = None,
    target_language: Annotated[str | None, typer.Option(help="The answer's language (translate).")] = None,
    system: System = None,
    rows: RowFile = None,
    output: Output = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Override the recipe's generation section.")] = None,
    base: Base = False,
    engine: AnswerEngine = "own",
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Answer with the tuned model of a run. Give the inputs of its task, or a file with many rows."""
    from llmtune.display.console import spinner
    from llmtune.store.run_folder import read_run

    read_run(run).require_trained()
    console = stderr_console()
    given = {"context": context, "pair": pair, "answer": answer, "system": system, "source_language": source_language}
    given |= {"target_language": target_language, "audio": str(audio) if audio else None}
    given |= {"image": json.dumps(image) if image else None, "passages": str(passages) if passages else None}
    if rows is not None:
        _check_files(rows, output, [text, prompt, *given.values()])
    elif world_size() > 1:
        raise RecipeError.of("several processes answer the rows of a file", "--input", "Add it, or omit torchrun.")
    elif output is not None:
        raise RecipeError.of("--output needs --input", "--output", "Add --input, or redirect standard output: > FILE.")
    elif engine != "own":
        raise RecipeError.of(f"--engine {engine} answers the rows of a file", "--engine", "Add --input, or omit it.")
    else:
        given["prompt"] = _prompt(text, prompt, needed=not (audio or image))
    prepare_environment(network=False, threads=threads)
    with spinner(console, "loading the model"), gc_paused():
        from llmtune.serve.finished_run import FinishedRun
    finished = FinishedRun(run, offline, console, engine)
    if passages is not None:
        given["passages"] = _read_passages(passages)
    if rows is not None:
        _answer_file(finished, rows, output, base=base, max_new_tokens=max_new_tokens)
    elif as_json:
        with spinner(console, "answering"):
            result = finished.answer(given, base=base, max_new_tokens=max_new_tokens)
        stated = {name: value for name, value in given.items() if value is not None and name != "passages"}
        pictures = {"image": image} if image else {}
        print_json({**stated, **pictures, **result, "model": "base" if base else "tuned", "run": str(run)})
    else:
        _print_pieces(finished.stream(given, base=base, max_new_tokens=max_new_tokens), console)


def _print_pieces(pieces: Iterator[str], console: Console) -> None:
    """Print an answer as it is generated."""
    from llmtune.display.console import spinner

    with spinner(console, "loading the model"):
        first = next(pieces, "")
    wrapped = WordWrap()
    for piece in chain([first], pieces):
        print_text(wrapped.add(piece))
    print_text(wrapped.rest() + "\n")


def _prompt(text: str | None, prompt: str | None, *, needed: bool) -> str | None:
    """Return the prompt: the argument, the option, or standard input for `-` or if both are missing."""
    if text is not None and prompt is not None:
        raise RecipeError.of(
            "the text is given twice, as an argument and with --prompt", "--prompt", "Omit one of them."
        )
    stated = text if text is not None else prompt
    if stated != STDIN and (stated is not None or not needed or sys.stdin.isatty()):
        return stated
    return sys.stdin.read().rstrip("\n") or None


def _read_passages(file: Path) -> str:
    """Return the passages of a file as a JSON list."""
    from llmtune.data.corpus import read_passages

    if not file.is_file():
        raise RecipeError.of("not a file with passages", str(file), "Check the path of --passages.")
    return json.dumps(read_passages(file), ensure_ascii=False)


def _check_files(rows: Path, output: Path | None, stated: Sequence[str | None]) -> None:
    if any(stated):
        raise RecipeError.of("--input takes its texts from the file", "--input", "Omit the other texts.")
    if not rows.is_file():
        raise RecipeError.of("not a file with rows", str(rows), "Check the path of --input.")
    taken = output is not None and output.exists() and (output.is_dir() or output.samefile(rows))
    if output is not None and (taken or not output.parent.is_dir()):
        raise RecipeError.of("answers cannot be written there", str(output), "Name a new file with --output.")


def _answer_file(run: FinishedRun, rows: Path, output: Path | None, *, base: bool, max_new_tokens: int | None) -> None:
    from llmtune.serve.answer_file import answer_file

    answered, bad = answer_file(run, rows, output, base=base, max_new_tokens=max_new_tokens)
    where = f" to {output}" if output else ""
    run.console.print(
        f"{answered:,} row{'s' * (answered != 1)} answered{where}" + (f"; {bad:,} could not be read" if bad else "")
    )


@handled
def chat(
    run: RunArgument, system: System = None, base: Base = False, threads: Threads = None, offline: Offline = False
) -> None:
    """Chat with the tuned model of a run. /reset forgets the conversation, /quit ends."""
    from llmtune.display.console import spinner
    from llmtune.store.run_folder import read_run

    read_run(run).require_trained()
    prepare_environment(network=False, threads=threads)
    console = stderr_console()
    with spinner(console, "loading the model"):
        with gc_paused():
            from llmtune.serve.finished_run import FinishedRun

        session = FinishedRun(run, offline, console).chat(base=base)
    prompt = YOU if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if prompt:
        import readline  # noqa: F401 - enables arrow keys in input(): history and moving in a line

        console.print(COMMANDS_OF_CHAT)
    interrupted, pictures = False, list[str]()
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated) or not prompt or interrupted:
                raise
            console.print(f"\n{ONCE_MORE}")
            interrupted = True
            continue
        interrupted = False
        if line in {"/quit", "/exit"}:
            return
        if line == "/reset":
            session.reset()
            pictures = []
            console.print("[dim]Conversation forgotten.[/]")
        elif line.startswith("/image "):
            pictures += _check_picture(session, line.removeprefix("/image ").strip(), console)
        elif line.startswith("/"):
            console.print(COMMANDS_OF_CHAT)
        elif line:
            interrupted = not _print_answer(session, line, pictures, system, console)
            pictures = []


def _check_picture(session: ChatSession, picture: str, console: Console) -> list[str]:
    """Return a picture for the next message; print why if it cannot be read."""
    try:
        session.read_question("", [picture])
    except LlmtuneError as error:
        console.print(error.problems[0].what, style="dim", markup=False)
        return []
    console.print("[dim]Added to the next message: before its text, or at <image> in it.[/]")
    return [picture]


def _print_answer(session: ChatSession, line: str, pictures: list[str], system: str | None, console: Console) -> bool:
    """Stream an answer; return False if Ctrl-C stopped it, in which case it is not remembered."""
    try:
        thinking, thoughts, answer = False, WordWrap(), WordWrap()
        for piece in session.answer(line, system=system, image=pictures or None, keep=True):
            typer.secho(visible(thoughts.add(piece.reasoning)), nl=False, dim=True, err=True)
            if thinking and piece.content:
                typer.secho(f"{visible(thoughts.rest())}\n", dim=True, err=True)
            print_text(answer.add(piece.content))
            thinking = not piece.content and (thinking or bool(piece.reasoning))
        print_text(answer.rest() + "\n")
        return True
    except DataError as error:
        if not sys.stdin.isatty():
            raise
        console.print(error.problems[0].what, style="dim", markup=False)
        return True
    except KeyboardInterrupt as stop:
        if isinstance(stop, Terminated) or not sys.stdin.isatty():
            raise
        typer.echo("")
        console.print(f"[dim]Stopped; this question is not remembered.[/] {ONCE_MORE}")
        return False


COMMANDS: dict[str, Callable[..., None]] = {"generate": generate_command, "chat": chat}
