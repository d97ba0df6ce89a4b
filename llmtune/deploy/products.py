"""The exports that a recipe names in `deploy`: made, certified and scored when `llmtune run` ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from llmtune import __version__
from llmtune.deploy.export import export, open_to_export
from llmtune.deploy.export_score import describe_export, reset_peak, score_export, time_export, time_tuned
from llmtune.deploy.exported_model import WEIGHT_FILES, ExportedModel, check_pictures, open_folder
from llmtune.deploy.gguf_export import gguf_format
from llmtune.deploy.gguf_readers import longest_text, open_gguf_export
from llmtune.deploy.merged_model import merged_format
from llmtune.deploy.onnx_export import missing_packages, onnx_format
from llmtune.deploy.onnx_model import open_onnx_export
from llmtune.deploy.parity import LIMITS, NOT_FINITE, OTHER, Certificate, describe_parity
from llmtune.deploy.quantized_model import SCHEMES, quantized_format
from llmtune.deploy.search_parity import make_reference
from llmtune.deploy.tuned_model import TunedModel
from llmtune.display.console import spinner
from llmtune.display.number_format import size
from llmtune.errors import EnvironmentProblem, GateFailed, LlmtuneError, Problem, RecipeError
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.config import readable
from llmtune.model.device import explain_oom
from llmtune.model.library_logging import silent
from llmtune.plan import Plan, RunContext
from llmtune.recipe.retired import refuse_retired
from llmtune.recipe.secrets import redact_all
from llmtune.recipe.user_files import check_regular
from llmtune.store.atomic_files import explained, hash_file, hash_folder, hash_value, plain, write_json
from llmtune.store.machine import process_memory_limit
from llmtune.store.report_record import ExportFailure
from llmtune.store.run_folder import CERTIFICATE, StepFacts

EXPORT_FORMATS = {
    "merged": merged_format(),
    "gguf": gguf_format("f16"),
    "gguf-q8_0": gguf_format("q8_0"),
    "gguf-q4_k_m": gguf_format("q4_k_m"),
    "onnx": onnx_format(),
    "onnx-int8": onnx_format(int8=True),
    **{scheme: quantized_format(scheme) for scheme in SCHEMES},
}
"""By name in the recipe's `deploy`."""
MOST_FILES, MOST_MEMORIES = 10_000, 2
"""Files of an export of somebody else, and its bytes, as a multiple of this machine's memory."""


def check_products(plan: Plan) -> None:
    """Check without loading weights that the exports of the recipe can be made; raises the errors of their formats."""
    for name in plan.recipe.exports:
        EXPORT_FORMATS[name].check(plan)


def reporting(write_report: Callable[[], object], make: Callable[[], None]) -> None:
    """Make products; if that fails or the user stops, write the report, which names what failed or is unfinished."""
    try:
        make()
    except BaseException as error:  # also Ctrl-C
        with suppress(OSError, LlmtuneError):  # the error may be a full disk
            write_report()
            if isinstance(error, LlmtuneError):
                error.reported = True
        raise


def make_products(context: RunContext, on_begin: Callable[[], object]) -> None:
    """Make, certify and score the exports that the recipe names, unless they exist from the same inputs.

    `on_begin` is called before the first of them is made. The step's facts have each export as soon as it is made.
    """
    recipe, trained = context.plan.recipe, hash_folder(context.trained_folder)
    settings, names = recipe.generation.model_dump(mode="json"), recipe.exports
    scored = context.plan.inputs.get("evaluate")
    parts = [__version__, trained, context.plan.model_ref.content_hash, settings, scored, sorted(names)]
    inputs = hash_value(parts if recipe.deploy.limit is None else [*parts, recipe.deploy.limit])
    with context.step("deploy", inputs, [EXPORT_FORMATS[name].folder for name in names]) as step:
        if not step.skipped:
            folders = {name: EXPORT_FORMATS[name].folder for name in names}
            step.facts.update(exports={}, failed={}, folders=folders)
            on_begin()
            for name in names:
                _make_one(context, name, step.facts)


def _make_one(context: RunContext, name: str, facts: StepFacts) -> None:
    """Make one export, and add its certificate to the facts of the step, or its error."""
    try:
        facts["exports"][name] = export(context, EXPORT_FORMATS[name])
    except LlmtuneError as error:
        message = redact_all(str(error))
        facts["failed"][name] = ExportFailure(kind=type(error).__name__, exit_code=error.exit_code, message=message)
        raise
    context.folder.write()


# Somebody else's export of a run


def open_export(path: Path, tuned: TunedModel) -> ExportedModel:
    """Open a file or a folder by the runtime that its kind belongs to; raises RecipeError for an unknown kind."""
    if not path.exists():
        raise RecipeError.of("not found", str(path), "Name a GGUF or ONNX file, a model folder, or a URL.")
    is_gguf = path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf")))
    is_onnx = path.suffix == ".onnx" or (path.is_dir() and any(path.glob("*.onnx")))
    graphs = path.glob("*.xml") if path.is_dir() else [path] if path.suffix == ".xml" else []
    if any(one.with_suffix(".bin").is_file() for one in graphs):
        raise refuse_retired("deploy certify FILE.xml")
    if is_gguf or is_onnx:
        check_pictures(tuned, str(path), "Certify the merged folder, or an endpoint: --url URL.")
    if is_gguf:
        return open_gguf_export(path, tuned, longest_text(tuned))
    if is_onnx:
        EnvironmentProblem.collect(missing_packages())
        return open_onnx_export(path, tuned)
    if (path / "config.json").is_file() and any(file.suffix in WEIGHT_FILES for file in path.iterdir()):
        return open_folder(path, tuned)
    fix = "Name a GGUF or ONNX file, a model folder with config.json and weights, or the URL of an endpoint."
    raise RecipeError.of("not an export that llmtune can open", str(path), fix)


def check_files(path: Path) -> None:
    """Raise EnvironmentProblem for an export that cannot be read to its end: pipes, devices, or too many bytes.

    The files next to a single file count too: it may name them, and its tokenizer is one of them.
    """
    below = path.rglob("*") if path.is_dir() else path.parent.iterdir() if path.exists() else ()
    files = [one for one in islice(below, MOST_FILES) if not (one.is_dir() or one.is_socket())]
    problems, total, most = list[Problem](), 0, MOST_MEMORIES * process_memory_limit()
    for file in files:
        try:
            count = check_regular(file).st_size
            total += count if path in (file, *file.parents) else 0
        except OSError as error:
            problems.append(Problem(f"cannot be read: {error.strerror}", str(file), "Remove it."))
    if total > most:
        what = f"{size(total)}, and no more than {size(most)} are read: {MOST_MEMORIES} times the memory"
        problems.append(Problem(what, str(path), "Name an export of this run, or use a larger machine."))
    EnvironmentProblem.collect(problems)


@contextmanager
def foreign(path: Path, device: str) -> Iterator[None]:
    """Turn errors that somebody else's export causes in libraries into an EnvironmentProblem.

    Logs are off: names and texts out of the export would reach the terminal as they are.
    """
    fix = "Export the model again."
    with (
        explain_oom(f"opening {path.name}", device),
        readable("the export cannot be opened or run", str(path), fix),
        silent(logging.CRITICAL),
    ):
        yield


def certify_export(run: Path, path: Path, *, offline: bool, console: Console, limit: int | None = None) -> Certificate:
    """Compare an export that llmtune need not have made with the tuned model, and score it on the run's test rows.

    At most `limit` rows, by default `deploy.limit` of the run. The certificate is written to `certified/FOLDER` or
    `certified/FOLDER-FILE` of the run, also if it fails.

    Raises:
        RecipeError: an unknown kind of file.
        EnvironmentProblem: as `check_files` does.
        GateFailed: the export differs from the tuned model by more than the limits.
    """
    check_files(path)
    context = open_to_export(run, console, offline=offline, limit=limit)
    tuned, usage = time_tuned(context)
    with spinner(console, "asking the tuned model"):
        reference = make_reference(tuned)
    with spinner(console, "asking the export"), foreign(path, tuned.device):
        exported = open_export(path, tuned)
        ours, theirs = unwrap(tuned.model).config.num_labels, exported.model.config.num_labels
        if tuned.task.model_kind.has_head and ours != theirs:
            what = f"the export has {theirs} labels, the tuned model {ours}"
            raise GateFailed.of(what, str(path), "Give an export of this run.")
        rounded = tuned.model.dtype != torch.float32  # so are its outputs, and merges that others convert
        limits = exported.limits.wider(LIMITS["rounded"]) if rounded else exported.limits
        certified = reference.certify(exported, limits)
        if reference.checkpoint is not None:
            certified = reference.checkpoint.certify(exported, certified, limits)
    named = path.resolve()
    out = run / "certified" / (f"{named.parent.name}-{named.name}" if named.is_file() else named.name)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        with foreign(path, tuned.device):
            useless = next((one for one in certified["breaches"] if one == NOT_FINITE or one.startswith(OTHER)), None)
            timed = {"runtime": exported.runtime, "bytes": exported.size, "usage": None, "unmeasured": useless}
            if useless is None:
                timed = time_export(exported, tuned, reset_peak())
            scored = score_export(context, exported, timed, out)
        scored |= usage
        content = hash_file(path) if path.is_file() else hash_folder(path)
        certificate: Certificate = plain({**certified, "export": path.name, "sha256": content, "score": scored})
        write_json(out / CERTIFICATE, certificate)
    console.print(
        f"{path.name}, read by {certified['reader']}: {describe_parity(certificate['measured'])}", highlight=False
    )
    for line in describe_export(scored):
        console.print(line, highlight=False)
    if certificate["passed"]:
        console.print(f"certificate: {out / CERTIFICATE}", highlight=False, soft_wrap=True)
    fix = f"The numbers are in {out / CERTIFICATE}."
    GateFailed.collect(Problem(f"the export differs: {breach}", str(path), fix) for breach in certified["breaches"])
    return certificate
