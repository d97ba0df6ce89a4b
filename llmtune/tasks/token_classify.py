"""Task token-classify: mark words in a text, such as names; tags in IOB2, each at its word's first token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.data import iterate_rows
from llmtune.data.data_report import tag_pieces
from llmtune.data.label_encoding import encode_tags, tag_names
from llmtune.data.labelled_rows import OUTSIDE, find_words
from llmtune.data.target_collators import tags_collator
from llmtune.errors import DataError
from llmtune.evaluate.metrics import Measure
from llmtune.evaluate.ner_metrics import ENTITY_METRICS, entities_of, entity_table, measure_entities
from llmtune.evaluate.task_predictions import predict_tags
from llmtune.model.config import is_encoder
from llmtune.model.heads import name_outputs
from llmtune.model.task_losses import tags_loss
from llmtune.recipe import TokenClassifySection
from llmtune.records import SIDES, Row, Rows, Task

if TYPE_CHECKING:
    from llmtune.recipe import Recipe


def prompt(row: Row) -> tuple[Row, str]:
    """Return the row without its tags, and the tagged words as text."""
    return {**row, "tags": []}, mark(row["tokens"], row["tags"])


def reference(row: Row) -> list[str]:
    """Return the tags."""
    return list(row["tags"])


def mark(words: Sequence[str], tags: Sequence[str]) -> str:
    """Write the entities of a text, each with its kind."""
    found = [f"{' '.join(words[start:end])} ({kind})" for kind, start, end in spans(tags)]
    return ", ".join(found) or "(none)"


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return kind, first word and end of each entity."""
    return [(kind, first, last + 1) for kind, first, last in entities_of(tags)]


def write(said: Any) -> str:
    """Write tags in a row."""
    return " ".join(said)


def tell(said: Any, row: Row) -> str:
    """Name the entities of a text."""
    return mark(row["tokens"], said)


def ask(given: Mapping[str, str | None]) -> Row:
    """Return the row of a text, cut into words."""
    text = given["prompt"] or ""
    return {"tokens": [text[start:end] for start, end in find_words(text)], "tags": []}


def settle(recipe: Recipe, rows: Rows, config: Any) -> Recipe:
    """Find the kinds of entities in the rows, unless the recipe names them.

    Raises DataError where there are none.
    """
    section = recipe.token_classify or TokenClassifySection()
    every = {tag[2:] for side in SIDES for _, row in iterate_rows(rows, side) for tag in row["tags"] if tag != OUTSIDE}
    own = kinds_of(config)
    labels = section.labels or (own if own and set(own) == every else tuple(sorted(every)))
    if not labels:
        raise DataError.of("no row has an entity", "token_classify.labels", "Tags are B-NAME and I-NAME.")
    return recipe.model_copy(update={"token_classify": section.model_copy(update={"labels": tuple(labels)})})


def kinds_of(config: Any) -> tuple[str, ...] | None:
    """Return the kinds of entities that a model knows, where its outputs are in our order."""
    own = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    kinds = tuple(dict.fromkeys(name[2:] for name in own if name[:2] in ("B-", "I-")))
    return kinds if kinds and own == tag_names(kinds) else None


def count_classes(rows: Rows, recipe: Recipe) -> dict[str, dict[str, int]]:
    """Count the entities of each kind on each side."""
    labels = (recipe.token_classify.labels if recipe.token_classify else None) or ()
    sides = {
        side: Counter(tag[2:] for _, row in iterate_rows(rows, side) for tag in row["tags"] if tag.startswith("B-"))
        for side in SIDES
    }
    return {label: {side: sides[side][label] for side in SIDES} for label in labels}


def shape_config(config: Any, recipe: Recipe) -> None:
    """Tell the model its tags."""
    section = recipe.token_classify or TokenClassifySection()
    name_outputs(config, tag_names(section.labels or ()), None)


def measure(
    metric: str,
    said: Sequence[list[str]],
    wanted: Sequence[list[str]],
    recipe: Recipe,
    base: Sequence[Any] | None = None,
) -> Measure | None:
    """Measure entities, and with `accuracy` tags."""
    return measure_entities(metric, said, wanted) if metric in ENTITY_METRICS else None


def baseline(learned: Sequence[list[str]], questions: Sequence[Row], recipe: Recipe) -> tuple[str, list[Any]]:
    """Give every word the most frequent tag of the training rows."""
    tag = Counter(tag for tags in learned for tag in tags).most_common(1)[0][0]
    return f"the most frequent tag ({tag}) on every word", [[tag] * len(row["tokens"]) for row in questions]


def details(said: Sequence[list[str]], wanted: Sequence[list[str]], recipe: Recipe) -> dict[str, Any]:
    """Return the table of kinds of entities."""
    return {"classes": entity_table(said, wanted)}


TOKEN_CLASSIFY = Task(
    name="token-classify",
    auto_class="AutoModelForTokenClassification",
    peft_task_type="TOKEN_CLS",
    encode=encode_tags,
    collator=tags_collator,
    loss=tags_loss,
    prompt=prompt,
    predict=predict_tags,
    measure=measure,
    reference=reference,
    write=write,
    baseline=baseline,
    details=details,
    count_classes=count_classes,
    ask=ask,
    asks={"prompt": True},
    tell=tell,
    settle=settle,
    shape_config=shape_config,
    pieces=tag_pieces,
    fits=is_encoder,
    packs=True,
    unit="words",
    by_token=False,
    headed=True,
)
FORMS = (TOKEN_CLASSIFY,)
