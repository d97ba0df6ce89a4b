"""Holds a stated recipe against the schema and says in a person's words what is wrong, all of it at once."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmtune.errors import Problem, RecipeError, nearest
from llmtune.recipe.aliases import FOREIGN
from llmtune.recipe.base_section import BRANCHES, Section, is_section
from llmtune.recipe.finding import Finding
from llmtune.recipe.rules import find_all
from llmtune.recipe.schema import Recipe
from llmtune.recipe.source_map import Key, Places, dotted
from llmtune.recipe.yaml_reader import Stated

PLACEHOLDERS: Mapping[str, Any] = {"task": "chat", "data": {"train": "rows.jsonl"}, "model": {"name": "model"}}
"""Stand in for what is missing or wrong, so that the rest can be checked in the same go."""

KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping (`key: value`)",
    "model_type": "a mapping (`key: value`)",
}
RANGES = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def section_at(key: Key) -> type[Section] | None:
    """Return the section whose keys stand at a key path, or None where it is no section."""
    at: type[Section] | None = Recipe
    for step in key:
        if step in BRANCHES or isinstance(step, int):
            continue
        field = at.model_fields.get(str(step)) if at else None
        at = find_section(field.annotation) if field else None
    return at


def find_section(annotation: Any) -> type[Section] | None:
    """Return the section type within a field's annotation, if there is one."""
    if is_section(annotation):
        return annotation
    found = (find_section(part) for part in typing.get_args(annotation))
    return next((section for section in found if section), None)


def admits_null(section: type[Section], key: str) -> bool:
    """Whether null is a value of a section's key."""
    return type(None) in typing.get_args(section.model_fields[key].annotation)


def settle(stated: Stated, section: type[Section]) -> Any:
    """Return plain values in which a null that is no value of its key stands for the default.

    That is so for a section without lines, and for a null that takes back what the extended recipe states.
    """
    if not isinstance(stated.value, dict):
        return stated.plain()
    found: dict[str, Any] = {}
    for key, item in stated.value.items():
        field = section.model_fields.get(key)
        inner = field and field.annotation
        optional = find_section(inner)
        if is_section(inner):
            found[key] = {} if item.value is None else settle(item, inner)
        elif optional is not None and isinstance(item.value, dict):
            found[key] = settle(item, optional)
        elif not (field and item.value is None and item.overrides and not admits_null(section, key)):
            found[key] = item.plain()
    return found


def key_paths(section: type[Section] = Recipe, above: str = "") -> list[str]:
    """List the dotted paths of all keys of the schema."""
    paths: list[str] = []
    for key, field in section.model_fields.items():
        paths.append(f"{above}{key}")
        inner = field.annotation
        if is_section(inner):
            paths.extend(key_paths(inner, f"{above}{key}."))
    return paths


def unknown_key(key: Key, places: Places) -> Problem:
    """Say that a key is unknown, what is near it and what is allowed beside it."""
    *above, name = [step for step in key if step not in BRANCHES]
    section = section_at(above)
    allowed = sorted(section.model_fields) if section else []
    name = str(name)
    elsewhere = [path for path in key_paths() if path.rpartition(".")[2] == name]
    if name in FOREIGN:
        hint = f" {FOREIGN[name]}"
    elif elsewhere:
        hint = f" Did you mean '{elsewhere[0]}'?"
    else:
        hint = nearest(name, allowed)
    if not above:
        allowed.append("extends")
    return Problem(
        f"unknown key '{dotted(key)}'", places.where(key), f"{hint} Allowed here: {', '.join(allowed)}.".strip()
    )


def describe(value: Any) -> str:
    """Show a value as a person wrote it, cut to one line."""
    words = {True: "true", False: "false", None: "null"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def wrong_value(error: ErrorDetails, key: Key, places: Places) -> Problem:
    """Say what is wrong with a value, from pydantic's error."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    name, where = dotted(key), places.where(key)
    said = f"'{name}' is {describe(value)}"
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "")
        words = allowed.replace(" or ", ", ").split(", ")
        return Problem(said, where, f"{nearest(str(value), words)} Allowed: {allowed}.".strip())
    if kind in KINDS:
        return Problem(said, where, f"It must be {KINDS[kind]}.{number_hint(kind, value)}")
    if kind in RANGES:
        word, bound = RANGES[kind]
        return Problem(said, where, f"It must be {word} {context[bound]}.")
    if kind in ("string_too_short", "too_short"):
        least = context["min_length"]
        return Problem(
            f"'{name}' is empty" if not value else said, where, f"It needs at least {least}; or leave the key out."
        )
    if kind == "string_pattern_mismatch":
        return Problem(said, where, PATTERNS.get(name, f"It must match {context['pattern']}."))
    return Problem(f"{said}: {error['msg']}", where, "See `llmtune recipes schema` for what is allowed.")


PATTERNS = {
    "model.attn_implementation": "A kernel is named `owner/name`, with `@revision` or `:function` behind it at most.",
    "name": "Use up to 64 letters, digits, `.`, `-` and `_`, with a letter or digit first: it names a folder.",
    "adapter.init_lora_weights": "Allowed: true, false, gaussian, pissa, pissa_niter_N (N steps of a fast SVD), olora.",
}


def number_hint(kind: str, value: Any) -> str:
    """Say why something that looks like a number or a switch is not one."""
    if not isinstance(value, str):
        return ""
    if kind.startswith(("int", "float")) and value.strip().replace(".", "", 1).replace(",", "", 1).isdigit():
        return " Write it without quotes, with a dot for decimals."
    if kind == "bool_type" and value.lower() in ("yes", "no", "on", "off"):
        return " YAML 1.2 knows `true` and `false` only."
    return ""


def missing_key(key: Key, places: Places) -> Problem:
    """Say that a required key is not there, and what it means."""
    section = section_at(key[:-1])
    field = section.model_fields.get(str(key[-1])) if section else None
    meaning = (field.description or "") if field else ""
    return Problem(f"the key '{dotted(key)}' is missing", places.where(key), meaning)


def schema_problems(errors: Iterable[ErrorDetails], places: Places) -> list[tuple[Key, Problem]]:
    """Turn pydantic's errors into problems; one that only follows from another is left out."""
    listed = list(errors)
    found: list[tuple[Key, Problem]] = []
    for error in listed:
        key = error["loc"]
        inner = any(other["loc"][: len(key)] == key and len(other["loc"]) > len(key) for other in listed)
        if error["type"] == "too_short" and inner:
            continue
        if error["type"] == "extra_forbidden":
            found.append((key, unknown_key(key, places)))
        elif error["type"] == "missing":
            found.append((key, missing_key(key, places)))
        else:
            found.append((key, wrong_value(error, key, places)))
    return found


def prune(plain: dict[str, Any], keys: Iterable[Key]) -> set[str]:
    """Replace in place what is wrong at `keys` by a default or a placeholder; return the dotted keys replaced."""
    pruned: set[str] = set()
    for key in keys:
        top = str(key[0])
        inner = Recipe.model_fields[top].annotation if top in Recipe.model_fields else None
        deep = len(key) > 1 and is_section(inner)
        if deep:
            name = str(key[1])
            plain[top] = dict(plain[top])
            plain[top].pop(name, None)
            if top == "data" and name == "train":
                plain[top][name] = PLACEHOLDERS[top][name]
            pruned.add(f"{top}.{name}")
        else:
            plain.pop(top, None)
            if top in PLACEHOLDERS:
                plain[top] = PLACEHOLDERS[top]
            pruned.add(top)
    return pruned


def about(finding: Finding, pruned: set[str]) -> bool:
    """Whether a finding rests on a key that is wrong by itself."""
    rests_on = (finding.key, *finding.because)
    return any(key == other or key.startswith(f"{other}.") for key in rests_on for other in pruned)


def check(root: Stated, name: str) -> Recipe:
    """Return the recipe, paths as written, called `name` unless it names itself.

    Raises RecipeError with every problem.
    """
    places = Places(root)
    plain = settle(root, Recipe)
    plain.setdefault("name", name)
    found: list[tuple[Key, Problem]] = []
    try:
        recipe = Recipe.model_validate(plain)
        pruned: set[str] = set()
    except ValidationError as error:
        found = schema_problems(error.errors(include_url=False), places)
        pruned = prune(plain, [key for key, _ in found])
        recipe = Recipe.model_validate(plain)
    findings = [finding for finding in find_all(recipe, places) if not about(finding, pruned)]
    problems = [problem for _, problem in found]
    problems += [Problem(finding.what, places.where(finding.path), finding.fix) for finding in findings]
    RecipeError.collect(sorted(problems, key=order))
    return recipe


def order(problem: Problem) -> tuple[str, int]:
    """Sort problems by file, then by line."""
    file, _, line = (problem.where or "").rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.where or "", 0)
