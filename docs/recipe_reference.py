"""The recipe reference: Markdown made from the schema, so that it cannot be out of date."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import PydanticUndefined

from llmtune.recipe.data_section import Source
from llmtune.recipe.decision_section import DecideSection, SetsSection
from llmtune.recipe.eval_suites_section import BenchmarkSection, FairnessSection, ForgettingSection, JudgeSection
from llmtune.recipe.gate_grammar import FORMS
from llmtune.recipe.model_section import CatalogueQuery
from llmtune.recipe.schema import EXTENDS, Recipe, json_schema
from llmtune.recipe.section import RecipeSection, find_section
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.train_section import SCHEDULE_OPTIONS
from llmtune.recipe.yaml_writer import scalar

HEAD = f"""\
# Recipe reference

Made by `make docs` from the schema; do not edit. `llmtune recipes schema` prints the same as JSON Schema.

A recipe is one YAML 1.2 document: `1e-4` is a number, `yes` is text. Paths are relative to the file that states them,
with `--set KEY=VALUE` to the working folder; `~` is the home folder; nothing else is interpolated. An unknown key, a
value out of range and a key that would have no effect are errors.

`extends`: {EXTENDS}
Mappings are merged key by key; lists and sources are replaced as a whole; `null` takes a value back, so that its
default holds. `--set` wins over all files. `llmtune recipes show NAME --origin` shows where each value came from.
"""


NAMED = {"Source": "source", "BenchmarkSection": "benchmark"}
STUDIES: dict[str, type[RecipeSection]] = {
    "`evaluate.decide`": DecideSection,
    "`evaluate.sets`": SetsSection,
    "`evaluate.forgetting`": ForgettingSection,
    "`evaluate.fairness`": FairnessSection,
    "`evaluate.judge`": JudgeSection,
    "Benchmark, in `evaluate.benchmarks`": BenchmarkSection,
}


def recipe_reference() -> str:
    """Return the reference of all keys as Markdown."""
    schema = json_schema()
    definitions: Mapping[str, Any] = schema["$defs"]
    parts = [HEAD, *section_lines("Top level", Recipe, schema, definitions)]
    for name, field in Recipe.model_fields.items():
        section = find_section(field.annotation)
        if section is not None:
            parts += section_lines(f"`{name}`", section, definitions[section.__name__], definitions)
        if name == "data":
            parts += section_lines("Source, in `data`", Source, definitions["Source"], definitions)
        if name == "model":
            parts += section_lines(
                "Query, in `model.candidates`", CatalogueQuery, definitions["CatalogueQuery"], definitions
            )
        if name == "evaluate":
            for title, inner in STUDIES.items():
                parts += section_lines(title, inner, definitions[inner.__name__], definitions)
    parts += [*task_lines(), *schedule_lines(), "\n## Gates\n", f"{gate_text()}\n"]
    return "\n".join(parts)


def section_lines(
    title: str, section: type[RecipeSection], schema: Mapping[str, Any], definitions: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the table of one section's keys."""
    yield f"\n## {title}\n"
    yield f"{section.__doc__}\n"
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        default = "required" if field.default is PydanticUndefined else show_default(field.default)
        value = cell(kind(schema["properties"][name], definitions))
        yield f"| `{name}` | {value} | {default} | {cell(field.description or '')} |"


def show_default(default: Any) -> str:
    """Show a default as YAML; a section's stands in its own table."""
    return "see below" if isinstance(default, RecipeSection) else f"`{scalar(default)}`"


def kind(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Return in words what a part of the JSON Schema allows."""
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            parts = list(dict.fromkeys(kind(part, definitions) for part in schema[union]))
            lists = [part for part in parts if part.startswith("list of ") and part.removeprefix("list of ") in parts]
            return " or ".join("a list of them" if part in lists else part for part in parts)
    if "$ref" in schema:
        return NAMED.get(schema["$ref"].rpartition("/")[2], "section")
    if "enum" in schema:
        return ", ".join(f"`{scalar(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{scalar(schema['const'])}`"
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}), definitions)}"
    words = {"integer": "integer", "string": "text", "boolean": "`true`, `false`", "object": "mapping"}
    word = words.get(schema.get("type", ""), schema.get("type", "value"))
    return f"{word}{bounds(schema)}"


def bounds(schema: Mapping[str, Any]) -> str:
    """Return which numbers are allowed."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [
        f"{sign} {schema[name]:,g}" if schema[name] < 1000 else f"{sign} {schema[name]:,}"
        for name, sign in signs.items()
        if name in schema
    ]
    return f" {', '.join(found)}" if found else ""


def cell(text: str) -> str:
    """Make text fit for a table's cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def task_lines() -> Iterator[str]:
    """Yield the table of tasks."""
    yield "\n## Tasks\n"
    yield "| task | what it learns | row formats | metrics (default in bold) |"
    yield "|---|---|---|---|"
    for facts in TASK_FACTS.values():
        metrics = ", ".join(f"**{name}**" if name in facts.default_metrics else name for name in facts.metrics)
        yield f"| `{facts.name}` | {facts.summary} | {', '.join(facts.formats)} | {metrics} |"


def schedule_lines() -> Iterator[str]:
    """Yield the table of learning-rate schedules."""
    yield "\n## Options of `train.lr_scheduler_type`\n"
    yield "| schedule | `lr_scheduler_kwargs` |"
    yield "|---|---|"
    for name, options in SCHEDULE_OPTIONS.items():
        yield f"| `{name}` | {', '.join(f'`{option}`' for option in options) or 'none'} |"


def gate_text() -> str:
    """Explain gates."""
    return (
        "A gate is `METRIC OP WANTED` with `>=`, `<=`, `>`, `<` or `==`, and WANTED a number, `base` or `champion`,\n"
        f"or one of these with `+`, `-` or `*` and a number:\n{FORMS}.\n"
        "`X > base` compares the scores of the tuned and the base model. `X.low > base` means that the low end of the\n"
        "paired 95 % interval of their difference is above zero; `X.high < base` that its high end is below.\n"
        "`champion` is the run that `evaluate.champion` names. A gate\n"
        "that fails ends the run with exit code 6; `evaluate.when_unsure` says what a gate counts as that\n"
        "these rows are too few for. Metrics of a study are called `STUDY.METRIC`: those of\n"
        "`evaluate.forgetting`, `evaluate.fairness`, `evaluate.benchmarks` and `evaluate.judge`."
    )
