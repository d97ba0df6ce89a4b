"""The command tree."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmtune import __version__
from llmtune.cli import (
    clean,
    compare,
    deploy,
    explain,
    init,
    launch,
    models,
    prompting,
    recipes,
    release,
    reward,
    rows,
    run,
    verify,
)
from llmtune.cli.options import AsJson
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.cli.run_result import print_usage_error
from llmtune.errors import RecipeError
from llmtune.store.process_environment import offline_switches, prepare_environment
from llmtune.store.processes import leave, reports, start

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""The parser's exception, for which Typer exports no name."""


class CommandGroup(TyperGroup):
    """The command tree; for an unknown option it names the matching recipe key or command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before a command."""
        self.words = list(args)
        with self._hints():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Parse the options of a command, and run it."""
        with self._hints():
            return super().invoke(ctx)

    @contextmanager
    def _hints(self) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
            hint = self._hint(option, context) if option and context else None
            if hint:
                vars(error).update(message=f"No such option: {option}. {hint}", possibilities=None)
            if message := getattr(error, "message", None):
                vars(error).update(message=message.removeprefix("Value error, "))  # pydantic's
            if "--json" in self.words:
                print_usage_error(_name_command(context), error.format_message())  # type: ignore[attr-defined]
            raise

    def _hint(self, option: str, context: Any) -> str | None:
        command = context.command
        from llmtune.recipe.retired import RETIRED

        if instead := RETIRED.get(f"{_name_command(context)} {option}"):
            given = dict.fromkeys(word.partition("=")[0] for word in self.words if word.startswith("--"))
            names = {word: f"{_name_command(context)} {word}" for word in given if word != option}
            others = [f"{word} was removed, too. {RETIRED[name]}" for word, name in names.items() if name in RETIRED]
            return " ".join([f"It was removed. {instead}", *others])
        if command is self:
            named = {name: other for name, other in self.commands.items() if not other.hidden}
            having = [name for name, other in named.items() if any(option in one.opts for one in other.params)]
            command = "run" if "run" in having else having[0] if having else None
            return f"It follows a command: llmtune {command} ... {option}" if command else None
        takes_sets = any("--set" in one.opts for one in command.params)
        from llmtune.recipe.validation import ALIASES, key_paths

        name = option.strip("-").replace("-", "_")
        keys = [path for path in key_paths() if path.rpartition(".")[2] == name]
        if not takes_sets or not (keys or name in ALIASES):
            return None
        return f"Set it in the recipe, or with --set {keys[0]}=VALUE." if keys else f"{ALIASES[name]} See --set."


def _name_command(context: Any) -> str:
    """Return the words of a command after the program's name, such as `launch local`."""
    if context is None or context.parent is None:
        return ""
    return f"{_name_command(context.parent)} {context.info_name}".strip()


REPORT = "Please report it with the lines above and the output of 'llmtune doctor'. CONTRIBUTING.md says where."

POINTERS = {
    **{name: f"llmtune deploy {name}" for name in ("serve", "merge", "gguf", "onnx", "quantize", "certify", "publish")},
    **dict.fromkeys(("train-recipe", "finetune", "fine-tune", "tune", "start"), "llmtune run RECIPE"),
    **{name: f"llmtune explain {name}" for name in ("attention", "positions")},
    **dict.fromkeys(("test", "eval", "score"), "llmtune evaluate RECIPE"),
    **dict.fromkeys(("infer", "predict", "ask"), 'llmtune generate RUN "TEXT"'),
    **dict.fromkeys(("list", "ls"), "llmtune runs, or llmtune recipes list"),
    "new": "llmtune init DATA, or llmtune recipes new",
    "check": "llmtune recipes check RECIPE",
    "export": "llmtune deploy gguf RUN, or llmtune deploy merge RUN",
    "resume": "llmtune run RECIPE --resume",
}
"""Command names of other tools -> ours."""
Words = Annotated[list[str] | None, typer.Argument()]
ANYTHING = {"ignore_unknown_options": True}


EXIT_CODES = {
    "0": "done",
    "1": "a bug in llmtune",
    "2": "recipe or usage",
    "3": "data: missing, unreadable or bad rows",
    "4": "environment: device, dependency, model, memory, disk, permission, network",
    "5": "training: diverged, out of memory after every remedy",
    "6": "a gate, a parity check or a verification failed",
    "7": "inconclusive: too few rows for a gate on an interval (with evaluate.when_unsure: report)",
    "130, 143": "interrupted or terminated, with the work saved",
    "141": "the reader of the output left, as in llmtune models list | head",
}
READER_LEFT = 128 + signal.SIGPIPE
"""Exit code if the reader of the output leaves, as in `llmtune models list | head`; Rich and the parser exit with 1."""
FIRST_STEPS = 'Your own rows: llmtune init rows.csv, then llmtune run rows.yaml, then llmtune generate rows "TEXT"'

app = typer.Typer(
    cls=CommandGroup,
    help="Fine-tune a Hugging Face model from one recipe, and prove what the tuning did.",
    epilog=f"{FIRST_STEPS}\n\nExit codes: {'; '.join(f'{code} {what}' for code, what in EXIT_CODES.items())}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmtune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


@handled
def doctor(
    folder: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    imports: Annotated[bool, typer.Option("--imports", help="Import every library, to find broken ones.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check versions, devices, memory and disk, and print the command for anything missing."""
    if folder is not None:
        from llmtune.recipe.retired import refuse_retired

        raise refuse_retired("doctor FOLDER")
    switched_off = offline_switches()
    prepare_environment(network=False)
    from rich.console import Console

    from llmtune.cli.doctor import examine

    report = examine(Console(quiet=as_json), switched_off, imports=imports)
    if as_json:
        print_json(report)


@handled
def runs(as_json: AsJson = False) -> None:
    """List the runs in runs/ with verdict, gates and the names that mean them, the latest first."""
    from llmtune.store.run_listing import list_names, list_runs

    listed = list_runs()
    names = list_names(listed)
    if as_json:
        print_json([{**vars(one), "address": one.address, "names": names[one.folder]} for one in listed])
        return
    if not listed:
        stderr_console().print("no runs in runs/ yet; start one: llmtune run RECIPE")
        return
    from llmtune.display.console import print_columns
    from llmtune.launch.python_api import make_console

    rows = [
        [
            *(str(one.folder), one.task, one.verdict or "-", one.gates or "-", ", ".join(names[one.folder]) or "-"),
            *(time.strftime("%Y-%m-%d %H:%M", time.localtime(one.started)), one.step),
        ]
        for one in listed
    ]
    columns = ("run", "task", "verdict", "gates", "names", "started", "step")
    if omitted := print_columns(columns, rows, make_console(stderr=False)):
        stderr_console().print(f"A wider terminal also shows {' and '.join(omitted)}.")


def _pointer(name: str) -> Callable[..., None]:
    @handled
    def point(words: Words = None, as_json: AsJson = False) -> None:
        raise RecipeError.of(f"unknown command {name!r}", "llmtune", f"Use: {POINTERS[name]}")

    return point


def sweep(words: Words = None, as_json: AsJson = False) -> None:
    """Refuse the retired command."""
    from llmtune.recipe.retired import refuse_retired

    raise refuse_retired("sweep")


def show_help(words: Words = None) -> None:
    """Print the help of a command."""
    app([*(words or []), "--help"], prog_name="llmtune")


def show_version(words: Words = None) -> None:
    """Print the version."""
    _print_version(True)


PANELS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Begin": {**init.COMMANDS, "run": run.COMMANDS["run"], "runs": runs, "doctor": doctor},
    "Use a run": {**prompting.COMMANDS, "deploy": deploy.app, **clean.COMMANDS},
    "One step at a time": {name: command for name, command in run.COMMANDS.items() if name != "run"},
    "Look closer": {**compare.COMMANDS, **verify.COMMANDS, **rows.COMMANDS, "explain": explain.app},
    "More": {
        "recipes": recipes.app,
        "models": models.app,
        "reward": reward.app,
        "release": release.app,
        "launch": launch.app,
    },
}
"""Commands by panel of the help."""
EXAMPLES = {
    "init": "llmtune init tickets.csv",
    "run": "llmtune run tickets.yaml --set train.max_steps=20",
    "evaluate": "llmtune evaluate RUN --set evaluate.limit=50",
    "generate": 'llmtune generate latest "TEXT", or llmtune generate latest --input rows.csv --output answers.jsonl',
    "chat": "llmtune chat latest",
    "compare": "llmtune compare RUN RUN, or llmtune compare tickets.yaml --methods full,lora,qlora",
    "verify": "llmtune verify latest",
    "clean": "llmtune clean latest --dry-run, or llmtune clean --all",
    "rows": "llmtune rows latest --suspects suspects.csv",
    "reproduce": "llmtune reproduce latest",
}

for _panel, _commands in PANELS.items():
    for _name, _command in _commands.items():
        if isinstance(_command, typer.Typer):
            app.add_typer(_command, name=_name, rich_help_panel=_panel)
        else:
            _example = f"Example: {EXAMPLES[_name]}" if _name in EXAMPLES else None
            app.command(_name, rich_help_panel=_panel, epilog=_example)(_command)
for _name, _hidden in {
    "help": show_help,
    "version": show_version,
    "sweep": handled(sweep),
    **{name: _pointer(name) for name in POINTERS},
}.items():
    app.command(_name, hidden=True, add_help_option=False, context_settings=ANYTHING)(_hidden)


def command_tree(words: list[str]) -> typer.Typer:
    """Return the command or group that `words` begin with: Typer reads the annotations of each, which takes a while.

    The help of the program shows no options of commands, so its groups are empty. An unknown word, another option and
    `help` need all of them.
    """
    tree = copy(app)
    if words in (["--help"], ["-h"], []):
        tree.registered_commands = [one for one in app.registered_commands if not one.hidden]
        tree.registered_groups = [copy(one) for one in app.registered_groups]
        for group in tree.registered_groups:
            group.typer_instance = copy(group.typer_instance)
            vars(group.typer_instance).update(registered_commands=[], registered_groups=[])
        return tree
    tree.registered_commands = [
        one for one in app.registered_commands if [one.name] == words[:1] and one.callback is not show_help
    ]
    tree.registered_groups = [one for one in app.registered_groups if [one.name] == words[:1]]
    return tree if tree.registered_commands or tree.registered_groups else app


def main() -> None:
    """Entry point of the `llmtune` command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: `>&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    start()
    # pydantic otherwise reads the metadata of every installed package, in search of plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    sys.excepthook = _report_bug
    code: Any = 1
    try:
        command_tree(sys.argv[1:])()
    except SystemExit as end:
        code = READER_LEFT if isinstance(end.__context__, BrokenPipeError) else end.code
        raise SystemExit(code) from None
    except KeyboardInterrupt:  # before the command began
        code = 128 + signal.SIGINT
        print("interrupted. Run the same command again.", file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        leave(code)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # the interpreter takes a moment to exit, with nothing left to save


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not reports(error):
        return
    sys.__excepthook__(kind, error, trace)
    print(f"\nThis is a bug in llmtune {__version__}. {REPORT}", file=sys.stderr)
