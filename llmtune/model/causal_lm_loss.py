"""The loss of a causal model as a sum and a count, taken at the predicted positions only.

Shapes: B batch, T positions, C columns that are predicted from in any row, S supervised tokens, V vocabulary, R rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch

from llmtune.model.chunked_cross_entropy import install_head_loss, remove_head_loss, takes_head_loss
from llmtune.model.device import compute_context
from llmtune.model.packed_attention import PACKED
from llmtune.records import Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_ELEMENTS = 1 << 22
"""Logits that stand in float32 at a time: 16 MiB."""
Batch = Mapping[str, Any]
"""The tensors of one micro-batch; `llmtune.data.collators` has the legend."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of a token's nats; the formats round logits of a few units about so much."""
_PACKING_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def causal_loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Compute the summed cross-entropy of the supervised tokens of `batch` (see `llmtune.data.collators`).

    `model` may be wrapped by PEFT or DDP. With `by_row` losses and right first choices are also
    given a row of the batch.
    """
    if not takes_head_loss(unwrap(model)):
        return token_losses(predicted_logits(model, batch), batch, by_row)
    wanted = {"predict_S": batch["predict_S"], "targets_S": batch["targets_S"], "choices": by_row}
    found = model(**_inputs(model, batch), **wanted)
    return _sum_up(found["losses_S"], found["correct_S"] if by_row else None, batch)


def token_losses(logits_SV: torch.Tensor, batch: Batch, by_row: bool = False) -> Loss:
    """Sum the cross-entropy of `targets_S` under their logits [S, V]; `rows_S` and `n_rows` say whose they are."""
    losses_S, correct_S = _CrossEntropy.apply(logits_SV, batch["targets_S"])  # type: ignore[no-untyped-call]
    return _sum_up(losses_S, correct_S if by_row else None, batch)


def _sum_up(losses_S: torch.Tensor, correct_S: torch.Tensor | None, batch: Batch) -> Loss:
    if correct_S is None:
        return Loss(losses_S.sum(), len(losses_S))
    zeros_R, rows_S = losses_S.new_zeros(batch["n_rows"]), batch["rows_S"]
    row_sums = zeros_R.index_add(0, rows_S, losses_S)
    row_correct = zeros_R.index_add(0, rows_S, correct_S.to(losses_S.dtype))
    return Loss(losses_S.sum(), len(losses_S), correct_S.sum(), row_sums, row_correct)


def predicted_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits [S, V] from which the supervised tokens of `batch` are predicted, as the model gives them."""
    accepted = accepted_arguments(type(unwrap(model)))  # type: ignore[arg-type]
    predict_S, width = batch["predict_S"], batch["input_ids"].shape[1]
    inputs = _inputs(model, batch)
    row_S, column_S = predict_S // width, predict_S % width
    if "logits_to_keep" not in accepted:
        return cast(torch.Tensor, model(**inputs).logits[row_S, column_S])
    if len(batch["input_ids"]) == 1:
        return cast(torch.Tensor, model(**inputs, logits_to_keep=column_S).logits[0])
    columns_C, index_S = column_S.unique(return_inverse=True)
    return cast(torch.Tensor, model(**inputs, logits_to_keep=columns_C).logits[row_S, index_S])


def _inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    inner = unwrap(model)
    accepted = accepted_arguments(type(inner))  # type: ignore[arg-type]
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    inputs |= {key: batch[key] for key in ("attention_mask", "position_ids") if key in batch and key in accepted}
    if inner.config._attn_implementation == PACKED:
        inputs |= {key: batch[key] for key in _PACKING_KEYS if key in batch}
    return inputs


def take_loss_at_head(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Let `model`, in place, take its loss without whole logits; say whether that gives what its logits give.

    They are compared on a few tokens, in the format `dtype` that is computed in; `model` is in eval mode.
    """
    if not install_head_loss(model):
        return False
    size = model.get_input_embeddings().weight.shape[0]
    ids_T = torch.tensor([size * (7 * i % 10) // 10 for i in range(1, 9)], device=model.device)
    places_S = torch.arange(len(ids_T) - 1, device=model.device)
    batch = {
        "input_ids": ids_T[None],
        "position_ids": torch.arange(len(ids_T), device=model.device)[None],
        "attention_mask": torch.ones_like(ids_T)[None],
        "predict_S": places_S,
        "targets_S": ids_T[1:],
        "rows_S": places_S,
        "n_rows": len(places_S),
    }
    with torch.inference_mode(), compute_context(dtype, model.device.type):
        found = causal_loss(model, batch, by_row=True).row_sums
        wanted = token_losses(predicted_logits(model, batch), batch, by_row=True).row_sums
    assert found is not None
    assert wanted is not None
    if torch.allclose(found, wanted, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]):
        return True
    remove_head_loss(model)
    return False


def unwrap(model: torch.nn.Module) -> Any:
    """Return the transformers model inside DDP's and PEFT's wrappers."""
    inner: Any = model
    if hasattr(inner, "module"):  # DistributedDataParallel
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@cache
def accepted_arguments(model_class: Any) -> frozenset[str]:
    """Return the names of what a model's forward takes."""
    return frozenset(inspect.signature(model_class.forward).parameters)


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
