"""Task translate: put a text into another language, with an encoder-decoder or, by prompt, with a decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llmtune.data.collators import causal_collator
from llmtune.data.data_report import pair_pieces
from llmtune.data.seq2seq_encoding import Pair, encode_by_prompt, encode_seq2seq, knows_languages, render_by_prompt
from llmtune.data.target_collators import seq2seq_collator
from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.metrics import TEXT_MEASURES, Measure, measure_texts
from llmtune.evaluate.task_predictions import write_texts
from llmtune.model import causal_loss
from llmtune.model.decoder_start import check_decoder_start
from llmtune.model.task_losses import seq2seq_loss
from llmtune.records import Row, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe, TranslateSection

PROMPT = "Translate from {source_language} into {target_language}.\n\n{source}"


def languages(row: Row, recipe: Recipe) -> tuple[str | None, str | None]:
    """Return the languages of a row: its own, else the recipe's, else what the data set calls them.

    Raises RecipeError where the recipe says them the other way round than the data set.
    """
    section: TranslateSection | None = recipe.translate
    said = (section.source_language, section.target_language) if section else (None, None)
    named = row.get("languages") or (None, None)
    turned = zip(said, named[::-1], strict=True)
    if all(wanted and name and wanted.lower().startswith(name.lower()) for wanted, name in turned):
        raise RecipeError.of(
            f"the rows go from {named[0]} into {named[1]}, and the recipe says from {said[0]} into {said[1]}",
            "translate.source_language",
            "The first text of a row is its source: turn the languages round, or the texts in the file.",
        )
    source, target = (row.get(f"{side}_language") for side in ("source", "target"))
    return source or said[0] or named[0], target or said[1] or named[1]


def fill(template: str, **fields: str | None) -> str:
    """Put fields into a prompt; braces that are no field stay, and so do those within a field."""
    named = "|".join(map(re.escape, fields))
    return re.sub(f"{{({named})}}", lambda found: fields[found[1]] or "", template)


def for_encoder(row: Row, recipe: Recipe) -> Pair:
    """Return the source as an encoder reads it, with its languages."""
    source_language, target_language = languages(row, recipe)
    template = recipe.translate.prompt if recipe.translate and recipe.translate.prompt else "{source}"
    words = {"source_language": source_language, "target_language": target_language}
    return Pair(fill(template, **words, source=row["source"]), row["target"], source_language, target_language)


def for_decoder(row: Row, recipe: Recipe) -> Pair:
    """Return the source as a prompt.

    Raises RecipeError where the prompt wants to name a language that nobody says.
    """
    source_language, target_language = languages(row, recipe)
    template = recipe.translate.prompt if recipe.translate and recipe.translate.prompt else PROMPT
    words = {"source_language": source_language, "target_language": target_language}
    for name, value in words.items():
        if f"{{{name}}}" in template and value is None:
            fix = "Set it to a word, such as German; or give the rows a column of that name."
            raise RecipeError.of(
                "the prompt names the language, and neither recipe nor row says it", f"translate.{name}", fix
            )
    return Pair(fill(template, **words, source=row["source"]), row["target"], source_language, target_language)


def check(model: Any, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Refuse a decoder without a start token, and languages that neither the tokenizer nor the prompt reads."""
    check_decoder_start(model, processor, recipe)
    about = recipe.translate
    if about is None or knows_languages(processor):
        return
    RecipeError.collect(
        Problem(
            f"'translate.{name}' has no effect: this model's tokenizer has no language codes",
            f"translate.{name}",
            f"Remove it, or put {{{name}}} into translate.prompt, e.g. with T5.",
        )
        for name in ("source_language", "target_language")
        if getattr(about, name) is not None and f"{{{name}}}" not in (about.prompt or "")
    )


def prompt(row: Row) -> tuple[Row, str]:
    """Return the row without its target, and the target."""
    return {**row, "target": ""}, row["target"]


def ask(given: Mapping[str, str | None]) -> Row:
    """Return the row of a text to translate."""
    return {"source": given["prompt"] or "", "target": "", "source_language": None, "target_language": None}


def measure(
    metric: str, said: Sequence[str], wanted: Sequence[str], recipe: Recipe, base: Sequence[Any] | None = None
) -> Measure | None:
    """Measure generated texts; token metrics are measured elsewhere."""
    return measure_texts(metric, said, wanted) if metric in TEXT_MEASURES else None


SEQ2SEQ = Task(
    name="translate",
    auto_class="AutoModelForSeq2SeqLM",
    peft_task_type="SEQ_2_SEQ_LM",
    encode=partial(encode_seq2seq, to_pair=for_encoder),
    collator=seq2seq_collator,
    loss=seq2seq_loss,
    prompt=prompt,
    predict=partial(write_texts, to_pair=for_encoder),
    measure=measure,
    ask=ask,
    asks={"prompt": True},
    pieces=pair_pieces,
    check=check,
)
DECODER = Task(
    name="translate",
    auto_class="AutoModelForCausalLM",
    peft_task_type="CAUSAL_LM",
    encode=partial(encode_by_prompt, to_pair=for_decoder),
    collator=causal_collator,
    loss=causal_loss,
    prompt=prompt,
    render=partial(render_by_prompt, to_pair=for_decoder),
    measure=measure,
    ask=ask,
    asks={"prompt": True},
    packs=True,
)
FORMS = (SEQ2SEQ, DECODER)
