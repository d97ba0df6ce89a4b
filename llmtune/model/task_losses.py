"""Losses of models that predict something else than the next token of what they read, each a sum and a count.

Shapes: B rows of a batch, R examples (the same), T positions, S predicted tokens, V vocabulary, K classes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from llmtune.model.causal_lm_loss import accepted_arguments, token_losses, unwrap
from llmtune.model.packed_attention import PACKED
from llmtune.records import Batch, Loss

READ = ("input_ids", "attention_mask", "token_type_ids", "input_features", "input_values")
"""What models read, by its name in a batch."""
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What they read beside that of a packed row; positions follow from it."""
MASKING = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
"""Models of sound that padding does not change, but for a first layer that is normed over time."""


def read_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    """Return what of a batch this model reads; features of sound in the number format of its weights."""
    inner = unwrap(model)
    accepted = accepted_arguments(type(inner))  # type: ignore[arg-type]
    found = {key: batch[key] for key in READ if key in batch and key in accepted}
    read = {key: part.to(inner.dtype) if part.is_floating_point() else part for key, part in found.items()}
    if "cu_seq_lens_q" in batch:
        assert inner.config._attn_implementation == PACKED, "rows are packed for a model that keeps them apart"
        read |= {key: batch[key] for key in DOCUMENTS}
    return read


def decoder_inputs(model: torch.nn.Module, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return what the decoder reads to predict `labels_BT` (-100 is padding): moved right, as this model starts."""
    inner = unwrap(model)
    shift = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return cast(torch.Tensor, shift(labels=labels_BT))
    moved_BT = labels_BT.new_full(labels_BT.shape, inner.config.pad_token_id)
    moved_BT[:, 1:] = labels_BT[:, :-1].clamp_min(0)
    moved_BT[:, 1:].masked_fill_(labels_BT[:, :-1] < 0, inner.config.pad_token_id)
    moved_BT[:, 0] = inner.config.decoder_start_token_id
    return moved_BT


def seq2seq_loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Sum the cross entropy of the supervised target tokens of an encoder-decoder, written or spoken to.

    `batch["labels"]` [B, T] holds the targets; `predict_S` and `targets_S` which of them are learned.
    """
    inputs = read_inputs(model, batch)
    inputs["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
    if "use_cache" in accepted_arguments(type(unwrap(model))):  # type: ignore[arg-type]
        inputs["use_cache"] = False
    logits_BTV = model(**inputs).logits
    return token_losses(logits_BTV.flatten(0, 1)[batch["predict_S"]], batch, by_row)


def classes_loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Sum a classifier's loss over rows: cross entropy of one class, mean binary one of many, square of a number.

    With `weights_R` each row counts so much in the sum, and once in the count.
    """
    logits_RK = model(**read_inputs(model, batch)).logits.float()
    if "classes_R" in batch:
        losses_R = functional.cross_entropy(logits_RK, batch["classes_R"], reduction="none")
        correct_R = logits_RK.argmax(-1) == batch["classes_R"]
    elif logits_RK.shape[1] == batch["values_RK"].shape[1] and batch["many"]:
        targets_RK = batch["values_RK"]
        losses_R = functional.binary_cross_entropy_with_logits(logits_RK, targets_RK, reduction="none").mean(-1)
        correct_R = ((logits_RK > 0) == (targets_RK > 0.5)).all(-1)
    else:
        losses_R = (logits_RK[:, 0] - batch["values_RK"][:, 0]).square()
        correct_R = torch.zeros_like(losses_R, dtype=torch.bool)
    if "weights_R" in batch:
        losses_R = losses_R * batch["weights_R"]
    return rows_loss(losses_R, correct_R, by_row)


def rows_loss(losses_R: torch.Tensor, correct_R: torch.Tensor, by_row: bool) -> Loss:
    """Return the loss of rows that each stand for one prediction."""
    right_R = correct_R.to(losses_R.dtype)
    if not by_row:
        return Loss(losses_R.sum(), len(losses_R), right_R.sum())
    return Loss(losses_R.sum(), len(losses_R), right_R.sum(), losses_R, right_R)


def tags_loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Sum the cross entropy of the tags at the first token of each word."""
    logits_BTK = model(**read_inputs(model, batch)).logits
    return token_losses(logits_BTK.flatten(0, 1)[batch["predict_S"]], batch, by_row)


def ends_loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Sum, a window, the mean cross entropy of the first and the last token of the answer; padding is no choice."""
    found = model(**read_inputs(model, batch))
    starts_BT, ends_BT = (by_text(part.float(), batch) for part in (found.start_logits, found.end_logits))
    first_R, last_R = batch["first_R"], batch["last_R"]
    losses_R = (
        functional.cross_entropy(starts_BT, first_R, reduction="none")
        + functional.cross_entropy(ends_BT, last_R, reduction="none")
    ) / 2
    correct_R = (starts_BT.argmax(-1) == first_R) & (ends_BT.argmax(-1) == last_R)
    return rows_loss(losses_R, correct_R, by_row)


def by_text(logits_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Put the logits of each text in a row of its own, [R, T] with the lowest number where there is no token."""
    lowest = torch.finfo(logits_BT.dtype).min
    if "cu_seq_lens_q" not in batch:
        return logits_BT.masked_fill(~batch["attention_mask"].bool(), lowest)
    sizes_R = batch["cu_seq_lens_q"].diff().tolist()
    return pad_sequence([*torch.split(logits_BT[0], sizes_R)], batch_first=True, padding_value=lowest)


def ctc_loss(model: torch.nn.Module, batch: Batch, by_row: bool = False) -> Loss:
    """Sum the negative log-likelihood of the transcripts over all alignments; the count is their tokens.

    Graves et al., "Connectionist Temporal Classification", 2006. Where padding would change what a model hears (its
    first layer is normed over time), rows are heard one by one.
    """
    inner = unwrap(model)
    labels_BT, blank = batch["labels"], inner.config.pad_token_id
    frames_R = inner._get_feat_extract_output_lengths(batch["samples_R"]).to(torch.long)
    sums = []
    for values, rows in sound_pieces(model, batch):
        logits_BTV = model(**values).logits
        log_TBV = logits_BTV.float().log_softmax(-1).transpose(0, 1)
        targets_BT = labels_BT[rows]
        sizes_B = (targets_BT >= 0).sum(-1)
        with torch.backends.cudnn.flags(enabled=False):  # its kernel is not deterministic
            losses_B = functional.ctc_loss(
                log_TBV, targets_BT.clamp_min(0), frames_R[rows], sizes_B, blank=blank, reduction="none"
            )
        sums.append(losses_B)
    losses_R = torch.cat(sums)
    count = int((labels_BT >= 0).sum())
    zero = torch.zeros((), device=losses_R.device)
    if not by_row:
        return Loss(losses_R.sum(), count, zero)
    return Loss(losses_R.sum(), count, zero, losses_R, torch.zeros_like(losses_R))


def sound_pieces(model: torch.nn.Module, batch: Batch) -> list[tuple[dict[str, Any], slice]]:
    """Return what is heard at once: the whole batch, or row by row without padding where the model cannot mask it.

    A first layer that is normed over time hears padding, and so do convolutions behind the mask (Data2Vec, Conformer).
    """
    inputs, config = read_inputs(model, batch), unwrap(model).config
    masked = config.model_type in MASKING and not getattr(config, "add_adapter", False)
    if masked and config.feat_extract_norm != "group":
        return [(inputs, slice(0, batch["n_rows"]))]
    sizes = batch["samples_R"].tolist()
    values_BN = inputs["input_values"]
    return [({"input_values": values_BN[i : i + 1, :size]}, slice(i, i + 1)) for i, size in enumerate(sizes)]
