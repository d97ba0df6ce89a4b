"""`llmtune verify` and `llmtune reproduce`: check a run's files against its lock, and train it again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AsJson, Fresh, Offline, RunArgument
from llmtune.cli.output_streams import handled, handled_by_all, print_json, stderr_console
from llmtune.errors import GateFailed
from llmtune.launch.python_api import names_remote
from llmtune.records import Json
from llmtune.store.process_environment import gc_paused, prepare_environment
from llmtune.store.processes import world_size

if TYPE_CHECKING:
    from llmtune.store.verification import Finding

SHOWN = 16
"""Characters of a hash or value shown in the table."""
FINDING_STYLES = {
    "same": "green",
    "changed": "red",
    "missing": "red",
    "added": "red",
    "differs": "yellow",
    "unknown": "yellow",
}


@handled
def verify_command(
    run: RunArgument,
    strict: Annotated[bool, typer.Option("--strict", help="Also require the same package versions.")] = False,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust", help="If it is unchanged, mark a run of others as yours: it may run its code and send keys."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check data, model, adapter and evaluation of a run against its lock, file by file; exit 6 if one changed."""
    from llmtune.store.run_origin import mark_own
    from llmtune.store.verification import verify_run

    verification = verify_run(run, strict=strict)
    if trust and not verification.failed:
        mark_own(run)
    if as_json:
        print_json(verification.to_dict() | {"problems": [vars(problem) for problem in verification.problems()]})
        if verification.failed:
            raise typer.Exit(GateFailed.exit_code)
    else:
        _print_findings(verification.findings)
        GateFailed.collect(verification.problems())
        unknown = sorted({finding.kind for finding in verification.findings if finding.state == "unknown"})
        rest = f"; not found here, so not checked: {', '.join(unknown)}" if unknown else ""
        typer.echo(f"verified: nothing has changed since the run{rest}")


def _print_findings(findings: Sequence[Finding]) -> None:
    """Print one line for all unchanged entries of a kind, and one for each changed entry."""
    from rich.markup import escape
    from rich.table import Column, Table

    from llmtune.display.console import VisibleConsole

    table = Table("claim", Column("", overflow="fold"), "state", "was", "is", box=None, pad_edge=False)
    for kind in dict.fromkeys(finding.kind for finding in findings):
        those = [finding for finding in findings if finding.kind == kind]
        same = [finding for finding in those if finding.state == "same"]
        if same:
            table.add_row(
                kind, escape(same[0].name) if len(same) == 1 else f"{len(same)} of {len(those)}", "[green]same[/]"
            )
        for finding in those:
            if finding.state != "same":
                values = [escape((value or "")[:SHOWN]) for value in (finding.was, finding.now)]
                state = f"[{FINDING_STYLES[finding.state]}]{finding.state}[/]"
                table.add_row(kind, escape(finding.name), state, *values)
    VisibleConsole(highlight=False).print(table)


@handled_by_all
def reproduce_command(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", help="The new run folder (default: RUN-reproduced).")] = None,
    loss_tolerance: Annotated[
        float,
        typer.Option(min=0, help="Allowed difference of losses if bytes cannot be equal; relative above 1."),
    ] = 0.05,
    score_tolerance: Annotated[float, typer.Option(min=0, help="The same for scores.")] = 0.02,
    fresh: Fresh = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=4096, help="CPU threads (default: the lock's).")
    ] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Train a run again from its lock and compare: bytes on a CPU like the lock's, otherwise losses and scores."""
    from llmtune.store.run_folder import read_run, recipe_of_run
    from llmtune.store.run_lock import LOCK, read_lock

    folder = read_run(run)
    folder.require_trained()
    threads = threads or read_lock(run / LOCK).get("threads")
    prepare_environment(network=names_remote(recipe_of_run(folder).recipe) and not offline, threads=threads)
    with gc_paused():
        from llmtune.reproduce import Tolerances, explain_difference, processes_of, reproduce

    if (count := processes_of(folder)) > 1 == world_size():
        from llmtune.launch.local_processes import launch
        from llmtune.launch.topology import Topology

        topology = Topology(count, folder.facts("train").get("strategy", "ddp"))
        launch(["-m", "llmtune", *sys.argv[1:]], topology, stderr_console(), threads=threads)
        return
    tolerances = Tolerances(loss_tolerance, score_tolerance)
    result = reproduce(run, stderr_console(), out=out, fresh=fresh, offline=offline, tolerances=tolerances)
    if not result:
        return
    if as_json:
        print_json(result | ({} if result["equal"] else {"problems": [vars(explain_difference(result))]}))
        if not result["equal"]:
            raise typer.Exit(GateFailed.exit_code)
    else:
        _print_reproduction(result)
        if not result["equal"]:
            raise GateFailed(explain_difference(result))
        typer.echo("reproduced: equal, byte for byte" if result["same_bytes"] else "reproduced: within the tolerances")


def _print_reproduction(result: Json) -> None:
    """Print each trained file, each score, and the differences from the lock."""
    from rich.markup import escape
    from rich.table import Table

    from llmtune.display.console import VisibleConsole

    table = Table("", "was", "is", "", box=None, pad_edge=False)
    yes, no = "[green]equal[/]", "[red]differs[/]"
    for file in result["files"]:
        hashes = [(file[side] or "missing")[:SHOWN] for side in ("was", "now")]
        table.add_row(escape(file["name"]), *hashes, yes if file["equal"] else no)
    for score in [*result["losses"][-1:], *result["scores"]]:
        near = "[yellow]within the tolerance[/]" if score["within"] else no
        table.add_row(escape(score["name"]), str(score["was"]), str(score["now"]), yes if score["equal"] else near)
    for setting in result["settings"]:
        table.add_row(setting["name"], str(setting["was"]), str(setting["now"]), "[yellow]not the lock's[/]")
    VisibleConsole(highlight=False).print(table)


COMMANDS: dict[str, Callable[..., None]] = {"verify": verify_command, "reproduce": reproduce_command}
