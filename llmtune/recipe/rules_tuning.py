"""Rules of the sections `model`, `adapter` and `train`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llmtune.errors import nearest
from llmtune.recipe.finding import Finding, idle
from llmtune.recipe.path_resolution import is_local
from llmtune.recipe.rules_data import has_rows
from llmtune.recipe.schema import Recipe
from llmtune.recipe.source_map import Places

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

SCHEDULE_OPTIONS = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles"),
}
"""Options of each schedule in transformers that are numbers and not set by the loop itself."""

BETAS = ("adamw", "paged_adamw", "ademamix", "paged_ademamix", "lion", "paged_lion")
"""Beginnings of the optimisers that read `adam_beta1` and `adam_beta2`."""
EPSILON = BETAS[:4]

LORA_KEYS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "bias",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
)
QUANTIZATION_KEYS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def model_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield a model that is not named, or named twice, and settings that its kind does not read."""
    model = recipe.model
    both = ("model.name", "model.candidates")
    if model.name is None and model.candidates is None:
        yield Finding("model", "neither 'model.name' nor 'model.candidates' is given", "Name a model.", both)
    elif model.name is not None and model.candidates is not None:
        fix = "Keep one of them; set the other to null if it comes from an extended recipe."
        yield Finding("model.candidates", "both 'model.name' and 'model.candidates' are given", fix, both)
    names = {"model.name": model.name} if model.name is not None else {}
    names |= {f"model.candidates.{i}": name for i, name in enumerate(model.candidates or ())}
    for key, name in names.items():
        yield from name_findings(key, name, places)
    if len(set(model.candidates or ())) < len(model.candidates or ()):
        yield Finding("model.candidates", "'model.candidates' names a model twice", "Name each once.")
    on_hub = [name for key, name in names.items() if not is_local(name, places.folder(key))]
    if places.stated("model.revision") and names and not on_hub:
        yield idle("model.revision", "but for a model on the hub", "Remove it.", *both)


def name_findings(key: str, name: str, places: Places) -> Iterator[Finding]:
    """Yield a model's name that can be none."""
    said = f"'{key}' is {name!r}"
    if name.startswith("hub:"):
        yield Finding(key, said, f"Write a model on the hub without `hub:`: {name.removeprefix('hub:')}.")
    elif name.startswith("builtin:"):
        if not name.removeprefix("builtin:").strip():
            yield Finding(key, f"{said}, without a name", "Write builtin:NAME.")
    elif not is_local(name, places.folder(key)) and not HUB_NAME.fullmatch(name):
        fix = f"There is no such folder in {places.folder(key)}, and a model on the hub is called `owner/name`."
        yield Finding(key, said, fix)


def adapter_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield adapter settings that the method, or the adapter to go on from, does not read."""
    adapter = recipe.adapter
    full = adapter.method == "full"
    for name in LORA_KEYS:
        key = f"adapter.{name}"
        if not places.stated(key) or getattr(adapter, name) is None:
            continue
        if full:
            yield idle(key, "with adapter.method: full", "Remove it, or use lora or qlora.", "adapter.method")
        elif adapter.start_from is not None and is_kept(name, places):
            fix = "Remove it (or set it to null): the adapter's own setting is kept."
            yield idle(key, "with adapter.start_from", fix, "adapter.start_from", "adapter.method")
    for name in QUANTIZATION_KEYS:
        if adapter.method != "qlora" and places.stated(f"adapter.{name}"):
            why = f"with adapter.method: {adapter.method}"
            yield idle(f"adapter.{name}", why, "Remove it, or use qlora.", "adapter.method")
    if full and adapter.start_from is not None:
        fix = "Name the run's `weights` folder as model.name."
        yield idle("adapter.start_from", "with adapter.method: full", fix, "adapter.method")
    if not full:
        yield from lora_findings(recipe)


def is_kept(name: str, places: Places) -> bool:
    """Whether a setting is the adapter's own when training goes on from one, and is not compared with it either."""
    if places.everything:
        return name != "lora_dropout"  # a default that is not stated gives way to the adapter's own
    if name in ("exclude_modules", "layers_to_transform"):
        return not places.stated("adapter.target_modules")
    return name in ("modules_to_save", "init_lora_weights")


def lora_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield combinations that PEFT does not do."""
    adapter = recipe.adapter
    start = adapter.init_lora_weights
    if adapter.method == "qlora" and isinstance(start, str) and start.startswith(("pissa", "olora")):
        what = f"'adapter.init_lora_weights' is '{start}', which needs weights that are not quantised"
        fix = "Use adapter.method: lora with it, or leave it out."
        yield Finding("adapter.init_lora_weights", what, fix, ("adapter.method",))
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(adapter, name)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                what = f"'adapter.{name}' has {pattern!r}, which is no regular expression: {error}"
                yield Finding(f"adapter.{name}", what, "For a name ending, write a list: [q_proj].")


def train_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield settings of the loop that others leave without effect, and features still to come."""
    train = recipe.train
    if train.batch_tokens is not None and places.stated("train.batch_size"):
        yield idle("train.batch_size", "beside train.batch_tokens", "Keep one of them.", "train.batch_tokens")
    if train.max_steps is not None and places.stated("train.num_train_epochs"):
        yield idle("train.num_train_epochs", "beside train.max_steps", "Keep one of them.", "train.max_steps")
    yield from validation_findings(recipe, places)
    yield from optimizer_findings(recipe, places)
    yield from schedule_findings(recipe, places)
    yield from seed_findings(recipe)
    if len(set(train.report_to)) < len(train.report_to):
        yield Finding("train.report_to", "'train.report_to' names a tracker twice", "Name each once.")


def seed_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield seeds that would train the same again."""
    key, seeds = "train.seeds", recipe.train.seeds
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        yield Finding(key, f"'{key}' names a seed twice: {', '.join(map(str, twice))}", "Name each once.")
    if recipe.seed in seeds:
        fix = f"Remove it: these are further seeds, and the run trains with 'seed' ({recipe.seed}) as always."
        yield Finding(key, f"'{key}' names the recipe's own seed, {recipe.seed}, again", fix, ("seed",))


def validation_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield settings that need validation rows where there are none."""
    train = recipe.train
    if not has_rows(recipe.data.validation):
        wanted = {
            "eval_steps": train.eval_steps is not None,
            "early_stopping_patience": train.early_stopping_patience is not None,
            "early_stopping_threshold": True,
            "load_best_model_at_end": train.load_best_model_at_end,
        }
        for name, is_on in wanted.items():
            if is_on and places.stated(f"train.{name}"):
                fix = "Give data.validation a share of the rows or sources, or remove it."
                yield idle(f"train.{name}", "without validation rows", fix, "data.validation")
    elif train.early_stopping_patience is None and places.stated("train.early_stopping_threshold"):
        fix = "Set train.early_stopping_patience too, or remove it."
        yield idle("train.early_stopping_threshold", "without a patience", fix, "train.early_stopping_patience")


def optimizer_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield settings that the optimiser, or what it trains, does not read."""
    optim = recipe.train.optim
    if recipe.adapter.method == "full" and recipe.train.loraplus_lr_ratio is not None:
        fix = "Remove it, or use lora or qlora."
        yield idle("train.loraplus_lr_ratio", "with adapter.method: full", fix, "adapter.method")
    readers = {"adam_beta1": BETAS, "adam_beta2": BETAS, "adam_epsilon": EPSILON}
    for name, beginnings in readers.items():
        if not optim.startswith(beginnings) and places.stated(f"train.{name}"):
            yield idle(f"train.{name}", f"with train.optim: {optim}", "Remove it, or use an Adam.", "train.optim")


def schedule_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield options that the schedule does not have, or lacks."""
    train = recipe.train
    schedule, options = train.lr_scheduler_type, train.lr_scheduler_kwargs
    known = SCHEDULE_OPTIONS[schedule]
    key = "train.lr_scheduler_kwargs"
    for name in options:
        if name not in known:
            fix = f"{nearest(name, known)} Options of {schedule}: {', '.join(known) or 'none'}.".strip()
            yield idle(f"{key}.{name}", f"with train.lr_scheduler_type: {schedule}", fix, "train.lr_scheduler_type")
    if schedule == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & set(options)) != 1:
        fix = "Give one of them, e.g. lr_scheduler_kwargs: {min_lr_rate: 0.1}."
        yield Finding(key, f"{schedule} needs either min_lr or min_lr_rate", fix, ("train.lr_scheduler_type",))
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in options:
        fix = "Write e.g. lr_scheduler_kwargs: {num_decay_steps: 100}."
        yield Finding(key, f"{schedule} needs num_decay_steps", fix, ("train.lr_scheduler_type",))
    if schedule == "constant" and train.warmup_steps and places.stated("train.warmup_steps"):
        fix = "Use constant_with_warmup, or remove it."
        yield idle("train.warmup_steps", "with train.lr_scheduler_type: constant", fix, "train.lr_scheduler_type")
    if train.warmup_steps >= 1 and not train.warmup_steps.is_integer():
        what = f"'train.warmup_steps' is {train.warmup_steps:g}"
        yield Finding("train.warmup_steps", what, "Below 1 it is a share of all steps, else a whole number of steps.")
