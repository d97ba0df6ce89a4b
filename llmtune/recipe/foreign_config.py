"""Reads configurations of other tools (YAML, JSON or a command line) and the migration tables for their keys."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from ruamel.yaml import YAML

from llmtune.errors import RecipeError, nearest
from llmtune.recipe.secrets import redact
from llmtune.recipe.yaml_reader import file_label, parse_yaml, read_recipe_text, resolve_scalar

RecipeValues = Mapping[str, object]
"""llmtune's keys with values."""
ENDS = ("|", "||", "&&", ";", ">", "2>&1")
"""Words that end a command."""
LAUNCHED = ("num_processes", "nproc_per_node", "num_gpus", "nnodes")
"""Names of the number of data-parallel processes in accelerate, torchrun, DeepSpeed and LLaMA-Factory."""
READ_LETTERS = 4 << 20
"""Characters to read of a file to find its first row."""


@dataclass(frozen=True)
class MigrationTable:
    """Migration rules for the keys of one tool; `migrations/trl.yaml` explains each part."""

    tool: str = ""
    rules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    programs: tuple[str, ...] = ()
    retired: bool = False
    words: Mapping[str, RecipeValues] = field(default_factory=dict)
    refused_words: Mapping[str, str] = field(default_factory=dict)
    scripts: Mapping[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    defaults: RecipeValues = field(default_factory=dict)
    task_defaults: Mapping[str, RecipeValues] = field(default_factory=dict)
    always: RecipeValues = field(default_factory=dict)
    task_always: Mapping[str, RecipeValues] = field(default_factory=dict)
    columns: Mapping[str, RecipeValues] = field(default_factory=dict)
    guesses: Mapping[str, RecipeValues] = field(default_factory=dict)
    decide: tuple[str, ...] = ()
    unstated: Mapping[str, str] = field(default_factory=dict)
    older: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], below: MigrationTable | None = None) -> MigrationTable:
        """Read a table; keys without a rule inherit the rule of the table `below`."""
        rules: dict[str, Mapping[str, Any]] = dict(below.rules) if below else {}
        rules |= {key: {"to": f"{section}.{key}"} for section, keys in values.get("same", {}).items() for key in keys}
        rules |= {key: {"refuse": why} for why, keys in values.get("refused", {}).items() for key in keys}
        rules |= {key: {"unneeded": why} for why, keys in values.get("unneeded", {}).items() for key in keys}
        rules |= {key: {"to": rule} if isinstance(rule, str) else rule for key, rule in values.get("keys", {}).items()}
        rules |= {older: rules[newer] for older, newer in values.get("older", {}).items()}
        parts: dict[str, Any] = {name: tuple(part) if isinstance(part, list) else part for name, part in values.items()}
        names = cls.__dataclass_fields__.keys() - {"rules"}
        return cls(rules=rules, **{name: part for name, part in parts.items() if name in names})

    def find(self, key: str) -> Mapping[str, Any] | None:
        """Return the rule for a key; rule names may have the wildcard `*`."""
        wild = (rule for name, rule in self.rules.items() if "*" in name and fnmatchcase(key, name))
        return self.rules.get(key) or next(wild, None)

    def flatten(self, values: Mapping[str, object], parent: str = "") -> Iterator[tuple[str, object]]:
        """Yield the flattened keys with values; nested keys have dots, down to keys that have a rule."""
        for key, value in values.items():
            name = f"{parent}{key}"
            if isinstance(value, dict) and value and name not in self.rules:
                yield from self.flatten(value, f"{name}.")
            else:
                yield name, value


@cache
def tables() -> dict[str, MigrationTable]:
    """Return the table of each supported tool, by file name."""
    raw_tables = _read_tables()
    trainer = MigrationTable.from_mapping(raw_tables["trainer"])
    return {
        name: MigrationTable.from_mapping(raw_tables[name], trainer)
        for name in sorted(raw_tables)
        if "extends" in raw_tables[name]
    }


@cache
def _known_tools() -> dict[str, MigrationTable]:
    """Return all tables, including those that recognise files of retired tools."""
    retired = _read_tables()["retired"]
    return {**tables(), **{name: MigrationTable.from_mapping({**retired[name], "retired": True}) for name in retired}}


@cache
def _read_tables() -> dict[str, Any]:
    read, folder = YAML(typ="safe"), resources.files("llmtune.recipe") / "migrations"
    return {file.name.removesuffix(".yaml"): read.load(file.read_text("utf-8")) for file in folder.iterdir()}


@dataclass(frozen=True)
class ForeignConfig:
    """A configuration of another tool, its keys flattened with dots."""

    label: str
    folder: Path
    table: MigrationTable
    values: dict[str, object]
    facts: RecipeValues
    """Values of llmtune's keys that follow from the command itself, not from its options."""
    others: int = 0
    """Commands of a tool after the first, which are not read."""

    @classmethod
    def read(cls, file: Path, tool: str | None = None) -> ForeignConfig:
        """Read a file. Raises RecipeError if the file is from an unknown tool, or `tool` is unknown."""
        tools = _known_tools()
        if tool is not None and tool not in tools:
            fix = f"{nearest(tool, list(tables()))} Tools: {', '.join(tables())}.".strip()
            raise RecipeError.of(f"unknown tool {tool!r}", "--tool", fix)
        text, name, folder = read_recipe_text(file), file_label(file), file.absolute().parent
        if file.suffix.lower() in (".py", ".ipynb"):
            raise RecipeError.of("Python code is not read: its values may depend on other code", name, _PYTHON)
        is_data = file.suffix.lower() in (".yaml", ".yml", ".json")
        commands = [] if is_data else [*_find_commands(text)]
        command = commands[0] if commands else None
        nested = {} if command else _read_nested(text, name, file)
        table = tools[tool] if tool else command[0] if command else _recognize(nested, name)
        if table.retired:
            raise RecipeError.of(f"llmtune no longer migrates configurations of {table.tool}", name, _INSTEAD)
        if command is None:
            return cls(name, folder, table, dict(table.flatten(nested)), {})
        _, words, before = command
        values, facts = _read_options(table, words, file)
        return cls(name, folder, table, values | _read_processes(before), facts, len(commands) - 1)


_TOOL = "Use a YAML or JSON file of the tool, or a file with its command line."
_PYTHON = (
    "Write the arguments of the tool's configuration classes to a YAML file, by the names of its command line: "
    "SFTConfig(max_length=512) is `max_length: 512`, LoraConfig(r=16) is `use_peft: true` and `lora_r: 16`."
)
_INSTEAD = (
    "Run `llmtune init ROWS` on your training rows, then copy the values you need into that recipe (docs/retired.md)."
)


def _read_nested(text: str, name: str, file: Path) -> dict[str, object]:
    nested = parse_yaml(text, name, file.parent, old_booleans=True).plain()
    if not isinstance(nested, dict) or not nested:
        what = "not a configuration: neither a mapping of keys nor a command of a tool"
        raise RecipeError.of(what, name, _TOOL)
    return nested


def _recognize(nested: Mapping[str, object], name: str) -> MigrationTable:
    """Return the table of the tool with the most marks; ties go to the table with rules for the most keys.

    Marks of a retired tool count three times: no other tool has them. Raises RecipeError if no key marks a tool.
    """

    def score(table: MigrationTable) -> tuple[int, float]:
        keys = dict(table.flatten(nested))
        marks = sum(key in table.marks for key in keys) * (3 if table.retired else 1)
        return marks, sum(table.find(key) is not None for key in keys) / len(keys)

    best = max(_known_tools().values(), key=score)
    if score(best)[0] == 0:
        keys = ", ".join(redact(str(key)) for key in [*nested][:8])
        raise RecipeError.of(
            f"no known tool has these keys: {keys}", name, f"Name the tool: --tool {' | '.join(tables())}."
        )
    return best


def _find_commands(text: str) -> Iterator[tuple[MigrationTable, list[str], list[str]]]:
    """Yield the table of each line that runs a tool, the words after the program and the words before it.

    Variables set on earlier lines are replaced by their values.
    """
    assigned: dict[str, str] = {}
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        try:
            words = [Template(word).safe_substitute(assigned) for word in shlex.split(_without_comment(line))]
        except ValueError:
            continue
        if words[:1] in (["from"], ["import"]):
            continue  # Python imports a tool, and runs no command
        pairs = [word.partition("=") for word in words if word != "export"]
        if all(name.isidentifier() and equals for name, equals, _ in pairs):
            assigned |= {name: value for name, _, value in pairs}
            continue
        if command := _find_program(words):
            yield command


def _find_program(words: list[str]) -> tuple[MigrationTable, list[str], list[str]] | None:
    for position, word in enumerate(words):
        if words[position + 1 : position + 2] in ([], *([end] for end in ENDS)) or "install" in words:
            continue  # a folder or package with that name
        for table in _known_tools().values():
            if os.path.basename(word) in table.programs:
                return table, words[position + 1 :], words[:position]
            for script in table.scripts:
                if f"/{word}".endswith(f"/{script}"):
                    return table, [table.scripts[script], *words[position + 1 :]], words[:position]
    return None


def _without_comment(line: str) -> str:
    """Return a script line without its comment; unlike in shlex, a `#` within a word does not start a comment."""
    return re.sub(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?<!\S)#.*""", lambda match: match[1] or "", line)


def _read_options(table: MigrationTable, words: list[str], file: Path) -> tuple[dict[str, object], RecipeValues]:
    """Parse `--key value...`, `--key=value`, `--key` and `key=value`; options override a named configuration file."""
    options: dict[str, list[object]] = {}  # the last of repeated options wins
    facts: dict[str, object] = {}
    key = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word in ENDS:
            break
        if word.startswith("--") or (equals and table.find(name) is not None):
            name = name.removeprefix("--").replace("-", "_") if word.startswith("--") else name
            options[name] = [_value(value)] if equals else []
            key = "" if equals else name
        elif key and (not word.startswith("-") or isinstance(_value(word), int | float)):
            options[key].append(_value(word))
        elif word in table.refused_words:
            raise RecipeError.of(
                f"a recipe cannot express `{table.tool} {word}`",
                file_label(file),
                f"{table.refused_words[word]}.",
            )
        elif word in table.words:
            facts |= table.words[word]
        else:
            options.setdefault("config" if word.endswith((".yaml", ".yml", ".json")) else "recipe", []).append(word)
    stated = {name: True if not items else items[0] if len(items) == 1 else items for name, items in options.items()}
    below: dict[str, object] = {}
    for base in (Path.cwd(), file.parent):
        named = base / str(stated.get("config", ""))
        if "config" in stated and named.is_file():
            del stated["config"]
            below = dict(table.flatten(mapping(named)))
            break
    for name in [one for one in stated if one.startswith("no_") and stated[one] is True and table.find(one) is None]:
        stated[name.removeprefix("no_")] = not stated.pop(name)
    return below | stated, facts


def _read_processes(words: list[str]) -> dict[str, object]:
    """Return the process counts in a launcher's options, or in variables such as `NPROC_PER_NODE=4`."""
    counts: dict[str, object] = {}
    for word, after in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_").lower()
        if name in LAUNCHED and (equals or option.startswith("--")):
            counts[name] = _value(value if equals else after)
    return counts


def _value(word: str) -> object:
    try:
        return resolve_scalar(word, old_booleans=True)
    except ValueError:  # a number with thousands of digits
        return word


def mapping(file: Path) -> dict[str, object]:
    """Return the keys of a YAML or JSON file; empty if it is not a mapping. Raises RecipeError if it is damaged."""
    value = parse_yaml(read_recipe_text(file), file_label(file), file.parent, old_booleans=True).plain()
    return value if isinstance(value, dict) else {}


def read_first_row(file: Path) -> Mapping[str, object]:
    """Return the first row of a JSON lines, JSON or CSV file, or of the first such file in a folder, or `{}`."""
    if file.is_dir():
        file = next((one for one in sorted(file.iterdir()) if one.suffix.lower() in (".jsonl", ".json", ".csv")), file)
    if not file.is_file() or file.suffix.lower() not in (".jsonl", ".json", ".csv"):
        return {}
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        text = lines.read(READ_LETTERS)
    try:
        if file.suffix.lower() == ".csv":
            whole = len(text) < READ_LETTERS or "\n" in text or "\r" in text
            return dict.fromkeys(next(csv.reader(io.StringIO(text, newline="")), []) if whole else [], "")
        row, _ = json.JSONDecoder().raw_decode(text.lstrip().removeprefix("[").lstrip())
    except (ValueError, RecursionError, csv.Error):
        return {}
    return row if isinstance(row, dict) else {}
