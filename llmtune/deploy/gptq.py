"""Rounding of linear layers by the inputs that they get on training rows: GPTQ, with scales of least squared error.

Shapes: O outputs and I inputs of a layer, G groups of inputs with one scale, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

COLUMNS = 128
"""Columns whose errors are carried over to the columns after them at once."""
DAMPING = 0.01
"""Added to the diagonal of the Gram matrix, as a share of its mean."""
GRAM_BYTES = 2 * 2**30
"""Gram matrices kept at once; larger models read the rows several times."""
SHRINK = torch.linspace(1.0, 0.7, 16)
"""Scales to try, as shares of the one that represents the largest weight."""


@torch.no_grad()
def round_layers(
    layers: Mapping[str, torch.nn.Linear], scales: Mapping[str, torch.Tensor], bits: int, read: Callable[[], object]
) -> None:
    """Round the weights of `layers`, in the order of the forward pass, to multiples of `scales` [O, G]; in place.

    `read` runs the model on the calibration rows. Layers after the first `GRAM_BYTES` get the inputs that the rounded
    layers before them produce.
    """
    for names in _portions(layers):
        with _gram_matrices({name: layers[name] for name in names}) as grams:
            read()
        for name in names:
            weight = layers[name].weight
            weight.copy_(round_weights(weight.float(), scales[name].float(), grams.pop(name), bits))


def _portions(layers: Mapping[str, torch.nn.Linear]) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, layer in layers.items():
        size = 4 * layer.in_features**2
        if names and total + size > GRAM_BYTES:
            yield names
            names, total = [], 0
        names, total = [*names, name], total + size
    yield names


@contextmanager
def _gram_matrices(layers: Mapping[str, torch.nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
    """Sum the Gram matrices [I, I] of the layers' inputs while the context is open."""
    grams: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            grams[name] = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)

            def add(
                module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], gram: torch.Tensor = grams[name]
            ) -> None:
                inputs_NI = inputs[0].flatten(0, -2).float()
                gram.addmm_(inputs_NI.T, inputs_NI)

            hooks.callback(layer.register_forward_pre_hook(add).remove)
        yield grams


def find_scales(weight_OI: torch.Tensor, group_size: int, bits: int) -> torch.Tensor:
    """Return the scale [O, G] of each group of inputs whose rounding has the least squared error."""
    weight_OGI = weight_OI.float().reshape(len(weight_OI), -1, group_size)
    largest_OG = weight_OGI.abs().amax(-1).clamp_min(1e-8) / (2 ** (bits - 1) - 0.5)
    least_OG = torch.full_like(largest_OG, torch.inf)
    best_OG: torch.Tensor = largest_OG
    for share in SHRINK.tolist():
        scale_OG = largest_OG * share
        error_OG = (_nearest_level(weight_OGI, scale_OG[..., None], bits) - weight_OGI).square().sum(-1)
        best_OG = torch.where(error_OG < least_OG, scale_OG, best_OG)
        least_OG = torch.minimum(least_OG, error_OG)
    return best_OG


def _nearest_level(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    steps: torch.Tensor = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return steps * scale


def round_weights(weight_OI: torch.Tensor, scale_OG: torch.Tensor, gram_II: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a layer's weights so that its outputs change least on the inputs that `gram_II` sums.

    GPTQ (Frantar et al. 2022, algorithm 1): round the columns one by one, those with the largest inputs first, and let
    the remaining columns make up for each error.
    """
    order_I = gram_II.diagonal().argsort(descending=True)
    scale_OI = scale_OG.repeat_interleave(weight_OI.shape[1] // scale_OG.shape[1], 1)[:, order_I]
    weight_OI, gram_II = weight_OI[:, order_I], gram_II[order_I][:, order_I]
    damping = (DAMPING * gram_II.diagonal().mean()).clamp_min(1e-6)
    gram_II.diagonal().add_(damping)
    factor_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram_II)), upper=True)
    for start in range(0, len(factor_II), COLUMNS):
        block = slice(start, start + COLUMNS)
        weight_OB, scale_OB, factor_BB = weight_OI[:, block], scale_OI[:, block], factor_II[block, block]
        error_OB = torch.empty_like(weight_OB)
        for at in range(weight_OB.shape[1]):
            rounded_O = _nearest_level(weight_OB[:, at], scale_OB[:, at], bits)
            error_OB[:, at] = (weight_OB[:, at] - rounded_O) / factor_BB[at, at]
            weight_OB[:, at + 1 :] -= torch.outer(error_OB[:, at], factor_BB[at, at + 1 :])
            weight_OB[:, at] = rounded_O
        weight_OI[:, start + COLUMNS :] -= error_OB @ factor_II[block, start + COLUMNS :]
    return weight_OI[:, order_I.argsort()]
