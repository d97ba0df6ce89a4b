"""Task token-classify: tag words in a text, such as names; tags in IOB2, each at its word's first token."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import TokenClassifierOutput

from llmtune.data.collators import IGNORED, encoder_batch, require_offsets
from llmtune.data.example import Example
from llmtune.data.overlong import too_long
from llmtune.data.row_store import iterate_rows
from llmtune.data.task_interface import Encoded
from llmtune.data.task_rows import TokenClassifyRow, find_words
from llmtune.data.tokenization import Segment, decode_shortened
from llmtune.errors import DataError
from llmtune.evaluate.classification_metrics import ENTITY_METRICS, entities_of, entity_table, measure_entities
from llmtune.evaluate.evaluated_task import EvalPrediction, LearnedClasses, LoadedModel, SimplePredictions
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.token_batches import run_encoder
from llmtune.model.causal_lm_loss import model_inputs, token_losses, unwrap
from llmtune.model.config import is_encoder, name_outputs
from llmtune.model.memory_plan import context_length
from llmtune.recipe.class_names import OUTSIDE
from llmtune.recipe.model_kind import TOKENS
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_sections import TokenClassifySection
from llmtune.records import SPLITS, Batch, Loss, Rows
from llmtune.tasks.base import Endpoint, Task
from llmtune.tasks.class_labels import UNKNOWN_LABEL


@dataclass(frozen=True)
class TagExample(Example):
    """A text with its tags."""

    tag_ids: Sequence[int] = ()
    """The tag of each token; `IGNORED` if not predicted."""


class TokenClassify(Task[TokenClassifyRow, list[str]]):
    """An encoder that tags each word."""

    name = "token-classify"
    endpoint = Endpoint(
        "/v1/token-classify",
        "a tag for each of `words`, in IOB2: `B-` begins an entity, `I-` continues it, `O` is outside",
    )
    model_kind = TOKENS
    example_type = TagExample
    loss_unit = "words"

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether the model is an encoder."""
        return is_encoder(config)

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Infer the entity types from the rows, unless the recipe names them.

        Raises DataError if no row has an entity.
        """
        section = recipe.token_classify or TokenClassifySection()
        tags = (tag for split in SPLITS for _, row in iterate_rows(rows, split) for tag in row["tags"])
        kinds = {tag[2:] for tag in tags if tag != OUTSIDE}
        model_kinds = kinds_of(config)
        labels = section.labels or (model_kinds if model_kinds and set(model_kinds) == kinds else tuple(sorted(kinds)))
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

    def words(self, row: TokenClassifyRow) -> list[str]:
        """Return the words of a row."""
        return row["tokens"]

    def split_answer(self, row: TokenClassifyRow) -> tuple[TokenClassifyRow, str]:
        """Return the row without its tags, and the tagged words as text."""
        return {**row, "tags": []}, list_entities(row["tokens"], row["tags"])

    def reference(self, row: TokenClassifyRow) -> list[str]:
        """Return the tags."""
        return list(row["tags"])

    def output_labels(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the tags."""
        return tuple(tag_names(labels_of(recipe)))

    def right_labels(self, reference: list[str]) -> list[list[str]]:
        """Return the tag of each word."""
        return [[tag] for tag in reference]

    def class_counts(self, rows: Rows, recipe: Recipe) -> dict[str, dict[str, int]]:
        """Count the entities of each type in each split."""
        counts = {
            split: Counter(
                tag[2:] for _, row in iterate_rows(rows, split) for tag in row["tags"] if tag.startswith("B-")
            )
            for split in SPLITS
        }
        return {label: {split: counts[split][label] for split in SPLITS} for label in labels_of(recipe)}

    def encode(
        self, rows: Sequence[TokenClassifyRow], processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Encoded]:
        """Return one example per row: its words with their tags, each at the word's first token."""
        numbers = {name: i for i, name in enumerate(tag_names(labels_of(recipe)))}
        encoded: list[Encoded] = []
        for row, (ids, firsts) in zip(rows, tokenize_words([row["tokens"] for row in rows], processor), strict=True):
            unknown = next((tag for tag in row["tags"] if tag not in numbers), None)
            if unknown is not None:
                encoded.append(f"{UNKNOWN_LABEL}: {unknown!r} is none of {', '.join(list(numbers)[:20])}")
            elif None in firsts:
                encoded.append(f"the tokenizer makes no token of the word {row['tokens'][firsts.index(None)]!r}")
            elif len(set(firsts)) < len(firsts):
                encoded.append("the tokenizer puts two words into one token, which can have only one tag")
            elif len(ids) > recipe.data.max_length:
                encoded.append(too_long(len(ids), recipe.data.max_length))
            else:
                targets = [IGNORED] * len(ids)
                for first, tag in zip(firsts, row["tags"], strict=True):
                    targets[first or 0] = numbers[tag]
                encoded.append([TagExample(ids, [], 0, tag_ids=targets, counted=len(firsts))])
        return encoded

    def learned_classes(self, example: TagExample) -> LearnedClasses:
        """Return the tag of each word's first token."""
        return [(place, [int(tag)]) for place, tag in enumerate(example.tag_ids) if tag != IGNORED]

    def collate(
        self, examples: Sequence[TagExample], processor: PreTrainedTokenizerBase, recipe: Recipe, packs: bool, draw: int
    ) -> Batch:
        """Add the positions of predicted tags; a word's other tokens are ignored."""
        batch, starts = encoder_batch(examples, processor.pad_token_id, packs)
        marked = [
            (start + at, tag, row)
            for row, (start, example) in enumerate(zip(starts, examples, strict=True))
            for at, tag in enumerate(example.tag_ids)
            if tag != IGNORED
        ]
        predict_S, targets_S, rows_S = torch.tensor(marked, dtype=torch.int64).reshape(-1, 3).T
        return batch | {"predict_S": predict_S, "targets_S": targets_S, "rows_S": rows_S}

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the cross entropy of the tags at the first token of each word."""
        logits_BTK = model(**model_inputs(model, batch)).logits
        return token_losses(logits_BTK.flatten(0, 1)[batch["predict_S"]], batch, by_row)

    def highlighted_text(
        self, example: TagExample, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Segment]:
        """Show a text with its entity tags; tags outside entities are supervised too, but not shown."""
        names = tag_names(labels_of(recipe))
        pieces: list[Segment] = []
        for token, tag in zip(example.input_ids, example.tag_ids, strict=True):
            pieces.append(Segment(f"{decode_shortened([token], processor)} ", False))
            if tag > 0:
                pieces.append(Segment(f"[{names[tag]}] ", True))
        return pieces

    def predict(self, rows: Sequence[TokenClassifyRow], loaded: LoadedModel) -> list[list[str]]:
        """Return the tag of each word, by its first token; `O` for a word without tokens.

        A text longer than the model's positions is read in parts.
        """
        processor, names = loaded.processor, tag_names(labels_of(loaded.recipe))
        limit = context_length(unwrap(loaded.model).config)
        parts = [(i, words) for i, row in enumerate(rows) for words in cut_words(row["tokens"], processor, limit)]
        tokenized = tokenize_words([words for _, words in parts], processor)

        def read(at: int, output: TokenClassifierOutput, row: int) -> list[list[float]]:
            logits_TK = output.logits[row].float().tolist()
            seen = (first if first is not None and first < len(logits_TK) else None for first in tokenized[at][1])
            return [[] if first is None else logits_TK[first] for first in seen]

        examples = [Example(ids[:limit], [], 0) for ids, _ in tokenized]
        part_logits = run_encoder(loaded.model, examples, processor.pad_token_id, loaded.device, read)
        logits: list[list[list[float]]] = [[] for _ in rows]
        for (i, _), part in zip(parts, part_logits, strict=True):
            logits[i] += part
        for i, of_words in enumerate(logits):
            loaded.note_logits(i, of_words)
        loaded.advance(len(rows))
        return [[names[word.index(max(word))] if word else OUTSIDE for word in of_words] for of_words in logits]

    def format_prediction(self, prediction: list[str]) -> str:
        """Write the tags, separated by spaces."""
        return " ".join(prediction)

    def format_answer(self, prediction: list[str], row: TokenClassifyRow) -> str:
        """List the entities of a text."""
        return list_entities(row["tokens"], prediction)

    def compute_metric(self, metric: str, output: EvalPrediction[list[str]], recipe: Recipe) -> Measure | None:
        """Measure entities, or tags for `accuracy`."""
        return measure_entities(metric, output.predictions, output.references) if metric in ENTITY_METRICS else None

    def baseline(
        self, references: Sequence[list[str]], prompts: Sequence[TokenClassifyRow], recipe: Recipe
    ) -> tuple[str, list[list[str]]]:
        """Predict the most frequent tag of the training rows for every word."""
        tag = Counter(tag for tags in references for tag in tags).most_common(1)[0][0]
        return f"the most frequent tag ({tag}) on every word", [[tag] * len(row["tokens"]) for row in prompts]

    def predict_simply(
        self, train: Sequence[TokenClassifyRow], prompts: Sequence[TokenClassifyRow], recipe: Recipe
    ) -> SimplePredictions:
        """Predict each word's most frequent tag of the training rows; `O` for other words."""
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for row in train:
            for word, tag in zip(row["tokens"], row["tags"], strict=True):
                counts[word][tag] += 1
        tags = {word: seen.most_common(1)[0][0] for word, seen in counts.items()}
        note = f"{len(tags):,} words of {len(train):,} training rows; {OUTSIDE} for other words"
        return SimplePredictions([[tags.get(word, OUTSIDE) for word in row["tokens"]] for row in prompts], note)

    def class_table(self, output: EvalPrediction[list[str]], recipe: Recipe) -> dict[str, Any]:
        """Return the table of entity types."""
        return {"classes": entity_table(output.predictions, output.references)}


def labels_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the entity types from the recipe, or those inferred from the rows."""
    return tuple((recipe.token_classify.labels if recipe.token_classify else None) or ())


def tag_names(labels: Sequence[str]) -> list[str]:
    """Return the IOB2 tags of entity types, in the order of the model's outputs."""
    return [OUTSIDE, *(f"{prefix}-{label}" for label in labels for prefix in "BI")]


def tokenize_words(
    texts: Sequence[Sequence[str]], processor: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int | None]]]:
    """Return, for each text, the ids of its words joined by spaces, and the index of each word's first token.

    Raises EnvironmentProblem for a tokenizer that does not report the offsets of its tokens.
    """
    require_offsets(processor)
    joined = [" ".join(words) for words in texts]
    tokenized = processor(joined, return_offsets_mapping=True, return_special_tokens_mask=True)
    encodings = []
    for i, words in enumerate(texts):
        ends = list(accumulate(len(word) + 1 for word in words))
        starts = [(end - len(word) - 1, end - 1) for word, end in zip(words, ends, strict=True)]
        firsts: list[int | None] = [None] * len(starts)
        word = 0
        for token, (left, right) in enumerate(tokenized["offset_mapping"][i]):
            if tokenized["special_tokens_mask"][i][token] or right <= left:
                continue
            while word < len(starts) and right > starts[word][0]:
                if left < starts[word][1]:
                    firsts[word] = token
                word += 1
        encodings.append((tokenized["input_ids"][i], firsts))
    return encodings


def cut_words(words: list[str], processor: PreTrainedTokenizerBase, limit: int | None) -> list[list[str]]:
    """Halve a text until each part fits into `limit` tokens, or is one word."""
    if limit is None or len(words) < 2 or len(processor(" ".join(words))["input_ids"]) <= limit:
        return [words]
    half = len(words) // 2
    return [*cut_words(words[:half], processor, limit), *cut_words(words[half:], processor, limit)]


def list_entities(words: Sequence[str], tags: Sequence[str]) -> str:
    """Write the entities of a text, each with its type."""
    entities = [f"{' '.join(words[first : last + 1])} ({kind})" for kind, first, last in entities_of(tags)]
    return ", ".join(entities) or "(none)"


def kinds_of(config: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the entity types of a model, if its outputs are in our order."""
    names = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    kinds = tuple(dict.fromkeys(name[2:] for name in names if name[:2] in ("B-", "I-")))
    return kinds if kinds and names == tag_names(kinds) else None


VARIANTS = (TokenClassify(),)
