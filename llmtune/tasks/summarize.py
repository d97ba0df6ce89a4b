"""Task summarize: say a text in fewer words, with an encoder-decoder or, by prompt, with a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from llmtune.data.seq2seq_encoding import Pair, encode_by_prompt, encode_seq2seq, render_by_prompt
from llmtune.evaluate.task_predictions import write_texts
from llmtune.records import Row, Task
from llmtune.tasks import translate
from llmtune.tasks.translate import fill

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

PROMPT = "{document}\n\nSummarize the text above."
"""The text comes first: where it is cut to `data.max_length`, its start goes, and the instruction stays."""


def template(recipe: Recipe, otherwise: str) -> str:
    """Return the recipe's prompt, or what stands in its place."""
    return recipe.summarize.prompt if recipe.summarize and recipe.summarize.prompt else otherwise


def for_encoder(row: Row, recipe: Recipe) -> Pair:
    """Return the document as an encoder reads it."""
    return Pair(fill(template(recipe, "{document}"), document=row["document"]), row["summary"])


def for_decoder(row: Row, recipe: Recipe) -> Pair:
    """Return the document as a prompt."""
    return Pair(fill(template(recipe, PROMPT), document=row["document"]), row["summary"])


def prompt(row: Row) -> tuple[Row, str]:
    """Return the row without its summary, and the summary."""
    return {**row, "summary": ""}, row["summary"]


def ask(given: Mapping[str, str | None]) -> Row:
    """Return the row of a text to summarise."""
    return {"document": given["prompt"] or "", "summary": ""}


SEQ2SEQ = replace(
    translate.SEQ2SEQ,
    name="summarize",
    encode=partial(encode_seq2seq, to_pair=for_encoder),
    prompt=prompt,
    predict=partial(write_texts, to_pair=for_encoder),
    ask=ask,
)
DECODER: Task = replace(
    translate.DECODER,
    name="summarize",
    encode=partial(encode_by_prompt, to_pair=for_decoder),
    prompt=prompt,
    render=partial(render_by_prompt, to_pair=for_decoder),
    ask=ask,
)
FORMS = (SEQ2SEQ, DECODER)
