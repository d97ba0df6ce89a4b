"""`llmtune release RUN`: write a small file for git; list, show and diff such files."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmtune.cli.options import AsJson, RunArgument
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.launch.python_api import make_console
from llmtune.score_records import Difference

File = Annotated[Path, typer.Argument(metavar="FILE", help="A release file.")]
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
    help="Write a run's scores into a small file for git: llmtune release RUN; list, show and diff such files.",
    no_args_is_help=True,
)


@app.command(MAKE)
@handled
def make(
    run: RunArgument,
    out: Annotated[
        str | None, typer.Option(metavar="OUT", help="The file, or FOLDER/ (default: releases/<run folder>.json).")
    ] = None,
    sign: Annotated[str | None, typer.Option("--sign", metavar="KEY", help="File of an SSH key, or: sigstore.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the release file of a run (short: `release RUN`). It contains no text of rows and no paths."""
    from llmtune.deploy.releases import make_release, summarize_release
    from llmtune.evaluate.opened_runs import read_release

    path = make_release(run, out, sign)
    if as_json:
        print_json(summarize_release(path, read_release(path)))
    else:
        typer.echo(f"{path}; as a champion: evaluate.champion: {path}")


@app.command("list")
@handled
def list_release_files(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with the files.")] = Path("releases"),
    as_json: AsJson = False,
) -> None:
    """List the releases in a folder, the oldest first."""
    from llmtune.deploy.releases import summarize_release
    from llmtune.evaluate.opened_runs import list_releases
    from llmtune.report.number_format import score

    found = list_releases(folder)
    if as_json:
        print_json([summarize_release(*one) for one in found])
        return
    if not found:
        stderr_console().print(f"no releases in {folder} yet; make one: llmtune release RUN", markup=False)
    for path, release in found:
        scores = ", ".join(f"{name} {score(value)}" for name, value in release["tuned"].items())
        typer.echo(f"{path}  {release['date']}  {release['verdict']['word']}  {scores}")


@app.command("show")
@handled
def show_release(file: File, signers: Signers = None, as_json: AsJson = False) -> None:
    """Show the scores and gates of a release, and check its signature if it has one."""
    from llmtune.deploy.releases import check_signature, summarize_release
    from llmtune.evaluate.opened_runs import read_release
    from llmtune.report.render_terminal import print_sections
    from llmtune.report.score_sections import gate_section, score_section
    from llmtune.report.simple_baseline_view import simple_baseline_section
    from llmtune.score_records import Evaluation

    release, signature = read_release(file), check_signature(file, signers)
    if as_json:
        print_json(summarize_release(file, release) | {"signature": asdict(signature) if signature else None})
        return
    scores = release["base"], release["tuned"], release["difference"]
    evaluation = Evaluation(*scores, (), release["rows"], release["signatures"])
    evaluation = replace(evaluation, simple_baseline=release.get("simple_baseline"))
    task = release["recipe"]["task"]
    sections = [score_section(evaluation, task), simple_baseline_section(evaluation, task)]
    sections.append(gate_section(release["gates"]))
    print_sections(sections, make_console(stderr=False))
    if signature:
        by = f"signed by {signature.by}" if signature.kind == "ssh" else signature.by
        whose = "" if signature.checked or signature.kind != "ssh" else "; identify the key with --signers FILE"
        typer.echo(f"{signature.file}: {by}{whose}")


@app.command()
@handled
def diff(first: File, second: File, as_json: AsJson = False) -> None:
    """Compare two releases row by row, second minus first."""
    from llmtune.deploy.releases import diff_releases
    from llmtune.report.blocks import Compared, Section, difference_table
    from llmtune.report.metric_info import better_side
    from llmtune.report.render_terminal import print_sections
    from llmtune.store.atomic_files import plain

    difference, left_out = diff_releases(first, second)
    if as_json:
        print_json({"difference": plain(difference), "left_out": left_out})
        return

    def compared(metric: str, change: Difference) -> Compared:
        return Compared(metric, None, None, change, better_side(metric))

    table = difference_table([compared(*pair) for pair in difference.items()], base=None)
    print_sections([Section(f"{second} minus {first}", [table])], make_console(stderr=False))
    for metric, why in left_out.items():
        typer.echo(f"{metric} not compared: {why}")
