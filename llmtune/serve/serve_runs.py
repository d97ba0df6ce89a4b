"""Serve finished runs together: one base with all their adapters, each under its own name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from llmtune.adapter.load import add_adapter, find_adapter
from llmtune.adapter.merging import merge_adapter
from llmtune.adapter.reference_model import switches_off
from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.calibration import run_calibration
from llmtune.evaluate.decision import run_decision
from llmtune.model.config import head_is_new
from llmtune.recipe.section import RELEASE_PREFIX
from llmtune.recipe.user_files import read_text_file
from llmtune.records import ModelRef
from llmtune.serve.engine import Engine
from llmtune.serve.http_app import build_app
from llmtune.serve.middleware import LOOPBACK
from llmtune.serve.release_watcher import ReleaseWatcher
from llmtune.serve.served_model import ServedModel, activate
from llmtune.serve.server import bind_socket, run_server
from llmtune.session import Models, Plan, RunContext, open_finished
from llmtune.store.release_store import is_stored, release_address
from llmtune.store.run_listing import match_run

KEY_VARIABLE = "LLMTUNE_API_KEY"
MIN_KEY_LENGTH = 16
MAX_KEY_BYTES = 2**16
BODY_BYTES = 2 * 2**20
RECORDING_BYTES = 32 * 2**20
MAX_BATCH = {"cpu": 16, "cuda": 64}
MAY_DIFFER = ("candidates", "chat_template", "chat_template_kwargs")
"""Keys of the recipe's model section that may differ between runs served together."""


@dataclass(frozen=True)
class ServeOptions:
    """Options of the server, apart from the runs."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    merged: bool = False
    max_queue: int = 64
    max_batch: int | None = None
    """Maximum answers generated together; None for the device's default."""
    max_body: int | None = None
    """Maximum bytes of a request; None for the task's default."""
    grace_seconds: float = 30.0
    offline: bool = False


@dataclass(frozen=True)
class ServableRun:
    """An opened run; its weights are not loaded yet."""

    name: str
    path: Path
    context: RunContext

    @property
    def plan(self) -> Plan:
        """The recipe, the task and the model of the run."""
        return self.context.plan

    @property
    def method(self) -> str:
        """The training method: lora, qlora or full."""
        return self.plan.recipe.adapter.method


def serve_runs(
    runs: Mapping[str, Path],
    options: ServeOptions,
    console: Console,
    on_ready: Callable[[dict[str, object]], None] = lambda about: None,
    watched: str | None = None,
) -> None:
    """Serve finished runs until a signal; `on_ready` gets the address and the models once the server listens.

    With `watched`, the only run is the current release of that name, and is reloaded when another one becomes current.

    Raises:
        RecipeError: the runs cannot share a base, or other machines could reach the server without a key.
        EnvironmentProblem: the port is taken, or a model cannot be loaded.
    """
    key = read_key(options)
    bound = bind_socket(options.host, options.port)
    try:
        opened = open_servable_runs(runs, options, console)
        with console.status("loading the model"):
            models = load_models(opened, options)
            device = next(iter(models.values())).device.split(":")[0]
            max_batch = options.max_batch or MAX_BATCH.get(device, MAX_BATCH["cpu"])
            engine = Engine(models, max_batch=max_batch, max_queue=options.max_queue)
            engine.start()
    except BaseException:
        bound.close()
        raise
    task = opened[0].plan.task
    body_bytes = options.max_body or (RECORDING_BYTES if task.model_kind.takes_audio else BODY_BYTES)
    app = build_app(engine, body_bytes=body_bytes, key=key)
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    names = [*models]
    del models  # the engine frees them when a release is replaced
    watcher = watch_release(watched, opened[0], engine, options, console) if watched else None

    def announce() -> None:
        console.print(f"serving {', '.join(names)} at {url} (Ctrl-C stops)", highlight=False)
        on_ready({"url": url, "models": names})
        if watcher:
            watcher.start()

    try:
        run_server(app, engine, bound, options.grace_seconds, announce)
    finally:
        if watcher:
            watcher.stop()


def watch_release(
    name: str, run: ServableRun, engine: Engine, options: ServeOptions, console: Console
) -> ReleaseWatcher:
    """Return the thread that reloads a release under the name that its model is served as."""

    def load(folder: Path) -> dict[str, ServedModel]:
        return load_models(open_servable_runs({run.name: folder}, options, console), options)

    return ReleaseWatcher(name, run.path.name, engine, load, console)


def read_key(options: ServeOptions) -> str | None:
    """Return the API key, from a file or the environment.

    Raises RecipeError if it is too short, or missing although other machines could reach the server.
    """
    key, source = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if options.key_file is not None:
        source = str(options.key_file)
        try:
            key = read_text_file(options.key_file, MAX_KEY_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError.of(f"the API key cannot be read: {error}", "--api-key-file") from error
    key = key.strip() if key is not None else None
    if key is not None and (len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key):
        what = f"an API key needs at least {MIN_KEY_LENGTH} printable ASCII characters, without spaces"
        fix = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        raise RecipeError.of(what, source, fix)
    if key is None and options.host not in LOOPBACK:
        what = f"other machines could reach {options.host} without an API key"
        fix = f"Set a key with --api-key-file FILE or the variable {KEY_VARIABLE}, or omit --host."
        raise RecipeError.of(what, "--host", fix)
    return key


def open_servable_runs(runs: Mapping[str, Path], options: ServeOptions, console: Console) -> list[ServableRun]:
    """Open the runs, and check that they can share a base; no weights are loaded.

    Raises RecipeError if they cannot.
    """
    opened = [ServableRun(name, path, open_finished(path, console, options.offline)) for name, path in runs.items()]
    problems = [problem for other in opened[1:] for problem in _differences(opened[0], other)]
    full = [run for run in opened if run.method == "full"]
    if options.merged and full:
        problems.append(Problem("this run trained all weights and has no adapter", "--merged", "Omit it."))
    elif options.merged and len(opened) > 1:
        problems.append(Problem("a merged model has only one adapter", "--merged", "Serve one run with --merged."))
    if full and len(opened) > 1:
        what = "it trained all weights (method: full), so it cannot share a base with another run"
        problems += [Problem(what, str(run.path), "Serve it alone.") for run in full]
    RecipeError.collect(problems)
    return opened


def _differences(first: ServableRun, other: ServableRun) -> list[Problem]:
    """Return the differences that keep two runs from sharing a base."""
    where, fix = str(other.path), "Serve it on another port."
    if first.plan.model_ref.content_hash != other.plan.model_ref.content_hash:
        what = f"its base is {other.plan.model_ref.name}, but that of {first.name} is {first.plan.model_ref.name}"
        return [Problem(what, where, fix)]
    pairs = zip(_shared_facts(first).items(), _shared_facts(other).values(), strict=True)
    return [
        Problem(f"its {key} is {its}, but that of {first.name} is {value}", where, fix)
        for (key, value), its in pairs
        if its != value
    ]


def _shared_facts(run: ServableRun) -> dict[str, object]:
    """Return the facts that must be equal in runs that share a base."""
    recipe, task = run.plan.recipe, run.plan.task
    facts = {"task": task.name, "kind of model": task.model_kind.auto_class, "method": run.method}
    return facts | {f"model.{key}": value for key, value in recipe.model if key not in MAY_DIFFER}


def load_models(opened: Sequence[ServableRun], options: ServeOptions) -> dict[str, ServedModel]:
    """Load the base once, add all adapters, and return the models by name, with the base last."""
    first, *others = opened
    recipe, task = first.plan.recipe, first.plan.task
    processor, adapted = first.plan.processor, Models(first.context).adapted
    known: dict[str, dict[str, Any]] = {
        run.name: {
            "calibration": run_calibration(run.context.folder),
            "decision": run_decision(run.context.folder),
            "release": release_address(run.path).removeprefix(RELEASE_PREFIX) if is_stored(run.path) else None,
        }
        for run in opened
    }
    if options.merged or first.method == "full":
        whole = adapted.model
        if options.merged:
            whole = merge_adapter(adapted, "dequantized" if adapted.selected.quantized else "original")
        alone = ServedModel(first.name, cast("PreTrainedModel", whole).eval(), processor, recipe, task)
        return {first.name: replace(alone, **known[first.name])}
    model = cast(PeftModel, adapted.model)
    served = {first.name: ServedModel(first.name, model, processor, recipe, task, "default")}
    for number, run in enumerate(others, 2):
        add_adapter(model, f"run{number}", find_adapter(run.path))
        own = run.plan
        served[run.name] = ServedModel(run.name, model, own.processor, own.recipe, own.task, f"run{number}")
    served = {name: replace(one, **known[name]) for name, one in served.items()}
    activate(model, "default")
    name = public_name(first.plan.model_ref)
    if name not in served and switches_off(model) and not head_is_new(first.plan.model_ref, recipe, task):
        served[name] = ServedModel(name, model, processor, recipe, task, None)
    return served


def public_name(model_ref: ModelRef) -> str:
    """Return the base's name; for a local folder only its last part, so that clients see no local paths."""
    path = Path(model_ref.name)
    return path.name if path.is_absolute() or path.exists() else model_ref.name


def name_run(path: Path) -> str:
    """Return the name that clients use for a run: that of its folder; for a release, that of all its releases."""
    folder = path.resolve()
    return folder.parent.name if is_stored(folder) else folder.name


def parse_run_names(runs: Sequence[Path], named: Sequence[str]) -> dict[str, Path]:
    """Return runs by name: the one in `NAME=RUN`, else that of the folder.

    Raises RecipeError if a name is used twice, or there is no run.
    """
    pairs, problems = [(name_run(path), path) for path in runs], []
    for text in named:
        name, _, path = text.partition("=")
        if not (name and path):
            problems.append(Problem(f"{text!r} is not NAME=RUN", "--adapter", "Example: --adapter polite=runs/polite"))
        pairs.append((name, match_run(path) or Path(path)))
    names = [name for name, _ in pairs]
    problems += [
        Problem(f"two runs are called {name!r}", "--adapter", "Rename one: --adapter NAME=RUN")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if not pairs:
        problems.append(Problem("nothing to serve", "RUN", "Name a run folder, or --adapter NAME=RUN."))
    RecipeError.collect(problems)
    return dict(pairs)
