"""What a model makes of better and worse answers: their likelihoods or scores, and the metrics of those.

Shapes: R rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel

from llmtune.data.collators import collate_padded
from llmtune.data.preference_encoding import encode_answers, encode_preference
from llmtune.data.target_collators import preference_collator
from llmtune.errors import DataError, Problem
from llmtune.evaluate.metric import Measure, columns, measure_means, ratio
from llmtune.evaluate.paired_statistics import Floats
from llmtune.evaluate.token_batches import TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.preference_losses import kl_to_reference, row_scores, sequence_logps
from llmtune.records import Advance, Batch, Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import PreferenceSection, Recipe

AGAINST = "a reward is beta times what training added to an answer's log-probability"
REWARDS = {
    "orpo": "a reward is beta times an answer's mean log-probability a token",
    "reward": "a reward is the model's score",
}
"""What rewards are with losses that have no reference."""
KL_SIGNATURE = "nats a token of the first answer from the model without any adapter, exact over the vocabulary"


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

    Of likelihoods, `*_tokens` says over how many tokens, and `kl` how far the model is from itself without its adapter,
    on the first answer, in nats a token; left out where the adapter does not hold all that training changed.

    Raises DataError for a row that cannot be encoded.
    """
    settings = recipe.preference
    assert settings is not None
    scoring = settings.loss == "reward"
    single = settings.loss == "kto" or (scoring and all("answer" in row for row in rows))
    names = ("answer",) if single else ("chosen", "rejected")
    examples = _encode(rows, single, processor, recipe)
    collate_pairs = preference_collator(processor, recipe)
    said: list[dict[str, float]] = [{} for _ in rows]

    def collate(batch: list[int], first_only: bool) -> Batch:
        chosen = [examples[i] for i in batch]
        tensors = collate_padded(chosen, processor.pad_token_id) if first_only else collate_pairs(chosen, 0)
        return {key: part.to(device) if isinstance(part, torch.Tensor) else part for key, part in tensors.items()}

    def work(batch: list[int]) -> None:
        tensors = collate(batch, single)
        found = {"": row_scores(model, tensors)} if scoring else _likelihoods(model, tensors)
        parts = {
            f"{name}{what}": values[k * len(batch) : (k + 1) * len(batch)].tolist()
            for what, values in found.items()
            for k, name in enumerate(names)
        }
        if "kl" not in recipe.variant.unmeasured:
            parts["kl"] = _kl(model, tensors if single else collate(batch, True))
        for row, i in enumerate(batch):
            said[i] = {name: float(values[row]) for name, values in parts.items()}
        advance(len(batch))

    unwrap(model).eval()
    run_in_batches([example.tokens for example in examples], budget_for(device, TOKEN_BUDGET), work)
    return said


def _encode(rows: Sequence[Row], single: bool, processor: PreTrainedTokenizerBase, recipe: Recipe) -> list[Example]:
    if single:
        encoded = encode_answers(rows, [row["answer"] for row in rows], processor, recipe)
    else:
        encoded = encode_preference(rows, processor, recipe)
    DataError.collect(
        Problem(found, f"row {i} of those asked") for i, found in enumerate(encoded, 1) if isinstance(found, str)
    )
    return [found[0] for found in encoded if not isinstance(found, str)]


def _likelihoods(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    logps_R, counts_R = sequence_logps(model, batch)
    return {"": logps_R, "_tokens": counts_R}


def _kl(model: torch.nn.Module, batch: Batch) -> list[float]:
    """Return the divergence [R] from the model without its adapter, in nats a token; 0 for one that has none."""
    if not isinstance(model, PeftModel):
        return [0.0] * int(batch["n_rows"])
    counts_R = torch.bincount(batch["rows_S"], minlength=batch["n_rows"]).clamp(min=1)
    found: list[float] = (kl_to_reference(model, batch, model.disable_adapter) / counts_R).tolist()
    return found


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

    Rewards of DPO, IPO and KTO are against what training started from: its own are all 0, a tie, which counts half.
    """
    if metric == "kl":
        known = all("kl" in one for one in said)
        return measure_means("kl", [one["kl"] for one in said], KL_SIGNATURE) if known else None
    reward = REWARDS.get(settings.loss, AGAINST)
    if settings.loss == "kto":
        found = rewards(said, "answer", settings, base)
        return None if found is None else _measure_thumbs(metric, found, np.array(thumbs, dtype=bool), reward)
    better, worse = (rewards(said, name, settings, base) for name in ("chosen", "rejected"))
    if better is None or worse is None:
        return None
    apart = better - worse
    if metric == "accuracy":
        return _measure_wins(metric, apart, f"share of pairs whose chosen answer has the higher reward, {reward}")
    if metric == "margin":
        return measure_means("margin", apart.tolist(), f"mean reward of chosen less rejected, {reward}")
    if metric == "likelihood_accuracy" and settings.loss != "reward":
        logps = [np.array([one[name] for one in said]) for name in ("chosen", "rejected")]
        return _measure_wins(metric, logps[0] - logps[1], "share of pairs whose chosen answer is likelier")
    if metric == "loss" and settings.loss in ("dpo", "reward"):
        smooth = settings.label_smoothing if settings.loss == "dpo" else 0.0
        losses = (1 - smooth) * np.logaddexp(0, -apart) + smooth * np.logaddexp(0, apart)
        center = settings.center_rewards_coefficient if settings.loss == "reward" else None
        losses = losses + (center or 0.0) * (better + worse) ** 2
        return measure_means("loss", losses.tolist(), f"mean over pairs of the {settings.loss} loss, {reward}")
    if metric == "loss" and settings.loss == "ipo" and base is not None:
        signature = f"mean over pairs of the ipo loss, {reward}"
        return measure_means("loss", _ipo(said, base, settings.beta).tolist(), signature)
    return None


def _measure_wins(metric: str, apart: Floats, signature: str) -> Measure:
    """Measure the share [N] that is above 0; a tie is half, so that the reference itself, all ties, has one half."""
    wins = np.where(apart == 0, 0.5, np.where(apart > 0, 1.0, 0.0))
    sums = columns(wins, np.ones(len(wins)))
    return Measure(metric, sums, ratio, right_wrong=True, signature=f"{signature}; a tie is half")


def _ipo(said: Sequence[dict[str, float]], base: Sequence[dict[str, float]], beta: float) -> Floats:
    sides = [
        (np.array([one[name] for one in said]) - np.array([one[name] for one in base]))
        / np.array([one[f"{name}_tokens"] for one in said])
        for name in ("chosen", "rejected")
    ]
    return np.asarray((sides[0] - sides[1] - 1 / (2 * beta)) ** 2)


def _measure_thumbs(metric: str, found: Floats, good: Any, reward: str) -> Measure | None:
    """Measure single answers: whether good ones gained and bad ones lost, and how far both kinds are apart."""
    if metric == "accuracy":
        signature = f"share of answers whose reward has the sign of their thumb, {reward}"
        return _measure_wins(metric, np.where(good, found, -found), signature)
    if metric == "margin" and good.any() and not good.all():
        sums = columns(np.where(good, found, 0), good.astype(float), np.where(good, 0, found), (~good).astype(float))
        signature = f"mean reward of thumbs up less that of thumbs down, {reward}"
        return Measure(metric, sums, apart_formula, signature=signature)
    return None


def apart_formula(sums: Floats) -> Floats:
    """[..., (sum of good, good, sum of bad, bad)] -> how far their means are apart [...]."""
    return ratio(sums[..., :2]) - ratio(sums[..., 2:])
