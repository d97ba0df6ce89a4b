"""`llmtune compare RECIPE --methods full,lora,qlora`: one recipe trained with each, on the same rows and budget.

Each method runs in its own process. Run as a program (`python -m llmtune.compare.compare_methods run ...`), this
module is llmtune itself, but stops when its parent is gone.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO

from rich.console import Console
from rich.markup import escape

from llmtune.data.run_naming import hash_run
from llmtune.errors import (
    BY_EXIT_CODE,
    EnvironmentProblem,
    GateFailed,
    GateUnsure,
    LlmtuneError,
    Problem,
    RecipeError,
    Stopped,
    describe_end,
    nearest,
    refuse_repeated,
)
from llmtune.recipe.adapter_section import LORA_KEYS, QUANTIZATION_KEYS, RESOLVED_KEYS
from llmtune.recipe.gate_grammar import parse_gate
from llmtune.recipe.loader import LoadedRecipe, load_recipe
from llmtune.recipe.peft_options import REFUSED_METHODS, options_of, peft_methods, rate_factor
from llmtune.recipe.source_map import SET
from llmtune.records import Json
from llmtune.store.atomic_files import explained, hash_value
from llmtune.store.process_environment import refuse_network
from llmtune.store.run_folder import MANIFEST
from llmtune.store.run_listing import RUNS
from llmtune.store.score_records import GateResult

METHODS = ("full", "lora", "qlora", *(name for name in peft_methods() if name not in (*REFUSED_METHODS, "lora")))
TENTH = 10
"""Factor from the learning rate of full tuning to that of an adapter (`train.learning_rate`, recipe reference)."""
PARENT = "LLMTUNE_TRIAL_PARENT"
"""Environment variable: the process that a trial must not outlive."""
SECONDS = 0.5
FILES = ("compare.json", "compare.md", "compare.html", "compare.svg", "compare.png", "pareto.svg", "pareto.png")


@dataclass(frozen=True)
class MethodOptions:
    """The options of `llmtune compare RECIPE`."""

    methods: tuple[str, ...]
    rates: Mapping[str, float]
    """Explicit learning rates by method."""
    sets: tuple[str, ...] = ()
    out: Path | None = None
    resume: bool = False
    fresh: bool = False
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True)
class Trial:
    """The recipe with one method."""

    method: str
    loaded: LoadedRecipe
    sets: tuple[str, ...]
    rate: str
    """Origin of its learning rate."""


def read_methods(text: str) -> tuple[str, ...]:
    """Read `full,lora,qlora`. Raises RecipeError for an unknown method, a repeated one, or only one."""
    methods = tuple(name.strip() for name in text.split(",") if name.strip())
    problems = [
        (f"unknown method '{name}'", f"{nearest(name, METHODS)} Methods: {', '.join(METHODS)}.".strip())
        for name in methods
        if name not in METHODS
    ]
    if len(set(methods)) < len(methods):
        problems.append(("a method is named twice", "Name each once."))
    if len(set(methods)) < 2:
        problems.append(("a single method cannot be compared", "Name two or more, e.g. full,lora,qlora."))
    RecipeError.collect(Problem(what, "--methods", fix) for what, fix in problems)
    return methods


def read_rates(texts: Sequence[str], methods: Sequence[str]) -> dict[str, float]:
    """Read `full=2e-5`, ... Raises RecipeError."""
    rates, problems = {}, []
    refuse_repeated([text.partition("=")[0].strip() for text in texts], "--learning-rate")
    for text in texts:
        method, _, value = text.partition("=")
        fix = "Write METHOD=NUMBER, e.g. full=2e-5"
        if method.strip() not in methods:
            what, fix = f"{text!r} does not name a compared method", f"{fix}; methods here: {', '.join(methods)}"
            problems.append(Problem(what, "--learning-rate", f"{fix}."))
            continue
        try:
            rates[method.strip()] = float(value)
        except ValueError:
            problems.append(Problem(f"{text!r} is not a number", "--learning-rate", f"{fix}."))
    RecipeError.collect(problems)
    return rates


def plan_trials(recipe: str, options: MethodOptions) -> tuple[LoadedRecipe, list[Trial]]:
    """Load the recipe as it is, and once per method; raises one RecipeError with all problems."""
    loaded = load_recipe(recipe, options.sets)
    trials, problems = [], []
    for method in options.methods:
        value, origin = choose_rate(loaded, method, options.rates)
        faster = [f"train.learning_rate={value!r}"] if value != loaded.recipe.train.learning_rate else []
        sets = (*options.sets, *change(loaded, method), *faster)
        try:
            trials.append(Trial(method, load_recipe(recipe, sets), sets, origin))
        except RecipeError as error:
            problems += [Problem(f"with method {method}: {one.what}", one.where, one.fix) for one in error.problems]
    RecipeError.collect(problems)
    return loaded, trials


def choose_rate(loaded: LoadedRecipe, method: str, rates: Mapping[str, float]) -> tuple[float, str]:
    """Return a method's learning rate and its origin; the recipe's rate is meant for its own method."""
    recipe_method, stated = loaded.recipe.adapter.method, loaded.recipe.train.learning_rate
    if method in rates:
        return rates[method], "--learning-rate"
    if "learning_rate" not in loaded.recipe.train.model_fields_set:
        return stated, "chosen for the method"
    factor = rate_factor(method) / rate_factor(recipe_method)
    if factor == 1:
        return stated, "the recipe's"
    text = "a tenth of" if factor == 1 / TENTH else "ten times" if factor == TENTH else f"{factor:g} times"
    note = ", which is for full" if recipe_method == "full" else ""
    return float(f"{stated * factor:.6g}"), f"{text} the recipe's{note}"


def change(loaded: LoadedRecipe, method: str) -> list[str]:
    """Return the settings that make the recipe train with `method`; keys the method does not read are reset.

    PEFT methods use PEFT's own defaults: of the keys shared with LoRA they take only those set by `--set`.
    """
    option_names, origins = options_of(method), loaded.origins
    given = [*LORA_KEYS, *loaded.recipe.adapter.options]
    lora = method in ("lora", "qlora")
    idle = [
        f"adapter.{name}"
        for name in given
        if name not in option_names or not (lora or name in RESOLVED_KEYS or origins.get(f"adapter.{name}") == SET)
    ]
    idle += [f"adapter.{name}" for name in (QUANTIZATION_KEYS if method != "qlora" else ())]
    idle += [] if lora else ["train.loraplus_lr_ratio"]
    stated = {name for name, origin in loaded.origins.items() if origin != "default"}
    taken_back = [key for key in idle if any(name == key or name.startswith(f"{key}.") for name in stated)]
    gates = [gate for gate in loaded.recipe.evaluate.gates if not parse_gate(gate).on_export]
    if not any(parse_gate(gate).part for gate in gates):
        taken_back += [key for key in ("evaluate.when_unsure", "evaluate.looks") if key in stated]
    return [
        f"adapter.method={method}",
        *(f"{key}=null" for key in taken_back),
        "deploy=[]",
        *([] if len(gates) == len(loaded.recipe.evaluate.gates) else [f"evaluate.gates={json.dumps(gates)}"]),
    ]


def default_out(loaded: LoadedRecipe, rates: Mapping[str, float]) -> Path:
    """`runs/<name>-compare-<8 hex>`: the same for the same recipe and rows, independent of the methods."""
    return RUNS / f"{loaded.recipe.name}-compare-{hash_value([hash_run(loaded), dict(rates)])[:8]}"


def compare_methods(recipe: str, options: MethodOptions, console: Console, shown: Console) -> Json:
    """Train the recipe with each method in its own process, compare the runs, and return the comparison.

    Progress goes to `console`, the comparison to `shown`.

    The runs are in `OUT/<method>/`; valid ones are skipped, stopped ones are resumed.

    Raises:
        LlmtuneError: the error of the recipe, or of a method's run. Failed gates are not an error here.
    """
    loaded, trials = plan_trials(recipe, options)
    refuse_network(loaded.recipe, offline=options.offline)
    out = options.out or default_out(loaded, options.rates)
    check_out_folder(out)
    if options.resume and not any((out / method / MANIFEST).exists() for method in options.methods):
        raise RecipeError.of("nothing to resume", str(out), "omit --resume to start")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    console.print(f"comparing {', '.join(options.methods)} -> {escape(str(out))}")
    for number, trial in enumerate(trials, 1):
        train = trial.loaded.recipe.train
        stated = f"{train.learning_rate:g}, " if "learning_rate" in train.model_fields_set else ""
        rate = f"learning rate {stated}{trial.rate}"
        console.rule(f"{number} of {len(trials)}: {trial.method} ({rate})", align="left")
        train_method(trial.method, command(recipe, trial, out / trial.method, options))
    return compare_trials(loaded, trials, out, shown)


def command(recipe: str, trial: Trial, out: Path, options: MethodOptions) -> list[str]:
    """Return the command line for one method."""
    words = ["run", recipe, "--out", str(out), "--json"]
    for item in trial.sets:
        words += ["--set", item]
    words += ["--fresh"] if options.fresh else []
    words += ["--threads", str(options.threads)] if options.threads else []
    words += ["--offline"] if options.offline else []
    return words


def check_out_folder(out: Path) -> None:
    """Refuse a folder with other contents."""
    if out.exists() and not out.is_dir():
        raise RecipeError.of("the comparison's folder is a file", str(out), "choose another one with --out")
    names = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")} if out.is_dir() else set()
    if strange := sorted(names - {*METHODS, *FILES}):
        what = f"this folder is not empty and not a comparison: it contains {', '.join(strange[:3])}"
        raise RecipeError.of(what, str(out), "choose an empty or new folder with --out")


def compare_trials(loaded: LoadedRecipe, trials: Sequence[Trial], out: Path, console: Console) -> Json:
    """Compare the existing runs; the libraries for this are imported only here."""
    from llmtune.compare.compare_runs import finish
    from llmtune.compare.run_comparison import make_comparison
    from llmtune.display.console import spinner
    from llmtune.evaluate.opened_runs import check_alike, open_runs
    from llmtune.store.report_record import require_report

    folders = [out / trial.method for trial in trials]
    runs = open_runs(folders)
    check_alike(runs)
    with spinner(console, "comparing the runs"):
        made = make_comparison(runs, "methods", loaded.recipe.name)
    reports = [require_report(folder) for folder in folders]
    summaries = [
        replace(run, rate=trial.rate, gates=[GateResult(**gate) for gate in report["gates"]])
        for run, trial, report in zip(made.runs, trials, reports, strict=True)
    ]
    first = runs[0]
    batch, steps = first.recipe.train, first.folder.facts("train").get("steps")
    unit = f"{batch.batch_tokens} tokens" if batch.batch_tokens else f"{batch.batch_size} rows"
    kept = first.folder.facts("prepare")["kept"].get("train")
    pairs = zip(runs, trials, strict=True)
    rates = ", ".join(f"{trial.method} {run.recipe.train.learning_rate:g} ({trial.rate})" for run, trial in pairs)
    notes = [
        f"All trained on the same {kept:,} rows, for {steps} steps of {unit}, with seed {first.recipe.seed}.",
        f"Learning rates: {rates}.",
        "Each ran in its own process; peak memory is that of its training.",
    ]
    return finish(replace(made, runs=summaries, notes=[*notes, *made.notes]), out, console)


# One method, in its own process


class TrialBug(RuntimeError):
    """A trial failed in a way that users cannot fix; its traceback was printed."""


def train_method(method: str, arguments: Sequence[str]) -> None:
    """Run `llmtune` with `arguments` in a separate process; its messages go to stderr as they come.

    SIGINT and SIGTERM are forwarded: the trial saves a checkpoint and stops.

    Raises:
        LlmtuneError: the trial's error, naming its method. Failed gates are ignored.
        TrialBug: it ended with a traceback.
    """
    words = [sys.executable, "-m", "llmtune.compare.compare_methods", *arguments]
    environment = {**os.environ, PARENT: str(os.getpid())}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = subprocess.Popen(  # noqa: S603
            words, stdin=subprocess.DEVNULL, stdout=output, env=environment, process_group=0
        )
        with handed_on(child):
            code = child.wait()
        if code not in (0, GateFailed.exit_code, GateUnsure.exit_code):
            raise trial_error(method, code, output)


@contextmanager
def handed_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Forward signals to the child inside the block, and wait until it has handled them."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def trial_error(method: str, code: int, output: IO[str]) -> Exception:
    """Turn how a trial ended into an error."""
    again = "Repeat the command to continue from there."
    if code < 0:
        fix = f"The system probably ran out of memory. {again}" if -code == signal.SIGKILL else again
        return EnvironmentProblem.of(f"the run {describe_end(code)}", method, fix)
    if code > 128:
        return Stopped(Problem("stopped; progress is saved", method, again), signal_number=code - 128)
    output.seek(0)
    try:
        problems = json.loads(output.read())["error"]["problems"]
    except (ValueError, KeyError, TypeError):
        return TrialBug(f"the run with method {method} ended with exit code {code}: see above")
    kind = BY_EXIT_CODE.get(code, LlmtuneError)
    return kind(*(Problem(f"with method {method}: {one['what']}", one["where"], one["fix"]) for one in problems))


def stop_with_parent() -> None:
    """Ask this process to stop once its parent is gone: an orphan would keep the run folder locked."""
    while os.getppid() == int(os.environ[PARENT]):
        time.sleep(SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=stop_with_parent, daemon=True).start()
    runpy.run_module("llmtune", run_name="__main__", alter_sys=True)
