"""Task embed: turn texts into vectors that are close if the texts belong together, for search and clustering."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.collators import encoder_batch
from llmtune.data.corpus import load_corpus
from llmtune.data.example import Example
from llmtune.data.overlong import Lost, too_long
from llmtune.data.row_store import iterate_rows
from llmtune.data.row_text import text_key
from llmtune.data.search_rows import EmbedRow, given_passages, named_texts, write_ranking
from llmtune.data.task_interface import Encoded
from llmtune.data.tokenization import Segment, decode_shortened
from llmtune.errors import DataError, RecipeError
from llmtune.evaluate.bm25 import index_words
from llmtune.evaluate.classification_metrics import measure_classes
from llmtune.evaluate.evaluated_task import EvalPrediction, LoadedModel
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.ranking_metrics import (
    Vectors,
    cosine,
    format_vectors,
    measure_spread,
    prepare_vectors,
)
from llmtune.model.memory_plan import context_length
from llmtune.model.sentence_folder import SentenceSettings, read_settings, write_settings
from llmtune.recipe.model_kind import VECTORS
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import Batch, Loss, Rows
from llmtune.store.atomic_files import hash_value
from llmtune.tasks.base import Endpoint, ReadingTask
from llmtune.tasks.embed_ranking import measure_search
from llmtune.tasks.embed_settings import CORRELATIONS, KINDS, find_misfit_settings, infer_rows
from llmtune.tasks.sentence_vectors import (
    SPREAD,
    VectorExample,
    describe_settings,
    embed_section,
    embed_texts,
    embedding_loss,
    hash_text,
    hidden_states,
    measure_last_texts,
    pool,
    require_triplets,
    resolve_settings,
    split_texts,
    tokenize_prompted,
)
from llmtune.train.objective import CachedFeatures, StepObjective


class Embed(ReadingTask[EmbedRow, Vectors]):
    """An encoder or decoder whose token vectors are pooled."""

    name = "embed"
    required_inputs = ()
    optional_inputs = ("prompt", "passages")
    endpoint = Endpoint("/v1/embeddings", "the vectors of the texts", "input")
    model_kind = VECTORS
    example_type = VectorExample
    has_row_loss = False

    def needs_float32(self, recipe: Recipe) -> bool:
        """Return True: cosines rank texts."""
        return True

    def supports(self, config: PretrainedConfig) -> bool:
        """Whether a model is an encoder or a decoder. Raises as `read_settings` does."""
        read_settings(Path(config.name_or_path))
        return super().supports(config)

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Choose the loss and the metrics by the kind of rows; take over the base's pooling and prompts.

        Raises:
            DataError: rows of several kinds, classes or scores that nothing can be learned from, or scores that a
                cosine cannot reach.
            RecipeError: a loss or a metric that these rows do not support, lengths that the model does not have, a
                step without negatives, or a base that cannot be trained.
        """
        section = resolve_settings(embed_section(recipe), config)
        kind = infer_rows(rows)
        loss = section.loss if section.loss != "auto" else KINDS[kind][0]
        RecipeError.collect(find_misfit_settings(recipe, section, loss, kind, config))
        scores = {row["score"] for _, row in iterate_rows(rows, "train")} if kind == "scores" else set()
        if loss == "cosine" and not all(abs(score) <= 1 for score in scores):
            raise DataError.of("scores outside −1 to 1", "embed.loss", "Rescale them, or set embed.loss: cosent.")
        if loss == "cosent" and len(scores) == 1:
            fix = "Give rows with other scores too, or set embed.loss: cosine."
            raise DataError.of(f"all training rows have the score {scores.pop():g}", "data.train", fix)
        if kind == "labels":
            require_triplets(row["label"] for _, row in iterate_rows(rows, "train"))
        metrics = recipe.evaluate.metrics
        if metrics in ((), TASK_FACTS["embed"].default_metrics) and kind == "scores":
            metrics = (*CORRELATIONS, "random_cosine")
        evaluate = recipe.evaluate.model_copy(update={"metrics": metrics})
        return recipe.model_copy(update={"embed": section.model_copy(update={"loss": loss}), "evaluate": evaluate})

    def check_model(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        """Set the padding token, and freeze a pooling layer, which the vectors do not use."""
        super().check_model(model, processor, recipe)
        pooler = getattr(model, "pooler", None)
        if isinstance(pooler, torch.nn.Module):
            pooler.requires_grad_(False)

    def make_row(self, given: Mapping[str, str | None]) -> EmbedRow:
        """Return the row of a query, passages (a JSON list, or one per line), or both.

        Raises RecipeError without any text.
        """
        query, passages = given.get("prompt") or None, given_passages(given.get("passages"))
        if query is None and not passages:
            raise RecipeError.of("no text is given", "--prompt", "Give a query, or --passages.")
        return {"query": query, "passages": passages, "negatives": [], "score": None, "label": None}

    def query_ids(self, text: str, processor: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[list[int], str]:
        """Return the tokens of a query, and the prompt before it."""
        return tokenize_prompted("query", text, processor, recipe), embed_section(recipe).query_prompt or ""

    def split_answer(self, row: EmbedRow) -> tuple[EmbedRow, str]:
        """Return the texts of a row, and their known passage, score or label."""
        answer = row["label"] if row["score"] is None else f"{row['score']:g}"
        return {**row, "score": None, "label": None}, answer or "\n".join(row["passages"])

    def named_texts(self, row: EmbedRow) -> list[tuple[str, str]]:
        """Return all texts of a row, each with its name."""
        return named_texts(row)

    def reference(self, row: EmbedRow) -> EmbedRow:
        """Return the row."""
        return row

    def row_notes(self, rows: Rows, split: str, recipe: Recipe) -> dict[str, str]:
        """Describe the vectors and the corpus, and count the queries and passages that training rows have too."""
        trained: tuple[set[str], set[str]] = set(), set()
        held_out: tuple[set[str], set[str]] = set(), set()
        for name, (queries, passages) in (("train", trained), (split, held_out)):
            for _, row in iterate_rows(rows, name):
                queries.add(text_key(row["query"]))
                passages.update(map(text_key, row["passages"]))
        shared = [len(new & old) for new, old in zip(held_out, trained, strict=True)]
        query_count, passage_count = map(len, held_out)
        notes = {
            "vectors": describe_settings(embed_section(recipe)),
            "queries": f"{query_count:,}; {shared[0]:,} also occur in training rows",
        }
        if passage_count:
            corpus = f"the passages and negatives of the {split} rows"
            if recipe.data.corpus and split == "test":
                further = {*map(text_key, load_corpus(rows.folder))} - held_out[1]
                corpus = f"data.corpus ({len(further):,} further passages), and {corpus}"
            notes["passages"] = f"{corpus}; {shared[1]:,} of {passage_count:,} passages also occur in training rows"
        return notes

    def encode_row(self, row: EmbedRow, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Encoded:
        """Return an example of the query, one passage and the negatives, with their hashes, for each passage."""
        named, limit = named_texts(row), recipe.data.max_length
        whole = [tokenize_prompted(*one, processor, recipe) for one in named]
        longest = max(map(len, whole))
        if longest > limit and recipe.data.on_overlong != "truncate":
            return too_long(longest, limit)
        if not min(map(len, whole)):
            return "a text has no tokens"
        kept = [
            ids if len(ids) <= limit else tokenize_prompted(*one, processor, recipe, limit)
            for ids, one in zip(whole, named, strict=True)
        ]
        lost = Lost(sum(map(len, whole)) - sum(map(len, kept))) if longest > limit else None
        hashes = [hash_text(text_key(text)) for _, text in named]
        negatives = range(1 + len(row["passages"]), len(kept))
        chosen = [[0, 1 + i, *negatives] for i in range(len(row["passages"]))] or [[0]]
        score = [] if row["score"] is None else [row["score"]]
        label = [] if row["label"] is None else [hash_text(row["label"])]
        examples: list[Example] = []
        for places in chosen:
            ids = [token for place in places for token in kept[place]]
            borders = np.cumsum([0, *(len(kept[place]) for place in places)]).tolist()
            example = VectorExample(
                ids,
                [],
                0,
                counted=1,
                longest=max(len(kept[place]) for place in places),
                lost=lost,
                texts=[border for pair in pairwise(borders) for border in pair],
                text_hashes=[hashes[place] for place in places],
                label_hash=label,
                score=score,
            )
            examples.append(example)
        return examples

    def collate(
        self,
        examples: Sequence[VectorExample],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        packs: bool,
        draw: int,
    ) -> Batch:
        """Put all texts into one batch, longest first, with their `lengths`, and the `examples` that they are from.

        Packed attention computes neighbours of equal length together, which takes a tenth off a step of short texts.
        `places` [texts] has the place of each text in the batch.
        """
        texts = [text for example in examples for text in split_texts(example)]
        order = np.argsort([-len(text.input_ids) for text in texts], kind="stable")
        batch, _ = encoder_batch([texts[i] for i in order], processor.pad_token_id, packs)
        lengths = [len(texts[i].input_ids) for i in order]
        places = torch.from_numpy(order.argsort())
        return batch | {"lengths": lengths, "places": places, "examples": examples, "recipe": recipe}

    def features(self, model: torch.nn.Module, batch: Batch) -> list[torch.Tensor]:
        """Return the pooled vectors [texts, D] of each example, before normalisation."""
        hidden_BTD = hidden_states(model, batch)
        lengths, section = batch["lengths"], embed_section(batch["recipe"])
        if "cu_seq_lens_q" in batch:
            texts = torch.split(hidden_BTD[0], lengths)
        else:
            texts = tuple(row[:length] for row, length in zip(hidden_BTD, lengths, strict=True))
        vectors = torch.stack([pool(text, section.pooling) for text in texts])[batch["places"]]
        return list(torch.split(vectors, [len(example.texts) // 2 for example in batch["examples"]]))

    def objective(self, recipe: Recipe) -> StepObjective:
        """Return an objective that compares all vectors of a step."""
        compare = partial(embedding_loss, section=embed_section(recipe))
        return CachedFeatures(self.loss, self.features, compare, measure_last_texts)

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Return the loss of a batch that is a complete step."""
        return embedding_loss(self.features(model, batch), batch["examples"], embed_section(batch["recipe"]))

    def guessing_loss(self, config: PretrainedConfig, examples: Iterable[VectorExample], recipe: Recipe) -> float:
        """Return the loss of vectors that are all equal, up to the rounding of small steps."""
        section, rows = embed_section(recipe), recipe.train.batch_size
        texts = max(len(example.texts) // 2 for example in examples)
        equal = {"ranking": math.log(rows * max(1, texts - 1)), "cosent": math.log(1 + rows * rows / 2)}
        return equal.get(section.loss, 1.0) * len(section.dimensions or (1,))

    def highlighted_text(
        self, example: VectorExample, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Segment]:
        """Show the query, with the passage marked."""
        texts = [decode_shortened(text.input_ids, processor) for text in split_texts(example)]
        return [Segment(f"{text}\n", place == 1) for place, text in enumerate(texts)]

    def count_tokens(self, row: EmbedRow, processor: PreTrainedTokenizerBase, recipe: Recipe, limit: int) -> int:
        """Return the tokens of the longest text, up to `limit`."""
        return max((len(tokenize_prompted(*text, processor, recipe, limit)) for text in named_texts(row)), default=0)

    def predict(self, rows: Sequence[EmbedRow], loaded: LoadedModel) -> list[Vectors]:
        """Return the vectors of each row's texts."""
        named = [named_texts(row) for row in rows]
        unique_texts = dict.fromkeys((name == "query", text) for row in named for name, text in row)
        vectors = dict(zip(unique_texts, embed_texts([*unique_texts], loaded), strict=True))
        loaded.advance(len(rows))
        return [{name: vectors[name == "query", text].tolist() for name, text in row} for row in named]

    def embed_passages(self, passages: Sequence[str], loaded: LoadedModel) -> NDArray[np.float32]:
        """Return the vectors of passages."""
        return embed_texts([(False, text) for text in passages], loaded, loaded.advance)

    def format_prediction(self, prediction: Vectors) -> str:
        """Write the cosine of the first two texts, or the vector of a single text."""
        return format_vectors(prediction)

    def format_answer(self, prediction: Vectors, row: EmbedRow) -> str:
        """Write the passages by their cosine with the query, best first; without a query or passages, the vectors."""
        query, *others = prediction.values()
        if "query" not in prediction or not others:
            return "\n".join(format_vectors({name: vector}) for name, vector in prediction.items())
        return write_ranking(row["passages"], [cosine(query, other) for other in others])

    def compute_metric(self, metric: str, output: EvalPrediction[Vectors], recipe: Recipe) -> Measure | None:
        """Measure the order of passages (None for pairs with scores), the scores of pairs, or the spread of vectors."""
        rows, vectors = list(output.references), list(output.predictions)
        if metric in SPREAD:
            measured, texts = measure_spread(metric, vectors), [named_texts(row)[-1][1] for row in rows]
            return replace(measured, signature=f"{measured.signature}; texts {hash_value(sorted(texts))[:8]}")
        if metric in CORRELATIONS:
            cosines = [cosine(one["query"], one["passage"]) for one in vectors]
            return measure_classes(metric, "regression", np.array(cosines)[:, None], [row["score"] for row in rows], ())
        if rows[0]["score"] is not None:
            return None
        corpus = output.corpus and zip(output.corpus.passages, output.corpus.vectors_PD, strict=True)
        return measure_search(metric, rows, vectors, corpus or (), prepare_vectors)

    def measure_words(
        self, metric: str, references: Sequence[EmbedRow], corpus: Sequence[str], recipe: Recipe
    ) -> Measure | None:
        """Measure the order of passages, or of texts with labels, by BM25; None for pairs with scores."""
        if references[0]["score"] is not None:
            return None
        named = [dict(named_texts(row)) for row in references]
        return measure_search(metric, references, named, zip(corpus, corpus, strict=True), index_words)

    def score_untuned(self, rows: Sequence[EmbedRow], *loaded: Any) -> tuple[str, float]:
        """Return nDCG@10 among the passages or texts of the rows, or the correlation with their scores."""
        metric = "ndcg@10" if rows[0]["score"] is None else "spearman"
        opened = LoadedModel(*loaded)
        vectors = self.predict(rows, opened)
        measured = self.compute_metric(metric, EvalPrediction(vectors, rows), opened.recipe)
        assert measured is not None, "both are metrics of the task"
        return metric, measured.value if all(np.isfinite([*one.values()]).all() for one in vectors) else math.nan

    def class_table(self, output: EvalPrediction[Vectors], recipe: Recipe) -> dict[str, Any] | None:
        """Return the scores of vectors cut to each of `embed.dimensions`, the longest first; None without such."""
        sizes, metrics = embed_section(recipe).dimensions or (), recipe.evaluate.chosen_metrics(recipe.variant)
        if len(sizes) < 2:
            return None
        lengths = []
        for size in sorted(sizes, reverse=True):
            cut = [{name: vector[:size] for name, vector in one.items()} for one in output.predictions]
            corpus = output.corpus and replace(output.corpus, vectors_PD=output.corpus.vectors_PD[:, :size])
            shorter = replace(output, predictions=cut, corpus=corpus)
            measured = {name: self.compute_metric(name, shorter, recipe) for name in metrics}
            lengths.append({"length": size, **{name: one.value for name, one in measured.items() if one is not None}})
        return {"lengths": lengths}

    def export_constants(self, recipe: Recipe, processor: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return what the program next to ONNX files needs to make the vectors of queries."""
        section = embed_section(recipe)
        return {"prompt": section.query_prompt, "pooling": section.pooling, "normalize": section.normalize}

    def sentence_settings(self, recipe: Recipe) -> SentenceSettings:
        """Return how vectors are made; the section has been resolved."""
        section = embed_section(recipe)
        return SentenceSettings(
            section.pooling,
            bool(section.normalize),
            section.query_prompt or "",
            section.passage_prompt or "",
            section.dimensions or (),
        )

    def save_files(self, folder: Path, config: PretrainedConfig, recipe: Recipe) -> None:
        """Write the files with which sentence-transformers loads the folder and computes the same vectors."""
        limit = min(recipe.data.max_length, context_length(config) or recipe.data.max_length)
        write_settings(folder, config, self.sentence_settings(recipe), limit)


VARIANTS = (Embed(),)
