"""`llmtune compare RECIPE --methods full,lora,qlora`: one recipe trained with each, on the same rows and budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from llmtune.compare.method_subprocess import run_trial
from llmtune.errors import Problem, RecipeError, nearest
from llmtune.recipe import LoadedRecipe, load_recipe
from llmtune.recipe.adapter_section import LORA_KEYS, QUANTIZATION_KEYS
from llmtune.records import GateResult, Json
from llmtune.store.atomic_files import explained, hash_value
from llmtune.store.process_environment import refuse_network
from llmtune.store.run_folder import MANIFEST

if TYPE_CHECKING:
    from llmtune.compare.run_scores import OpenedRun

METHODS = ("full", "lora", "qlora")
TENTH = 10
"""How much faster an adapter learns than all weights (`train.learning_rate` in the recipe reference)."""
FILES = ("compare.json", "compare.md", "compare.html", "compare.svg", "compare.png")


@dataclass(frozen=True)
class MethodOptions:
    """The options of `llmtune compare RECIPE`."""

    methods: tuple[str, ...]
    rates: Mapping[str, float]
    """Learning rates by method, where they are stated."""
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
    """Where its learning rate comes from."""


def read_methods(text: str) -> tuple[str, ...]:
    """Read `full,lora,qlora`. Raises RecipeError for an unknown method, one that is named twice, or one alone."""
    methods = tuple(name.strip() for name in text.split(",") if name.strip())
    problems = [
        Problem(
            f"unknown method '{name}'", "--methods", f"{nearest(name, METHODS)} Methods: {', '.join(METHODS)}.".strip()
        )
        for name in methods
        if name not in METHODS
    ]
    if len(set(methods)) < len(methods):
        problems.append(Problem("a method is named twice", "--methods", "Name each once."))
    if len(set(methods)) < 2:
        problems.append(
            Problem("one method alone cannot be compared", "--methods", "Name two or more, e.g. full,lora,qlora.")
        )
    RecipeError.collect(problems)
    return methods


def read_rates(texts: Sequence[str], methods: Sequence[str]) -> dict[str, float]:
    """Read `full=2e-5`, ... Raises RecipeError."""
    rates, problems = {}, []
    for text in texts:
        method, _, value = text.partition("=")
        if method.strip() not in methods:
            fix = f"Write METHOD=NUMBER, e.g. full=2e-5; methods here: {', '.join(methods)}."
            problems.append(Problem(f"{text!r} names no method that is compared", "--learning-rate", fix))
            continue
        try:
            rates[method.strip()] = float(value)
        except ValueError:
            problems.append(
                Problem(f"{text!r} is no number", "--learning-rate", "Write METHOD=NUMBER, e.g. full=2e-5.")
            )
    RecipeError.collect(problems)
    return rates


def plan_trials(recipe: str, options: MethodOptions) -> tuple[LoadedRecipe, list[Trial]]:
    """Load the recipe as it is, and once with each method; raises RecipeError with all that is wrong with any."""
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
    """Return the learning rate of a method and where it comes from; the recipe's is meant for its own method."""
    own, stated = loaded.recipe.adapter.method, loaded.recipe.train.learning_rate
    if method in rates:
        return rates[method], "--learning-rate"
    if method == "full" and own != "full":
        return float(f"{stated / TENTH:.6g}"), "a tenth of the recipe's"
    if method != "full" and own == "full":
        return float(f"{stated * TENTH:.6g}"), "ten times the recipe's, which is for full"
    return stated, "the recipe's"


def change(loaded: LoadedRecipe, method: str) -> list[str]:
    """Return what to set so that the recipe trains with `method`: keys that it does not read are taken back."""
    idle = [f"adapter.{name}" for name in (LORA_KEYS if method == "full" else ())]
    idle += [f"adapter.{name}" for name in (QUANTIZATION_KEYS if method != "qlora" else ())]
    idle += ["train.loraplus_lr_ratio"] if method == "full" else []
    stated = [key for key in idle if is_stated(loaded, key)]
    return [f"adapter.method={method}", *(f"{key}=null" for key in stated), "deploy=[]"]


def is_stated(loaded: LoadedRecipe, key: str) -> bool:
    """Whether the recipe, or --set, gives the key a value."""
    return loaded.origins.get(key, "default") != "default" or any(
        origin != "default" for name, origin in loaded.origins.items() if name.startswith(f"{key}.")
    )


def default_out(loaded: LoadedRecipe, rates: Mapping[str, float]) -> Path:
    """`runs/<name>-compare-<8 hex>`: the same for the same recipe, whichever methods are compared."""
    return Path("runs") / f"{loaded.recipe.name}-compare-{hash_value([loaded.fingerprint, dict(rates)])[:8]}"


def compare_methods(recipe: str, options: MethodOptions, console: Console) -> Json:
    """Train the recipe with each method in a process of its own, compare the runs, and return the comparison.

    The runs lie in `OUT/<method>/`; each is skipped where it is valid, and goes on where it was stopped.

    Raises:
        LlmtuneError: what the recipe, or the run of a method, ends with. Gates that fail end nothing here.
    """
    loaded, trials = plan_trials(recipe, options)
    refuse_network(loaded.recipe, offline=options.offline)
    out = options.out or default_out(loaded, options.rates)
    check_folder(out)
    if options.resume and not any((out / method / MANIFEST).exists() for method in options.methods):
        raise RecipeError.of("nothing to resume", str(out), "leave --resume away to start")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    console.print(f"comparing {', '.join(options.methods)} -> {escape(str(out))}")
    for number, trial in enumerate(trials, 1):
        rate = f"learning rate {trial.loaded.recipe.train.learning_rate:g}, {trial.rate}"
        console.rule(f"{number} of {len(trials)}: {trial.method} ({rate})", align="left")
        run_trial(trial.method, command(recipe, trial, out / trial.method, options))
    return conclude(loaded, trials, out, console)


def command(recipe: str, trial: Trial, out: Path, options: MethodOptions) -> list[str]:
    """Return what to type for one method."""
    words = ["run", recipe, "--out", str(out), "--json"]
    for item in trial.sets:
        words += ["--set", item]
    words += ["--fresh"] if options.fresh else []
    words += ["--threads", str(options.threads)] if options.threads else []
    words += ["--offline"] if options.offline else []
    return words


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else."""
    if out.exists() and not out.is_dir():
        raise RecipeError.of("the folder of the comparison is a file", str(out), "choose another one with --out")
    names = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")} if out.is_dir() else set()
    if strange := sorted(names - {*METHODS, *FILES}):
        what = f"this folder is not empty and no comparison: it holds {', '.join(strange[:3])}"
        raise RecipeError.of(what, str(out), "choose an empty or new folder with --out")


def conclude(loaded: LoadedRecipe, trials: Sequence[Trial], out: Path, console: Console) -> Json:
    """Compare the runs that are there now; the libraries that this needs are loaded only here."""
    from llmtune.compare.comparison import describe
    from llmtune.compare.run_comparison import finish
    from llmtune.compare.run_pairs import check_alike
    from llmtune.compare.run_scores import open_runs

    runs = open_runs([out / trial.method for trial in trials])
    check_alike(runs)
    made = describe(runs, "methods", loaded.recipe.name)
    summaries = [
        replace(run, rate=trial.rate, gates=read_gates(out / trial.method))
        for run, trial in zip(made.runs, trials, strict=True)
    ]
    return finish(replace(made, runs=summaries, notes=[*budget(runs, trials), *made.notes]), out, console)


def read_gates(run: Path) -> list[GateResult]:
    """Return what became of the gates of a run."""
    return [GateResult(**gate) for gate in json.loads((run / "report.json").read_text("utf-8"))["gates"]]


def budget(runs: Sequence[OpenedRun], trials: Sequence[Trial]) -> list[str]:
    """Say what all had in common, and which learning rate each had."""
    first = runs[0]
    train, batch = first.facts("train"), first.recipe.train
    unit = f"{batch.batch_tokens} tokens" if batch.batch_tokens else f"{batch.batch_size} rows"
    kept = first.folder.manifest["steps"]["prepare"]["facts"]["kept"].get("train")
    steps, seed = train.get("steps"), first.recipe.seed
    same = f"All were trained on the same {kept:,} rows, for {steps} steps of {unit}, with seed {seed}."
    rates = ", ".join(f"{trial.method} {trial.loaded.recipe.train.learning_rate:g} ({trial.rate})" for trial in trials)
    return [same, f"Learning rates: {rates}.", "Each ran in a process of its own; peak memory is that of its training."]
