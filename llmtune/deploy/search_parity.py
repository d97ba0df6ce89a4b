"""The parity of products of `embed` and `rerank`: cosines of vectors, scores of passages, and the order that they give.

Shapes: D numbers of a vector, P passages of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.row_kind import kind_of_row
from llmtune.deploy.exported_model import ExportedModel
from llmtune.deploy.folder_settings import stated_recipe
from llmtune.deploy.parity import (
    LARGEST,
    NOT_FINITE,
    SLACK,
    Certificate,
    Limits,
    check_shapes,
    describe_share,
    measure_step,
)
from llmtune.deploy.parity_reference import HeadReference, TextReference, TunedReference, are_finite
from llmtune.deploy.tuned_model import TunedModel
from llmtune.evaluate.evaluated_task import EvalPrediction, LoadedModel
from llmtune.model.config import readable
from llmtune.model.library_logging import silent
from llmtune.model.sentence_folder import LENGTH, MODULES
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS

NDCG = "ndcg@10"
NDCG_LOSS = 0.02
"""A product may lose this much nDCG@10 on the compared rows."""
HIDES = 2
"""A product that differs from the tuned model by more than this times tuning's effect did not just lose the adapter."""
SCORE, COSINE = "score", "1 - cosine"


@dataclass(frozen=True)
class SearchDistance:
    """The distance between the vectors or scores of two models."""

    unit: str
    """`1 - cosine` of each text's two vectors, or the difference of each passage's two `score`s, from 0 to 1."""
    difference_mean: float
    difference_max: float
    length_difference: float | None
    """Largest relative difference of a vector's length; None for scores."""
    same_order: float
    """Share of rows whose passages are in the same order."""


@dataclass(frozen=True)
class SearchParity(SearchDistance):
    """The distance of a product from the tuned model."""

    rows: int
    outputs: int
    """Texts or passages."""
    same_ids: bool
    """Whether the saved tokenizer produces the same token ids."""
    effect: float | None
    """Mean difference between the tuned model and its base; None if it cannot be measured."""
    from_base: float | None
    """Mean difference between the product and the base."""
    effect_share: float | None
    """How far the product went from the base in the direction of the tuned model: 1 is all the way."""
    share_noise: float
    """How far rounding may move `effect_share`."""
    ndcg_tuned: float | None
    """nDCG@10 of the tuned model on these rows; None if they have no passages to rank."""
    ndcg: float | None


class SearchReference(HeadReference):
    """The tuned model's vectors or scores of the run's rows."""

    @property
    def is_vectors(self) -> bool:
        """Whether the task makes vectors."""
        return self.tuned.task.model_kind.answer_column == "vectors"

    def read_logits(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return the outputs of `model` for each row, as the run computes them."""
        return self._read(model, self.tuned.processor, self.tuned.recipe)

    def _read(self, model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[torch.Tensor]:
        """Return vectors [texts, D] or scores [P] of each row."""
        questions = [self.tuned.task.split_answer(row)[0] for row in self.tuned.rows]
        with torch.inference_mode():
            loaded = LoadedModel(model, processor, recipe, str(model.device))
            return [self._as_tensor(one) for one in self.tuned.task.predict(questions, loaded)]

    def _as_tensor(self, prediction: Any) -> torch.Tensor:
        return torch.tensor([*prediction.values()] if self.is_vectors else prediction["scores"])

    def read_product(self, exported: ExportedModel) -> tuple[list[torch.Tensor], str]:
        """Return a product's outputs, and the program that made them: sentence-transformers, if it is installed."""
        recipe = stated_recipe(self.tuned.recipe, exported)
        broken = any(one.startswith((f"{MODULES}: not", f"{LENGTH}: ")) for one in self.find_causes(exported))
        if not exported.is_folder or broken or find_spec("sentence_transformers") is None:
            return self._read(exported.model, exported.processor, recipe), exported.runtime
        read = self._embed if self.is_vectors else self._score
        with silent(), readable("sentence-transformers cannot use the folder", str(exported.path), "Export it again."):
            return read(exported.path), f"sentence-transformers {version('sentence-transformers')}"

    def _options(self) -> dict[str, Any]:
        trust = self.tuned.recipe.model.trust_remote_code
        return {"device": self.tuned.device, "local_files_only": True, "trust_remote_code": trust}

    def _embed(self, folder: Path) -> list[torch.Tensor]:
        from sentence_transformers import SentenceTransformer

        model: Any = SentenceTransformer(str(folder), **self._options())
        vectors = []
        for row in self.tuned.rows:
            texts = self.tuned.task.named_texts(row)
            parts = [
                (model.encode_query if name == "query" else model.encode_document)(text, show_progress_bar=False)
                for name, text in texts
            ]
            vectors.append(torch.stack([torch.as_tensor(part).float().cpu() for part in parts]))
        return vectors

    def _score(self, folder: Path) -> list[torch.Tensor]:
        from sentence_transformers import CrossEncoder

        model = CrossEncoder(str(folder), **self._options())
        model.max_length = min(model.max_length, self.tuned.recipe.data.max_length)  # as docs/rerank.md shows
        pairs_by_row = []
        for row in self.tuned.rows:
            kind = kind_of_row(row)
            query = kind.row_input(row).query
            pairs_by_row.append([(query, passage) for passage in kind.passages(row)])
        return [torch.as_tensor(model.predict(pairs, show_progress_bar=False)).float().cpu() for pairs in pairs_by_row]

    def measure_effect(self, base_logits: Sequence[torch.Tensor]) -> float:
        """Return the mean difference between the tuned model and its base."""
        return self._measure(self.logits, base_logits).difference_mean

    def compare(self, logits: Sequence[torch.Tensor]) -> Any:
        """Compare outputs of the same rows with those of the tuned model."""
        return self._measure(self.logits, logits)

    def _measure(self, expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> SearchDistance:
        check_shapes(expected, actual)
        pairs = [*zip(expected, actual, strict=True)]
        same = [torch.equal(_order(one), _order(other)) for one, other in pairs]
        share, length = sum(same) / len(same), None
        if self.is_vectors:
            ones, others = (torch.cat(part).double() for part in zip(*pairs, strict=True))
            parts = 1 - functional.cosine_similarity(ones, others, dim=-1)
            sizes = [part.norm(dim=-1).clamp_min(1e-12) for part in (ones, others)]
            length = float((sizes[1] / sizes[0] - 1).abs().max())
        else:
            parts = torch.cat([(one.double() - other.double()).abs() for one, other in pairs])
        unit = COSINE if self.is_vectors else SCORE
        return SearchDistance(unit, float(parts.mean()), float(parts.max()), length, share)

    def certify(self, exported: ExportedModel, limits: Limits | None = None) -> Certificate:
        """Return the fields of an export's certificate; `limits` override its own."""
        limits = limits or exported.limits
        outputs, reader = self.read_product(exported)
        measured = self._judge_search(outputs, self._same_ids(exported))
        highest = limits.cosine if self.is_vectors else limits.score
        breaches = [*find_search_breaches(measured, highest), *self.find_causes(exported)]
        stated = {"difference_mean": highest, "difference_max": LARGEST * highest, "ndcg_loss": NDCG_LOSS}
        return {
            **self.tuned.certificate(breaches),
            "reader": reader,
            "limits": stated,
            "measured": asdict(measured),
        }

    def _judge_search(self, outputs: list[torch.Tensor], same_ids: bool) -> SearchParity:
        base = self.base_logits
        share, noise = (None, 0.0) if base is None else measure_step(base, self.logits, outputs, "number")
        return SearchParity(
            **asdict(self.compare(outputs)),
            rows=len(outputs),
            outputs=sum(map(len, outputs)),
            same_ids=same_ids,
            effect=self.effect,
            from_base=None if base is None else self._measure(base, outputs).difference_mean,
            effect_share=share,
            share_noise=noise,
            ndcg_tuned=self._ndcg(self.logits),
            ndcg=self._ndcg(outputs),
        )

    def _ndcg(self, outputs: list[torch.Tensor]) -> float | None:
        """Return nDCG@10 among the passages of the rows; None of rows with scores."""
        rows, task = [*self.tuned.rows], self.tuned.task
        if not are_finite(outputs):
            return None
        values = (part.tolist() for part in outputs)
        predictions: list[Any] = [
            dict(zip([name for name, _ in task.named_texts(row)], value, strict=True))
            if self.is_vectors
            else {"scores": value, "ranking": []}
            for row, value in zip(rows, values, strict=True)
        ]
        measured = task.compute_metric(NDCG, EvalPrediction(predictions, rows), self.tuned.recipe)
        return None if measured is None else measured.value


def _order(outputs: torch.Tensor) -> torch.Tensor:
    """Return the order of a row's passages: by their scores [P], or the cosines of [texts, D] with the first text."""
    if outputs.dim() == 1:
        return outputs.argsort(descending=True, stable=True)
    return functional.cosine_similarity(outputs[:1], outputs[1:], dim=-1).argsort(descending=True, stable=True)


def find_search_breaches(parity: SearchParity, highest: float) -> list[str]:
    """Describe the violated limits; `highest` is that of the mean difference."""
    breaches = []
    if not math.isfinite(parity.difference_mean):
        breaches.append(NOT_FINITE)
    if not parity.same_ids:
        breaches.append("the saved tokenizer produces other token ids")
    if not (parity.difference_mean <= highest and parity.difference_max <= LARGEST * highest):  # NaN is a breach
        numbers = f"{parity.difference_mean:.2g} on average and at most {parity.difference_max:.2g}"
        breaches.append(f"its {parity.unit} differs by {numbers}; the limits are {highest:g} and {LARGEST * highest:g}")
    if parity.length_difference is not None and not parity.length_difference <= max(10 * highest**0.5, 1e-2):
        breaches.append(f"the length of a vector differs by {parity.length_difference:.0%}")
    if parity.ndcg is not None and not parity.ndcg >= (parity.ndcg_tuned or 0.0) - NDCG_LOSS:
        breaches.append(f"{NDCG} is {parity.ndcg:.3f}; the tuned model has {parity.ndcg_tuned:.3f}")
    taken, base, effect = parity.effect_share, parity.from_base, parity.effect
    if taken is None or base is None or effect is None or not parity.same_ids:
        return breaches
    hidden = parity.difference_mean > HIDES * effect
    if not hidden and not abs(taken - 1) <= SLACK + parity.share_noise:
        breaches.append(describe_share(taken))
        if parity.difference_mean - base > effect / 2:
            breaches.append("it is nearer to the base model: the adapter is lost")
    return breaches


def make_reference(tuned: TunedModel) -> TunedReference:
    """Ask the tuned model the fixed prompts and its rows; only the rows if it does not continue a text."""
    if TASK_FACTS[tuned.task.name].loader is not None:
        return SearchReference(tuned)
    return TextReference(tuned) if tuned.task.model_kind.decodes else HeadReference(tuned)
