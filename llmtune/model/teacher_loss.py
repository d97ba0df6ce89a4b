"""The loss against a teacher's most likely tokens, a chunk of tokens at a time, exact in its gradient.

A teacher's distribution is kept in k + 1 bins: its k most likely tokens, and all others together. The loss is the
Kullback-Leibler divergence of the student from it over the same bins, so with k = vocabulary it is the exact one.

Shapes: S predictions, c predictions of one chunk, p of one piece, V vocabulary or classes, D width, K most likely
tokens, L = K + 1 bins of which the last is the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from llmtune.model.chunked_cross_entropy import (
    CHUNK_ELEMENTS,
    LogitShape,
    chunk_logits,
    head_width,
    propagate,
    split_tokens,
)

PIECE_ELEMENTS = 1 << 19
"""Float32 logits at a time: some copies of them fit a CPU's cache."""
PLAIN = LogitShape()


class Teacher:
    """Measures predictions in the place of cross entropy; in a batch as `teacher`."""

    def losses(
        self,
        inputs_SD: torch.Tensor,
        weight_VD: torch.Tensor | None,
        bias_V: torch.Tensor | None,
        targets_S: torch.Tensor,
        shape: LogitShape = PLAIN,
    ) -> torch.Tensor:
        """Return the loss of each prediction, float32 nats; without a weight, `inputs_SD` are logits."""
        losses_S: torch.Tensor = _TeacherLoss.apply(inputs_SD, weight_VD, bias_V, targets_S, self, shape)  # type: ignore[no-untyped-call]
        return losses_S

    def measure(
        self, logits_cV: torch.Tensor, targets_c: torch.Tensor, part: slice, shape: LogitShape, *, keep: bool
    ) -> torch.Tensor:
        """Return the losses of the predictions `part`; with `keep`, turn `logits_cV` into their gradient, in place."""
        raise NotImplementedError


@dataclass
class BinRecorder(Teacher):
    """Records the distributions of the model that is the teacher; its losses are zero."""

    top_k: int
    temperature: float
    vocabulary: int
    """Logits after the first so many are padding of the student's or the teacher's head."""
    weight: ClassVar[float] = 1.0
    ids: list[torch.Tensor] = field(default_factory=list)
    logs: list[torch.Tensor] = field(default_factory=list)

    def measure(
        self, logits_cV: torch.Tensor, targets_c: torch.Tensor, part: slice, shape: LogitShape, *, keep: bool
    ) -> torch.Tensor:
        """Record the bins of the predictions."""
        assert not keep, "a recorder learns nothing"
        for rows in _cut_pieces(logits_cV):
            values_pV, _ = _bend(logits_cV[rows, : self.vocabulary], shape)
            logs_pV = (values_pV / self.temperature).log_softmax(1)
            top_pK, ids_pK = logs_pV.topk(min(self.top_k, logs_pV.shape[1]))
            rest_p = logs_pV.scatter_(1, ids_pK, -torch.inf).logsumexp(1)
            self.ids.append(ids_pK)
            self.logs.append(torch.cat([top_pK, rest_p[:, None]], 1))
        return logits_cV.new_zeros(len(logits_cV), dtype=torch.float32)


@dataclass(frozen=True)
class Distribution(Teacher):
    """A teacher's distributions for the predictions of a batch, and their weight against the labels."""

    ids: torch.Tensor
    """int64 [S, K]: the most likely tokens."""
    logs: torch.Tensor
    """float32 [S, L]: log-probabilities of the bins at `temperature`."""
    weight: float
    temperature: float

    def measure(
        self, logits_cV: torch.Tensor, targets_c: torch.Tensor, part: slice, shape: LogitShape, *, keep: bool
    ) -> torch.Tensor:
        """Return weight * T^2 * KL at temperature T, plus (1 - weight) * cross entropy, of the predictions `part`."""
        losses_c = torch.empty(len(logits_cV), dtype=torch.float32, device=logits_cV.device)
        ids_cK, logs_cL = self.ids[part], self.logs[part]
        for rows in _cut_pieces(logits_cV):
            values_pV, slopes_pV = _bend(logits_cV[rows], shape)
            losses_p, gradient_pV = self._divergence(values_pV / self.temperature, ids_cK[rows], logs_cL[rows], keep)
            losses_c[rows] = losses_p * (self.weight * self.temperature**2)
            gradient_pV *= self.weight * self.temperature
            if self.weight < 1:
                share, targets_p1 = 1 - self.weight, targets_c[rows, None]
                logs_pV = values_pV.log_softmax(1)
                losses_c[rows] -= share * logs_pV.gather(1, targets_p1)[:, 0]
                if keep:
                    gradient_pV += share * logs_pV.exp_()
                    gradient_pV.scatter_add_(1, targets_p1, targets_p1.new_full(targets_p1.shape, -1).float() * share)
            if keep:
                logits_cV[rows] = (gradient_pV * slopes_pV).to(logits_cV.dtype)
        return losses_c

    @staticmethod
    def _divergence(
        values_pV: torch.Tensor, ids_pK: torch.Tensor, logs_pL: torch.Tensor, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the divergence of a piece over the bins, and with `keep` its gradient in `values_pV`."""
        logs_pV = values_pV.log_softmax(1)
        top_pK = logs_pV.gather(1, ids_pK)
        rest_p1 = logs_pV.scatter(1, ids_pK, -torch.inf).logsumexp(1, keepdim=True)
        teacher_pL, student_pL = logs_pL.exp(), torch.cat([top_pK, rest_p1], 1)
        terms_pL = torch.where(teacher_pL > 0, teacher_pL * (logs_pL - student_pL), 0)  # an empty bin adds nothing
        if not keep:
            return terms_pL.sum(1), values_pV.new_zeros(1)
        # of the rest, each token gets its share of the student's rest, in logs: the quotient of both may overflow
        pull_p1 = torch.where(teacher_pL[:, -1:] > 0, logs_pL[:, -1:] - rest_p1, -torch.inf)
        gradient_pV = logs_pV.exp() - logs_pV.add_(pull_p1).exp_()
        return terms_pL.sum(1), gradient_pV.scatter_(1, ids_pK, top_pK.exp() - teacher_pL[:, :-1])


def class_losses(
    logits_RK: torch.Tensor,
    classes_R: torch.Tensor,
    weights_R: torch.Tensor | float,
    teacher: Distribution | BinRecorder | None,
) -> torch.Tensor:
    """Return the loss of each row that has one class: cross entropy times `weights_R`, or that of its teacher.

    The weights apply to the labels' share of a teacher's loss, not to the teacher's.
    """
    labels_R = cross_entropy(logits_RK, classes_R, reduction="none")
    if teacher is None:
        return labels_R * weights_R
    return teacher.losses(logits_RK, None, None, classes_R) + (1 - teacher.weight) * (weights_R - 1) * labels_R


def yes_no_losses(logits_RK: torch.Tensor, targets_RK: torch.Tensor, teacher: Teacher | None) -> torch.Tensor:
    """Return the mean loss over the classes of each row, which may have several; each class is a choice of two."""
    if teacher is None:
        return binary_cross_entropy_with_logits(logits_RK, targets_RK, reduction="none").mean(-1)
    pairs = torch.stack([logits_RK, torch.zeros_like(logits_RK)], -1).flatten(0, 1)
    losses = teacher.losses(pairs, None, None, (targets_RK <= 0.5).long().flatten())
    return losses.reshape(logits_RK.shape).mean(-1)


class _TeacherLoss(torch.autograd.Function):
    """Hidden states, or logits, into the losses of a `Teacher`."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs_SD: torch.Tensor,
        weight_VD: torch.Tensor | None,
        bias_V: torch.Tensor | None,
        targets_S: torch.Tensor,
        teacher: Teacher,
        shape: LogitShape,
    ) -> torch.Tensor:
        """Return nats [S] float32; for a frozen head, also compute the gradient of the inputs."""
        ctx.trained = weight_VD is None or weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
        ctx.teacher, ctx.shape = teacher, shape
        eager = inputs_SD.requires_grad and not ctx.trained
        gradient_SD = torch.empty_like(inputs_SD) if eager else None
        losses_S = torch.empty(len(targets_S), dtype=torch.float32, device=inputs_SD.device)
        with torch.autocast(inputs_SD.device.type, enabled=False):
            for part in split_tokens(len(targets_S), head_width(inputs_SD, weight_VD), CHUNK_ELEMENTS):
                logits_cV = chunk_logits(inputs_SD[part], weight_VD, bias_V)
                losses_S[part] = teacher.measure(logits_cV, targets_S[part], part, shape, keep=eager)
                if gradient_SD is not None and weight_VD is not None:
                    gradient_SD[part] = logits_cV @ weight_VD
        ctx.save_for_backward(*((inputs_SD, weight_VD, bias_V, targets_S) if ctx.trained else (gradient_SD,)))
        return losses_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of each prediction's loss [S] -> of inputs, weight and bias."""
        raised_S = outputs[0]
        if not ctx.trained:
            (gradient_SD,) = ctx.saved_tensors
            return gradient_SD * raised_S[:, None].to(gradient_SD.dtype), None, None, None, None, None
        inputs_SD, weight_VD, bias_V, targets_S = ctx.saved_tensors

        def turn(logits_cV: torch.Tensor, part: slice) -> None:
            ctx.teacher.measure(logits_cV, targets_S[part], part, ctx.shape, keep=True)

        return *propagate(inputs_SD, weight_VD, bias_V, raised_S, turn), None, None, None


def _cut_pieces(logits_cV: torch.Tensor) -> Iterator[slice]:
    return split_tokens(len(logits_cV), logits_cV.shape[1], PIECE_ELEMENTS << (4 if logits_cV.is_cuda else 0))


def _bend(logits_pV: torch.Tensor, shape: LogitShape) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return logits scaled and capped as the model does, in float32, and the slope of each."""
    values_pV = logits_pV.to(torch.float32) * shape.scale
    if shape.cap is None:
        return values_pV, shape.scale
    values_pV = (values_pV / shape.cap).tanh_()
    return values_pV * shape.cap, (1 - values_pV.square()) * shape.scale
