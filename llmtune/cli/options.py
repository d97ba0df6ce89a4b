"""Options that several commands share, defined once; `takes_options` gives a command those of `RunOptions`."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from llmtune.errors import RecipeError
from llmtune.records import Until
from llmtune.store.run_request import RunRequest

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
    str | None,
    typer.Option("--device", help="With select or --dry-run: plan for this card (h100, a100-40, 4090 ...) or cpu."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Forbid any network access.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress, only errors on stderr.")]
AnswerEngine = Annotated[
    Literal["own", "vllm"],
    typer.Option("--engine", metavar="ENGINE", help="Engine of the answers: own, or vllm if installed."),
]
ModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The base model, as --set model.name=NAME.")
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of `run`, of its steps and of `launch`, in the order of their help."""

    out: RunFolderOption = None
    sets: Sets = None
    model: ModelName = None
    resume: Resume = False
    fresh: Fresh = False
    lock: LockFile = None
    threads: Threads = None
    dry_run: DryRun = False
    device: Device = None
    offline: Offline = False
    quiet: Quiet = False
    as_json: AsJson = False

    @property
    def values(self) -> list[str]:
        """The recipe values to set, including --model."""
        return [*(self.sets or []), *([f"model.name={json.dumps(self.model)}"] if self.model else [])]

    def request(self, until: Until) -> RunRequest:
        """Return the request of a run up to a step; raises RecipeError for options that exclude each other."""
        refuse_both(self.resume, self.fresh)
        return RunRequest(
            out=self.out,
            until=until,
            resume=self.resume,
            fresh=self.fresh,
            lock=self.lock,
            threads=self.threads,
            offline=self.offline,
            dry_run=self.dry_run,
            device=self.device,
        )


def refuse_both(resume: bool, fresh: bool) -> None:
    """Raise RecipeError if both options are set: they exclude each other."""
    if resume and fresh:
        raise RecipeError.of("--resume and --fresh exclude each other", fix="Omit one of them.")


def takes_options(*omitted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `options: RunOptions` of a command by the fields of that class, without those omitted."""

    def spread(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(RunOptions, include_extras=True)
        names = {field.name: field.default for field in fields(RunOptions) if field.name not in omitted}

        @functools.wraps(command)
        def spread_command(**values: Any) -> None:
            options = RunOptions(**{name: values.pop(name) for name in names})
            command(**values, options=options)

        parameters: list[inspect.Parameter] = []
        for one in inspect.signature(command, eval_str=True).parameters.values():
            if one.name != "options":
                parameters.append(one.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            else:
                parameters += [
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
                    for name, default in names.items()
                ]
        vars(spread_command)["__signature__"] = inspect.Signature(parameters)
        spread_command.__annotations__ = {one.name: one.annotation for one in parameters}
        return spread_command

    return spread
