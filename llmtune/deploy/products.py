"""The exports that a recipe names in `deploy`: made, certified and scored when `llmtune run` ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llmtune import __version__
from llmtune.deploy.gguf_export import check_gguf, make_gguf
from llmtune.deploy.merged_model import merge_run
from llmtune.deploy.parity import Certificate
from llmtune.deploy.quantized_model import SCHEMES, check_quantizable, quantize_run
from llmtune.session import Plan, RunContext
from llmtune.store.atomic_files import hash_folder, hash_value


@dataclass(frozen=True)
class ExportFormat:
    """One format of `deploy`."""

    folder: str
    """Its place in the run folder."""
    make: Callable[[RunContext], Certificate]
    """Makes it, certifies it and scores it."""
    check: Callable[[Plan], object] | None = None
    """Raises before training if it cannot be made of the model."""


EXPORT_FORMATS = {
    "merged": ExportFormat("merged", merge_run),
    "gguf": ExportFormat("gguf/f16", make_gguf, check_gguf),
    "gguf-q8_0": ExportFormat("gguf/q8_0", partial(make_gguf, number_format="q8_0"), check_gguf),
    "gguf-q4_k_m": ExportFormat("gguf/q4_k_m", partial(make_gguf, number_format="q4_k_m"), check_gguf),
    **{
        name: ExportFormat(
            f"quantized/{name}", partial(quantize_run, scheme=name), partial(check_quantizable, scheme=name)
        )
        for name in SCHEMES
    },
}
"""By name in the recipe's `deploy`."""


def check_products(plan: Plan) -> None:
    """Check without loading weights that the exports of the recipe can be made; raises the errors of their formats."""
    for name in plan.recipe.deploy:
        if check := EXPORT_FORMATS[name].check:
            check(plan)


def make_products(context: RunContext) -> None:
    """Make, certify and score the exports that the recipe names, unless they exist from the same inputs."""
    recipe, trained = context.plan.recipe, hash_folder(context.trained_folder)
    settings, names = recipe.generation.model_dump(mode="json"), recipe.deploy
    inputs = hash_value([__version__, trained, context.plan.model_ref.content_hash, settings, sorted(names)])
    with context.step("deploy", inputs, [EXPORT_FORMATS[name].folder for name in names]) as step:
        if not step.skipped:
            step.facts["exports"] = {name: EXPORT_FORMATS[name].make(context) for name in names}
