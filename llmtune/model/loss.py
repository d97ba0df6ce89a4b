"""The loss of a causal model as a sum and a count, with logits at the predicted positions only.

Shapes: B batch, T positions, C columns that are predicted from in any row, S supervised tokens, V vocabulary, R rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping
from functools import cache
from typing import Any, cast

import torch

from llmtune.model.attention import PACKED
from llmtune.records import Loss

_CHUNK_ELEMENTS = 1 << 22
"""Logits that stand in float32 at a time: 16 MiB."""
Batch = Mapping[str, Any]
"""The tensors of one micro-batch; `llmtune.data.collate` has the legend."""
_PACKING_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def causal_loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Compute the summed cross-entropy of the supervised tokens of `batch` (see `llmtune.data.collate`).

    `model` may be wrapped by PEFT or DDP. With `by_row` losses and right first choices are also
    given a row of the batch.
    """
    return token_losses(predicted_logits(model, batch), batch, by_row)


def token_losses(logits_SV: torch.Tensor, batch: Batch, by_row: bool = False) -> Loss:
    """Sum the cross-entropy of `targets_S` under their logits [S, V]; `rows_S` and `n_rows` say whose they are."""
    targets_S = batch["targets_S"]
    losses_S, correct_S = _CrossEntropy.apply(logits_SV, targets_S)  # type: ignore[no-untyped-call]
    if not by_row:
        return Loss(losses_S.sum(), len(targets_S), correct_S.sum())
    zeros_R, rows_S = losses_S.new_zeros(batch["n_rows"]), batch["rows_S"]
    row_sums = zeros_R.index_add(0, rows_S, losses_S)
    row_correct = zeros_R.index_add(0, rows_S, correct_S.to(losses_S.dtype))
    return Loss(losses_S.sum(), len(targets_S), correct_S.sum(), row_sums, row_correct)


def predicted_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits [S, V] from which the supervised tokens of `batch` are predicted, as the model gives them."""
    inner = unwrap(model)
    predict_S = batch["predict_S"]
    ids_BT = batch["input_ids"]
    inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": False}
    accepted = accepted_arguments(type(inner))  # type: ignore[arg-type]
    inputs |= {key: batch[key] for key in ("attention_mask", "position_ids") if key in batch and key in accepted}
    if inner.config._attn_implementation == PACKED:
        inputs |= {key: batch[key] for key in _PACKING_KEYS if key in batch}
    row_S, column_S = predict_S // ids_BT.shape[1], predict_S % ids_BT.shape[1]
    if "logits_to_keep" not in accepted:
        return cast(torch.Tensor, model(**inputs).logits[row_S, column_S])
    if len(ids_BT) == 1:
        return cast(torch.Tensor, model(**inputs, logits_to_keep=column_S).logits[0])
    columns_C, index_S = column_S.unique(return_inverse=True)
    return cast(torch.Tensor, model(**inputs, logits_to_keep=columns_C).logits[row_S, index_S])


def unwrap(model: torch.nn.Module) -> Any:
    """Return the transformers model inside DDP's and PEFT's wrappers."""
    inner: Any = model
    if hasattr(inner, "module"):  # DistributedDataParallel
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@cache
def accepted_arguments(model_class: Hashable) -> frozenset[str]:
    """Return the names of what a model's forward takes."""
    return frozenset(inspect.signature(cast(Any, model_class).forward).parameters)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy a token in float32, a chunk of tokens at a time; only the logits as they are and a sum are kept.

    Against `cross_entropy(logits.float(), targets)` it saves three float32 copies of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits_SV: torch.Tensor, targets_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, V], [S] -> nats [S] float32, whether the target was the first choice [S] bool."""
        losses_S = torch.empty(len(targets_S), dtype=torch.float32, device=logits_SV.device)
        totals_S = torch.empty_like(losses_S)
        correct_S = torch.empty(len(targets_S), dtype=torch.bool, device=logits_SV.device)
        for part in _chunks(logits_SV):
            logits_cV, targets_c = logits_SV[part].to(torch.float32, copy=True), targets_S[part]
            highest_c, choices_c = logits_cV.max(1)
            logits_cV -= highest_c[:, None]  # a loss near zero keeps its digits
            spread_c = logits_cV.logsumexp(1)
            losses_S[part] = spread_c - logits_cV.gather(1, targets_c[:, None])[:, 0]
            totals_S[part] = highest_c + spread_c
            correct_S[part] = choices_c == targets_c
        ctx.mark_non_differentiable(correct_S)
        ctx.save_for_backward(logits_SV, targets_S, totals_S)
        return losses_S, correct_S

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gradient of each token's loss [S] -> of the logits [S, V]: softmax minus one at the target."""
        logits_SV, targets_S, totals_S = ctx.saved_tensors
        gradient_SV = torch.empty_like(logits_SV)
        for part in _chunks(logits_SV):
            probabilities_cV = (logits_SV[part].float() - totals_S[part, None]).exp_()
            targets_c1 = targets_S[part, None]
            probabilities_cV.scatter_add_(1, targets_c1, torch.full_like(targets_c1, -1, dtype=torch.float32))
            gradient_SV[part] = probabilities_cV.mul_(outputs[0][part, None])
        return gradient_SV, None


def _chunks(logits_SV: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // logits_SV.shape[1])
    for start in range(0, len(logits_SV), step):
        yield slice(start, start + step)
