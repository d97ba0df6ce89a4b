"""The limit of the machine: the speed of a LoRA step that only consists of its matrix products, each at its peak.

The products of a step, for a causal model whose frozen linear layers have adapters (M tokens, rank r):

- a frozen layer: X W^T forward, dY W backward; no gradient of W. The layers that read the embeddings (q, k, v of the
  first layer) need no dY W, since nothing below them learns;
- its adapter: X A^T and H B^T forward, and backward two products for each, by input and by weight;
- attention: QK^T and PV forward, four such products backward, half of each because it is causal;
- the head, at supervised positions only: X W^T forward, dY W backward.

Each product is timed separately in the model's number format in this process, until the best time is stable. Its rate
is the highest over several numbers of rows. Norms, softmax, optimiser and memory traffic do not count. A common prefix
of rows, such as a system prompt, counts in every row here, though llmtune computes it once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from clock import Asked

ROUNDS, ROUND_SECONDS = 5, 0.04
PACKS = (1, 2, 4)
"""Numbers of packs per product to try."""


@dataclass(frozen=True)
class Product:
    """A matrix product [rows, inner] x [inner, columns] of a step; None means the number of tokens."""

    part: str
    rows: int | None
    inner: int | None
    columns: int
    transposed: bool = False
    """Whether the second matrix lies in memory as [columns, inner], as a weight does in the forward pass."""


def measure_limit(model: torch.nn.Module, steps: list[dict[str, Any]], asked: Asked) -> dict[str, Any]:
    """Return the tokens per CPU second (on CUDA: per second) that the products alone allow, and their parts.

    `model` is a causal model wrapped by PEFT; `steps` have the numbers of tokens and of supervised tokens.
    """
    tokens, supervised = (sum(step[key] for step in steps) for key in ("tokens", "supervised"))
    dtype, device = getattr(torch, asked.dtype), next(model.parameters()).device
    seconds: Counter[str] = Counter()
    for product, count in products(model, supervised / tokens).items():
        seconds[product.part] += count * seconds_a_token(product, asked.pack, dtype, device)
    seconds["attention"] = attention_seconds(model.config, asked.attended_tokens, dtype, device)
    return {
        "tokens_per_second": 1 / sum(seconds.values()),
        "unit": "second" if device.type == "cuda" else "cpu_second",
        "microseconds_a_token": {part: 1e6 * value for part, value in seconds.items()},
    }


def products(model: torch.nn.Module, share: float) -> Counter[Product]:
    """Count the products of a step; those of the head by the share of supervised tokens."""
    found: Counter[Product] = Counter()
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        outputs, inputs = module.get_base_layer().weight.shape
        rank = module.lora_A["default"].weight.shape[0]
        found[Product("frozen layers", None, inputs, outputs, transposed=True)] += 1
        found[Product("adapters", None, inputs, rank, transposed=True)] += 1
        found[Product("adapters", None, rank, outputs, transposed=True)] += 1
        found[Product("adapters", None, outputs, rank)] += 1
        found[Product("adapters", rank, None, inputs)] += 1
        found[Product("adapters", outputs, None, rank)] += 1
        if not reads_embeddings(name):
            found[Product("frozen layers", None, outputs, inputs)] += 1
            found[Product("adapters", None, rank, inputs)] += 1
    words, width = model.get_base_model().get_output_embeddings().weight.shape
    found[Product("head", None, width, words, transposed=True)] += share
    found[Product("head", None, words, width)] += share
    return found


def reads_embeddings(name: str) -> bool:
    """Whether a layer reads the embeddings directly, by the layer names of Llama-like models."""
    return ".layers.0." in name and name.endswith(("q_proj", "k_proj", "v_proj"))


def seconds_a_token(product: Product, pack: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds per token of a product at its own peak."""
    return min(time_product(product, pack * packs, dtype, device) / (pack * packs) for packs in PACKS)


def time_product(product: Product, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the best time of a product of `tokens` tokens, in seconds."""
    rows, inner = (tokens if size is None else size for size in (product.rows, product.inner))
    # Where the tokens are summed over, the first matrix lies in memory by tokens.
    left = torch.randn(rows, inner, dtype=dtype, device=device)
    left = left.T.contiguous().T if product.inner is None else left
    right = torch.randn(product.columns, inner, dtype=dtype, device=device).T
    right = right if product.transposed else right.contiguous()
    return shortest(lambda: left @ right, device)


def attention_seconds(config: Any, attended: float, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds per token of attention within rows of a given length: six products, half of each."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    length = round(attended)
    query, key = (torch.randn(heads, length, width, dtype=dtype, device=device) for _ in range(2))
    scores = torch.randn(heads, length, length, dtype=dtype, device=device)
    one = shortest(lambda: query @ key.mT, device) + 2 * shortest(lambda: scores @ query, device)
    return config.num_hidden_layers * one / length


def shortest(work: Callable[[], object], device: torch.device) -> float:
    """Return the best time of `work` in several rounds, in seconds: CPU time, or wall time on CUDA."""
    now = time.perf_counter if device.type == "cuda" else time.process_time

    def spend(times: int) -> float:
        began = now()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return now() - began

    spend(1)
    times = max(1, int(ROUND_SECONDS / max(1e-7, spend(1))))
    return min(spend(times) / times for _ in range(ROUNDS))
