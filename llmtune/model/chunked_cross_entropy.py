"""Fused output head and cross-entropy, a chunk of tokens at a time, which keeps logits from filling the memory.

It runs inside the model's own `forward`, so PEFT, DDP and FSDP wrap it like the rest. For a frozen head the forward
pass also computes the gradient of the head's input while a chunk's logits are available. For a trained head the
backward pass recomputes the logits.

Shapes: B batch, T positions, S supervised tokens, c tokens of one chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from types import MethodType
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from transformers import PreTrainedConfig, PreTrainedModel

CHUNK_ELEMENTS = 1 << 24
"""Logits in the compute dtype at a time: 32 MiB in 16 bits."""
_FLOAT32_ELEMENTS = 1 << 22
"""Full logits copied to float32 at a time: 16 MiB."""
_PIECE_ELEMENTS = 1 << 19
"""Float32 logits at a time on a CPU: they fit its cache."""
_MARK = "_llmtune_head_loss"


@dataclass(frozen=True)
class LogitShape:
    """A model's transformation of its logits: multiplied by `scale`, capped to -cap .. cap, then times `heat`."""

    scale: float = 1.0
    cap: float | None = None
    heat: float = 1.0
    """The inverse of the temperature."""


def install_head_loss(model: PreTrainedModel) -> bool:
    """Make `model.forward` also accept `targets_S` and `predict_S`, and then return losses instead of logits; in place.

    Returns False, without changes, unless the model is a backbone with a linear head and a class of transformers. The
    forward pass then returns {losses_S: float32 nats, correct_S: bool, or empty without `choices`}.
    """
    head, backbone = model.get_output_embeddings(), model.base_model
    if backbone is model or type(head) is not torch.nn.Linear or not type(model).__module__.startswith("transformers."):
        return False
    original = type(model).forward

    @wraps(original)
    def forward(
        self: PreTrainedModel,
        *args: object,
        targets_S: torch.Tensor | None = None,
        predict_S: torch.Tensor | None = None,
        choices: bool = False,
        temperature: float = 1.0,
        teacher: Any = None,
        **kwargs: object,
    ) -> object:
        if targets_S is None:
            return original(self, *args, **kwargs)
        hidden_BTD = self.base_model(*args, **kwargs)[0]
        hidden_SD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[predict_S]
        head, shape = self.get_output_embeddings(), replace(logit_shape(self.config), heat=1 / temperature)
        return head_loss(hidden_SD, head, targets_S, shape, choices, teacher)

    model.forward = MethodType(forward, model)
    setattr(model, _MARK, True)
    return True


def remove_head_loss(model: PreTrainedModel) -> None:
    """Restore the original forward of `model`, in place."""
    if getattr(model, _MARK, False):
        del model.forward
        setattr(model, _MARK, False)


def takes_head_loss(model: PreTrainedModel) -> bool:
    """Whether the model inside all wrappers currently takes its loss at the head.

    A head with its own adapter, or one with a hook, is called like any other module.
    """
    if not getattr(model, _MARK, False):
        return False
    head = model.get_output_embeddings()
    return type(head) is torch.nn.Linear and not head._forward_hooks


def logit_shape(config: PreTrainedConfig) -> LogitShape:
    """Read a model's logit transformation from its configuration (Cohere and Granite scale, Gemma 2 caps)."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    return LogitShape(scale, getattr(text, "final_logit_softcapping", None))


def head_loss(
    hidden_SD: torch.Tensor,
    head: torch.nn.Linear,
    targets_S: torch.Tensor,
    shape: LogitShape,
    choices: bool,
    teacher: Any = None,
) -> dict[str, torch.Tensor]:
    """Return each target's cross-entropy, float32 nats, with gradient, and whether it was the first choice.

    A `teacher` (`llmtune.model.teacher_loss`) measures them instead, without choices.
    """
    kind = hidden_SD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    if teacher is not None:
        losses_S = teacher.losses(hidden_SD.to(dtype), head.weight.to(dtype), bias, targets_S, shape)
        return {"losses_S": losses_S, "correct_S": torch.empty(0, dtype=torch.bool, device=losses_S.device)}
    outputs = _HeadLoss.apply(hidden_SD.to(dtype), head.weight.to(dtype), bias, targets_S, shape, choices)  # type: ignore[no-untyped-call]
    losses_S, correct_S = cast(tuple[torch.Tensor, torch.Tensor], outputs)
    return {"losses_S": losses_S, "correct_S": correct_S}


class _HeadLoss(torch.autograd.Function):
    """Hidden states and targets into losses."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_S: torch.Tensor,
        shape: LogitShape,
        choices: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return nats [S] float32, and first choices [S] bool (empty unless requested)."""
        count = len(targets_S)
        losses_S = torch.empty(count, dtype=torch.float32, device=hidden_SD.device)
        correct_S = torch.empty(count if choices else 0, dtype=torch.bool, device=hidden_SD.device)
        trained = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
        eager = hidden_SD.requires_grad and not trained
        gradient_SD = torch.empty_like(hidden_SD) if eager else None
        with torch.autocast(hidden_SD.device.type, enabled=False):
            for part in split_tokens(count, weight_VD.shape[0], CHUNK_ELEMENTS):
                logits_cV = linear(hidden_SD[part], weight_VD, bias_V)
                if choices:
                    correct_S[part] = logits_cV.argmax(1) == targets_S[part]
                slopes_c = _losses(logits_cV, targets_S[part], shape, losses_S[part], keep=eager)
                if gradient_SD is not None:
                    into_cD = logits_cV @ weight_VD  # these are the gradient by now, except for the target's own part
                    own_cD = weight_VD[targets_S[part]].float() * slopes_c[:, None]
                    gradient_SD[part] = (into_cD.float() - own_cD).to(hidden_SD.dtype)
        if trained:
            ctx.save_for_backward(hidden_SD, weight_VD, bias_V, targets_S)
        else:
            ctx.save_for_backward(gradient_SD)
        ctx.trained, ctx.shape = trained, shape
        ctx.mark_non_differentiable(correct_S)
        return losses_S, correct_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of each token's loss [S] -> of hidden states, weights and bias."""
        raised_S = outputs[0]
        if not ctx.trained:
            (gradient_SD,) = ctx.saved_tensors
            return gradient_SD * raised_S[:, None].to(gradient_SD.dtype), None, None, None, None, None
        hidden_SD, weight_VD, bias_V, targets_S = ctx.saved_tensors

        def turn(logits_cV: torch.Tensor, part: slice) -> None:
            losses_c = torch.empty(len(logits_cV), dtype=torch.float32, device=logits_cV.device)
            slopes_c = _losses(logits_cV, targets_S[part], ctx.shape, losses_c, keep=True)
            logits_cV.scatter_add_(1, targets_S[part, None], -slopes_c[:, None].to(logits_cV.dtype))

        return *propagate(hidden_SD, weight_VD, bias_V, raised_S, turn), None, None, None


def propagate(
    inputs_SD: torch.Tensor,
    weight_VD: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    raised_S: torch.Tensor,
    turn: Callable[[torch.Tensor, slice], object],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of inputs, weight and bias from those of the losses, with the logits computed again.

    `turn` replaces the logits of a chunk by their gradient, in place.
    """
    inner_SD = torch.empty_like(inputs_SD)
    dw_VD = None if weight_VD is None else torch.zeros_like(weight_VD, dtype=torch.float32)
    db_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
    for part in split_tokens(len(inputs_SD), head_width(inputs_SD, weight_VD), CHUNK_ELEMENTS):
        logits_cV = chunk_logits(inputs_SD[part], weight_VD, bias_V)
        turn(logits_cV, part)
        logits_cV.mul_(raised_S[part, None])
        inner_SD[part] = logits_cV if weight_VD is None else logits_cV @ weight_VD
        if dw_VD is not None:
            dw_VD += logits_cV.T @ inputs_SD[part]
        if db_V is not None:
            db_V += logits_cV.sum(0, dtype=torch.float32)
    dw, db = (None if sums is None else sums.to(inputs_SD.dtype) for sums in (dw_VD, db_V))
    return inner_SD, dw, db


def chunk_logits(inputs_cD: torch.Tensor, weight_VD: torch.Tensor | None, bias_V: torch.Tensor | None) -> torch.Tensor:
    """Return logits that may be changed in place; without a weight, the inputs are logits."""
    return inputs_cD.clone() if weight_VD is None else linear(inputs_cD, weight_VD, bias_V)


def head_width(inputs_SD: torch.Tensor, weight_VD: torch.Tensor | None) -> int:
    """Return the number of logits of a prediction."""
    return (inputs_SD.shape[1:] if weight_VD is None else weight_VD.shape)[0]


def _losses(
    logits_cV: torch.Tensor, targets_c: torch.Tensor, shape: LogitShape, losses_c: torch.Tensor, *, keep: bool
) -> torch.Tensor:
    """Write each token's loss to `losses_c`; with `keep`, turn `logits_cV` into the gradient of log-sum-exp, in place.

    Returns the slope [c] of each target's own logit, which that gradient does not include yet.
    """
    slope = shape.scale * shape.heat
    slopes_c = torch.full_like(losses_c, slope)
    step = len(logits_cV) if logits_cV.is_cuda else max(1, _PIECE_ELEMENTS // logits_cV.shape[1])
    for start in range(0, len(logits_cV), step):
        rows = slice(start, start + step)
        values_pV, targets_p1 = logits_cV[rows].to(torch.float32, copy=True), targets_c[rows, None]
        before_cap = slope if shape.cap is None else shape.scale
        if before_cap != 1:
            values_pV.mul_(before_cap)
        bent_pV = None
        if shape.cap is not None:
            values_pV.div_(shape.cap).tanh_()
            bent_pV = (1 - values_pV.square()).mul_(slope)
            slopes_c[rows] = bent_pV.gather(1, targets_p1)[:, 0]
            values_pV.mul_(shape.cap * shape.heat)
        values_pV -= values_pV.amax(1, keepdim=True)  # a loss near zero keeps its digits
        own_p = values_pV.gather(1, targets_p1)[:, 0]
        sums_p1 = values_pV.exp_().sum(1, keepdim=True)
        losses_c[rows] = sums_p1[:, 0].log() - own_p
        if keep:
            values_pV.mul_((slope if bent_pV is None else 1.0) / sums_p1)
            logits_cV[rows] = values_pV if bent_pV is None else values_pV.mul_(bent_pV)
    return slopes_c


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy per token from full logits in float32, a chunk at a time; keeps only the logits and a sum.

    Compared with `cross_entropy(logits.float(), targets)` it saves three float32 copies of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits_SV: torch.Tensor, targets_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, V], [S] -> nats [S] float32, whether the target was the first choice [S] bool."""
        losses_S = torch.empty(len(targets_S), dtype=torch.float32, device=logits_SV.device)
        totals_S = torch.empty_like(losses_S)
        correct_S = torch.empty(len(targets_S), dtype=torch.bool, device=logits_SV.device)
        for part in split_tokens(len(logits_SV), logits_SV.shape[1], _FLOAT32_ELEMENTS):
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
        for part in split_tokens(len(logits_SV), logits_SV.shape[1], _FLOAT32_ELEMENTS):
            probabilities_cV = (logits_SV[part].float() - totals_S[part, None]).exp_()
            targets_c1 = targets_S[part, None]
            probabilities_cV.scatter_add_(1, targets_c1, torch.full_like(targets_c1, -1, dtype=torch.float32))
            gradient_SV[part] = probabilities_cV.mul_(outputs[0][part, None])
        return gradient_SV, None


def split_tokens(tokens: int, vocabulary: int, elements: int) -> Iterator[slice]:
    """Yield slices of at most `elements` logits, and of at least one token."""
    step = max(1, elements // vocabulary)
    for start in range(0, tokens, step):
        yield slice(start, start + step)
