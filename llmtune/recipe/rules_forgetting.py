"""Rules of `evaluate.forgetting`: what it asks that this task's models have no answer to, or that nothing comes of."""

from __future__ import annotations

from collections.abc import Iterator

from llmtune.recipe.finding import Finding
from llmtune.recipe.gate_grammar import Gate
from llmtune.recipe.rules_tasks import is_masked, points, scores_answers
from llmtune.recipe.schema import Recipe

KEY = "evaluate.forgetting"
PARTS = ("texts", "questions")
HEADED = ("classify", "token-classify", "speech")
"""Tasks whose models are never decoders of written language, whatever the model."""
MADE_OF = {"perplexity": "texts", "bits_per_byte": "texts", "accuracy": "questions", "accuracy_norm": "questions"}
"""By metric, the key of the section that it comes from."""


def forgetting_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield a study that cannot be made of this task's models, asks for nothing, or names something twice."""
    section = recipe.evaluate.forgetting
    if section is None:
        return
    if found := no_decoder(recipe):
        why, because = found
        what = f"'{KEY}' takes the likelihood of text, and {why}"
        yield Finding(KEY, what, "Remove it; it is for decoder language models.", (because,))
        return
    if not any(getattr(section, name) for name in PARTS):
        yield Finding(KEY, f"'{KEY}' asks for nothing", "Give it texts or questions, or remove it.")
    for name in PARTS:
        places = getattr(section, name)
        if len(set(places)) < len(places):
            yield Finding(f"{KEY}.{name}", f"'{KEY}.{name}' names something twice", "Name each once.")
        for place in places:
            if place.startswith(("hub:", "builtin:")):
                yield Finding(f"{KEY}.{name}", f"'{place}' is no file", "Give `own`, or files.")


def no_decoder(recipe: Recipe) -> tuple[str, str] | None:
    """Say why no model of this recipe goes on with a text, and by which key; None where one may, or does."""
    if recipe.task in HEADED:
        return f"models of task: {recipe.task} give text none", "task"
    if is_masked(recipe):
        return "with completion.objective: masked a model only fills in words", "completion.objective"
    if points(recipe):
        return "with qa.style: extractive a model only points at answers", "qa.style"
    if scores_answers(recipe):
        return "with preference.loss: reward a model only gives scores", "preference.loss"
    return None


def forgetting_gate_findings(recipe: Recipe, key: str, gate: Gate, metric: str) -> Iterator[Finding]:
    """Yield a gate about a metric of the study that this recipe does not measure."""
    section, part = recipe.evaluate.forgetting, MADE_OF[metric]
    if section is not None and not getattr(section, part):
        fix = f"Give {KEY}.{part} something to measure, or remove the gate."
        what = f"the gate {gate.text!r} is about a metric that is not measured"
        yield Finding(key, what, fix, (f"{KEY}.{part}",))
