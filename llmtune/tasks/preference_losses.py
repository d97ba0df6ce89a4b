"""Losses that learn from preferences: DPO, IPO, KTO, ORPO and the reward loss, each as a sum and a count.

Shapes: B batch, T positions, S supervised tokens, V vocabulary, R rows, P pairs, c tokens of a chunk.

A batch of pairs comes from `llmtune.data.collators.collate_padded` with 2P rows: first all chosen answers, then all
rejected ones in the same order. In addition to its keys, the losses read:

    desirable_R     bool [R]     kto only, whose rows are single answers with a thumb: thumb up
    kl_...          kto only: a second padded batch of each prompt with the answer to another one
    totals          kto and orpo: the result of `step_statistics`, added up over all micro-batches of the step

With the log-ratio r(y) = log p(y|x) - log p_ref(y|x) of an answer, w the chosen and l the rejected one, |y| its tokens,
s the logistic function and b `beta`:

    dpo     -(1 - e) log s(b (r(w) - r(l))) - e log s(-b (r(w) - r(l))), e `label_smoothing`
            Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothed it is the conservative DPO of its authors' code
    ipo     (r(w) / |w| - r(l) / |l| - 1 / (2 b))^2
            Azar et al. 2023, arXiv:2310.12036, eq. 17, by token as its authors advise and TRL does
    kto     u s(b (z - r(y))) for a desirable y, v s(b (r(y) - z)) for an undesirable one, u and v the two weights;
            z = max(0, mean of r over the answers to other prompts); a mean over rows, not over weights
            Ethayarajh et al. 2024, arXiv:2402.01306, section 4
    orpo    -mean over tokens of log p - b log s(o(w) - o(l)), o(y) = log q - log(1 - q), log q = log p(y|x) / |y|
            Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7
    reward  -log s(R(w) - R(l)) + c (R(w) + R(l))^2, c `center_rewards_coefficient`
            Bradley and Terry 1952, as in Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the centre is
            Eisenstein et al. 2023, arXiv:2312.09244

The first term of orpo covers the chosen row from its second token on, prompt included, as in TRL's trainer; in the
paper it covers the answer alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from torch.nn.functional import log_softmax, logsigmoid

from llmtune.model.causal_lm_loss import causal_loss, predicted_logits, unwrap
from llmtune.recipe.task_sections import PreferenceSection
from llmtune.records import Batch, Loss

ReferenceModel = Callable[[], AbstractContextManager[object]]
"""Creates a context in which the model behaves as the reference, such as PEFT's `disable_adapter`."""

_CHUNK_ELEMENTS = 1 << 22
_SURE = -1e-30
"""Upper limit of log-probabilities before odds are taken: at 0 the odds and their gradient are infinite."""


def preference_loss(
    model: torch.nn.Module, batch: Batch, settings: PreferenceSection, reference: ReferenceModel | None = None
) -> Loss:
    """Compute the summed loss of `batch` and its count: of pairs, or of rows for kto.

    `correct` counts the pairs whose chosen answer has the higher reward; for kto, the rows on the right side of z. With
    the same `totals`, the sums of micro-batches add up to that of the complete step. dpo, ipo and kto need `reference`,
    which runs without gradient or dropout.
    """
    return _LOSSES[settings.loss](model, batch, settings, reference)


def step_statistics(
    model: torch.nn.Module, batch: Batch, settings: PreferenceSection, reference: ReferenceModel | None = None
) -> list[float]:
    """Return the sums over a complete step that the loss of each of its micro-batches needs.

    kto: the summed log-ratios of the mismatched answers (no gradient, no dropout), and their number. orpo, without a
    forward pass: the number of tokens in the mean of its first term, and the number of pairs. Other losses: [].
    """
    if settings.loss == "kto":
        mismatched = {key.removeprefix("kl_"): part for key, part in batch.items() if key.startswith("kl_")}
        ratios_R = _log_ratios(model, mismatched, reference, policy_gradient=False)
        return [float(ratios_R.sum(dtype=torch.float64)), float(len(ratios_R))]
    if settings.loss == "orpo":
        pairs = _count_pairs(batch)
        return [float(batch["attention_mask"][:pairs, 1:].sum()), float(pairs)]
    return []


def sequence_logps(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probability [R] of each row's supervised tokens, with gradient, and their number [R]."""
    row_sums = causal_loss(model, batch, by_row=True).row_sums
    assert row_sums is not None
    return -row_sums, count_supervised(batch)


def row_scores(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the rewards [R] of a sequence classifier with one label, with gradient.

    A decoder's reward is read at the last token that is not its configuration's `pad_token_id`, so rows must be padded
    with that token.
    """
    inner = unwrap(model)
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    is_pad_BT = ids_BT == inner.config.get_text_config().pad_token_id
    padded = ids_BT.is_cuda or bool((is_pad_BT | (mask_BT != 0)).all())  # skipped on a GPU, where it would synchronise
    assert padded, "rows are padded with the pad token of the model's configuration"
    options = {"use_cache": False} if "use_cache" in inspect.signature(type(inner).forward).parameters else {}
    logits_R1 = model(input_ids=ids_BT, attention_mask=mask_BT, **options).logits
    assert logits_R1.shape[1] == 1, "a reward model has one label"
    scores_R: torch.Tensor = logits_R1[:, 0].float()
    return scores_R


def kl_to_reference(model: torch.nn.Module, batch: Batch, reference: ReferenceModel) -> torch.Tensor:
    """Return KL(policy || reference) over the full vocabulary, summed over each row's supervised positions: [R] nats.

    Without gradient or dropout. Exact at each position. The policy has not sampled the answers itself, so this does not
    estimate the KL of complete sequences.
    """
    with _measure(model):
        policy_SV = predicted_logits(model, batch)
        with reference():
            reference_SV = predicted_logits(model, batch)
        step = max(1, _CHUNK_ELEMENTS // policy_SV.shape[1])
        chunks = [slice(start, start + step) for start in range(0, max(1, len(policy_SV)), step)]
        kl_S = torch.cat([_divergence(policy_SV[chunk], reference_SV[chunk]) for chunk in chunks])
        return kl_S.new_zeros(batch["n_rows"]).index_add(0, batch["rows_S"], kl_S)


def kl_per_token(model: torch.nn.Module, batch: Batch) -> list[float]:
    """Return the divergence [R] from the model without its adapter, in nats per token; 0 without an adapter."""
    if not isinstance(model, PeftModel):
        return [0.0] * int(batch["n_rows"])
    counts_R = count_supervised(batch).clamp(min=1)
    kl_R: list[float] = (kl_to_reference(model, batch, model.disable_adapter) / counts_R).tolist()
    return kl_R


def _dpo_or_ipo(
    model: torch.nn.Module, batch: Batch, settings: PreferenceSection, reference: ReferenceModel | None
) -> Loss:
    """Return the DPO or IPO loss of P pairs, from the log ratios of both answers to the reference."""
    chosen_P, rejected_P = _log_ratios(model, batch, reference).chunk(2)
    if settings.loss == "ipo":
        chosen_counts_P, rejected_counts_P = count_supervised(batch).clamp(min=1).chunk(2)
        margins_P = chosen_P / chosen_counts_P - rejected_P / rejected_counts_P
        losses_P = (margins_P - 1 / (2 * settings.beta)) ** 2
    else:
        logits_P, smoothing = settings.beta * (chosen_P - rejected_P), settings.label_smoothing
        losses_P = -(1 - smoothing) * logsigmoid(logits_P) - smoothing * logsigmoid(-logits_P)
    return Loss(losses_P.sum(), len(losses_P), (chosen_P > rejected_P).sum(), losses_P.detach())


def _kto(model: torch.nn.Module, batch: Batch, settings: PreferenceSection, reference: ReferenceModel | None) -> Loss:
    kl_sum, kl_rows = batch["totals"]
    desirable_R = batch["desirable_R"]
    gains_R = _log_ratios(model, batch, reference) - max(0.0, float(kl_sum) / float(kl_rows))
    gains_R = torch.where(desirable_R, gains_R, -gains_R)
    weights_R = torch.where(desirable_R, settings.desirable_weight, settings.undesirable_weight)
    losses_R = weights_R * torch.sigmoid(-settings.beta * gains_R)
    return Loss(losses_R.sum(), len(losses_R), (gains_R > 0).sum(), losses_R.detach())


def _orpo(model: torch.nn.Module, batch: Batch, settings: PreferenceSection, reference: ReferenceModel | None) -> Loss:
    """The first term is a mean over the step's tokens; multiply it by the step's pairs, because the count divides."""
    tokens, pairs = (float(total) for total in batch["totals"])
    logps_R, _ = sequence_logps(model, _with_prompts(batch))
    chosen_P, rejected_P, prompts_P = logps_R.chunk(3)
    chosen_counts_P, rejected_counts_P = count_supervised(batch).clamp(min=1).chunk(2)
    chosen_mean_P, rejected_mean_P = chosen_P / chosen_counts_P, rejected_P / rejected_counts_P
    ratios_P = logsigmoid(_log_odds(chosen_mean_P) - _log_odds(rejected_mean_P))
    likelihood = (chosen_P + prompts_P).sum()
    loss = -likelihood * (pairs / tokens) - settings.beta * ratios_P.sum()
    return Loss(loss, len(ratios_P), (chosen_mean_P > rejected_mean_P).sum())


def _reward(
    model: torch.nn.Module, batch: Batch, settings: PreferenceSection, reference: ReferenceModel | None
) -> Loss:
    chosen_P, rejected_P = row_scores(model, batch).chunk(2)
    losses_P = -logsigmoid(chosen_P - rejected_P)
    if settings.center_rewards_coefficient is not None:
        losses_P = losses_P + settings.center_rewards_coefficient * (chosen_P + rejected_P) ** 2
    return Loss(losses_P.sum(), len(losses_P), (chosen_P > rejected_P).sum(), losses_P.detach())


_LOSSES: Mapping[str, Callable[[torch.nn.Module, Batch, PreferenceSection, ReferenceModel | None], Loss]] = {
    "dpo": _dpo_or_ipo,
    "ipo": _dpo_or_ipo,
    "kto": _kto,
    "orpo": _orpo,
    "reward": _reward,
}


def _log_ratios(
    model: torch.nn.Module, batch: Batch, reference: ReferenceModel | None, policy_gradient: bool = True
) -> torch.Tensor:
    """Return log p - log p_ref [R]; run the reference first, before the policy's graph is in memory."""
    assert reference is not None, "this loss has a reference"
    with _measure(model), reference():
        reference_R, _ = sequence_logps(model, batch)
    if policy_gradient:
        return sequence_logps(model, batch)[0] - reference_R
    with _measure(model):
        return sequence_logps(model, batch)[0] - reference_R


def _log_odds(logps_P: torch.Tensor) -> torch.Tensor:
    logps_P = logps_P.clamp(max=_SURE)
    return logps_P - torch.log(-torch.expm1(logps_P))


def _divergence(policy_cV: torch.Tensor, reference_cV: torch.Tensor) -> torch.Tensor:
    policy_cV = log_softmax(policy_cV, dim=1, dtype=torch.float32)
    reference_cV = log_softmax(reference_cV, dim=1, dtype=torch.float32)
    return (policy_cV.exp() * (policy_cV - reference_cV)).sum(1)


def prompt_positions(batch: Batch) -> torch.Tensor:
    """Return the flat index in B * T of the positions that predict unsupervised tokens of chosen rows.

    Computed on the CPU when the batch is made: their number depends on data, which would synchronise a GPU.
    """
    pairs = _count_pairs(batch)
    wanted_BT = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    wanted_BT[:pairs, :-1] = batch["attention_mask"][:pairs, 1:] != 0
    wanted_BT.view(-1)[batch["predict_S"]] = False
    return wanted_BT.view(-1).nonzero()[:, 0]


def _with_prompts(batch: Batch) -> Batch:
    """Return `batch` with P additional rows in `rows_S`: the unsupervised tokens of each chosen row."""
    ids_BT, pairs, predict_S = batch["input_ids"], _count_pairs(batch), batch["prompts_S"]
    targets_S = ids_BT.reshape(-1)[predict_S + 1]
    rows_S = predict_S // ids_BT.shape[1] + 2 * pairs
    return {
        **batch,
        "predict_S": torch.cat([batch["predict_S"], predict_S]),
        "targets_S": torch.cat([batch["targets_S"], targets_S]),
        "rows_S": torch.cat([batch["rows_S"], rows_S]),
        "n_rows": 3 * pairs,
    }


def _count_pairs(batch: Batch) -> int:
    rows: int = batch["n_rows"]
    assert rows % 2 == 0, "each chosen answer has a rejected one"
    return rows // 2


def count_supervised(batch: Batch) -> torch.Tensor:
    """Count each row's supervised tokens: [R]. `bincount` would synchronise a GPU."""
    rows_S: torch.Tensor = batch["rows_S"]
    return rows_S.new_zeros(batch["n_rows"]).index_add(0, rows_S, torch.ones_like(rows_S))


@contextmanager
def _measure(model: torch.nn.Module) -> Iterator[None]:
    """Run `model` without gradient and dropout, then restore each module's mode.

    With dropout the reference would differ each time, and would consume the policy's random numbers.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
