"""Task token-classify: mark words in a text, such as names; tags in IOB2, each at its word's first token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from llmtune.data import iterate_rows
from llmtune.data.data_report import tag_pieces
from llmtune.data.label_encoding import encode_tags, tag_names
from llmtune.data.labelled_rows import OUTSIDE, find_words
from llmtune.data.target_collators import tags_collator
from llmtune.data.task_interface import Encoded
from llmtune.errors import DataError
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.ner_metrics import ENTITY_METRICS, entities_of, entity_table, measure_entities
from llmtune.evaluate.task_predictions import predict_tags
from llmtune.model.config import is_encoder
from llmtune.model.heads import name_outputs
from llmtune.model.task_losses import tags_loss
from llmtune.recipe import TokenClassifySection
from llmtune.records import SIDES, Advance, Batch, Collate, Example, Loss, Rows
from llmtune.tasks.base import Task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe


class TokenClassifyRow(TypedDict):
    """Words with a tag each; a prompt has no tags."""

    tokens: list[str]
    tags: list[str]


class TokenClassify(Task[TokenClassifyRow, list[str]]):
    """An encoder that gives each word a tag."""

    name = "token-classify"
    auto_class = "AutoModelForTokenClassification"
    peft_task_type = "TOKEN_CLS"
    packs = True
    loss_unit = "words"
    predicts_tokens = False
    trains_head = True

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model is an encoder."""
        return is_encoder(config)

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Find the kinds of entities in the rows, unless the recipe names them.

        Raises DataError where there are none.
        """
        section = recipe.token_classify or TokenClassifySection()
        tags = (tag for side in SIDES for _, row in iterate_rows(rows, side) for tag in row["tags"])
        kinds = {tag[2:] for tag in tags if tag != OUTSIDE}
        own = kinds_of(config)
        labels = section.labels or (own if own and set(own) == kinds else tuple(sorted(kinds)))
        if not labels:
            raise DataError.of("no row has an entity", "token_classify.labels", "Tags are B-NAME and I-NAME.")
        return recipe.model_copy(update={"token_classify": section.model_copy(update={"labels": tuple(labels)})})

    def configure_head(self, config: PretrainedConfig, recipe: Recipe) -> None:
        """Give the model its tags."""
        name_outputs(config, tag_names(labels_of(recipe)), None)

    def make_row(self, given: Mapping[str, str | None]) -> TokenClassifyRow:
        """Return the row of a text, cut into words."""
        text = given["prompt"] or ""
        return {"tokens": [text[start:end] for start, end in find_words(text)], "tags": []}

    def split_answer(self, row: TokenClassifyRow) -> tuple[TokenClassifyRow, str]:
        """Return the row without its tags, and the tagged words as text."""
        return {**row, "tags": []}, list_entities(row["tokens"], row["tags"])

    def reference(self, row: TokenClassifyRow) -> list[str]:
        """Return the tags."""
        return list(row["tags"])

    def class_counts(self, rows: Rows, recipe: Recipe) -> dict[str, dict[str, int]]:
        """Count the entities of each kind in each split."""
        counts = {
            side: Counter(tag[2:] for _, row in iterate_rows(rows, side) for tag in row["tags"] if tag.startswith("B-"))
            for side in SIDES
        }
        return {label: {side: counts[side][label] for side in SIDES} for label in labels_of(recipe)}

    def encode(
        self, rows: Sequence[TokenClassifyRow], processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Encoded]:
        """Return one example a row: its words with their tags, each at the word's first token."""
        return encode_tags(rows, processor, recipe)

    def collator(self, processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool | None = None) -> Collate:
        """Return what packs texts, or pads them."""
        return tags_collator(processor, recipe, bool(packs))

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the tags."""
        return tags_loss(model, batch, by_row)

    def highlighted_text(
        self, example: Example, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[tuple[str, bool]]:
        """Show a text with the tags of its words."""
        return tag_pieces(example, processor, recipe)

    def predict(
        self,
        model: torch.nn.Module,
        rows: Sequence[TokenClassifyRow],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        *,
        device: str,
        advance: Advance = lambda rows: None,
    ) -> list[list[str]]:
        """Return the tag of each word."""
        return predict_tags(model, rows, processor, recipe, device=device, advance=advance)

    def format_prediction(self, prediction: list[str]) -> str:
        """Write tags in a row."""
        return " ".join(prediction)

    def format_answer(self, prediction: list[str], row: TokenClassifyRow) -> str:
        """Name the entities of a text."""
        return list_entities(row["tokens"], prediction)

    def compute_metric(
        self,
        metric: str,
        predictions: Sequence[list[str]],
        references: Sequence[list[str]],
        recipe: Recipe,
        base: Sequence[list[str]] | None = None,
    ) -> Measure | None:
        """Measure entities, and with `accuracy` tags."""
        return measure_entities(metric, predictions, references) if metric in ENTITY_METRICS else None

    def baseline(
        self, references: Sequence[list[str]], prompts: Sequence[TokenClassifyRow], recipe: Recipe
    ) -> tuple[str, list[list[str]]]:
        """Give every word the most frequent tag of the training rows."""
        tag = Counter(tag for tags in references for tag in tags).most_common(1)[0][0]
        return f"the most frequent tag ({tag}) on every word", [[tag] * len(row["tokens"]) for row in prompts]

    def class_table(
        self, predictions: Sequence[list[str]], references: Sequence[list[str]], recipe: Recipe
    ) -> dict[str, Any]:
        """Return the table of kinds of entities."""
        return {"classes": entity_table(predictions, references)}


def labels_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the kinds of entities that the recipe names, or the rows decided."""
    return tuple((recipe.token_classify.labels if recipe.token_classify else None) or ())


def list_entities(words: Sequence[str], tags: Sequence[str]) -> str:
    """Write the entities of a text, each with its kind."""
    entities = [f"{' '.join(words[first : last + 1])} ({kind})" for kind, first, last in entities_of(tags)]
    return ", ".join(entities) or "(none)"


def kinds_of(config: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the kinds of entities that a model knows, where its outputs are in our order."""
    own = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    kinds = tuple(dict.fromkeys(name[2:] for name in own if name[:2] in ("B-", "I-")))
    return kinds if kinds and own == tag_names(kinds) else None


VARIANTS = (TokenClassify(),)
