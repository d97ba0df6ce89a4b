"""`llmtune release RUN`: store a run as the current release of its name; list, show, diff and roll back releases."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llmtune.cli.options import AsJson, Offline, RunArgument
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.launch.python_api import make_console
from llmtune.store.process_environment import gc_paused, prepare_environment

if TYPE_CHECKING:
    from llmtune.records import Difference

Stored = Annotated[
    str, typer.Argument(metavar="RELEASE", help="release:NAME, release:NAME@HASH, NAME, or a release file.")
]
Signers = Annotated[
    Path | None,
    typer.Option("--signers", help="Allowed signers: lines of a name and an SSH public key. Others fail (exit 6)."),
]
MAKE = "make"


class MakesByDefault(TyperGroup):
    """A group that passes an unknown first word to `make` as the run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command."""
        words = args if args[0] in self.commands else [MAKE, *args]
        return super().resolve_command(ctx, words)


app = typer.Typer(
    cls=MakesByDefault,
    help="Make a run the current release of its name: llmtune release RUN; list, show, diff and roll back releases.",
    no_args_is_help=True,
)


@app.command(MAKE)
@handled
def make(
    run: RunArgument,
    out: Annotated[
        str | None, typer.Option(metavar="OUT", help="Only write the scores into this file, or a file in FOLDER/.")
    ] = None,
    sign: Annotated[str | None, typer.Option("--sign", metavar="KEY", help="File of an SSH key, or: sigstore.")] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Store a run in releases/NAME/HASH and make it the current release (short: `release RUN`).

    Exit code 6 if a gate of the run failed, 7 if one is inconclusive; then the earlier release stays. With --out, only
    write a small file for git, with the scores of every row and without texts, weights and paths.
    """
    from llmtune.deploy.releases import make_release, require_passed, summarize_release
    from llmtune.evaluate.release_records import read_release

    if out is not None:
        path = make_release(run, out, sign)
        if as_json:
            print_json(summarize_release(path, read_release(path)))
        else:
            typer.echo(f"{path}; as a champion: evaluate.champion: {path}")
        return
    require_passed(run)
    prepare_environment(network=False)
    with gc_paused():
        from llmtune.deploy.release_folder import promote_run
        from llmtune.store.release_store import RECORD_FILE

    promoted = promote_run(run, stderr_console(), offline=offline, signing=sign)
    if as_json:
        record = promoted.folder / RECORD_FILE
        print_json(summarize_release(record, read_release(record)) | {"before": promoted.before})
    else:
        before = f", before {promoted.before}" if promoted.before not in (None, promoted.folder.name) else ""
        typer.echo(f"{promoted.address} is current{before}; use it as a run: llmtune generate {promoted.short}")


@app.command("list")
@handled
def list_release_files(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with release files.")] = Path("releases"),
    as_json: AsJson = False,
) -> None:
    """List releases, the oldest first of each name; `*` marks the current one. Also release files in FOLDER."""
    from llmtune.deploy.releases import summarize_release
    from llmtune.display.number_format import score
    from llmtune.evaluate.release_records import list_all_releases

    releases = list_all_releases(folder)
    if as_json:
        print_json([summarize_release(*one) for one in releases])
        return
    if not releases:
        stderr_console().print(f"no releases in {folder} yet; make one: llmtune release RUN", markup=False)
    for path, release in releases:
        summary = summarize_release(path, release)
        scores = ", ".join(f"{name} {score(value)}" for name, value in release["tuned"].items())
        marked = f"{'*' if summary['current'] else ' '} {summary['address'] or path}"
        typer.echo(f"{marked}  {release['date']}  {release['verdict']['word']}  {scores}")


@app.command("show")
@handled
def show_release(release: Stored, signers: Signers = None, as_json: AsJson = False) -> None:
    """Show the scores and gates of a release, and check its signature if it has one."""
    from llmtune.deploy.releases import check_signature, summarize_release
    from llmtune.display.console import print_sections
    from llmtune.evaluate.release_records import find_record, read_release, released_evaluation
    from llmtune.report.control_sections import control_run_section, control_section
    from llmtune.report.evaluation_sections import gate_section
    from llmtune.report.score_sections import score_section, simple_baseline_section

    file = find_record(release)
    record, signature = read_release(file), check_signature(file, signers)
    summary = summarize_release(file, record)
    if as_json:
        print_json(summary | {"signature": asdict(signature) if signature else None})
        return
    if summary["address"]:
        typer.echo(f"{summary['address']}{' (current)' if summary['current'] else ''}, from run {record['run']}")
    evaluation, task = released_evaluation(record), record["recipe"]["task"]
    makers = (score_section, control_run_section, control_section, simple_baseline_section)
    sections = [make(evaluation, task) for make in makers]
    sections.append(gate_section(record["gates"]))
    print_sections(sections, make_console(stderr=False))
    if signature:
        by = f"signed by {signature.by}" if signature.kind == "ssh" else signature.by
        whose = "" if signature.checked or signature.kind != "ssh" else "; identify the key with --signers FILE"
        typer.echo(f"{signature.file}: {by}{whose}")


@app.command()
@handled
def diff(first: Stored, second: Stored, as_json: AsJson = False) -> None:
    """Compare two releases on the test rows that both have, row by row, second minus first."""
    from llmtune.deploy.releases import diff_releases
    from llmtune.display.blocks import Compared, Section, difference_table
    from llmtune.display.console import print_sections
    from llmtune.evaluate.metric_info import better_side
    from llmtune.evaluate.release_records import find_record
    from llmtune.store.atomic_files import plain

    difference, left_out, rows = diff_releases(find_record(first), find_record(second))
    if as_json:
        print_json({"difference": plain(difference), "left_out": left_out, "rows": rows})
        return

    def compared(metric: str, change: Difference) -> Compared:
        return Compared(metric, None, None, change, better_side(metric))

    table = difference_table([compared(*pair) for pair in difference.items()], base=None)
    print_sections([Section(f"{second} minus {first}", [table])], make_console(stderr=False))
    if rows["only_first"] or rows["only_second"]:
        counts = f"{rows['only_first']:,} test rows are only in {first}, {rows['only_second']:,} only in {second}"
        typer.echo(f"Compared on the {rows['common']:,} test rows of both: {counts}.")
    for metric, why in left_out.items():
        typer.echo(f"{metric} not compared: {why}")


@app.command("rollback")
@handled
def roll_back(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the releases.")],
    to: Annotated[
        str | None, typer.Option("--to", metavar="HASH", help="The release (default: the one before the current).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier release current again, by one rename of a pointer. Servers with --release reload it."""
    from llmtune.recipe.section import RELEASE_PREFIX
    from llmtune.store.release_store import rollback

    name = name.removeprefix(RELEASE_PREFIX)
    before, current = rollback(name, to)
    if as_json:
        print_json({"name": name, "before": before, "current": current})
    else:
        typer.echo(f"{name}: {before or 'none'} -> {current}")
