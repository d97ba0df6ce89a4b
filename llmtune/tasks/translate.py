"""Task translate: translate a text, with an encoder-decoder or a prompted decoder."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.task_rows import TranslateRow
from llmtune.data.text_pairs import TextPair, has_languages
from llmtune.errors import Problem, RecipeError
from llmtune.evaluate.evaluated_task import EvalPrediction
from llmtune.evaluate.metric import Measure
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import TranslateSection
from llmtune.tasks.base import Endpoint, Task, option_of
from llmtune.tasks.text_to_text import EncoderDecoder, PromptedDecoder, fill_template, measure_texts

PROMPT = "Translate from {source_language} into {target_language}.\n\n{source}"


class Translate(Task[TranslateRow, str]):
    """The rows of translate."""

    name = "translate"
    endpoint = Endpoint("/v1/translate", "the translation")
    optional_inputs = ("source_language", "target_language")
    default_prompt = "{source}"

    def make_row(self, given: Mapping[str, str | None]) -> TranslateRow:
        """Return the row of a text to translate, with its languages if they are given."""
        source, target = given.get("source_language"), given.get("target_language")
        return {"source": given["prompt"] or "", "target": "", "source_language": source, "target_language": target}

    def stated_inputs(self, row: TranslateRow, recipe: Recipe) -> dict[str, str | None]:
        """Return the languages of a row, which may be those of its data set or of the recipe."""
        return dict(zip(self.optional_inputs, languages_of(row, recipe), strict=True))

    def split_answer(self, row: TranslateRow) -> tuple[TranslateRow, str]:
        """Return the row without its target, and the target."""
        return {**row, "target": ""}, row["target"]

    def pair(self, row: TranslateRow, recipe: Recipe) -> TextPair:
        """Return the source, in its prompt, and the target, with their languages."""
        source_language, target_language = languages_of(row, recipe)
        fields = {"source_language": source_language, "target_language": target_language}
        self.check_languages(fields, recipe)
        text = fill_template(self.template(recipe), **fields, source=row["source"])
        return TextPair(text, row["target"], source_language, target_language)

    def template(self, recipe: Recipe) -> str:
        """Return the recipe's prompt, or the variant's default."""
        return recipe.translate.prompt if recipe.translate and recipe.translate.prompt else self.default_prompt

    def check_languages(self, languages: Mapping[str, str | None], recipe: Recipe) -> None:
        """Refuse a row that lacks required languages."""

    def compute_metric(self, metric: str, output: EvalPrediction[str], recipe: Recipe) -> Measure | None:
        """Measure generated texts."""
        return measure_texts(metric, output)


class TranslateEncoderDecoder(Translate, EncoderDecoder[TranslateRow]):
    """An encoder-decoder translator; its tokenizer may write language codes."""

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Refuse a decoder without a start token, and languages that neither the tokenizer nor the prompt uses."""
        super().check_model(model, processor, recipe)
        section = recipe.translate
        if section is None or has_languages(processor):
            return
        RecipeError.collect(
            Problem(
                f"'translate.{name}' has no effect: this model's tokenizer has no language codes",
                f"translate.{name}",
                f"Remove it, or put {{{name}}} into translate.prompt, e.g. with T5.",
            )
            for name in ("source_language", "target_language")
            if getattr(section, name) is not None and f"{{{name}}}" not in (section.prompt or "")
        )


class TranslateDecoder(Translate, PromptedDecoder[TranslateRow]):
    """A decoder prompted to translate."""

    default_prompt = PROMPT

    def check_languages(self, languages: Mapping[str, str | None], recipe: Recipe) -> None:
        """Raise RecipeError if the prompt names a language that neither the recipe nor the row states."""
        for name, value in languages.items():
            if f"{{{name}}}" in self.template(recipe) and value is None:
                fix = "Set it to a word, such as German; or add a column of that name to the rows. "
                fix += f"`llmtune generate` takes {option_of(name)}."
                raise RecipeError.of(
                    "the prompt needs the language, and neither recipe nor row states it", f"translate.{name}", fix
                )


def languages_of(row: TranslateRow, recipe: Recipe) -> tuple[str | None, str | None]:
    """Return the languages of a row: its own, else the recipe's, else the data set's names for them.

    Raises RecipeError if the recipe has them in the opposite direction of the data set.
    """
    section = recipe.translate or TranslateSection()
    stated = (section.source_language, section.target_language)
    named = row.get("languages") or (None, None)
    turned = zip(stated, named[::-1], strict=True)
    if all(language and name and language.lower().startswith(name.lower()) for language, name in turned):
        raise RecipeError.of(
            f"the rows go from {named[0]} into {named[1]}, but the recipe says from {stated[0]} into {stated[1]}",
            "translate.source_language",
            "The first text of a row is its source: swap the languages in the recipe, or the texts in the file.",
        )
    source = row.get("source_language") or stated[0] or named[0]
    return source, row.get("target_language") or stated[1] or named[1]


VARIANTS = (TranslateEncoderDecoder(), TranslateDecoder())
