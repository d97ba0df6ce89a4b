"""The command tree."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Annotated

import typer

from llmtune import __version__
from llmtune.cli import compare, deploy, explain, launch, prompting, recipes, run, verify
from llmtune.cli.options import AsJson
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.store.process_environment import offline_switches, prepare_environment

REPORT = "Please report it with the lines above and what 'llmtune doctor' prints: CONTRIBUTING.md says where."

app = typer.Typer(
    help="Fine-tune a Hugging Face model from one recipe, and prove what the tuning did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmtune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@handled
def doctor(as_json: AsJson = False) -> None:
    """Look at versions, devices, memory and disk, and say what to type where something is missing."""
    switched_off = offline_switches()
    prepare_environment(network=False)
    from llmtune.cli.doctor import examine

    found = examine(stderr_console(), switched_off)
    if as_json:
        print_json(found)


COMMANDS = run.COMMANDS | prompting.COMMANDS | {"doctor": doctor} | verify.COMMANDS | compare.COMMANDS
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(deploy.app, name="deploy")
app.add_typer(explain.app, name="explain")
app.add_typer(recipes.app, name="recipes")
app.add_typer(launch.app, name="launch")


def main() -> None:
    """Entry point of the `llmtune` command."""
    sys.excepthook = _report_bug
    app()


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    print(f"\nThis is a bug in llmtune {__version__}. {REPORT}", file=sys.stderr)
