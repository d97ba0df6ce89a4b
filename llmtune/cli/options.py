"""Options that several commands share, defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="A run folder; NAME, the recipe's newest run that passed; NAME@HASH; latest; release:NAME."
    ),
]
RunFolderOption = Annotated[Path | None, typer.Option("--out", help="The run folder (default: runs/<name>-<hash>).")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one recipe value; may be repeated."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the existing run; exit 2 if there is none.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over and delete the run folder's contents.")]
LockFile = Annotated[Path | None, typer.Option("--lock", help="Require the model and data in this llmtune.lock.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=4096, help="CPU threads (default: torch's own choice).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Run all cheap checks, print what would run, and stop.")]
Device = Annotated[
    str | None, typer.Option("--device", help="Plan for this card (h100, a100-40, 4090 ...) or cpu, and stop.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Forbid any network access.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress, only errors on stderr.")]
ModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The base model, as --set model.name=NAME.")
]
