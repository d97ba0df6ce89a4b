"""Migrates another tool's configuration: each key is carried over, renamed, not needed, or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.errors import RecipeError
from llmtune.recipe.foreign_config import ForeignConfig, read_first_row
from llmtune.recipe.loader import LoadedRecipe, resolve_recipe
from llmtune.recipe.migration_rules import Migration, Setting, apply_rule, move
from llmtune.recipe.schema import Recipe
from llmtune.recipe.secrets import redact
from llmtune.recipe.task_facts import DEFAULT_TASK, TASK_FACTS
from llmtune.recipe.yaml_reader import Node
from llmtune.recipe.yaml_writer import scalar

HELD_OUT: dict[str, tuple[object, str]] = {
    "data.validation": (0.05, "llmtune's own: a loss on held-out rows; that tool holds out none, as 0 does"),
    "data.test": (0.1, "llmtune's own: measures the effect of tuning; that tool holds out no rows, as 0 does"),
    "data.deduplicate": ("none", "that tool trains on duplicates; near keeps one of each"),
}
"""Recipe keys that other tools lack: the value to state, and a note."""
REQUIRED = {
    "task": (DEFAULT_TASK, "SET: the task"),
    "data.train": ("rows.jsonl", "SET: the rows"),
    "model.name": ("owner/model", "SET: the model"),
}
"""Required keys, each with a placeholder and a note for the user."""


def migrate_config(
    file: Path, out: Path, tool: str | None = None, task: str | None = None
) -> tuple[Migration, LoadedRecipe]:
    """Migrate a configuration to a recipe for `out`; return the outcome of each key, and the recipe.

    Raises RecipeError if the file cannot be read, no known tool matches, or no valid recipe is possible.
    """
    config = ForeignConfig.read(file, tool)
    table, migration = config.table, Migration(config, out.absolute().parent)
    if task is not None:
        migration.settings["task"] = Setting(task, ["--task"])
    for ours, value in config.facts.items():
        migration.settings.setdefault(ours, Setting(value, ["the command"]))
    for key, value in config.values.items():  # keys that decide the task come first
        if '"task"' in json.dumps(table.find(key)):
            move(migration, key, value)
    for ours, value in (fact for key, facts in table.guesses.items() if key in config.values for fact in facts.items()):
        migration.settings.setdefault(ours, Setting(value, []))
    _look_at_rows(migration)
    for key, value in sorted(
        config.values.items(), key=lambda item: bool({"each", "split_of"} & {*(table.find(item[0]) or ())})
    ):
        if key not in migration.moved:
            move(migration, key, value)
    _look_at_rows(migration)
    _state_defaults(migration)
    _count_tokens(migration)
    loaded = _check(migration, out)
    if config.others:
        migration.looks[f"only the first of {config.others + 1} commands is migrated; give each its own file"] = None
    chosen = {ours: one.keys for ours, one in migration.settings.items() if not {*one.keys} & {*config.values}}
    migration.looks |= dict.fromkeys(
        [*table.decide, *(line for ours, line in table.unstated.items() if ours in chosen)]
    )
    return migration, loaded


def _look_at_rows(migration: Migration) -> None:
    """Set keys by the columns of a local file's first row if nothing else has set them."""
    path = migration.settings.get("data.train.0.path")
    row = read_first_row(migration.folder / str(path.value)) if path else {}
    for name, facts in migration.config.table.columns.items():
        column, _, messages = name.partition(" ")
        if column in row and (not messages or isinstance(row[column], list)):
            for ours, value in facts.items():
                migration.settings.setdefault(ours, Setting(value, [f"the column {column}"]))
            return


def _state_defaults(migration: Migration) -> None:
    """Set the other tool's defaults for keys that its configuration does not state."""
    table, config = migration.config.table, migration.config
    guess, mark = REQUIRED["task"]
    task = migration.settings.setdefault("task", Setting(guess, [mark])).value
    migration.stated = frozenset(migration.settings)
    loss = migration.settings.get("preference.loss")
    defaults = dict(table.defaults)
    for kind in (str(task), str(loss.value) if loss else ""):
        defaults |= table.task_defaults.get(kind, {})
    by = f"{table.tool}'s default"
    factors = {rule["times"] for rule in table.rules.values() if "times" in rule}
    names = {key for key in config.values if "times" in (table.find(key) or ())}
    is_product = not factors & migration.stated or bool(names)
    for key, value in defaults.items():
        rule = table.find(key)
        if rule is None or _is_stated(config, key, rule) or ("times" in rule and not is_product):
            continue
        if isinstance(value, Mapping):
            once = migration.settings.get(value["twice"])
            value = 2 * once.value if once is not None and isinstance(once.value, int) else None
        before = dict(migration.settings)
        apply_rule(migration, by, value, rule, "data.train.0")
        migration.moved.pop(by, None)
        overridden = [one for ours, one in before.items() if migration.settings.get(ours) is not one]
        for name in {name for one in overridden for name in one.keys} if rule.get("replaces") == "any" else ():
            if name in migration.moved:
                why = f"{by}, {key}, overrides it"
                migration.moved[name] = replace(migration.moved[name], state="not needed", to=(), why=why)
    always = {**table.always, **table.task_always.get(str(task), {})}
    for ours, (value, why) in (HELD_OUT | {ours: (value, by) for ours, value in always.items()}).items():
        if not any(one == ours or one.startswith(f"{ours}.") for one in migration.settings):
            migration.settings[ours] = Setting(value, [why])


def _is_stated(config: ForeignConfig, key: str, rule: Mapping[str, Any]) -> bool:
    """Return whether a configuration states a key by any of its names; null counts if a rule gives it a meaning."""
    names = (key, *(older for older, newer in config.table.older.items() if newer == key))
    values = [config.values[name] for name in names if name in config.values]
    return any(value is not None or "null" in rule.get("values", {}) for value in values)


def _count_tokens(migration: Migration) -> None:
    """If the other tool counts packed sequences per step, set the equivalent number of tokens."""
    rows, length = (migration.settings.get(ours) for ours in ("train.batch_size", "data.max_length"))
    packing, task = migration.settings.get("data.packing"), migration.settings["task"].value
    if not migration.packed or packing is None or packing.value is not True or not TASK_FACTS[str(task)].splits_text:
        return
    if rows is None or length is None or type(rows.value) is not int or type(length.value) is not int:
        return
    del migration.settings["train.batch_size"]
    migration.settings["train.batch_tokens"] = Setting(rows.value * length.value, [*rows.keys, *length.keys])
    for key in rows.keys:
        if key in migration.moved:
            migration.settle(key, migration.moved[key].value, to=["train.batch_tokens"])


def _check(migration: Migration, out: Path) -> LoadedRecipe:
    """Remove every key that the recipe check refuses, noting the reason, until the recipe is valid."""
    while True:
        for ours, (value, what) in REQUIRED.items():
            if not any(one == ours or one.startswith(f"{ours}.") for one in migration.settings):
                first = f"{ours}.0.path" if ours == "data.train" else ours
                migration.settings[first] = Setting(value, [what])
        try:
            return resolve_recipe(_node(nested(migration.settings), "", migration.folder), out)
        except RecipeError as error:
            refused = [
                migration.take_out(str(problem.where), f"{problem.what}. {problem.fix or ''}".strip())
                for problem in error.problems
            ]
            if not any(refused):
                raise


def nested(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Nest dotted keys; list items keep their index as key."""
    root: dict[str, Any] = {}
    for ours, setting in settings.items():
        here = root
        *parents, last = ours.split(".")
        for name in parents:
            here = here.setdefault(name, {})
        here[last] = setting
    return root


def _node(value: Any, key: str, folder: Path) -> Node:
    """Return a node whose origin is its key; problems then name the key."""
    if isinstance(value, Setting):
        return _plain_value(value.value, key, folder)
    items = {name: _node(inner, f"{key}.{name}".lstrip("."), folder) for name, inner in value.items()}
    if items and all(name.isdigit() for name in items):
        return Node([items[name] for name in sorted(items, key=int)], key, folder)
    return Node(items, key, folder)


def _plain_value(value: Any, key: str, folder: Path) -> Node:
    if isinstance(value, list):
        return Node([_plain_value(item, key, folder) for item in value], key, folder)
    if isinstance(value, dict):
        return Node({str(name): _plain_value(item, key, folder) for name, item in value.items()}, key, folder)
    return Node(value, key, folder)


# As YAML


def write_migrated(migration: Migration) -> str:
    """Return the text of the recipe, with comments."""
    config = migration.config
    tree = nested(migration.settings)
    first = f"# Migrated from {config.label} ({config.table.tool}). The comment after a value is its original key."
    lines = [first, "recipe_version: 1"]
    for name in Recipe.model_fields:
        if name in tree:
            lines += _lines(name, tree[name], "")
    refused = [one for one in migration.outcomes if one.state == "refused"]
    unneeded = [one for one in migration.outcomes if one.state == "not needed"]
    same = [one.key for one in migration.outcomes if one.state == "carried" and not one.to]
    lines += ["", "# Not carried over:" if refused else "# All relevant keys are carried over."]
    lines += [f"#   {one.shown}: {one.why}" for one in refused]
    lines += ["# Not needed:"] if unneeded else []
    lines += [f"#   {one.shown}: {one.why}" for one in unneeded]
    lines += [f"# Same as llmtune's default: {', '.join(same)}."] if same else []
    lines += [f"# Check: {line}." for line in migration.looks]
    return redact("".join(f"{''.join(c if c.isprintable() else '?' for c in line)}\n" for line in lines))


def _lines(name: str, value: Setting | Mapping[str, Any], indent: str) -> Iterator[str]:
    if isinstance(value, Setting):
        note = f"  # {', '.join(dict.fromkeys(value.keys))}" if value.keys else ""
        yield f"{indent}{scalar(name)}: {scalar(value.value)}{note}"
        return
    yield f"{indent}{scalar(name)}:"
    if value and all(key.isdigit() for key in value):
        for item in value.values():
            first, *others = [line for key, inner in item.items() for line in _lines(key, inner, f"{indent}    ")]
            yield f"{indent}  - {first.lstrip()}"
            yield from others
    else:
        for key, inner in value.items():
            yield from _lines(key, inner, f"{indent}  ")
