"""A run that was trained, opened again: base and tuned model read back, talked to, merged, written as GGUF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from llmtune.adapter import find_adapter, load_adapter
from llmtune.data import load_rows, read_rows
from llmtune.deploy.chat_session import ChatSession
from llmtune.deploy.endpoint import Endpoint
from llmtune.deploy.endpoint_parity import certify_endpoint
from llmtune.deploy.gguf_export import DEFAULT_FORMAT, check_export, check_model, export_gguf
from llmtune.deploy.merged_model import merge_model
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.evaluate.generation import generate_texts
from llmtune.model import compute_context, load_model, load_processor, resolve_dtype
from llmtune.model.config import read_model_config
from llmtune.model.heads import head_is_new
from llmtune.recipe import TASK_FACTS, Recipe
from llmtune.records import AdaptedModel, ModelPlace, Row, SelectedModel, Task
from llmtune.store.atomic_files import hash_folder
from llmtune.store.run_folder import read_run, recipe_of_run
from llmtune.store.run_lock import LOCK, read_pins
from llmtune.work import Work, locate_pinned, trained_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TALKING = ("chat", "completion", "preference")
"""Tasks whose models answer in a conversation, or go on from a text."""
ENDPOINT_CERTIFICATE = "endpoint.certificate.json"
CERTIFIED_ROWS = 8
"""Test rows that a merged model is asked beside the fixed prompts."""


@dataclass
class Models:
    """Base and tuned model of a run, each loaded from disk as its user would load it; adapters share their base."""

    work: Work
    place: ModelPlace
    processor: PreTrainedTokenizerBase
    packs: bool | None = None
    """Whether the model that was loaded last reads rows that stand end to end; None before there is one."""

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """The model that training started from, on the same quantised weights if it was quantised."""
        yield self._selected.model
        if self.work.recipe.adapter.method == "full":
            del self.__dict__["_selected"]  # one set of full weights in memory at a time

    @contextmanager
    def before(self) -> Iterator[torch.nn.Module]:
        """The base; where the task compares with what training started from, with the adapter of `start_from` on it."""
        start = self.work.recipe.adapter.start_from
        if start is None or not self.work.task.compares(self.work.recipe):
            with self.base() as model:
                yield model
        else:
            place = find_adapter(Path(start))
            known = self.work.folder.findings.get("start_from")
            if known is not None and known != hash_folder(place):
                what = "the adapter that training started from is another one now: there is nothing to compare with"
                raise EnvironmentProblem.of(what, str(place), "Put it back, or run the recipe again.")
            yield load_adapter(self._load(self.place), place).model

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        """The model with the adapter (or the tuned weights) read back from the run folder."""
        yield self.adapted.model

    @property
    def adapted(self) -> AdaptedModel:
        """The tuned model, read back."""
        trained = self.work.folder.path / trained_name(self.work.recipe)
        if self.work.recipe.adapter.method == "full":
            selected = self._load(replace(self.place, path=trained))
            if selected.new_weights:
                what = "the head in these weights is for other classes than the rows have now"
                raise EnvironmentProblem.of(what, str(trained), "Run the recipe again: it trains anew.")
            return load_adapter(selected, trained)
        return load_adapter(self._selected, trained)

    @cached_property
    def _selected(self) -> SelectedModel:
        return self._load(self.place)

    def _load(self, place: ModelPlace) -> SelectedModel:
        work = self.work
        selected = load_model(place, work.recipe, work.task, self.processor, device=work.device, training=False)
        self.packs = selected.packs
        return selected


def merge_run(
    run: Path, *, out: Path | None, onto: str | None, dtype: str, offline: bool, console: Console
) -> dict[str, Any]:
    """Merge the adapter of a finished run; returns the certificate.

    Raises:
        GateFailed: the merged model differs from what was trained by more than the limits.
    """
    work, place = open_finished(run, console, offline)
    return merge(work, place, out or run / "merged", onto=onto, dtype=dtype)


def merge(work: Work, place: ModelPlace, out: Path, *, onto: str | None, dtype: str) -> dict[str, Any]:
    """Merge; without `onto`, into the weights that the adapter was trained on, where the two agree best."""
    onto = onto or trained_on(work.recipe)
    processor = load_processor(place, work.recipe.model)
    adapted = Models(work, place, processor).adapted
    return merge_model(
        adapted,
        work.recipe,
        work.task,
        out,
        work.console,
        onto=onto,
        dtype=dtype,
        rows=certified_rows(work) or some_rows(work),
        trained_sha256=hash_folder(work.folder.path / trained_name(work.recipe)),
    )


def some_rows(work: Work) -> list[Row]:
    """Return rows to ask where there are no test rows: models whose answers continue no prompt have nothing else."""
    rows = load_rows(work.folder.path / "data" / "rows")
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
    work, place = open_finished(run, console, offline)
    name = endpoint.choose_model(model, work.recipe.name)
    return certify_endpoint(
        Models(work, place, load_processor(place, work.recipe.model)).adapted,
        work.recipe,
        work.task,
        endpoint,
        name,
        run / ENDPOINT_CERTIFICATE,
        console,
        rows=certified_rows(work),
        trained_sha256=hash_folder(run / trained_name(work.recipe)),
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


def certified_rows(work: Work) -> list[Row]:
    """Return the test rows that a product is asked beside the fixed prompts."""
    rows = load_rows(work.folder.path / "data" / "rows")
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
    work, place = open_finished(run, console, offline)
    return make_gguf(work, place, out, number_format=number_format, adapter_only=adapter_only, onto=onto)


def make_gguf(
    work: Work,
    place: ModelPlace,
    out: Path | None = None,
    *,
    number_format: str = DEFAULT_FORMAT,
    adapter_only: bool = False,
    onto: str | None = None,
) -> dict[str, Any]:
    """Write a GGUF file; without `out`, into a folder of its own kind below `gguf/` of the run."""
    if onto is not None and (adapter_only or work.recipe.adapter.method != "qlora"):
        what = "an adapter alone is put onto nothing" if adapter_only else "the base was not quantised in training"
        raise RecipeError.of(what, "--onto", "Leave --onto away.")
    if onto is not None and onto not in ("original", "dequantized"):
        raise RecipeError.of(f"{onto!r} is neither original nor dequantized", "--onto")
    processor = check_gguf(work, place)
    kind = f"adapter-{number_format}" if adapter_only else number_format
    return export_gguf(
        Models(work, place, processor).adapted,
        work.recipe,
        work.task,
        out or work.folder.path / "gguf" / kind,
        work.console,
        number_format=number_format,
        onto=onto or trained_on(work.recipe),
        adapter_only=adapter_only,
        rows=certified_rows(work),
        trained_sha256=hash_folder(work.folder.path / trained_name(work.recipe)),
    )


def check_gguf(work: Work, place: ModelPlace) -> PreTrainedTokenizerBase:
    """Return the tokenizer.

    Raises:
        RecipeError: the model does not go on from a text.
        EnvironmentProblem: the model or its tokenizer has no place in GGUF files.
    """
    if work.task.render is None:
        what = f"a model of task {work.task.name} that does not go on from a text cannot be written as GGUF"
        raise RecipeError.of(what, "deploy", "Use the adapter as it is, or what `deploy merge` makes.")
    processor = load_processor(place, work.recipe.model)
    check_model(read_model_config(place, work.recipe.model), processor)
    return processor


def open_finished(run: Path, console: Console, offline: bool, recipe: Recipe | None = None) -> tuple[Work, ModelPlace]:
    """Open a run that was trained, to use its model; `recipe` stands in for the run's own.

    Raises:
        RecipeError: not a run folder, or not trained yet.
        EnvironmentProblem: its base model is gone or was changed.
    """
    folder = read_run(run)
    folder.require_trained()
    pins = read_pins(run / LOCK)
    work = Work(recipe or recipe_of_run(folder).recipe, folder, console, offline, pins, held=True)
    place = locate_pinned(work, pins.model)
    work.settle(place, load_rows(run / "data" / "rows"))
    return work, place


def answer_once(
    run: Path,
    given: Mapping[str, str | None],
    console: Console,
    *,
    base: bool = False,
    max_new_tokens: int | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Let the model of a finished run answer what a person gives, whatever its task.

    Returns:
        `text`, as a person reads it, and `prediction`, as the task has it.

    Raises:
        RecipeError: something is not given, or given and not used by this task; the base has no head to answer with.
        DataError: what is given cannot be used: an empty text, a recording that cannot be read.
    """
    work, place = open_finished(run, console, offline)
    check_given(work.task, given)
    if max_new_tokens is not None and not TASK_FACTS[work.recipe.task].generates:
        raise RecipeError.of("this run's model writes no text", "--max-new-tokens", "Leave it out.")
    if base and head_is_new(place, work.recipe, work.task):
        fix = "Leave --base out: the head was made and trained by this run."
        raise RecipeError.of("the base model has no trained head for this task", "--base", fix)
    session = load_session(work, place, console, base=base, max_new_tokens=max_new_tokens)
    task, recipe = session.task, session.recipe
    if task.ask is None or (task.name == "preference" and task.render is not None):
        text = "".join(session.answer(str(given["prompt"]), system=given.get("system")))
        return {"text": text, "prediction": text}
    row, device = task.ask(given), str(session.model.device)
    said: Any
    if task.predict is None:
        assert task.render is not None
        ids = task.render(row, session.processor, recipe)
        (said,) = generate_texts(session.model, [ids], session.processor, recipe, device=device)
    else:
        dtype = resolve_dtype(recipe.model.dtype, session.model.device.type)
        with torch.inference_mode(), compute_context(dtype, device):
            (said,) = task.predict(session.model, [row], session.processor, recipe, device=device)
    return {"text": task.tell(said, row) if task.tell else task.write(said), "prediction": said}


def check_given(task: Task, given: Mapping[str, str | None]) -> None:
    """Raise RecipeError for what a task asks for and was not given, or was given and does not use."""
    wanted = ", ".join(f"--{name}" for name in task.asks)
    problems = [
        Problem(f"task {task.name} needs it", f"--{name}", f"Give {wanted}.")
        for name, needed in task.asks.items()
        if needed and not (given.get(name) or "").strip()
    ]
    problems += [
        Problem(f"task {task.name} has no use for it", f"--{name}", f"Leave it out; give {wanted}.")
        for name, value in given.items()
        if value is not None and name not in task.asks
    ]
    RecipeError.collect(problems)


def open_session(
    run: Path, console: Console, *, base: bool = False, max_new_tokens: int | None = None, offline: bool = False
) -> ChatSession:
    """Load the model of a finished run to talk to it."""
    work, place = open_finished(run, console, offline)
    if work.task.name not in TALKING:
        fix = "Use: llmtune generate RUN, which asks one thing at a time."
        raise RecipeError.of(f"a model of task {work.task.name} holds no conversation", str(run), fix)
    return load_session(work, place, console, base=base, max_new_tokens=max_new_tokens)


def load_session(
    work: Work, place: ModelPlace, console: Console, *, base: bool, max_new_tokens: int | None
) -> ChatSession:
    """Load the base or the tuned model of an opened run."""
    recipe = work.recipe
    if max_new_tokens is not None:
        longer = recipe.generation.model_copy(update={"max_new_tokens": max_new_tokens})
        recipe = recipe.model_copy(update={"generation": longer})
    processor = load_processor(place, recipe.model)
    models = Models(work, place, processor)
    with models.base() if base else models.tuned() as model:
        return ChatSession(model, processor, recipe, work.task, console)
