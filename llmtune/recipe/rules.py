"""What a schema cannot say: keys without effect in this recipe, keys that rest on others, features still to come."""

from __future__ import annotations

from collections.abc import Iterator

from llmtune.recipe.finding import Finding, idle
from llmtune.recipe.rules_data import data_findings
from llmtune.recipe.rules_evaluate import evaluate_findings
from llmtune.recipe.rules_tasks import task_findings
from llmtune.recipe.rules_tuning import adapter_findings, model_findings, train_findings
from llmtune.recipe.schema import Recipe
from llmtune.recipe.source_map import Places


def find_all(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield everything that is wrong with a recipe whose keys and values fit the schema."""
    yield from task_findings(recipe, places)
    yield from data_findings(recipe, places)
    yield from model_findings(recipe, places)
    yield from adapter_findings(recipe, places)
    yield from train_findings(recipe, places)
    yield from generation_findings(recipe, places)
    yield from evaluate_findings(recipe, places)
    yield from deploy_findings(recipe)


def generation_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield settings of drawing at random where nothing is drawn."""
    for name in ("temperature", "top_k", "top_p", "min_p"):
        key = f"generation.{name}"
        if not recipe.generation.do_sample and getattr(recipe.generation, name) is not None and places.stated(key):
            fix = "Set generation.do_sample to true, or remove it."
            yield idle(key, "without generation.do_sample", fix, "generation.do_sample")


def deploy_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield what cannot be made at the end."""
    if "merged" in recipe.deploy and recipe.adapter.method == "full":
        fix = "Remove it: `weights/` in the run folder is the whole model."
        yield Finding("deploy", "'merged' has no effect with adapter.method: full", fix, ("adapter.method",))
    if len(set(recipe.deploy)) < len(recipe.deploy):
        yield Finding("deploy", "'deploy' names the same thing twice", "Name it once.")
