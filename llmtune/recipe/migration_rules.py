"""Applies a rule of `migrations/TOOL.yaml` to one key of another tool's configuration.

A rule is a llmtune key, or a mapping. "Our" means llmtune's:

- `to` or `times`: our key gets the value, or is multiplied by it; `positive`: why a number below 1 has no meaning;
- `values`: by value (`*` matches anything), our value, `{our key: value}` or `{refuse: reason}`; `{}` is our default;
- `refuse`: the reason to refuse every other value; `unneeded`: why the key changes nothing; `why`: a note on it;
- `look`: a line for the user if a value of `values` matches;
- `packs`: a step of the other tool counts packed sequences if this is true;
- `each`: a key to set on every source;
- `list`: our key for a list, its items renamed by `rename`;
- `source`, `column`: a key or a column of a source, by task in `of_task`; `append`: our list to append the value to;
- `sources`: a list of sources, with its own rules; `listing`: the key with the folder of LLaMA-Factory's
  dataset_info.json, in which their names are looked up;
- `split_of`: a split of the same data set;
- `path`: a `model` or `file`, resolved against the recipe; `then`: further keys to set; `replaces`, `replaced`: which
  of two values wins.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from llmtune.errors import nearest
from llmtune.recipe.data_section import Source
from llmtune.recipe.foreign_config import ForeignConfig, MigrationTable, mapping
from llmtune.recipe.secrets import REMOVED, holds_secret, redact
from llmtune.recipe.yaml_writer import scalar

OutcomeState = Literal["carried", "renamed", "not needed", "refused"]
SOURCE_PATH = re.compile(r"data\.(?:train|validation)\.\d+\.path")
VARIABLE = re.compile(r"\S*\$[A-Za-z_{(]")
NO_SECRETS = "recipes must not contain secrets: log in, or set an environment variable"
NO_EFFECT = "has no effect"
UNKNOWN = "llmtune does not know this key of the tool"
UNLISTED = "dataset_info.json does not list it with a file or a hub name: write its path"
FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
WIDEST = 60


@dataclass(frozen=True)
class Moved:
    """The outcome of one key of the other tool."""

    key: str
    value: object
    state: OutcomeState
    to: tuple[str, ...] = ()
    why: str | None = None

    @property
    def shown(self) -> str:
        """Return the key with its value on one line, without secrets."""
        text = REMOVED if holds_secret(self.key, self.value) else scalar(self.value)
        return f"{redact(self.key)}: {text if len(text) <= WIDEST else text[: WIDEST - 3] + '...'}"


@dataclass
class Setting:
    """The value of one llmtune key, and the keys it comes from."""

    value: object
    keys: list[str]
    replaced: bool = False


@dataclass
class Migration:
    """A recipe under construction, and the outcome of each key so far."""

    config: ForeignConfig
    folder: Path
    """Where the recipe will be written."""
    settings: dict[str, Setting] = field(default_factory=dict)
    moved: dict[str, Moved] = field(default_factory=dict)
    looks: dict[str, None] = field(default_factory=dict)
    """Lines for the user to check, in order."""
    packed: bool = False
    """Whether a step of the other tool counts packed sequences."""
    stated: frozenset[str] = frozenset()
    """llmtune keys that the configuration sets; they override the tool's defaults, which come later."""

    @property
    def outcomes(self) -> list[Moved]:
        """Return the outcomes of the configuration's keys, in its order."""
        return [*self.moved.values()]

    @property
    def unset(self) -> list[str]:
        """Return the llmtune keys that the user has to set, since the configuration does not."""
        return [ours for ours, one in self.settings.items() if any(key.startswith("SET:") for key in one.keys)]

    def settle(
        self, key: str, value: object, why: str | None = None, *, to: Sequence[str] = (), ok: bool = True
    ) -> None:
        """Record that a key is carried or renamed, or refused unless `ok`."""
        tail = [name.rpartition(".")[2] for name in to]
        same = tail == [key.rpartition(".")[2]] or (ok and not to)
        self.moved[key] = Moved(
            key, value, "carried" if ok and same else "renamed" if ok else "refused", tuple(to), why
        )

    def put(self, ours: str, value: object, key: str, rule: Mapping[str, Any]) -> str | None:
        """Set a llmtune key; return the reason if that fails. Named rows override a share of the rows."""
        if below := [key for one, old in self.settings.items() if one.startswith(f"{ours}.") for key in old.keys]:
            return f"{', '.join(dict.fromkeys(below))} already names the rows of {ours}"
        for parent in [one for one in self.settings if ours.startswith(f"{one}.")]:
            self.take_out(parent, f"{key} names the rows of {parent}")
        old, replaces = self.settings.get(ours), rule.get("replaces", ())
        if ours in self.stated and replaces != "any":
            return None
        wins = old is not None and (old.replaced or replaces == "any" or old.value in replaces)
        if old is not None and not wins and old.value != value:
            if rule.get("replaced"):
                return None
            return f"{', '.join(old.keys)} already sets {ours} to {scalar(old.value)}"
        keys = [*(old.keys if old and old.value == value else []), key]
        self.settings[ours] = Setting(value, keys, bool(rule.get("replaced")))
        return None

    def take_out(self, where: str, why: str) -> bool:
        """Remove the llmtune keys at and below `where`, for the reason `why`; return whether any existed.

        Their original keys become refused, or not needed if they have no effect.
        """
        matches = [ours for ours in self.settings if ours == where or ours.startswith(f"{where}.")]
        for ours in matches:
            setting = self.settings.pop(ours)
            for key in setting.keys:
                if key in self.moved:
                    kept = tuple(name for name in self.moved[key].to if name != ours)
                    state: OutcomeState = "not needed" if NO_EFFECT in why else "refused"
                    if kept:  # other llmtune keys from this key remain
                        self.moved[key] = replace(self.moved[key], to=kept)
                        part = f"{key} ({ours})"
                        self.moved[part] = Moved(part, setting.value, state, (), why)
                    else:
                        self.moved[key] = replace(self.moved[key], state=state, to=(), why=why)
        return bool(matches)


def move(migration: Migration, key: str, value: object) -> None:
    """Apply the rule for a key; refuse unknown keys."""
    rule = migration.config.table.find(key)
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, str) and VARIABLE.match(first):
        migration.settle(key, value, "it is a variable with unknown value: write the value", ok=False)
        return
    newer = migration.config.table.older.get(key)
    if newer in migration.config.values:
        migration.settle(key, value, f"{newer} is the newer name of this key, and is set too", ok=False)
        return
    if rule is None:
        hint = nearest(key, list(migration.config.table.rules)).strip()
        why = NO_SECRETS if holds_secret(key, value) else f"{UNKNOWN}. {hint}".strip()
        migration.settle(key, value, why, ok=False)
        return
    apply_rule(migration, key, value, rule, "data.train.0")


def apply_rule(migration: Migration, key: str, value: object, rule: Mapping[str, Any], source: str) -> None:
    """Apply a rule to the value of a key; `source` is the llmtune key for keys of a source."""
    if "sources" not in rule and holds_secret(key, value):
        migration.settle(key, value, rule.get("refuse", NO_SECRETS), ok=False)
        return
    if isinstance(value, list) and len(value) == 1 and not rule.keys() & {"list", "sources"}:
        value = value[0] if _rule_of_value(rule.get("values", {}), value) is None else value
    if "unneeded" in rule:
        migration.moved[key] = Moved(key, value, "not needed", (), rule["unneeded"])
        return
    named = _rule_of_value(rule.get("values", {}), value)
    if isinstance(named, Mapping) and "look" in named:
        migration.looks[named["look"]] = None
        named = {name: one for name, one in named.items() if name != "look"}
    if named == {}:
        migration.settle(key, value, rule.get("why", "same as the default"))
        return
    if named is None and value is None:
        migration.settle(key, value, "it is null")
        return
    migration.packed |= bool(rule.get("packs")) and value is True
    if isinstance(named, Mapping):
        if "refuse" in named:
            migration.settle(key, value, named["refuse"], ok=False)
        else:
            _put_all(migration, key, value, named, rule, source)
        return
    if named is None and "refuse" in rule:
        migration.settle(key, value, rule["refuse"], ok=False)
        return
    value_there, value = value, value if named is None else named
    if "positive" in rule and isinstance(value, int | float) and value <= 0:
        migration.settle(key, value, rule["positive"])
        return
    targets = _targets(migration, key, value, rule, source)
    if isinstance(targets, str):
        migration.settle(key, value_there, targets, ok=False)
    else:
        _put_all(migration, key, value_there, {**targets, **rule.get("then", {})}, rule, source)


def _targets(
    migration: Migration, key: str, value: Any, rule: Mapping[str, Any], source: str
) -> dict[str, object] | str:
    """Return llmtune keys with values, or the reason to refuse the key."""
    if "times" in rule:
        ours, old = rule["times"], migration.settings.get(rule["times"])
        if not isinstance(value, int):
            return f"it is {scalar(value)}, not a number of rows"
        if old is not None and isinstance(old.value, int):
            old.value *= value
            value = old.value
        return {ours: value}
    if "list" in rule:
        items = value if isinstance(value, list) else [item for item in re.split(r"[,\s]+", str(value)) if item]
        if not all(isinstance(item, str) for item in items):
            return f"it is {scalar(value)}, not a list of names"
        items = [renamed for item in items if (renamed := rule.get("rename", {}).get(item, item)) is not None]
        return {rule["list"]: "all-linear" if items in (["all-linear"], ["all"]) else items} if items else {}
    if "sources" in rule:
        return _move_sources(migration, key, value, rule)
    if "split_of" in rule:
        path = migration.settings.get("data.train.0.path")
        if path is None or not str(path.value).startswith("hub:"):
            return "files have no splits: set data.validation to a file"
        return {f"{rule['split_of']}.0.path": path.value, f"{rule['split_of']}.0.split": value}
    if "column" in rule:
        task = migration.settings.get("task")
        ours = rule.get("of_task", {}).get(task.value if task else None, rule["column"])
        return {} if value == ours else {f"{source}.columns.{ours}": value}
    if "append" in rule:
        old = migration.settings.get(rule["append"])
        names = old.value if old is not None and isinstance(old.value, list) else []
        return {rule["append"]: names if value in names else [*names, value]}
    if "each" in rule:
        return _each(migration, value, rule["each"])
    if "source" in rule:
        return _source_key(migration, value, rule["source"], source)
    if "to" not in rule:
        return f"known values: {', '.join(rule.get('values', {})) or 'none'}"
    if rule.get("path"):
        return {rule["to"]: _local(migration, str(value)) or value}
    return {rule["to"]: value}


def _rule_of_value(values: Mapping[str, Any], value: object) -> Any:
    """Return the entry of a rule's `values` for a value, by its text, or None."""
    text = scalar(value).strip('"').lower() if not isinstance(value, str) else value.lower()
    if text in values:
        return values[text]
    return next((values[name] for name in values if "*" in name and fnmatchcase(text, name)), None)


def _put_all(
    migration: Migration, key: str, value: object, targets: Mapping[str, Any], rule: Mapping[str, Any], source: str
) -> None:
    named = {f"{source}.{ours}" if ours in Source.model_fields else ours: one for ours, one in targets.items()}
    multiplied = {"replaces": "any"} if rule.keys() & {"times", "each", "append"} else {}
    if any(holds_secret(ours, one) for ours, one in named.items()):
        migration.settle(key, value, NO_SECRETS, ok=False)
        return
    for ours, one in named.items():
        if problem := migration.put(ours, one, key, {**rule, **multiplied}):
            migration.settle(key, value, problem, ok=False)
            return
    if "sources" in rule:
        migration.settle(key, value, to=[rule["sources"]])
    else:
        migration.settle(key, value, rule.get("why") if named else "same as the default", to=list(named))


def _move_sources(migration: Migration, parent: str, value: Any, rule: Mapping[str, Any]) -> dict[str, object] | str:
    """Migrate each source of a list with the rule's own table, and record the outcome of each of its keys."""
    inner, number = MigrationTable.from_mapping(rule), -1
    entries = value if isinstance(value, list) else [value]
    if "listing" in rule:
        if not all(isinstance(name, str | int) for name in entries):
            return "write data set names, separated by commas"
        folder = str(migration.config.values.get(rule["listing"], "data"))
        entries = _look_up(migration, ",".join(map(str, entries)), folder)
    for index, entry in enumerate(entries):
        keys = entry if isinstance(entry, dict) else {"path": entry}
        paths = [name for name in keys if (inner.find(name) or {}).get("source") == "path"]
        if "listing" in rule and not paths:
            migration.settle(f"{parent}[{index}]", keys.get("name", entry), UNLISTED, ok=False)
            continue
        files = next((name for name in paths if isinstance(keys[name], list)), None)
        for file in keys[files] if files else [None]:  # each file becomes its own source
            number += 1
            for key, item in (keys | ({files: file} if files else {})).items():
                for name, one in inner.flatten({key: item}):
                    key_rule = inner.find(name)
                    if key_rule is None and one is not None:
                        migration.settle(f"{parent}[{index}].{name}", one, UNKNOWN, ok=False)
                    elif key_rule is not None:
                        apply_rule(migration, f"{parent}[{index}].{name}", one, key_rule, f"{rule['sources']}.{number}")
    return {} if number >= 0 else "it names no known rows"


def _look_up(migration: Migration, names: str, folder: str) -> list[Any]:
    """Return the entries of LLaMA-Factory's dataset_info.json by name; `owner/name` is a hub data set."""
    places = [base / folder / "dataset_info.json" for base in (Path.cwd(), migration.config.folder)]
    listing = next((file for file in places if file.is_file()), None)
    listed = mapping(listing) if listing else {}
    entries: list[Any] = []
    for name in (part for one in names.split(",") if (part := one.strip())):
        entry = listed.get(name)
        if isinstance(entry, dict) and listing is not None and "file_name" in entry:
            entry = {**entry, "file_name": str(listing.parent.absolute() / str(entry["file_name"]))}
        entries.append(entry if isinstance(entry, dict) else {"path": name} if "/" in name else {"name": name})
    return entries


def _each(migration: Migration, value: Any, name: str) -> dict[str, object] | str:
    """Return the key for every source; if a source already has a number, the lower one wins."""
    sources = [ours.removesuffix(".path") for ours in migration.settings if SOURCE_PATH.fullmatch(ours)]
    if not sources or type(value) is not int:
        return f"set `{name}`, a number of rows, in each source"
    stated = {source: migration.settings.get(f"{source}.{name}") for source in sources}
    return {
        f"{source}.{name}": min(value, old.value) if old is not None and isinstance(old.value, int) else value
        for source, old in stated.items()
    }


def _source_key(migration: Migration, value: Any, name: str, source: str) -> dict[str, object] | str:
    """Return the key of a source; a path that does not exist locally is a hub data set."""
    if name != "path":
        return {f"{source}.{name}": value}
    if not isinstance(value, str):
        return "name each file as `path` of a source"
    if value in ("json", "csv", "parquet", "text"):  # another key names the files
        return {}
    path, local = value, _local(migration, value)
    looks_local = path.startswith((".", "/", "~")) or path.lower().endswith(FILES)
    old = migration.settings.get(f"{source}.path")
    if old is not None and looks_local and str(old.value).startswith("hub:") and local is None:
        return f"{path} is a file of {old.value}: download it, or name only the data set"
    if old is not None and local is not None:
        migration.settings.pop(f"{source}.path")
    if local is None and "://" in path:
        local = path
    elif local is None and looks_local:
        local = os.path.relpath(os.path.expanduser(path), migration.folder)
    if local is None and "/" not in path:
        return f"{path} is neither a local file nor a hub data set OWNER/NAME: write its path"
    return {f"{source}.path": local or f"hub:{path}"}


def _local(migration: Migration, path: str) -> str | None:
    """Return an existing path relative to the recipe; search the working folder and the configuration's folder."""
    for folder in (Path.cwd(), migration.config.folder):
        there = folder / os.path.expanduser(path)
        if path and os.path.exists(there):
            relative = os.path.relpath(there, migration.folder)
            return relative if relative.startswith("..") else f"./{relative}"
    return None
