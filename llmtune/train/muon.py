"""Muon for the matrices of layers, AdamW for all else, as one optimiser with one state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from llmtune.errors import EnvironmentProblem


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon on groups of matrices, and torch's AdamW on the others.

    Steps have the size of AdamW's (`match_rms_adamw`; Liu et al., "Muon is Scalable for LLM Training", 2025), so that
    one learning rate fits both.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        """Take groups; what has two dimensions goes to Muon, unless its group says `muon: False`.

        Raises EnvironmentProblem for a torch before 2.9.
        """
        if not hasattr(torch.optim, "Muon"):
            what = f"torch {torch.__version__} has no Muon"
            raise EnvironmentProblem.of(what, "train.optim", "pip install 'torch>=2.9', or set it to adamw_torch.")
        parts = (
            {
                **group,
                "params": [one for one in group["params"] if (one.ndim == 2 and group.get("muon", True)) is matrix],
                "muon": matrix,
            }
            for group in groups
            for matrix in (True, False)
        )
        super().__init__([part for part in parts if part["params"]], {"lr": lr})
        matrices, others = self._split()
        self.muon = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw") if matrices else None
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps) if others else None
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights from their gradients."""
        self._share()
        for part in (self.muon, self.adamw):
            if part is not None:
                part.step()  # type: ignore[no-untyped-call]

    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        whole: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for group in self.param_groups:
            whole[not group["muon"]].append(group)
        return whole

    def _share(self) -> None:
        """Let the parts read and write the groups and the state of the whole, which loading a checkpoint replaces."""
        for part, groups in zip((self.muon, self.adamw), self._split(), strict=True):
            if part is not None:
                for group in groups:
                    for name, value in part.defaults.items():
                        group.setdefault(name, value)
                part.param_groups, part.state = groups, self.state
