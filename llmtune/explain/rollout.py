"""Attention rollout: through all layers up to one, how much of each input reaches each position.

Shape: T positions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]


def roll(before_TT: Matrix | None, mean_TT: Matrix) -> Matrix:
    """Go on by one layer: half of each position is its own (the residual), half what its heads look at on average.

    Rows of the result sum to 1 where those of `mean_TT` do. `before_TT` is the rollout up to the layer before, None
    before the first. Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, section 3, where W_att is
    the mean over heads.
    """
    mixed_TT = 0.5 * mean_TT + 0.5 * np.eye(len(mean_TT), dtype=np.float32)
    return mixed_TT if before_TT is None else mixed_TT @ before_TT
