"""Exports of a tuned model: each format is written, read back, certified and scored on the same road.

The tuned model is timed and asked its questions. The format writes the files and opens them by their own runtime. Their
outputs are compared with the tuned model's, their answers to the run's test rows are scored, and the certificate is
written. A folder appears only if all of this succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from llmtune.deploy.export_score import describe_export, reset_peak, score_export, time_export, time_tuned
from llmtune.deploy.exported_model import ExportedModel, ModelSource
from llmtune.deploy.parity import Certificate, Limits
from llmtune.deploy.parity_reference import TunedReference
from llmtune.deploy.search_parity import make_reference
from llmtune.deploy.tuned_model import TunedModel
from llmtune.display.console import spinner
from llmtune.errors import GateFailed, Problem, RecipeError
from llmtune.evaluate.decision import copy_rules
from llmtune.model.device import explain_oom, release_memory
from llmtune.plan import RunContext, open_finished
from llmtune.records import Json
from llmtune.store.atomic_files import explained, plain, read_json, refuse_links_out, staged, write_json
from llmtune.store.run_folder import CERTIFICATE


@dataclass(frozen=True)
class WrittenExport:
    """The files of an export as its format wrote them."""

    facts: Certificate
    """The certificate's fields about the files."""
    limits: Limits | None = None
    """Replace the limits of the number format."""
    advice: str = ""
    """What to change if the files fail their certificate."""
    find_cause: Callable[[bool], str | None] = lambda passed: None
    """Describes a layer that differs, given whether the outputs passed; None if none does."""
    temporary: Path | None = None
    """A file that is needed only to read the others back."""


@dataclass(frozen=True)
class ExportFormat:
    """A format of exports: how its files are checked, written, opened and described."""

    folder: str
    """Its place in the run folder."""
    product: str
    """Its name in messages."""
    check: Callable[[ModelSource], object]
    """Raises if a model cannot have this format; needs no weights."""
    write: Callable[[TunedReference, Path], WrittenExport]
    """Writes the files of a tuned model, which it consumes, into a folder."""
    open: Callable[[Path, TunedReference], ExportedModel | None]
    """Opens the files by the runtime of their users; None if it is not installed."""
    describe: Callable[[Certificate, Path], list[str]]
    """Returns the lines to print about a certified folder."""
    prepare: Callable[[TunedModel], object] = lambda tuned: None
    """Changes or refuses the loaded model before any question."""
    scored: bool = True
    """Whether it answers rows, and so gets a score."""


@dataclass(frozen=True)
class CertifiedExport:
    """Files that passed their certificate, in the folder where they were written."""

    folder: Path
    certificate: Certificate
    exported: ExportedModel | None
    usage: Json
    """Runtime, size, speed and memory."""


def open_to_export(run: Path, console: Console, *, offline: bool, limit: int | None = None) -> RunContext:
    """Open a finished run to export it; `limit` replaces its `deploy.limit`.

    Raises as `open_finished` does, and EnvironmentProblem if a link leads out of the run's folder.
    """
    refuse_links_out(run)
    context = open_finished(run, console, offline)
    if limit is not None:
        recipe = context.plan.recipe
        deploy = recipe.deploy.model_copy(update={"limit": limit})
        context.resolved = replace(context.plan, recipe=recipe.model_copy(update={"deploy": deploy}))
    return context


def export(context: RunContext, form: ExportFormat, out: Path | None = None) -> Certificate:
    """Export the model of a finished run, by default into the run folder; return the certificate.

    Raises:
        RecipeError: an invalid option, a model that cannot have this format, or `out` contains something else.
        GateFailed: the export differs from the tuned model by more than the limits.
        EnvironmentProblem: a package is missing, the files cannot be written or opened, or disk or memory is full.
    """
    out = out or context.folder.path / form.folder
    check_export(form, context.plan, out)
    tuned, tuned_usage = time_tuned(context)
    with certified_export(tuned, form, out) as certified:
        del tuned  # the score needs its memory
        release_memory()
        if form.scored and certified.exported is not None:
            certified.certificate["score"] = (
                score_export(context, certified.exported, certified.usage, certified.folder) | tuned_usage
            )
            copy_rules(context.folder, certified.folder)
    for line in describe_export(certified.certificate["score"]) if form.scored else ():
        context.console.print(line, highlight=False)
    return dict(plain(certified.certificate))


def check_export(form: ExportFormat, source: ModelSource, out: Path) -> None:
    """Raise the problems of an export that can be found without weights: those of the format and of the folder."""
    problems = [*check_output(out)]
    try:
        form.check(source)
    except RecipeError as error:
        raise RecipeError(*error.problems, *problems) from None
    RecipeError.collect(problems)


def check_output(out: Path) -> Iterator[Problem]:
    """Yield problems with writing a product to the folder `out`."""
    if out.is_dir() and any(out.iterdir()) and read_json(out / CERTIFICATE) is None:
        yield Problem("the folder contains something else", str(out), "Choose another folder with --out.")
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield Problem("expected a folder, found a file", str(existing), "Choose another --out.")


@contextmanager
def certified_export(tuned: TunedModel, form: ExportFormat, out: Path) -> Iterator[CertifiedExport]:
    """Write an export of a model in memory and certify it; `tuned` is consumed.

    The block may add to the files and to the certificate. After it, the folder with both becomes `out`. On failure
    `out` stays as it is, and a certificate that did not pass is written to `<out>.failed.json`.
    """
    form.prepare(tuned)
    console, failed = tuned.console, out.with_name(f"{out.name}.failed.json")
    memory = explain_oom(f"exporting {tuned.model_ref.name}", tuned.device)
    with spinner(console, "asking the tuned model"):
        reference = make_reference(tuned)
    with explained(out), memory, staged(out) as folder:
        written = form.write(reference, folder)
        with spinner(console, f"asking {form.product}, read back from disk"):
            certified = _certify(form, reference, written, folder)
        if not certified.certificate["passed"]:
            write_json(failed, certified.certificate)
            fix = f"{written.advice}The product was deleted; the numbers are in {failed}."
            breaches = certified.certificate["breaches"]
            GateFailed.collect(Problem(f"{form.product} differs: {breach}", None, fix) for breach in breaches)
        del tuned, reference, written
        yield certified
        write_json(folder / CERTIFICATE, certified.certificate)
        failed.unlink(missing_ok=True)
    for line in form.describe(certified.certificate, out):
        console.print(line, highlight=False, soft_wrap=True)


def _certify(form: ExportFormat, reference: TunedReference, written: WrittenExport, folder: Path) -> CertifiedExport:
    """Open the files, time them, and compare their outputs with the tuned model's."""
    resting, usage = reset_peak(), Json()
    exported = form.open(folder, reference)
    if exported is None:
        certified = {**reference.tuned.certificate([]), "reader": "its own arithmetic", "limits": {}, "measured": None}
    else:
        usage = time_export(exported, reference.tuned, resting) if form.scored else usage
        certified = reference.certify(exported, written.limits)
        if reference.checkpoint is not None:
            certified = reference.checkpoint.certify(exported, certified, written.limits or exported.limits)
    if cause := written.find_cause(certified["passed"]):
        certified |= {"passed": False, "breaches": [*certified["breaches"], cause]}
    if written.temporary is not None:
        written.temporary.unlink()
    return CertifiedExport(folder, {**certified, **written.facts}, exported, usage)
