"""The products that `llmtune run` makes at its end, as listed in the recipe's `deploy`."""

from __future__ import annotations

from llmtune import __version__
from llmtune.deploy.gguf_export import DEFAULT_FORMAT, make_gguf
from llmtune.deploy.merged_model import merge_run
from llmtune.session import RunContext
from llmtune.store.atomic_files import hash_folder, hash_value


def make_products(context: RunContext) -> None:
    """Make and certify the merged model and the GGUF file, unless they exist from the same inputs."""
    recipe, trained = context.plan.recipe, hash_folder(context.trained_folder)
    settings, products = recipe.generation.model_dump(mode="json"), recipe.deploy
    inputs = hash_value([__version__, trained, context.plan.model_ref.content_hash, settings, sorted(products)])
    made = {"merged": "merged", "gguf": f"gguf/{DEFAULT_FORMAT}"}
    with context.step("deploy", inputs, [made[name] for name in products]) as step:
        if not step.skipped:
            if "merged" in products:
                step.facts.update(merge_run(context))
            if "gguf" in products:
                written = make_gguf(context)
                step.facts.update(gguf=written, gguf_file=written["file"], gguf_read_by=written["reader"])
