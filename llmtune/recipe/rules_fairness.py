"""Rules of `evaluate.fairness`: what it asks that this task, or these rows, have no answer to."""

from __future__ import annotations

from collections.abc import Iterator

from llmtune.recipe.eval_suites_section import OWN, FairnessSection
from llmtune.recipe.finding import Finding, idle
from llmtune.recipe.gate_grammar import Gate
from llmtune.recipe.rules_data import has_rows
from llmtune.recipe.rules_tasks import points, scores_answers
from llmtune.recipe.schema import Recipe
from llmtune.recipe.source_map import Places

KEY = "evaluate.fairness"
PARTS = ("pairs", "swaps", "groups")
HEADED = ("classify", "token-classify", "speech")
"""Tasks whose models are never models of written language, whatever the model."""
UNSWAPPED = {
    "speech": "a recording has no words to swap",
    "translate": "a translation may have to change with the group",
}
"""Tasks in whose rows words are not swapped, and why."""
MADE_OF = {
    "gap": "groups",
    "stereotype": "pairs",
    "stereotype_distance": "pairs",
    "lm_score": "pairs",
    "icat": "pairs",
    "swap_changes": "swaps",
}
"""By metric, the key of the section that it comes from."""
OF_STEREOSET = ("lm_score", "icat")


def fairness_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield keys of the section that would have no effect, and what is named twice."""
    section = recipe.evaluate.fairness
    if section is None:
        return
    if not any(getattr(section, name) for name in PARTS):
        yield Finding(KEY, f"'{KEY}' asks for nothing", "Give it pairs, swaps or groups, or remove it.")
    for name in PARTS:
        if len(set(getattr(section, name))) < len(getattr(section, name)):
            yield Finding(f"{KEY}.{name}", f"'{KEY}.{name}' names something twice", "Name each once.")
    for name, why in without_effect(recipe).items():
        if getattr(section, name) and places.stated(f"{KEY}.{name}"):
            yield idle(f"{KEY}.{name}", why[0], why[1], "task" if name != "groups" else "data.test")
    for name in section.swaps:
        if name.startswith(("hub:", "builtin:")):
            yield Finding(f"{KEY}.swaps", f"'{name}' is no file", "Give `own`, or a CSV file of two columns.")
    for name in section.pairs:
        if name.startswith("hub:") and name.count("/") > 2:
            yield Finding(f"{KEY}.pairs", f"'{name}' is no name of a data set", "Write hub:OWNER/NAME[/CONFIG].")


def without_effect(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Return the keys of the section that this task and these rows have no use for: why, and what to do."""
    task, found = recipe.task, {}
    if task in HEADED or points(recipe) or scores_answers(recipe):
        found["pairs"] = (
            f"with task: {task}: its model gives sentences no likelihood",
            "Remove it; swaps and groups work here." if task != "speech" else "Remove it; groups work here.",
        )
    if not has_rows(recipe.data.test):
        fix = "Give data.test a share of the rows or sources, or remove it."
        found |= dict.fromkeys(("swaps", "groups"), ("without test rows", fix))
    elif task in UNSWAPPED:
        found["swaps"] = (f"with task: {task}: {UNSWAPPED[task]}", "Remove it.")
    return found


def fairness_gate_findings(recipe: Recipe, key: str, gate: Gate, metric: str) -> Iterator[Finding]:
    """Yield a gate about a metric of the study that this recipe does not measure."""
    section, part = recipe.evaluate.fairness or FairnessSection(), MADE_OF[metric]
    where = f"{KEY}.{part}"
    if part in without_effect(recipe):
        yield Finding(
            key, f"the gate {gate.text!r} is about a metric that is not measured here", "Remove it.", (where,)
        )
    elif not getattr(section, part):
        fix = f"Give {where} something to measure, or remove the gate."
        yield Finding(key, f"the gate {gate.text!r} is about a metric that is not measured", fix, (where,))
    elif metric in OF_STEREOSET and section.pairs == (OWN,):
        fix = f"Name a file in the form of StereoSet in {where}, or remove the gate."
        yield Finding(key, f"the gate {gate.text!r} is about a metric of StereoSet alone", fix, (where,))
