"""Classes of packed documents: an encoder's head is given each document's own first token, or its own mean.

Shapes: T positions of a packed row, D documents in it, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedModel

from llmtune.model.packed_attention import LENGTHS, documents_inside


def pool_documents(model: PreTrainedModel) -> None:
    """Let a classifier read one class a document of a packed row, by hooks on its body; changes `model` in place.

    What it pools itself stays: of [D, 1, H] in place of [1, T, H] the first token of a row and the mean over it are the
    same. A layer of the body that pools (BERT's) reads the first tokens.
    """
    body = model.base_model
    pool = means if getattr(model.config, "classifier_pooling", None) == "mean" else first_tokens
    pooler = getattr(body, "pooler", None)
    if isinstance(pooler, torch.nn.Module):
        pooler.register_forward_pre_hook(_first_tokens_to_pooler)

    def pool_output(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if LENGTHS in kwargs:
            output.last_hidden_state = pool(output.last_hidden_state, kwargs[LENGTHS])
        return output

    body.register_forward_hook(pool_output, with_kwargs=True)


def first_tokens(hidden_1TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Take the first token of each document: [1, T, H] -> [D, 1, H]."""
    starts_D = torch.tensor([0, *accumulate(lengths[:-1])], device=hidden_1TH.device)
    return hidden_1TH[0, starts_D, None]


def means(hidden_1TH: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Take the mean over each document: [1, T, H] -> [D, 1, H]."""
    return torch.stack([part_LH.mean(0, keepdim=True) for part_LH in torch.split(hidden_1TH[0], list(lengths))])


def _first_tokens_to_pooler(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    lengths = documents_inside.get()
    return None if lengths is None or args[0].dim() != 3 else (first_tokens(args[0], lengths), *args[1:])
