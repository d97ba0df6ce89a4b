"""What a rule of `migrations/TOOL.yaml` makes of one key of another tool's configuration.

A rule is one of our keys, or a mapping:

- `to` or `times`: our key takes the value, or is multiplied with it; `positive`: why a number below 1 states nothing;
- `values`: by value (`*`: any letters), our value, or `{our key: value}`, or `{refuse: reason}`; `{}` is as here;
- `refuse`: the reason against every other value; `why`: what is to be said of it;
- `list`: our key takes a list, its items by `rename`;
- `source`, `column`: a key or a column of the rows; `sources`: a list of them, with rules of its own;
- `split_of`: a split of the same data set; `listing`: names in LLaMA-Factory's dataset_info.json;
- `path`: a `model` or `file`, seen from the recipe; `then`: what follows; `replaces`, `replaced`: who wins over whom.
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
from llmtune.recipe.foreign_config import ForeignConfig, Table, mapping
from llmtune.recipe.secrets import REMOVED, holds_secret, redact
from llmtune.recipe.yaml_writer import scalar

State = Literal["carried", "renamed", "refused"]
VARIABLE = re.compile(r"\S*\$[A-Za-z_{(]")
NO_SECRETS = "a recipe holds no secrets: log in, or set an environment variable"
UNKNOWN = "it is no key of this tool that llmtune knows"
FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
WIDEST = 60
TAGS = {
    *("role", "content", "user", "assistant", "system", "tool", "function"),
    *("from", "value", "human", "gpt", "observation", "function_call"),
}
"""What LLaMA-Factory's tags may be, that llmtune reads by itself."""


@dataclass(frozen=True)
class Moved:
    """What became of one key of the other tool."""

    key: str
    value: object
    state: State
    to: tuple[str, ...] = ()
    why: str | None = None

    @property
    def shown(self) -> str:
        """The key with its value, on one line; no secrets."""
        text = REMOVED if holds_secret(self.key, self.value) else scalar(self.value)
        return f"{redact(self.key)}: {text if len(text) <= WIDEST else text[: WIDEST - 3] + '...'}"


@dataclass
class Setting:
    """The value of one of our keys, and the keys that it comes from."""

    value: object
    keys: list[str]
    replaced: bool = False


@dataclass
class Migration:
    """A recipe in the making, and what became of the keys so far."""

    config: ForeignConfig
    folder: Path
    """Where the recipe will stand."""
    settings: dict[str, Setting] = field(default_factory=dict)
    moved: dict[str, Moved] = field(default_factory=dict)

    @property
    def outcomes(self) -> list[Moved]:
        """What became of the keys that the configuration states, in its order."""
        return [*self.moved.values()]

    @property
    def unset(self) -> list[str]:
        """Our keys that have to be set, since the configuration does not say them."""
        return [ours for ours, one in self.settings.items() if any(key.startswith("SET:") for key in one.keys)]

    def settle(
        self, key: str, value: object, why: str | None = None, *, to: Sequence[str] = (), ok: bool = True
    ) -> None:
        """Note what became of a key."""
        tail = [name.rpartition(".")[2] for name in to]
        same = tail == [key.rpartition(".")[2]] or (ok and not to)
        self.moved[key] = Moved(
            key, value, "carried" if ok and same else "renamed" if ok else "refused", tuple(to), why
        )

    def put(self, ours: str, value: object, key: str, rule: Mapping[str, Any]) -> str | None:
        """Set one of our keys; return why that cannot be. Rows that are named win over a share of them."""
        if below := [key for one, old in self.settings.items() if one.startswith(f"{ours}.") for key in old.keys]:
            return f"{ours} names its rows already, by {', '.join(dict.fromkeys(below))}"
        for parent in [one for one in self.settings if ours.startswith(f"{one}.")]:
            self.take_out(parent, f"{parent} names its rows, by {key}")
        old, replaces = self.settings.get(ours), rule.get("replaces", ())
        wins = old is not None and (old.replaced or replaces == "any" or old.value in replaces)
        if old is not None and not wins and old.value != value:
            if rule.get("replaced"):
                return None
            return f"{ours} is {scalar(old.value)} already, by {', '.join(old.keys)}"
        keys = [*(old.keys if old and old.value == value else []), key]
        self.settings[ours] = Setting(value, keys, bool(rule.get("replaced")))
        return None

    def take_out(self, where: str, why: str) -> bool:
        """Take out the keys at and below one; what they come from is refused. Returns whether there were any."""
        found = [ours for ours in self.settings if ours == where or ours.startswith(f"{where}.")]
        for ours in found:
            setting = self.settings.pop(ours)
            for key in setting.keys:
                if key in self.moved:
                    kept = tuple(name for name in self.moved[key].to if name != ours)
                    if kept:  # a part of what the key says
                        self.moved[key] = replace(self.moved[key], to=kept)
                        self.settle(f"{key} ({ours})", setting.value, why, ok=False)
                    else:
                        self.moved[key] = replace(self.moved[key], state="refused", to=(), why=why)
        return bool(found)


def move(migration: Migration, key: str, value: object) -> None:
    """Apply the rule for a key; one that the table does not know is refused too."""
    rule = migration.config.table.find(key)
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, str) and VARIABLE.match(first):
        migration.settle(key, value, "a variable, whose value is not known here: write it out", ok=False)
        return
    if rule is None:
        hint = nearest(key, list(migration.config.table.rules)).strip()
        why = NO_SECRETS if holds_secret(key, value) else f"{UNKNOWN}. {hint}".strip()
        migration.settle(key, value, why, ok=False)
        return
    apply_rule(migration, key, value, rule, "data.train.0")


def apply_rule(migration: Migration, key: str, value: object, rule: Mapping[str, Any], source: str) -> None:
    """Apply a rule to the value of a key; `source` is where keys of a source go."""
    if "sources" not in rule and holds_secret(key, value):
        migration.settle(key, value, rule.get("refuse", NO_SECRETS), ok=False)
        return
    if isinstance(value, list) and len(value) == 1 and not rule.keys() & {"list", "sources", "listing"}:
        value = value[0] if _named(rule.get("values", {}), value) is None else value
    named = _named(rule.get("values", {}), value)
    if named == {}:
        migration.settle(key, value, rule.get("why", "as here"))
        return
    if named is None and value is None:
        migration.settle(key, value, "it states nothing")
        return
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
    found = _targets(migration, key, value, rule, source)
    if isinstance(found, str):
        migration.settle(key, value_there, found, ok=False)
    else:
        _put_all(migration, key, value_there, {**found, **rule.get("then", {})}, rule, source)


def _targets(
    migration: Migration, key: str, value: Any, rule: Mapping[str, Any], source: str
) -> dict[str, object] | str:
    """Return our keys with their values, or why there are none."""
    if "times" in rule:
        ours, old = rule["times"], migration.settings.get(rule["times"])
        if not isinstance(value, int):
            return f"it is {scalar(value)}, and rows are counted"
        if old is not None and isinstance(old.value, int):
            old.value *= value
            value = old.value
        return {ours: value}
    if "list" in rule:
        items = value if isinstance(value, list) else [item for item in re.split(r"[,\s]+", str(value)) if item]
        if not all(isinstance(item, str) for item in items):
            return f"it is {scalar(value)}, and names are wanted"
        items = [renamed for item in items if (renamed := rule.get("rename", {}).get(item, item)) is not None]
        return {rule["list"]: "all-linear" if items in (["all-linear"], ["all"]) else items} if items else {}
    if "sources" in rule:
        return _sources(migration, key, value, rule)
    if "listing" in rule:
        return _listed(migration, value, rule)
    if "split_of" in rule:
        path = migration.settings.get("data.train.0.path")
        if path is None or not str(path.value).startswith("hub:"):
            return "a file has no splits: name its rows as data.validation"
        return {f"{rule['split_of']}.0.path": path.value, f"{rule['split_of']}.0.split": value}
    if "column" in rule:
        return {} if value == rule["column"] else {f"{source}.columns.{rule['column']}": value}
    if "source" in rule:
        return _source_key(migration, value, rule["source"], source)
    if "to" not in rule:
        return f"known values: {', '.join(rule.get('values', {})) or 'none'}"
    if rule.get("path"):
        return {rule["to"]: _local(migration, str(value)) or value}
    return {rule["to"]: value}


def _named(values: Mapping[str, Any], value: object) -> Any:
    """Return what a rule's `values` say about a value, by its text; None: nothing."""
    text = scalar(value).strip('"').lower() if not isinstance(value, str) else value.lower()
    if text in values:
        return values[text]
    return next((values[name] for name in values if "*" in name and fnmatchcase(text, name)), None)


def _put_all(
    migration: Migration, key: str, value: object, targets: Mapping[str, Any], rule: Mapping[str, Any], source: str
) -> None:
    named = {f"{source}.{ours}" if ours in Source.model_fields else ours: one for ours, one in targets.items()}
    multiplied = {"replaces": "any"} if "times" in rule else {}
    if any(holds_secret(ours, one) for ours, one in named.items()):
        migration.settle(key, value, NO_SECRETS, ok=False)
        return
    for ours, one in named.items():
        if problem := migration.put(ours, one, key, {**rule, **multiplied}):
            migration.settle(key, value, problem, ok=False)
            return
    if "sources" in rule or "listing" in rule:
        migration.settle(key, value, to=[rule.get("sources") or rule["listing"]])
    else:
        migration.settle(key, value, rule.get("why") if named else "as here", to=list(named))


def _sources(migration: Migration, parent: str, value: Any, rule: Mapping[str, Any]) -> dict[str, object] | str:
    """Move each source of a list by the rule's own table; what became of its keys is noted one by one."""
    inner, number = Table.from_mapping(rule), -1
    for index, entry in enumerate(value if isinstance(value, list) else [value]):
        keys = entry if isinstance(entry, dict) else {"path": entry}
        files = next((name for name, one in keys.items() if isinstance(one, list) and _is_path(inner, name)), None)
        for file in keys[files] if files else [None]:  # each file of a source is one of ours
            number += 1
            for key, item in (keys | ({files: file} if files else {})).items():
                for name, one in inner.flatten({key: item}):
                    known = inner.find(name)
                    if known is None:
                        migration.settle(f"{parent}[{index}].{name}", one, UNKNOWN, ok=False)
                    else:
                        apply_rule(migration, f"{parent}[{index}].{name}", one, known, f"{rule['sources']}.{number}")
    return {}


def _is_path(table: Table, name: str) -> bool:
    return (table.find(name) or {}).get("source") == "path"


def _source_key(migration: Migration, value: Any, name: str, source: str) -> dict[str, object] | str:
    """Return the key of a source; a path is local where it is there, else a data set of the hub."""
    if name != "path":
        return {f"{source}.{name}": value}
    if not isinstance(value, str):
        return "name each file as `path` of a source"
    if value in ("json", "csv", "parquet", "text"):  # the files are named beside it
        return {}
    path, local = value, _local(migration, value)
    looks_local = path.startswith((".", "/", "~")) or path.lower().endswith(FILES)
    old = migration.settings.get(f"{source}.path")
    if old is not None and looks_local and str(old.value).startswith("hub:") and local is None:
        return f"{path} is a file of {old.value}: download it, or name the data set alone"
    if old is not None and local is not None:
        migration.settings.pop(f"{source}.path")
    if local is None and "://" in path:
        local = path
    elif local is None and looks_local:
        local = os.path.relpath(os.path.expanduser(path), migration.folder)
    return {f"{source}.path": local or f"hub:{path}"}


def _local(migration: Migration, path: str) -> str | None:
    """Return a path as seen from the recipe, if it is there: seen from here or from the configuration."""
    for folder in (Path.cwd(), migration.config.folder):
        there = folder / os.path.expanduser(path)
        if path and os.path.exists(there):
            relative = os.path.relpath(there, migration.folder)
            return relative if relative.startswith("..") else f"./{relative}"
    return None


def _listed(migration: Migration, value: Any, rule: Mapping[str, Any]) -> dict[str, object] | str:
    """Look names up in the dataset_info.json of LLaMA-Factory."""
    folder = str(migration.config.values.get(rule["folder"], "data"))
    places = [base / folder / "dataset_info.json" for base in (Path.cwd(), migration.config.folder)]
    listing = next((file for file in places if file.is_file()), None)
    known = mapping(listing) if listing else {}
    found: dict[str, object] = {}
    parts = value if isinstance(value, list) else str(value).split(",")
    if not all(isinstance(one, str) for one in parts):
        return "name data sets, with commas between them"
    for number, name in enumerate(part for one in parts if (part := one.strip())):
        entry, path = known.get(name), f"{rule['listing']}.{number}"
        if not isinstance(entry, dict):
            found |= {f"{path}.path": f"hub:{name}"}
            continue
        file = listing.parent / str(entry["file_name"]) if listing and "file_name" in entry else None
        found[f"{path}.path"] = (
            os.path.relpath(file, migration.folder) if file else f"hub:{entry.get('hf_hub_url') or name}"
        )
        for theirs, ours in (("subset", "config"), ("split", "split"), ("num_samples", "limit")):
            if theirs in entry and not (file and ours == "split"):
                found[f"{path}.{ours}"] = entry[theirs]
        task = migration.settings.get("task")
        names = {"prompt": "text" if task and task.value == "completion" else "instruction", "kto_tag": "label"}
        names |= {"query": "input", "response": "output", "messages": "conversations"}
        tags = entry.get("tags") or {}
        if tags.get("role_tag") == "role":
            names["messages"] = "messages"
        for tag, word in tags.items():
            if word not in TAGS:
                why = "messages are role and content, or from and value, of the usual roles"
                migration.settle(f"{path}.{tag}", word, why, ok=False)
        for theirs, column in (entry.get("columns") or {}).items():
            ours = names.get(theirs, theirs)
            if column != ours:
                found[f"{path}.columns.{ours}"] = column
    return found
