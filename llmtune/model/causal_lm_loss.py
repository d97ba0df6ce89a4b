"""A model's inputs from a batch, and a causal model's loss as a sum and a count, only at the predicted positions.

Shapes: B batch, T positions, C columns with a prediction in any row, S supervised tokens, V vocabulary, R rows.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from llmtune.model.chunked_cross_entropy import CrossEntropy, takes_head_loss
from llmtune.model.packed_attention import LENGTHS, PACKED, PREFIXES
from llmtune.model.prefix_packing import share_prefixes, takes_shared_prefixes
from llmtune.records import Batch, Loss

DFT = "loss_weighed_by_probability"
"""Set on a model trained with `train.loss_type: dft`."""
_PACKING_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", LENGTHS, PREFIXES)


def causal_loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Compute the summed cross-entropy of the supervised tokens of `batch` (see `llmtune.data.collators`).

    `model` may be wrapped by PEFT or DDP. With `by_row`, losses and correct first choices are also given per row.
    """
    losses_S, correct_S = target_losses(model, batch, choices=by_row)
    return _sum_up(weigh_by_probability(losses_S, model), correct_S if by_row else None, batch)


def target_losses(
    model: torch.nn.Module, batch: Batch, *, choices: bool = False, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy [S] of each supervised token, with gradient; the temperature divides the logits.

    With `choices`, also whether each token was the first choice [S]; otherwise that part may be empty.
    """
    if not takes_head_loss(unwrap(model)):
        logits_SV = predicted_logits(model, batch)
        return _measure_tokens(logits_SV if temperature == 1 else logits_SV / temperature, batch)
    if takes_shared_prefixes(unwrap(model)):
        batch = share_prefixes(batch)
    targets = {"predict_S": batch["predict_S"], "targets_S": batch["targets_S"], "choices": choices}
    targets |= {key: batch[key] for key in ("teacher",) if key in batch}
    output = model(**_decoder_arguments(model, batch), **targets, temperature=temperature)
    return output["losses_S"], output["correct_S"]


def weigh_by_probability(losses_S: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Return losses times their tokens' probabilities, if `model` is marked for DFT and in training mode (eq. 9).

    Wu et al., "On the Generalization of SFT", 2025: no gradient goes through the factor.
    """
    dft = model.training and getattr(unwrap(model), DFT, False)
    return losses_S * losses_S.detach().neg().exp() if dft else losses_S


def token_losses(logits_SV: torch.Tensor, batch: Batch, by_row: bool = False) -> Loss:
    """Sum the cross-entropy of `targets_S` under their logits [S, V]; `rows_S` and `n_rows` map tokens to rows."""
    losses_S, correct_S = _measure_tokens(logits_SV, batch)
    return _sum_up(losses_S, correct_S if by_row else None, batch)


def _measure_tokens(logits_SV: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each prediction, by the batch's `teacher` if it has one, and which were the first choice."""
    if "teacher" in batch:
        losses_S = batch["teacher"].losses(logits_SV, None, None, batch["targets_S"])
        return losses_S, logits_SV.argmax(1) == batch["targets_S"]
    return CrossEntropy.apply(logits_SV, batch["targets_S"])  # type: ignore[no-untyped-call, no-any-return]


def _sum_up(losses_S: torch.Tensor, correct_S: torch.Tensor | None, batch: Batch) -> Loss:
    zeros_R, rows_S = losses_S.new_zeros(batch["n_rows"]), batch["rows_S"]
    if correct_S is None:
        return Loss(losses_S.sum(), len(losses_S), row_sums=zeros_R.index_add(0, rows_S, losses_S.detach()))
    row_sums = zeros_R.index_add(0, rows_S, losses_S)
    row_correct = zeros_R.index_add(0, rows_S, correct_S.to(losses_S.dtype))
    return Loss(losses_S.sum(), len(losses_S), correct_S.sum(), row_sums, row_correct)


def predicted_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits [S, V] that predict the supervised tokens of `batch`, as the model returns them."""
    accepted = accepted_arguments(type(unwrap(model)))  # type: ignore[arg-type]
    predict_S, width = batch["predict_S"], batch["input_ids"].shape[1]
    inputs = _decoder_arguments(model, batch)
    row_S, column_S = predict_S // width, predict_S % width + virtual_logits(model)
    if "logits_to_keep" not in accepted:
        return cast(torch.Tensor, model(**inputs).logits[row_S, column_S])
    if len(batch["input_ids"]) == 1:
        return cast(torch.Tensor, model(**inputs, logits_to_keep=column_S).logits[0])
    columns_C, index_S = column_S.unique(return_inverse=True)
    return cast(torch.Tensor, model(**inputs, logits_to_keep=columns_C).logits[row_S, index_S])


def _decoder_arguments(model: torch.nn.Module, batch: Batch) -> dict[str, object]:
    inner = unwrap(model)
    accepted = accepted_arguments(type(inner))  # type: ignore[arg-type]
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    keys = ("attention_mask", "position_ids") if _prompt_config(model) is None else ("attention_mask",)
    inputs |= {key: batch[key] for key in keys if key in batch and key in accepted}
    inputs |= {key: _as_read(batch[key], inner) for key in batch.get("media", ())}
    if inner.config._attn_implementation == PACKED:
        inputs |= {key: batch[key] for key in _PACKING_KEYS if key in batch}
    return inputs


def _as_read(part: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Return an input in the dtype of the model's weights, if it is not of whole numbers."""
    return part.to(model.dtype) if part.is_floating_point() else part


def virtual_tokens(model: torch.nn.Module) -> int:
    """Return the number of trained vectors that the model reads before a text; 0 if they are off."""
    config = _prompt_config(model)
    return 0 if config is None else int(config.num_virtual_tokens)


def virtual_logits(model: torch.nn.Module) -> int:
    """Return the number of logits before those of the text: the keys and values of prefix tuning have none."""
    config = _prompt_config(model)
    decodes = config is not None and config.task_type == "CAUSAL_LM"
    return virtual_tokens(model) if decodes and config.peft_type != "PREFIX_TUNING" else 0


def _prompt_config(model: torch.nn.Module) -> Any:
    """Return PEFT's settings for vectors before a text; None without them, or if they are off."""
    inner = getattr(model, "module", model)
    config = getattr(inner, "active_peft_config", None)
    active = config is not None and config.is_prompt_learning and not inner._adapters_disabled
    return config if active else None


def unwrap(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model inside DDP's and PEFT's wrappers."""
    inner = cast("PreTrainedModel", getattr(model, "module", model))  # DistributedDataParallel
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@cache
def accepted_arguments(model_class: type[torch.nn.Module]) -> frozenset[str]:
    """Return the argument names of a model's forward."""
    return frozenset(inspect.signature(model_class.forward).parameters)


READ = ("input_ids", "attention_mask", "token_type_ids", "input_features", "input_values")
"""Model inputs, by name in a batch."""
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", LENGTHS)
"""Further inputs of a packed row; they imply the positions."""


def move_to(device: torch.device | str, batch: Batch) -> Batch:
    """Return a batch with its tensors on the device; other values are unchanged."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def model_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the parts of a batch that this model reads; audio features in the dtype of its weights."""
    inner = unwrap(model)
    accepted = accepted_arguments(type(inner))  # type: ignore[arg-type]
    parts = {key: batch[key] for key in (*READ, *batch.get("media", ())) if key in batch and key in accepted}
    inputs = {key: _as_read(part, inner) for key, part in parts.items()}
    if "cu_seq_lens_q" in batch:
        assert inner.config._attn_implementation == PACKED, "packed rows need a model that isolates them"
        inputs |= {key: batch[key] for key in DOCUMENTS}
    return inputs


def decoder_inputs(model: torch.nn.Module, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the decoder inputs that predict `labels_BT` (-100 is padding): shifted right after the start token."""
    inner = unwrap(model)
    shift = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return cast(torch.Tensor, shift(labels=labels_BT))
    moved_BT = labels_BT.new_full(labels_BT.shape, inner.config.pad_token_id)
    moved_BT[:, 1:] = labels_BT[:, :-1].clamp_min(0)
    moved_BT[:, 1:].masked_fill_(labels_BT[:, :-1] < 0, inner.config.pad_token_id)
    moved_BT[:, 0] = inner.config.decoder_start_token_id
    return moved_BT
