"""Task summarize: shorten a text, with an encoder-decoder or a prompted decoder."""

from __future__ import annotations

from collections.abc import Mapping

from llmtune.data.task_rows import SummarizeRow
from llmtune.data.text_pairs import TextPair
from llmtune.evaluate.evaluated_task import EvalPrediction
from llmtune.evaluate.metric import Measure
from llmtune.recipe.schema import Recipe
from llmtune.tasks.base import Endpoint, Task
from llmtune.tasks.text_to_text import EncoderDecoder, PromptedDecoder, fill_template, measure_texts

PROMPT = "{document}\n\nSummarize the text above."
"""The text comes first: truncation to `data.max_length` removes its start and keeps the instruction."""


class Summarize(Task[SummarizeRow, str]):
    """The rows of summarize."""

    name = "summarize"
    endpoint = Endpoint("/v1/summarize", "the summary")
    default_prompt = "{document}"

    def make_row(self, given: Mapping[str, str | None]) -> SummarizeRow:
        """Return the row of a text to summarise."""
        return {"document": given["prompt"] or "", "summary": ""}

    def split_answer(self, row: SummarizeRow) -> tuple[SummarizeRow, str]:
        """Return the row without its summary, and the summary."""
        return {**row, "summary": ""}, row["summary"]

    def pair(self, row: SummarizeRow, recipe: Recipe) -> TextPair:
        """Return the document, in its prompt, and the summary."""
        template = recipe.summarize.prompt if recipe.summarize and recipe.summarize.prompt else self.default_prompt
        return TextPair(fill_template(template, document=row["document"]), row["summary"])

    def compute_metric(self, metric: str, output: EvalPrediction[str], recipe: Recipe) -> Measure | None:
        """Measure generated texts."""
        return measure_texts(metric, output)


class SummarizeEncoderDecoder(Summarize, EncoderDecoder[SummarizeRow]):
    """An encoder-decoder, which reads the document unchanged."""


class SummarizeDecoder(Summarize, PromptedDecoder[SummarizeRow]):
    """A decoder prompted to summarise."""

    default_prompt = PROMPT


VARIANTS = (SummarizeEncoderDecoder(), SummarizeDecoder())
