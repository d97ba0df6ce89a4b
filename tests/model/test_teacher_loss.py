"""The loss against a teacher's bins: compared with dense references, with TRL, and with finite memory."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, linear, softplus

from llmtune.model import teacher_loss
from llmtune.model.chunked_cross_entropy import LogitShape
from llmtune.model.teacher_loss import BinRecorder, Distribution, class_losses

S, D, V = 37, 8, 53


@pytest.fixture
def parts() -> SimpleNamespace:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * scale

    return SimpleNamespace(
        hidden_SD=normal(S, D),
        weight_VD=normal(V, D),
        bias_V=normal(V),
        teacher_SV=normal(S, V, scale=3.0),
        targets_S=torch.randint(V, (S,), generator=draw),
    )


def record(logits_SV: torch.Tensor, top_k: int, temperature: float, weight: float) -> Distribution:
    recorder = BinRecorder(top_k, temperature, logits_SV.shape[1])
    recorder.losses(logits_SV, None, None, torch.zeros(len(logits_SV)))
    return Distribution(torch.cat(recorder.ids), torch.cat(recorder.logs), weight, temperature)


def dense_loss(
    logits_SV: torch.Tensor,
    teacher_SV: torch.Tensor,
    targets_S: torch.Tensor,
    top_k: int,
    temperature: float,
    weight: float,
) -> torch.Tensor:
    """Return the losses from complete distributions, with a bin for all tokens that are not among the top k."""
    teacher_SV, student_SV = (one.div(temperature).softmax(1) for one in (teacher_SV, logits_SV))
    ids_SK = teacher_SV.topk(top_k).indices
    rest_SV = torch.ones_like(teacher_SV).scatter(1, ids_SK, 0.0)
    bins = [
        torch.cat([one.gather(1, ids_SK), (one * rest_SV).sum(1, keepdim=True)], 1) for one in (teacher_SV, student_SV)
    ]
    kept = slice(None) if top_k < V else slice(-1)
    teacher_SL, student_SL = (one[:, kept] for one in bins)
    divergence_S = (teacher_SL * (teacher_SL.log() - student_SL.log())).sum(1)
    return weight * temperature**2 * divergence_S + (1 - weight) * cross_entropy(logits_SV, targets_S, reduction="none")


@pytest.mark.parametrize("top_k", [1, 7, V])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.5, 1.0), (0.3, 2.5)])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(0.5, 4.0)])
def test_losses_and_gradients_equal_those_of_complete_distributions(
    parts, monkeypatch, top_k, weight, temperature, trained, shape
):
    monkeypatch.setattr(teacher_loss, "CHUNK_ELEMENTS", 10 * V)
    monkeypatch.setattr(teacher_loss, "PIECE_ELEMENTS", 3 * V)
    scores = torch.linspace(-1, 2, S)
    results = []
    for is_dense in (True, False):
        hidden_SD, weight_VD, bias_V = (one.clone() for one in (parts.hidden_SD, parts.weight_VD, parts.bias_V))
        leaves = [hidden_SD, weight_VD, bias_V] if trained else [hidden_SD]
        for leaf in leaves:
            leaf.requires_grad_()
        if is_dense:
            logits_SV = linear(hidden_SD, weight_VD, bias_V) * shape.scale
            if shape.cap:
                logits_SV = shape.cap * (logits_SV / shape.cap).tanh()
            losses_S = dense_loss(logits_SV, parts.teacher_SV, parts.targets_S, top_k, temperature, weight)
        else:
            teacher = record(parts.teacher_SV, top_k, temperature, weight)
            losses_S = teacher.losses(hidden_SD, weight_VD, bias_V, parts.targets_S, shape)
        gradients = torch.autograd.grad((losses_S * scores).sum(), leaves)
        results.append([losses_S.detach(), *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_whole_vocabulary_the_loss_equals_that_of_trl_with_beta_zero(parts, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student_SV = linear(parts.hidden_SD, parts.weight_VD).requires_grad_()
    labels_S = torch.arange(S)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student_SV[None], parts.teacher_SV[None], labels_S[None], beta=0.0, temperature=temperature
    )
    teacher = record(parts.teacher_SV, V, temperature, 1.0)
    ours = teacher.losses(student_SV, None, None, parts.targets_S).sum() / S / temperature**2
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    gradients = [torch.autograd.grad(loss, student_SV)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_a_student_that_is_certain_of_another_token_gets_a_finite_gradient(parts):
    logits_SV = torch.zeros(S, V).index_fill_(1, torch.tensor([3]), 500.0).requires_grad_()
    losses_S = record(parts.teacher_SV, 4, 1.0, 1.0).losses(logits_SV, None, None, parts.targets_S)
    (gradient_SV,) = torch.autograd.grad(losses_S.sum(), logits_SV)
    assert losses_S.isfinite().all()
    assert gradient_SV.isfinite().all()
    torch.testing.assert_close(gradient_SV.sum(1), torch.zeros(S), rtol=0, atol=1e-5)


def test_two_outcomes_equal_the_binary_divergence(parts):
    teacher_S, student_S = parts.teacher_SV[:, 0], parts.teacher_SV[:, 1]
    pairs = [torch.stack([one, torch.zeros_like(one)], 1) for one in (teacher_S, student_S)]
    ours = record(pairs[0], 2, 1.0, 1.0).losses(pairs[1], None, None, torch.zeros(S, dtype=torch.int64))
    p = teacher_S.sigmoid()
    cross = p * softplus(-student_S) + (1 - p) * softplus(student_S)
    entropy = p * softplus(-teacher_S) + (1 - p) * softplus(teacher_S)
    torch.testing.assert_close(ours, cross - entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_class_weights_weigh_the_labels_and_not_the_teacher(parts, weight):
    logits_SV = linear(parts.hidden_SD, parts.weight_VD).requires_grad_()
    weights_S, teacher = torch.linspace(0.5, 5, S), record(parts.teacher_SV, V, 2.0, weight)
    ours = class_losses(logits_SV, parts.targets_S, weights_S, teacher)
    alone = dense_loss(logits_SV, parts.teacher_SV, parts.targets_S, V, 2.0, 1.0)
    labels_S = cross_entropy(logits_SV, parts.targets_S, reduction="none")
    expected = weight * alone + (1 - weight) * weights_S * labels_S
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
    gradients = [torch.autograd.grad(losses.sum(), logits_SV, retain_graph=True)[0] for losses in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-5)
