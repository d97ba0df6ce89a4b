"""What a model makes of better and worse answers: their likelihoods or scores, and the metrics of those.

Shapes: R rows of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.adapter.reference import reference_of
from llmtune.data.collate_targets import preference_collator
from llmtune.data.encode_pairs import encode_preference
from llmtune.evaluate.batches import TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.evaluate.measure import Measure, columns, measure_means, ratio
from llmtune.evaluate.statistics import Floats
from llmtune.model.loss import unwrap
from llmtune.model.preference import kl_to_reference, row_scores, sequence_logps
from llmtune.records import Advance, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import PreferenceSection, Recipe


def predict_preferences(
    model: torch.nn.Module,
    rows: Sequence[Row],
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    device: str,
    advance: Advance = lambda rows: None,
) -> list[dict[str, float]]:
    """Return a row's log-probabilities of its answers (`chosen`, `rejected` or `answer`), or their scores.

    Of likelihoods, `*_tokens` says over how many tokens, and `kl` how far the model is from its reference on the first
    answer, in nats a token, where an adapter can be switched off.
    """
    settings = recipe.preference
    assert settings is not None
    encoded = encode_preference(rows, processor, recipe)
    kept = [(i, examples[0]) for i, examples in enumerate(encoded) if not isinstance(examples, str)]
    collate = preference_collator(processor, recipe)
    names = ("answer",) if settings.loss == "kto" else ("chosen", "rejected")
    said: list[dict[str, float]] = [dict.fromkeys(names, math.nan) for _ in rows]
    comparable = hasattr(model, "disable_adapter") and settings.loss != "reward"

    def work(batch: list[int]) -> None:
        tensors = collate([kept[i][1] for i in batch], 0)
        moved = {key: part.to(device) if isinstance(part, torch.Tensor) else part for key, part in tensors.items()}
        if settings.loss == "reward":
            found = {"": row_scores(model, moved)}
        else:
            logps_R, counts_R = sequence_logps(model, moved)
            found = {"": logps_R, "_tokens": counts_R}
        parts = {
            f"{name}{what}": values[k * len(batch) : (k + 1) * len(batch)].tolist()
            for what, values in found.items()
            for k, name in enumerate(names)
        }
        if comparable:
            kl_R = kl_to_reference(model, moved, partial(reference_of, model))[: len(batch)]
            parts["kl"] = (kl_R / found["_tokens"][: len(batch)].clamp(min=1)).tolist()
        for row, i in enumerate(batch):
            said[kept[i][0]] = {name: float(values[row]) for name, values in parts.items()}
        advance(len(batch))

    unwrap(model).eval()
    run_in_batches([example.tokens for _, example in kept], budget_for(device, TOKEN_BUDGET), work)
    return said


def rewards(
    said: Sequence[dict[str, float]], name: str, settings: PreferenceSection, base: Sequence[dict[str, float]] | None
) -> Floats | None:
    """Return the reward [N] of each row's answer `name`: a score, or beta times what training made of its likelihood.

    None where there is no base to hold it against.
    """
    values = np.array([one[name] for one in said])
    if settings.loss == "reward":
        return values
    if settings.loss == "orpo":
        return np.asarray(settings.beta * values / np.array([one[f"{name}_tokens"] for one in said]))
    if base is None:
        return None
    return np.asarray(settings.beta * (values - np.array([one[name] for one in base])))


def measure_preferences(
    metric: str,
    said: Sequence[dict[str, float]],
    thumbs: Sequence[bool],
    settings: PreferenceSection,
    base: Sequence[dict[str, float]] | None,
) -> Measure | None:
    """Build accuracy, margin, likelihood_accuracy, kl or loss; None for what this loss has no such thing of.

    Rewards of DPO, IPO and KTO are against the untuned model: its own are all 0, a tie, which counts half.
    """
    if metric == "kl":
        if not any("kl" in one for one in [*said, *(base or ())]):
            return None
        return measure_means("kl", [one.get("kl", 0.0) for one in said], "nats a token of the first answer, exact")
    if settings.loss == "kto":
        found = rewards(said, "answer", settings, base)
        return None if found is None else _measure_thumbs(metric, found, np.array(thumbs, dtype=bool))
    better, worse = (rewards(said, name, settings, base) for name in ("chosen", "rejected"))
    if better is None or worse is None:
        return None
    apart = better - worse
    if metric == "accuracy":
        return measure_means(
            "accuracy", _wins(apart), "share of pairs whose chosen answer has the higher reward; a tie is half"
        )
    if metric == "margin":
        return measure_means("margin", apart.tolist(), "mean reward of chosen less rejected")
    if metric == "likelihood_accuracy" and settings.loss != "reward":
        logps = [np.array([one[name] for one in said]) for name in ("chosen", "rejected")]
        return measure_means(metric, _wins(logps[0] - logps[1]), "share of pairs whose chosen answer is likelier")
    if metric == "loss" and settings.loss in ("dpo", "reward"):
        smooth = settings.label_smoothing if settings.loss == "dpo" else 0.0
        losses = (1 - smooth) * np.logaddexp(0, -apart) + smooth * np.logaddexp(0, apart)
        return measure_means("loss", losses.tolist(), "mean over pairs of -log sigmoid(reward difference)")
    if metric == "loss" and settings.loss == "ipo" and base is not None:
        return measure_means("loss", _ipo(said, base, settings.beta).tolist(), "mean over pairs of the IPO loss")
    return None


def _wins(apart: Floats) -> list[float]:
    return [0.5 if value == 0 else float(value > 0) for value in apart.tolist()]


def _ipo(said: Sequence[dict[str, float]], base: Sequence[dict[str, float]], beta: float) -> Floats:
    sides = [
        (np.array([one[name] for one in said]) - np.array([one[name] for one in base]))
        / np.array([one[f"{name}_tokens"] for one in said])
        for name in ("chosen", "rejected")
    ]
    return np.asarray((sides[0] - sides[1] - 1 / (2 * beta)) ** 2)


def _measure_thumbs(metric: str, found: Floats, good: Any) -> Measure | None:
    """Measure single answers: whether good ones gained and bad ones lost, and how far they are apart."""
    if metric == "accuracy":
        signed = np.where(good, found, -found)
        return measure_means(
            metric, _wins(signed), "share of answers whose reward has the sign of its thumb; 0 is half"
        )
    if metric == "margin":
        sums = columns(np.where(good, found, 0), good.astype(float), np.where(good, 0, found), (~good).astype(float))
        return Measure(metric, sums, _apart, signature="mean reward of thumbs up less that of thumbs down")
    return None


def _apart(sums: Floats) -> Floats:
    return ratio(sums[..., :2]) - ratio(sums[..., 2:])
