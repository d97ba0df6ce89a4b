"""Kinds of rows of `embed`, and the settings that do not fit them."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PretrainedConfig

from llmtune.data.row_store import iterate_rows
from llmtune.errors import DataError, Problem
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import RANKING, TASK_FACTS
from llmtune.recipe.task_sections import EmbedSection
from llmtune.recipe.task_variant import at_ten
from llmtune.records import SPLITS, Rows
from llmtune.tasks.sentence_vectors import SPREAD

KINDS = {"passages": ("ranking",), "scores": ("cosent", "cosine"), "labels": ("triplet",)}
"""By kind of rows, the losses that learn from them; the first is the default."""
CORRELATIONS = ("spearman", "pearson")


def infer_rows(rows: Rows) -> str:
    """Return the kind of rows: passages, scores or labels. Raises DataError if there are several."""
    kinds = {
        "labels" if row["label"] is not None else "passages" if row["score"] is None else "scores"
        for split in SPLITS
        for _, row in iterate_rows(rows, split)
    }
    if len(kinds) > 1:
        what = f"the rows have {' and '.join(sorted(kinds))}"
        raise DataError.of(what, "data.train", "Give rows of one kind: passages, scores, or labels.")
    return kinds.pop() if kinds else "passages"


def find_misfit_settings(
    recipe: Recipe, section: EmbedSection, loss: str, kind: str, config: PretrainedConfig
) -> Iterator[Problem]:
    """Yield settings that do not fit the rows or the model."""
    if loss not in KINDS[kind]:
        what = f"embed.loss: {loss} cannot learn from rows with {kind}"
        yield Problem(what, "embed.loss", f"Use {' or '.join(KINDS[kind])}.")
    size = config.get_text_config().hidden_size
    if section.dimensions and max(section.dimensions) != size:
        what = f"the longest of embed.dimensions is {max(section.dimensions)}, but the model's vectors have {size}"
        yield Problem(f"{what} numbers", "embed.dimensions", f"Add {size}, and remove longer ones.")
    if kind != "passages" and recipe.data.corpus:
        yield Problem(f"rows with {kind} are not searched for", "data.corpus", "Remove it.")
    if kind != "scores" and recipe.train.batch_size < 2 and recipe.train.batch_tokens is None:
        yield Problem("a step of one row has no other passages", "train.batch_size", "Set it to 16 or more.")
    known = {"scores": (*CORRELATIONS, *SPREAD)}.get(kind, (*RANKING, *SPREAD))
    defaults = TASK_FACTS["embed"].default_metrics
    for metric in () if recipe.evaluate.metrics == defaults else recipe.evaluate.metrics:
        if at_ten(metric) not in known:
            what = f"rows with {kind} do not support {metric}"
            yield Problem(what, "evaluate.metrics", f"Metrics of these rows: {', '.join(known)}.")
