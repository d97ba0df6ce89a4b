"""Policy gradient losses on sampled answers, each as a sum and a count, and the advantages of a prompt's answers.

Shapes: S trained tokens of a batch, R answers.

A batch comes from `llmtune.data.collators`, one row per answer. In addition, the losses read:

    advantages_R    float [R]   0 for a placeholder answer
    old_S           float [S]   log-probabilities when the answers were sampled; missing if the weights are the same
    reference_S     float [S]   log-probabilities under the starting model; only with `beta`

With the ratio r = p(token) / p_old(token) and the advantage A of the token's answer, each token's loss is

    -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) + beta r (q - log q - 1), q = p_reference(token) / p(token)

Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, eq. 3; the second term is Schulman's estimator k3 of the KL
divergence, times r as in DeepSeek-V3.2, arXiv:2512.02556, which makes its gradient unbiased. The sum of a step is
divided by

    dr_grpo   answers times the longest possible answer: Liu et al. 2025, arXiv:2503.20783
    grpo      answers, after each answer's loss is divided by its own tokens
    dapo      trained tokens of the step: Yu et al. 2025, arXiv:2503.14476

`filter` trains on accepted answers: their negative log-likelihood, divided by their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

import torch

from llmtune.recipe.reinforce_section import ReinforceSection, lowest_accepted, rewards_differ
from llmtune.records import Batch

SPREAD_EPSILON = 1e-4
"""Added to the standard deviation that divides advantages, as in TRL."""


def find_advantages(rewards: Sequence[float | None], section: ReinforceSection) -> list[float]:
    """Return the advantage of each answer to a prompt; 0 for an answer without a reward.

    For `filter` it is 1 for an accepted answer, else 0.
    """
    if section.method == "filter":
        return [float(reward is not None and reward >= lowest_accepted(section.accept)) for reward in rewards]
    values = [reward for reward in rewards if reward is not None]
    mean = fmean(values) if rewards_differ(rewards) else 0.0
    scale = stdev(values) + SPREAD_EPSILON if section.scales_rewards and rewards_differ(rewards) else 1.0
    return [0.0 if reward is None or not rewards_differ(rewards) else (reward - mean) / scale for reward in rewards]


def policy_loss(losses_S: torch.Tensor, batch: Batch, section: ReinforceSection) -> torch.Tensor:
    """Return the summed loss of a batch from the cross-entropy [S] of its tokens at the samples' temperature."""
    rows_S: torch.Tensor = batch["rows_S"]
    advantages_S: torch.Tensor = batch["advantages_R"][rows_S]
    if section.method == "filter":
        return (losses_S * advantages_S).sum()
    logps_S = -losses_S
    ratios_S = (logps_S - batch.get("old_S", logps_S.detach())).exp()
    clipped_S = ratios_S.clamp(1 - section.epsilon, 1 + section.epsilon)
    tokens_S = -torch.minimum(ratios_S * advantages_S, clipped_S * advantages_S)
    if section.ties:
        gaps_S = batch["reference_S"] - logps_S
        tokens_S = tokens_S + section.beta * ratios_S * (gaps_S.exp() - gaps_S - 1)
    if section.loss == "grpo":
        counts_R = rows_S.bincount(minlength=batch["n_rows"])
        tokens_S = tokens_S / counts_R[rows_S]
    return tokens_S.sum()
