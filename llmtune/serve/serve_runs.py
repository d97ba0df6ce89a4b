"""Finished runs opened to be served: one base with the adapters of all of them, each under a name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from rich.console import Console

from llmtune.adapter import find_adapter, merge
from llmtune.adapter.fused_lora import fuse_products
from llmtune.adapter.load import SAVED, read_config
from llmtune.adapter.target_modules import are_transposed
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.model import load_processor
from llmtune.model.heads import head_is_new
from llmtune.model.library_logging import hushed
from llmtune.records import ModelRef
from llmtune.serve.engine import Engine
from llmtune.serve.http_app import build_app
from llmtune.serve.middleware import LOOPBACK, Rules, digest
from llmtune.serve.served_model import Served
from llmtune.serve.server import run_server, take_socket
from llmtune.serve.vllm_engine import Tuned, hand_over, require_vllm, vllm_command
from llmtune.session import Models, RunContext, open_finished, trained_name

KEY_VARIABLE = "LLMTUNE_API_KEY"
SHORTEST_KEY = 16
BODY_BYTES = 2 * 2**20
RECORDING_BYTES = 32 * 2**20
MOST_ROWS = {"cpu": 16, "cuda": 64}
OF_ALL = ("chat_template", "chat_template_kwargs")
"""Keys of the recipe's model section in which runs that are served together may differ."""


@dataclass(frozen=True)
class ServeOptions:
    """How to serve, as opposed to what."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    merged: bool = False
    max_queue: int = 64
    max_batch: int | None = None
    """Answers that are written side by side; None: what suits the device."""
    max_body: int | None = None
    """Bytes of a request; None: what suits the task."""
    grace_seconds: float = 30.0
    offline: bool = False


@dataclass(frozen=True)
class _Opened:
    """A run, looked at and not loaded yet."""

    name: str
    path: Path
    context: RunContext
    place: ModelRef


def serve_runs(
    runs: Mapping[str, Path], options: ServeOptions, console: Console, tell: Any = lambda about: None
) -> None:
    """Serve finished runs until a signal; `tell` is given the address and the models once requests are taken.

    Raises:
        RecipeError: runs that do not go together; an address beyond this machine without a key.
        EnvironmentProblem: the port is taken, or a model cannot be loaded.
    """
    key = read_key(options)
    taken = take_socket(options.host, options.port)
    try:
        opened = open_runs(runs, options, console)
        with console.status("loading the model"):
            models = load_models(opened, options)
            device = next(iter(models.values())).device.split(":")[0]
            most = options.max_batch or MOST_ROWS.get(device, MOST_ROWS["cpu"])
            engine = Engine(models, most_rows=most, max_queue=options.max_queue)
            engine.start()
    except BaseException:
        taken.close()
        raise
    speech = opened[0].context.task.takes_audio
    body_bytes = options.max_body or (RECORDING_BYTES if speech else BODY_BYTES)
    hosts = LOOPBACK if key is None else None
    app = build_app(engine, Rules(body_bytes, digest(key) if key else None, hosts))
    host, port = taken.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def say_ready() -> None:
        console.print(f"serving {', '.join(models)} at {address} (Ctrl-C stops)", highlight=False)
        tell({"url": address, "models": list(models)})

    run_server(app, engine, taken, options.grace_seconds, say_ready)


def read_key(options: ServeOptions) -> str | None:
    """Return the API key, from a file or the environment.

    Raises RecipeError where there is none and other machines could ask, or it is too short to be one.
    """
    key, where = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if options.key_file is not None:
        where = str(options.key_file)
        try:
            key = options.key_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError.of(f"the API key cannot be read: {error}", "--api-key-file") from error
    key = key.strip() if key is not None else None
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        what = f"the API key is to have at least {SHORTEST_KEY} letters, digits or signs, without spaces"
        fix = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        raise RecipeError.of(what, where, fix)
    if key is None and options.host not in LOOPBACK:
        what = f"other machines could reach {options.host}, and there is no API key"
        fix = f"Give one with --api-key-file FILE, or in the variable {KEY_VARIABLE}; or leave --host away."
        raise RecipeError.of(what, "--host", fix)
    return key


def open_runs(runs: Mapping[str, Path], options: ServeOptions, console: Console) -> list[_Opened]:
    """Look at the runs, and check that one base can do them all; no weights are loaded.

    Raises RecipeError where they do not go together.
    """
    opened = []
    for name, path in runs.items():
        context, place = open_finished(path, console, options.offline)
        opened.append(_Opened(name, path, context, place))
    first = opened[0]
    problems = [problem for other in opened[1:] for problem in _differences(first, other)]
    full = [run for run in opened if run.context.recipe.adapter.method == "full"]
    if options.merged and (full or len(opened) > 1):
        what = "this run trained all weights: there is nothing to merge" if full else "one merged model has one adapter"
        problems.append(Problem(what, "--merged", "Leave it out." if full else "Serve one run with --merged."))
    if full and len(opened) > 1:
        what = "it trained all weights (method: full): it shares no base with another run"
        problems += [Problem(what, str(run.path), "Serve it by itself.") for run in full]
    RecipeError.collect(problems)
    return opened


def _differences(first: _Opened, other: _Opened) -> Iterator[Problem]:
    """Yield what keeps two runs from sharing a base."""
    one, two = first.context.recipe, other.context.recipe
    if first.place.content_hash != other.place.content_hash:
        what = f"its base is {other.place.name}, and that of {first.name} is {first.place.name}"
        yield Problem(what, str(other.path), "Serve runs of one base together, others on another port.")
        return
    if (
        first.context.task.name != other.context.task.name
        or first.context.task.auto_class != other.context.task.auto_class
    ):
        yield Problem(f"its task is {two.task}, and that of {first.name} is {one.task}", str(other.path))
    if one.adapter.method != two.adapter.method:
        what = f"its method is {two.adapter.method}, and that of {first.name} is {one.adapter.method}"
        yield Problem(what, str(other.path), "4-bit weights are another base.")
    for key in type(one.model).model_fields:
        mine, its = getattr(one.model, key), getattr(two.model, key)
        if key not in OF_ALL and mine != its and key != "candidates":
            yield Problem(f"model.{key} is {its!r} there, and {mine!r} in {first.name}", str(other.path))


def load_models(opened: Sequence[_Opened], options: ServeOptions) -> dict[str, Served]:
    """Load the base once, put all adapters on it, and return what is served by name; the base comes last."""
    first, *others = opened
    context = first.context
    processor = load_processor(first.place, context.recipe.model)
    adapted = Models(context, first.place, processor).adapted
    full = context.recipe.adapter.method == "full"
    if options.merged or full:
        onto = "dequantized" if context.recipe.adapter.method == "qlora" else "original"
        model: Any = merge(adapted, cast(Any, onto)) if options.merged else adapted.model
        return {first.name: Served(first.name, model.eval(), processor, context.recipe, context.task)}
    model = cast(PeftModel, adapted.model)
    served = {first.name: Served(first.name, cast(Any, model), processor, context.recipe, context.task, "default")}
    for number, run in enumerate(others):
        adapter = f"run{number + 2}"
        add_adapter(model, adapter, find_adapter(run.path))
        own = load_processor(run.place, run.context.recipe.model)
        served[run.name] = Served(run.name, cast(Any, model), own, run.context.recipe, run.context.task, adapter)
    model.set_adapter("default", inference_mode=True)
    name = _short_name(first.place)
    biased = any(config.bias != "none" for config in model.peft_config.values())  # they stay when adapters are off
    if name not in served and not biased and not head_is_new(first.place, context.recipe, context.task):
        served[name] = Served(name, cast(Any, model), processor, context.recipe, context.task, None)
    return served


def _short_name(place: ModelRef) -> str:
    """Return the base's name; of a folder its own, so that no path of this machine is told."""
    return Path(place.name).name if Path(place.name).is_absolute() or Path(place.name).exists() else place.name


def add_adapter(model: PeftModel, name: str, place: Path) -> None:
    """Put one more adapter on a model that has one, in place.

    Raises EnvironmentProblem where its weights and the model do not fit each other.
    """
    config = read_config(place)
    config.inference_mode = True
    config.fan_in_fan_out = are_transposed(model.get_base_model())
    try:
        with hushed():
            model.add_adapter(name, config)
        result = set_peft_model_state_dict(model, load_peft_weights(str(place), device="cpu"), adapter_name=name)
    except (ValueError, RuntimeError) as error:
        what = f"the adapter cannot be put beside the others: {str(error).strip().splitlines()[-1]}"
        raise EnvironmentProblem.of(what, str(place), "Serve it by itself.") from error
    own = {key for key, _ in model.named_parameters() if f".{name}" in key and any(part in key for part in SAVED)}
    wrong = [key for key in result.missing_keys if key in own] or list(result.unexpected_keys)
    if wrong:
        what = f"{len(wrong)} weights of the adapter have no counterpart, {wrong[0]} for one"
        raise EnvironmentProblem.of(what, str(place), "It is damaged, or it was made for another model.")
    fuse_products(model)
    model.eval()


def serve_by_vllm(runs: Mapping[str, Path], options: ServeOptions, console: Console) -> None:
    """Hand over to vLLM, which takes this process's place.

    Raises:
        EnvironmentProblem: it is not installed.
        RecipeError: the runs are of a task, or of a kind, that it cannot be given.
    """
    require_vllm()
    key = read_key(options)
    opened = open_runs(runs, options, console)
    first = opened[0]
    recipe, task = first.context.recipe, first.context.task
    if not task.free_prompt:
        fix = "Leave --engine away: llmtune's own server has an endpoint for it."
        raise RecipeError.of(f"vLLM serves no model of task {task.name} that llmtune tunes", "--engine", fix)
    whole = first.path / "merged" if options.merged else first.path / trained_name(recipe)
    if options.merged and not (whole / "config.json").is_file():
        raise RecipeError.of("there is no merged model yet", str(whole), f"Make it: llmtune deploy merge {first.path}")
    if options.merged or recipe.adapter.method == "full":
        tuned = [Tuned(first.name, whole, None)]
    else:
        places = [(run.name, find_adapter(run.path)) for run in opened]
        tuned = [Tuned(name, place, _rank(place)) for name, place in places]
    stated = recipe.generation.model_dump(exclude_none=True)
    sampled = stated.pop("do_sample")
    stated.pop("num_beams")
    command = vllm_command(
        first.place.path,
        _short_name(first.place),
        tuned,
        host=options.host,
        port=options.port,
        dtype=recipe.model.dtype,
        quantized=recipe.adapter.method == "qlora" and not options.merged,
        trust_remote_code=recipe.model.trust_remote_code,
        generation=stated if sampled else {**stated, "temperature": 0.0},
    )
    console.print(f"handing over to: {' '.join(command)}", highlight=False, markup=False)
    hand_over(command, key)


def _rank(place: Path) -> int:
    config = read_config(place)
    return int(max(config.r, *(config.rank_pattern or {}).values(), 1))


def name_runs(runs: Sequence[Path], named: Sequence[str]) -> dict[str, Path]:
    """Return runs by name: those without one under that of their folder, and `NAME=RUN`.

    Raises RecipeError for a name that is given twice, or none at all.
    """
    pairs = [(path.resolve().name, path) for path in runs]
    problems = []
    for text in named:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            problems.append(Problem(f"{text!r} is not NAME=RUN", "--adapter", "For one: --adapter polite=runs/polite"))
        pairs.append((name, Path(path)))
    names = [name for name, _ in pairs]
    problems += [
        Problem(f"two runs are called {name!r}", "--adapter", "Give one another name: --adapter NAME=RUN")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if not pairs:
        problems.append(Problem("there is nothing to serve", "RUN", "Name a run folder, or --adapter NAME=RUN."))
    RecipeError.collect(problems)
    return dict(pairs)
