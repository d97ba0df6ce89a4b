"""Checks a recipe against schema and rules, and reports all problems at once in plain words."""

from __future__ import annotations

import json
import typing
from collections.abc import Collection, Iterable, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmtune.errors import Problem, RecipeError, nearest, read_origin
from llmtune.recipe.peft_options import options_of, readers_of
from llmtune.recipe.retired import RETIRED, retired_problem
from llmtune.recipe.schema import Recipe
from llmtune.recipe.section import BRANCHES, RecipeSection, descriptions, find_section, is_section
from llmtune.recipe.source_map import Diagnostics, Key, SourceMap, dotted
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.undecided import list_undecided
from llmtune.recipe.yaml_reader import Node

THREADS = "Remove it: llmtune uses all cores, or the number given with `--threads`."
_HINTS = {
    "Use 'train.batch_size': rows per step over all processes.": ("per_device_train_batch_size", "train_batch_size"),
    "Remove it: evaluation chooses its own batch size.": ("per_device_eval_batch_size",),
    "Use 'train.batch_size'; the memory decides the size of micro-batches.": ("micro_batch_size",),
    "Use 'train.batch_size'; the memory decides the number of accumulation steps.": ("gradient_accumulation_steps",),
    "Use 'train.num_train_epochs'.": ("epochs", "num_epochs"),
    "Use 'train.learning_rate'.": ("lr",),
    "Use 'train.lr_scheduler_type'.": ("lr_scheduler", "scheduler"),
    "Use 'train.optim'.": ("optimizer",),
    "Use 'train.warmup_steps': below 1 it is a share of all steps.": ("warmup_ratio",),
    "Use 'train.max_grad_norm'.": ("grad_clip",),
    "Use 'model.dtype: bfloat16'.": ("bf16",),
    "Use 'model.dtype: float16'.": ("fp16",),
    "Use 'model.dtype'.": ("torch_dtype",),
    "Use 'adapter.method: qlora'.": ("load_in_4bit", "quantization"),
    "Use 'model.name'.": ("model_name_or_path", "base_model"),
    "Use 'model.attn_implementation'.": ("attn", "attn_impl", "flash_attention"),
    "Use 'adapter.r'.": ("lora_r", "rank", "lora_rank"),
    "Use 'adapter.lora_alpha'.": ("alpha",),
    "Use 'adapter.lora_dropout'.": ("dropout",),
    "Use 'adapter.target_modules'.": ("lora_target", "lora_target_modules"),
    "Use 'adapter'.": ("lora", "peft"),
    "Use 'train'.": ("training", "trainer"),
    "Use 'data'.": ("dataset",),
    "Use 'data.train': a source or a list of them.": ("datasets",),
    "Put it in a source: `train: {path: rows.csv, columns: {prompt: question, completion: answer}}`.": (
        "columns",
        "encoding",
        "format",
        "path",
    ),
    "Use 'data.train'.": ("train_file",),
    "Use 'data.validation'.": ("val_set_size", "val_size"),
    "Use 'data.max_length'.": ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len"),
    "Use 'data.packing'.": ("sample_packing", "group_by_length", "length_column_name"),
    "Remove it: 'seed' decides the order of rows.": ("shuffle",),
    THREADS: ("num_proc", "dataset_num_proc", "preprocessing_num_workers", "dataloader_num_workers"),
    "Use 'train.eval_steps'.": ("evaluation_strategy", "eval_strategy"),
    "Use 'train.save_steps'.": ("save_strategy",),
    "Use 'data.train_on': assistant, last or all.": ("train_on_inputs", "assistant_only_loss"),
    "Use `llmtune deploy publish RUN` after the run.": ("push_to_hub", "hub_model_id"),
    "Recipes do not say where to run: see `llmtune launch local --help`.": ("deepspeed", "fsdp", "local_rank"),
    "Recipes do not say where to run: use the option `--out`.": ("output_dir",),
    "Recipes do not say where to run: use `llmtune launch local --processes N`.": ("num_processes",),
    "Recipes do not say where to run: llmtune picks the device.": ("device",),
    "Keep tokens out of a recipe: log in, or set HF_TOKEN.": ("hub_token", "token"),
}
ALIASES = {name: hint for hint, names in _HINTS.items() for name in names}
"""Keys of other tools -> the key to use instead."""


def unknown_key(key: Key, source_map: SourceMap, others: Collection[str] = ()) -> Problem:
    """Return the problem of an unknown key, with the nearest key and all allowed keys including `others`."""
    if dotted(key) in RETIRED:
        return retired_problem(dotted(key), source_map.where(key))
    *parents, last = [step for step in key if step not in BRANCHES]
    name = str(last)
    section = section_at(parents)
    allowed = sorted({*section.model_fields, *others}) if section else []
    elsewhere = [path for path in key_paths() if path.rpartition(".")[2] == name]
    if name in ALIASES:
        return Problem(f"unknown key '{dotted(key)}'", source_map.where(key), ALIASES[name])
    hint = f" Did you mean '{elsewhere[0]}'?" if elsewhere else nearest(name, allowed)
    if not parents:
        allowed.append("extends")
    fix = f"{hint} Allowed here: {', '.join(allowed)}.".strip()
    return Problem(f"unknown key '{dotted(key)}'", source_map.where(key), fix)


def section_at(key: Key) -> type[RecipeSection] | None:
    """Return the section at a key path, or None."""
    section: type[RecipeSection] | None = Recipe
    for step in key:
        if step not in BRANCHES and not isinstance(step, int):
            field = section.model_fields.get(step) if section else None
            section = find_section(field.annotation) if field else None
    return section


def key_paths(section: type[RecipeSection] = Recipe, prefix: str = "") -> list[str]:
    """List the dotted paths of all keys of the schema."""
    paths: list[str] = []
    for key, field in section.model_fields.items():
        paths.append(f"{prefix}{key}")
        inner = field.annotation
        if is_section(inner):
            paths.extend(key_paths(inner, f"{prefix}{key}."))
    return paths


PLACEHOLDERS: dict[str, object] = {
    "task": next(iter(TASK_FACTS)),
    "data": {"train": "rows.jsonl"},
    "model": {"name": "model"},
}
"""Values for missing or wrong keys, to check the rest of the recipe in the same pass."""
TYPES = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "a smaller integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping (`key: value`)",
    "model_type": "a mapping (`key: value`)",
}
VARIANTS = {
    **{name: f"Write `method: lora` and `use_{name}: true`." for name in ("dora", "rslora")},
    **{name: f"Write `method: lora` and `init_lora_weights: {name}`." for name in ("pissa", "eva", "corda", "olora")},
}
"""LoRA variants that are methods in other tools."""
RANGES = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
PATTERNS = {
    "model.attn_implementation": "Name a kernel `owner/name`, optionally followed by `@revision` or `:function`.",
    "name": "Use up to 64 letters, digits, `.`, `-` and `_`, with a letter or digit first: it names a folder.",
    "adapter.init_lora_weights": "Allowed: true, false, gaussian, orthogonal, pissa, pissa_niter_N (N steps of "
    "a fast SVD), olora, eva, corda, lora_ga. LoftQ is not supported: it rounds base weights without saving them.",
}


def validate(root: Node, name: str) -> Recipe:
    """Return the recipe with paths as written; `name` is its default name.

    Raises RecipeError with every problem.
    """
    source_map = SourceMap(root)
    values = plain_values(root, Recipe)
    values.setdefault("name", name)
    undecided = dict(list_undecided(root))
    problems = [*undecided.values()]
    broken = replace_broken(values, undecided)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        keys, wrong = schema_problems(error.errors(include_url=False), source_map)
        problems += wrong
        broken |= replace_broken(values, keys)
        recipe = Recipe.model_validate(values)
    strangers = [name for name in recipe.adapter.model_extra or () if not readers_of(name)]
    problems += [unknown_key(("adapter", name), source_map, options_of(recipe.adapter.method)) for name in strangers]
    diagnostics = Diagnostics(source_map, broken)
    recipe.check(diagnostics)
    RecipeError.collect(sorted([*problems, *diagnostics.problems], key=file_and_line))
    return recipe


def plain_values(node: Node, section: type[RecipeSection]) -> dict[str, object]:
    """Return plain values, without nulls that mean the default value.

    Those are sections without keys, and nulls that reset a value of the extended recipe.
    """
    values: dict[str, object] = {}
    for key, item in node.value.items() if isinstance(node.value, dict) else ():
        field = section.model_fields.get(key)
        annotation = field.annotation if field else None
        inner = find_section(annotation)
        if is_section(annotation) and item.value is None:
            values[key] = {}
        elif inner is not None and isinstance(item.value, dict):
            values[key] = plain_values(item, inner)
        elif not (field and item.overrides and type(None) not in typing.get_args(annotation)):
            values[key] = item.plain()
    return values


def schema_problems(errors: Sequence[ErrorDetails], source_map: SourceMap) -> tuple[list[Key], list[Problem]]:
    """Convert pydantic's errors to problems, each with its key; skip errors that follow from another."""
    keys: list[Key] = []
    problems: list[Problem] = []
    for error in errors:
        key = error["loc"]
        has_inner = any(other["loc"][: len(key)] == key and len(other["loc"]) > len(key) for other in errors)
        if error["type"] == "too_short" and has_inner:
            continue
        keys.append(key)
        if error["type"] == "extra_forbidden":
            problems.append(unknown_key(key, source_map))
        elif error["type"] == "missing":
            problems.append(missing_key(key, source_map))
        else:
            problems.append(wrong_value(error, key, source_map))
    return keys, problems


def missing_key(key: Key, source_map: SourceMap) -> Problem:
    """Return the problem of a missing required key, with its description."""
    section = section_at(key[:-1])
    meaning = descriptions(section).get(str(key[-1]), "") if section else ""
    return Problem(f"the key '{dotted(key)}' is missing", source_map.where(key), meaning)


def wrong_value(error: ErrorDetails, key: Key, source_map: SourceMap) -> Problem:
    """Return the problem of a wrong value, from pydantic's error."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    name = dotted(key)
    what = f"'{name}' is {show_value(value)}"
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace("True", "true").replace("False", "false")
        hint = VARIANTS.get(str(value).casefold(), "") if dotted(key) == "adapter.method" else ""
        hint = hint or nearest(str(value), allowed.replace(" or ", ", ").split(", "))
        fix = f"{hint} Allowed: {allowed}.".strip()
    elif kind in TYPES:
        fix = f"It must be {TYPES[kind]}.{type_hint(kind, value)}"
    elif kind in RANGES:
        word, bound = RANGES[kind]
        fix = f"It must be {word} {context[bound]}."
    elif kind in ("string_too_short", "too_short"):
        what = what if value else f"'{name}' is empty"
        fix = f"Give at least {context['min_length']}, or remove the key."
    elif kind == "string_pattern_mismatch":
        fix = PATTERNS.get(name, f"It must match {context['pattern']}.")
    else:
        what, fix = f"{what}: {error['msg']}", "See `llmtune recipes schema` for allowed values."
    return Problem(what, source_map.where(key), fix)


def show_value(value: object) -> str:
    """Return a value as text, truncated to one line."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def type_hint(kind: str, value: object) -> str:
    """Return a hint if a string looks like a number or a boolean."""
    if not isinstance(value, str):
        return ""
    if kind.startswith(("int", "float")) and value.strip().replace(".", "", 1).replace(",", "", 1).isdigit():
        return " Write it without quotes, with a dot for decimals."
    if kind == "bool_type" and value.lower() in ("yes", "no", "on", "off"):
        return " In YAML 1.2 only `true` and `false` are booleans."
    return ""


def replace_broken(values: dict[str, object], keys: Iterable[Key]) -> set[str]:
    """Replace wrong values at `keys` in place with defaults or placeholders; return the replaced dotted keys."""
    broken: set[str] = set()
    for key in keys:
        top = str(key[0])
        section = values.get(top)
        if len(key) > 1 and isinstance(section, dict) and is_section(Recipe.model_fields[top].annotation):
            name = str(key[1])
            filler = {"train": "rows.jsonl"} if (top, name) == ("data", "train") else {}
            values[top] = {inner: value for inner, value in section.items() if inner != name} | filler
            broken.add(f"{top}.{name}")
        else:
            values.pop(top, None)
            if top in PLACEHOLDERS:
                values[top] = PLACEHOLDERS[top]
            broken.add(top)
    return broken


def file_and_line(problem: Problem) -> tuple[str, int]:
    """Sort problems by file, then by line."""
    file, line, _ = read_origin(problem.where or "")
    return file, line or 0
