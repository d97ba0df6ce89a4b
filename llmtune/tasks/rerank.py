"""Task rerank: score how relevant passages are for a query, with a cross-encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from llmtune.data.classify_rows import ClassifyRow
from llmtune.data.collators import encoder_batch
from llmtune.data.example import Example
from llmtune.data.row_store import iterate_rows
from llmtune.data.row_text import text_key
from llmtune.data.search_rows import RerankRow, given_passages, write_ranking
from llmtune.data.task_interface import Encoded
from llmtune.data.tokenization import Segment, decode_shortened
from llmtune.errors import DataError
from llmtune.evaluate.bm25 import BM25_NOTE, index_words
from llmtune.evaluate.evaluated_task import EvalPrediction, LoadedModel, SimplePredictions
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.ranking_metrics import RELEVANT, RankedQuery, measure_ranking, name_query
from llmtune.evaluate.token_batches import run_encoder
from llmtune.model.causal_lm_loss import model_inputs
from llmtune.model.config import name_outputs
from llmtune.model.device import in_own_dtype
from llmtune.model.sentence_folder import SIGMOID
from llmtune.recipe.model_kind import CLASSES
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import RANKING
from llmtune.recipe.task_sections import RerankSection
from llmtune.recipe.task_variant import at_ten
from llmtune.records import Batch, Loss, Rows
from llmtune.tasks.base import Endpoint, ReadingTask, loss_of_rows
from llmtune.tasks.classify import fitted_texts, tokenize_texts

BM25 = "BM25 (words that query and passage share)"


class RerankPrediction(TypedDict):
    """The passages of one row, scored."""

    scores: list[float]
    """Probability that a passage is relevant, in the order of the passages."""
    ranking: list[int]
    """Indexes of the passages, best first."""


@dataclass(frozen=True)
class RelevanceExample(Example):
    """A query with a passage."""

    relevance: Sequence[float] = ()
    """How relevant the passage is, from 0 to 1, as a one-element list."""


class Rerank(ReadingTask[RerankRow, RerankPrediction]):
    """An encoder or decoder with one output on query and passage together."""

    name = "rerank"
    required_inputs = ("prompt", "passages")
    endpoint = Endpoint("/v1/rerank", "the scores of the documents, best first", "query")
    model_kind = CLASSES
    example_type = RelevanceExample
    loss_unit = "passages"
    answer_keys = ("scores", "ranking")

    def needs_float32(self, recipe: Recipe) -> bool:
        """Return True: scores rank passages."""
        return True

    def infer_labels(self, recipe: Recipe, rows: Rows, config: PretrainedConfig) -> Recipe:
        """Infer the highest relevance. Raises DataError if no passage is relevant, or all are equally."""
        section = rerank_section(recipe)
        relevances = {value for _, row in iterate_rows(rows, "train") for value in row["relevances"]}
        if len(relevances) == 1 or max(relevances) == 0:
            fix = "Give each query relevant passages, and irrelevant ones with relevance 0."
            fix += " Or mine irrelevant ones: data.negatives: {mine: 4}." if max(relevances) > 0 else ""
            raise DataError.of(f"all passages have the relevance {max(relevances):g}", "data.train", fix)
        highest = section.max_relevance or max(1.0, *relevances)
        return recipe.model_copy(update={"rerank": section.model_copy(update={"max_relevance": highest})})

    def configure_head(self, config: PretrainedConfig, recipe: Recipe) -> None:
        """Give the head one output; sentence-transformers' `CrossEncoder` reads the activation after it.

        A head that has one output scores already, whatever its name, and is kept.
        """
        if config.num_labels == 1:
            config.id2label = {0: "relevance"}
        name_outputs(config, ("relevance",), None)
        config.sentence_transformers = {"activation_fn": SIGMOID}

    def save_files(self, folder: Path, config: PretrainedConfig, recipe: Recipe) -> None:
        """Remove a decoder's chat template: training does not use it, and `CrossEncoder` would."""
        (folder / "chat_template.jinja").unlink(missing_ok=True)

    def make_row(self, given: Mapping[str, str | None]) -> RerankRow:
        """Return the row of a query and its passages: a JSON list, or one passage per line."""
        passages = given_passages(given.get("passages"))
        return {"query": given["prompt"] or "", "passages": passages, "relevances": []}

    def split_answer(self, row: RerankRow) -> tuple[RerankRow, str]:
        """Return the row without relevances, and these as text."""
        return {**row, "relevances": []}, ", ".join(f"{relevance:g}" for relevance in row["relevances"])

    def reference(self, row: RerankRow) -> RerankRow:
        """Return the row: its relevances belong to its query."""
        return row

    def row_notes(self, rows: Rows, split: str, recipe: Recipe) -> dict[str, str]:
        """Return the number of queries and passages, and of passages that training rows have too."""
        trained = {text_key(passage) for _, row in iterate_rows(rows, "train") for passage in row["passages"]}
        split_rows: list[Any] = [row for _, row in iterate_rows(rows, split)]
        queries = [highest_relevances([split_rows[i] for i in numbers]) for numbers in rows_by_query(split_rows)]
        passages = {passage for relevances in queries for passage in relevances}
        missing = sum(max(relevances.values()) <= RELEVANT for relevances in queries)
        tied = sum(min(relevances.values()) == max(relevances.values()) > RELEVANT for relevances in queries)
        text = f"{len(queries):,} queries with {sum(map(len, queries)) / len(queries):.1f} passages each"
        text += f"; {missing:,} without a relevant passage are left out of ranking metrics" if missing else ""
        text += f"; {tied:,} have only equally relevant passages, so any order is right" if tied else ""
        shared = sum(passage in trained for passage in passages)
        return {
            "queries": f"{text}. A query's rows are all in one split",
            "passages": f"{shared:,} of {len(passages):,} passages also occur in training rows, with other queries",
        }

    def encode(self, rows: Sequence[RerankRow], processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
        """Return one example per passage: query and passage with the relevance, from 0 to 1."""
        texts, encoded = fitted_texts(pair_rows(rows), processor, recipe), list[Encoded]()
        highest = rerank_section(recipe).max_relevance or 1.0
        for row in rows:
            pairs = [next(texts) for _ in row["passages"]]
            reason = next((one for one in pairs if isinstance(one, str)), None)
            encoded.append(
                reason
                or [
                    RelevanceExample(**vars(one), relevance=[min(1.0, relevance / highest)])
                    for one, relevance in zip(pairs, row["relevances"], strict=True)
                    if not isinstance(one, str)
                ]
            )
        return encoded

    def collate(
        self,
        examples: Sequence[RelevanceExample],
        processor: PreTrainedTokenizerBase,
        recipe: Recipe,
        packs: bool,
        draw: int,
    ) -> Batch:
        """Add the relevances `values_R` [R]."""
        batch, _ = encoder_batch(examples, processor.pad_token_id, packs)
        return batch | {"values_R": torch.tensor([example.relevance[0] for example in examples], dtype=torch.float32)}

    def loss(self, model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
        """Sum the binary cross-entropy of the passages; outside training, of the logits that `predict` has."""
        values_R = batch["values_R"]
        with nullcontext() if model.training else in_own_dtype(model, values_R.device.type):
            logits_R = model(**model_inputs(model, batch)).logits[:, 0].float()
        losses_R = functional.binary_cross_entropy_with_logits(logits_R, values_R, reduction="none")
        return loss_of_rows(losses_R, (logits_R > 0) == (values_R > RELEVANT), by_row)

    def guessing_loss(self, config: PretrainedConfig, examples: Iterable[RelevanceExample], recipe: Recipe) -> float:
        """Return the loss of scoring every passage with the mean relevance."""
        mean = float(np.mean([example.relevance[0] for example in examples]))
        return -sum(share * math.log(share) for share in (mean, 1 - mean) if share > 0)

    def highlighted_text(
        self, example: RelevanceExample, processor: PreTrainedTokenizerBase, recipe: Recipe
    ) -> list[Segment]:
        """Show query and passage with the relevance."""
        text = decode_shortened(example.input_ids, processor)
        return [Segment(f"{text}\n", False), Segment(f"{example.relevance[0]:g}", True)]

    def count_tokens(self, row: RerankRow, processor: PreTrainedTokenizerBase, recipe: Recipe, limit: int) -> int:
        """Return the tokens of the longest passage with the query, up to `limit`."""
        return max((len(pair.input_ids) for pair in tokenize_texts(pair_rows([row]), processor, limit)), default=0)

    def predict(self, rows: Sequence[RerankRow], loaded: LoadedModel) -> list[RerankPrediction]:
        """Score the passages of each row."""
        examples = tokenize_texts(pair_rows(rows), loaded.processor, loaded.recipe.data.max_length)

        def read(i: int, output: SequenceClassifierOutput, row: int) -> float:
            return float(output.logits[row, 0].double().sigmoid())

        with in_own_dtype(loaded.model, loaded.device):
            scores = iter(run_encoder(loaded.model, examples, loaded.processor.pad_token_id, loaded.device, read))
        loaded.advance(len(rows))
        return [ranked([next(scores) for _ in row["passages"]]) for row in rows]

    def format_prediction(self, prediction: RerankPrediction) -> str:
        """Write the scores, in the order of the passages."""
        return ", ".join(f"{score:.3f}" for score in prediction["scores"])

    def format_answer(self, prediction: RerankPrediction, row: RerankRow) -> str:
        """Write a line per passage, best first."""
        return write_ranking(row["passages"], prediction["scores"])

    def compute_metric(self, metric: str, output: EvalPrediction[RerankPrediction], recipe: Recipe) -> Measure | None:
        """Measure the ranking of each query's passages, from all of its rows; a passage of several rows counts once."""
        if at_ten(metric) not in RANKING:
            return None
        rows, queries = rows_by_query(output.references), []
        for numbers in rows:
            relevances = highest_relevances([output.references[i] for i in numbers])
            scores = dict.fromkeys(relevances, 0.0)
            for i in reversed(numbers):
                scores |= zip(
                    map(text_key, output.references[i]["passages"]), output.predictions[i]["scores"], strict=True
                )
            name = name_query(text_key(output.references[numbers[0]]["query"]), relevances.items())
            queries.append(RankedQuery([*scores.values()], [*relevances.values()], name=name))
        measured = measure_ranking(metric, queries, [numbers[0] for numbers in rows])
        if (mined := recipe.data.negatives) is None:
            return measured
        miner = mined.model or recipe.model.name
        searched = f"passages mined with {miner} (mine {mined.mine}, below {mined.below:g})"
        searched += ", in data.corpus too" if recipe.data.corpus else ""
        return replace(measured, signature=f"{measured.signature}; {searched}")

    def baseline(
        self, references: Sequence[RerankRow], prompts: Sequence[RerankRow], recipe: Recipe
    ) -> tuple[str, list[RerankPrediction]]:
        """Rank by BM25, which needs no training; word counts are those of the passages to rank."""
        return BM25, [ranked(scores) for scores in bm25(prompts)]

    def predict_simply(
        self, train: Sequence[RerankRow], prompts: Sequence[RerankRow], recipe: Recipe
    ) -> SimplePredictions:
        """Rank by BM25, as `baseline` does."""
        return SimplePredictions([ranked(scores) for scores in bm25(prompts)], BM25_NOTE)

    def output_kind(self, recipe: Recipe) -> str:
        """Return the kind of the head's output."""
        return "number"


def rerank_section(recipe: Recipe) -> RerankSection:
    """Return the recipe's section, or its defaults."""
    return recipe.rerank or RerankSection()


def rows_by_query(rows: Sequence[RerankRow]) -> list[list[int]]:
    """Return the numbers of the rows of each different query."""
    numbers: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        numbers.setdefault(text_key(row["query"]), []).append(i)
    return [*numbers.values()]


def highest_relevances(rows: Iterable[RerankRow]) -> dict[str, float]:
    """Return the highest relevance of each different passage of a query's rows, by its `text_key`."""
    relevances: dict[str, float] = {}
    for row in rows:
        for passage, relevance in zip(row["passages"], row["relevances"], strict=True):
            key = text_key(passage)
            relevances[key] = max(relevance, relevances.get(key, relevance))
    return relevances


def pair_rows(rows: Sequence[RerankRow]) -> list[ClassifyRow]:
    """Return a pair of texts per passage."""
    return [{"text": row["query"], "pair": passage, "label": None} for row in rows for passage in row["passages"]]


def ranked(scores: list[float]) -> RerankPrediction:
    """Return scores with their ranking; of equal scores, the first passage is first."""
    return {"scores": scores, "ranking": sorted(range(len(scores)), key=lambda i: -scores[i])}


def bm25(rows: Sequence[RerankRow]) -> list[list[float]]:
    """Score the passages of each row; they count among all different passages of the rows."""
    passages = {text_key(passage): passage for row in rows for passage in row["passages"]}
    places, score = {key: place for place, key in enumerate(passages)}, index_words([*passages.values()])
    return [score([row["query"]])[0, [places[text_key(text)] for text in row["passages"]]].tolist() for row in rows]


VARIANTS = (Rerank(),)
