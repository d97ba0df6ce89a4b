"""What is made of a finished run: a merged model, a GGUF file, a certificate of an endpoint; each held against it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmtune.data import load_rows, read_rows
from llmtune.deploy.endpoint import Endpoint
from llmtune.deploy.endpoint_parity import certify_endpoint
from llmtune.deploy.gguf_export import DEFAULT_FORMAT, check_export, check_model, export_gguf
from llmtune.deploy.merged_model import merge_model
from llmtune.errors import RecipeError
from llmtune.model import load_processor
from llmtune.model.config import read_model_config
from llmtune.recipe import Recipe
from llmtune.records import ModelRef, Row
from llmtune.session import Models, RunContext, open_finished, trained_name
from llmtune.store.atomic_files import hash_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDPOINT_CERTIFICATE = "endpoint.certificate.json"
CERTIFIED_ROWS = 8
"""Test rows that a merged model is asked beside the fixed prompts."""


def merge_run(
    run: Path, *, out: Path | None, onto: str | None, dtype: str, offline: bool, console: Console
) -> dict[str, Any]:
    """Merge the adapter of a finished run; returns the certificate.

    Raises:
        GateFailed: the merged model differs from what was trained by more than the limits.
    """
    context, place = open_finished(run, console, offline)
    return merge(context, place, out or run / "merged", onto=onto, dtype=dtype)


def merge(context: RunContext, place: ModelRef, out: Path, *, onto: str | None, dtype: str) -> dict[str, Any]:
    """Merge; without `onto`, into the weights that the adapter was trained on, where the two agree best."""
    onto = onto or trained_on(context.recipe)
    processor = load_processor(place, context.recipe.model)
    adapted = Models(context, place, processor).adapted
    return merge_model(
        adapted,
        context.recipe,
        context.task,
        out,
        context.console,
        onto=onto,
        dtype=dtype,
        rows=certified_rows(context) or some_rows(context),
        trained_sha256=hash_folder(context.folder.path / trained_name(context.recipe)),
    )


def some_rows(context: RunContext) -> list[Row]:
    """Return rows to ask where there are no test rows: models whose answers continue no prompt have nothing else."""
    rows = load_rows(context.folder.path / "data" / "rows")
    side = "validation" if rows.counts["validation"] else "train"
    return read_rows(rows, side, range(min(CERTIFIED_ROWS, rows.counts[side])))


def certify_run(
    run: Path, *, url: str, model: str | None, key_file: Path | None, offline: bool, console: Console
) -> dict[str, Any]:
    """Hold a served endpoint against the model of a finished run; returns the certificate.

    Raises:
        RecipeError: no URL, no such model there, a task without prompts.
        GateFailed: the endpoint differs from what was trained by more than the limits.
    """
    endpoint = Endpoint(url, read_secret(key_file), offline)
    context, place = open_finished(run, console, offline)
    name = endpoint.choose_model(model, context.recipe.name)
    return certify_endpoint(
        Models(context, place, load_processor(place, context.recipe.model)).adapted,
        context.recipe,
        context.task,
        endpoint,
        name,
        run / ENDPOINT_CERTIFICATE,
        console,
        rows=certified_rows(context),
        trained_sha256=hash_folder(run / trained_name(context.recipe)),
    )


def read_secret(file: Path | None) -> str | None:
    """Return what a file with an API key holds; raises RecipeError where it cannot be read."""
    if file is None:
        return None
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError.of(f"the API key cannot be read: {error}", "--api-key-file") from error


def trained_on(recipe: Recipe) -> str:
    """Return which weights the adapter was trained on, by `--onto`'s name: there both models agree best."""
    return "dequantized" if recipe.adapter.method == "qlora" else "original"


def certified_rows(context: RunContext) -> list[Row]:
    """Return the test rows that a product is asked beside the fixed prompts."""
    rows = load_rows(context.folder.path / "data" / "rows")
    return read_rows(rows, "test", range(min(CERTIFIED_ROWS, rows.counts["test"])))


def gguf_run(
    run: Path,
    *,
    out: Path | None,
    number_format: str,
    adapter_only: bool,
    onto: str | None,
    offline: bool,
    console: Console,
) -> dict[str, Any]:
    """Write the model of a finished run, or its adapter alone, as a GGUF file; returns the certificate.

    Raises:
        RecipeError: an option that does not fit, or a task whose models GGUF has no place for.
        EnvironmentProblem: a model or tokenizer that GGUF has no place for.
        GateFailed: the file differs from what was trained by more than the limits.
    """
    check_export(number_format, adapter_only)
    context, place = open_finished(run, console, offline)
    return make_gguf(context, place, out, number_format=number_format, adapter_only=adapter_only, onto=onto)


def make_gguf(
    context: RunContext,
    place: ModelRef,
    out: Path | None = None,
    *,
    number_format: str = DEFAULT_FORMAT,
    adapter_only: bool = False,
    onto: str | None = None,
) -> dict[str, Any]:
    """Write a GGUF file; without `out`, into a folder of its own kind below `gguf/` of the run."""
    if onto is not None and (adapter_only or context.recipe.adapter.method != "qlora"):
        what = "an adapter alone is put onto nothing" if adapter_only else "the base was not quantised in training"
        raise RecipeError.of(what, "--onto", "Leave --onto away.")
    if onto is not None and onto not in ("original", "dequantized"):
        raise RecipeError.of(f"{onto!r} is neither original nor dequantized", "--onto")
    processor = check_gguf(context, place)
    kind = f"adapter-{number_format}" if adapter_only else number_format
    return export_gguf(
        Models(context, place, processor).adapted,
        context.recipe,
        context.task,
        out or context.folder.path / "gguf" / kind,
        context.console,
        number_format=number_format,
        onto=onto or trained_on(context.recipe),
        adapter_only=adapter_only,
        rows=certified_rows(context),
        trained_sha256=hash_folder(context.folder.path / trained_name(context.recipe)),
    )


def check_gguf(context: RunContext, place: ModelRef) -> PreTrainedTokenizerBase:
    """Return the tokenizer.

    Raises:
        RecipeError: the model does not go on from a text.
        EnvironmentProblem: the model or its tokenizer has no place in GGUF files.
    """
    if not context.task.continues_text:
        what = f"a model of task {context.task.name} that does not go on from a text cannot be written as GGUF"
        raise RecipeError.of(what, "deploy", "Use the adapter as it is, or what `deploy merge` makes.")
    processor = load_processor(place, context.recipe.model)
    check_model(read_model_config(place, context.recipe.model), processor)
    return processor
