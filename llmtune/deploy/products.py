"""What `llmtune run` makes at its end, where the recipe names it in `deploy`."""

from __future__ import annotations

from llmtune import __version__
from llmtune.deploy.gguf_export import DEFAULT_FORMAT, make_gguf
from llmtune.deploy.merged_model import merge_run
from llmtune.records import ModelRef
from llmtune.session import RunContext
from llmtune.store.atomic_files import hash_value


def make_products(context: RunContext, model_ref: ModelRef) -> None:
    """Make the merged model and the GGUF file, each certified, unless they are there from the same inputs."""
    settings = context.recipe.generation.model_dump(mode="json")
    products = context.recipe.deploy
    inputs = hash_value([__version__, context.trained_hash, model_ref.content_hash, settings, sorted(products)])
    made = {"merged": "merged", "gguf": f"gguf/{DEFAULT_FORMAT}"}
    with context.step("deploy", inputs, [made[name] for name in products]) as step:
        if not step.skipped:
            if "merged" in products:
                step.facts.update(merge_run(context, model_ref))
            if "gguf" in products:
                written = make_gguf(context, model_ref)
                step.facts.update(gguf=written, gguf_file=written["file"], gguf_read_by=written["reader"])
