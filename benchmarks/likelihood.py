"""Compare scoring for evaluation: llmtune's losses of test rows, and a plain forward pass over padded batches.

    python benchmarks/likelihood.py [--rows 48] [--pairs 1] [--threads 1] [--dtype bfloat16]

One process, one model, rows of the quickstart; the two take turns. Both sum the loss of each row's answer. The plain
pass has rows of similar length in a batch, and computes all logits, as `model(**batch).logits` does. Prints one JSON
document, which has the largest difference of a row's loss too.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from llmtune.data.example import Example
from llmtune.data.examples import encode_rows
from llmtune.data.preparation import prepare_rows
from llmtune.evaluate.eval_inputs import make_inputs
from llmtune.evaluate.inference import score_tokens
from llmtune.model.device import compute_context, pick_device, resolve_dtype
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe.loader import load_recipe
from llmtune.tasks.registry import get_task

Losses = NDArray[np.float64]
SHIPPED_ROWS = 640
"""Rows that the quickstart reads."""


def main() -> int:
    """Measure, and print the result."""
    options = read_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        tools = build_tools(options, Path(folder))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
        losses: dict[str, Losses] = {}
        with torch.inference_mode():
            for turn in range(options.pairs + 1):
                for name, work in tools.items():
                    spent, began = time.process_time(), time.perf_counter()
                    losses[name] = work()
                    took = {"cpu_seconds": time.process_time() - spent, "seconds": time.perf_counter() - began}
                    runs[name] += [took] if turn else []  # the first turn warms up
    difference = float(np.abs(losses["llmtune"] - losses["transformers, padded"]).max())
    print(json.dumps({"runs": runs, "difference": difference}))
    return 0


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=1, help="turns, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-rows", type=int, default=8, help="rows of a padded batch")
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def build_tools(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Losses]]:
    """Return each tool's function, which returns the summed loss of each row, in nats."""
    console, device = Console(file=io.StringIO()), pick_device()
    recipe = load_recipe("quickstart").recipe
    data = recipe.data.model_copy(update={"test": options.rows / SHIPPED_ROWS, "validation": 0})
    recipe = recipe.model_copy(update={"data": data, "model": recipe.model.model_copy(update={"dtype": options.dtype})})
    place = resolve_model(str(recipe.model.name), recipe.model, console, True)
    processor, task = load_processor(place, recipe.model), get_task(recipe.task)
    rows = prepare_rows(recipe, folder / "rows", console)
    examples = encode_rows(rows, task, processor, recipe, folder / "examples", console)
    inputs = make_inputs(rows, examples, task, processor, recipe)
    selected = load_model(place, recipe, task, processor, device=device, training=False)
    model, packs = selected.model.eval(), selected.packs
    collate, dtype = task.collator(processor, recipe, packs), resolve_dtype(options.dtype, device)

    def ours() -> Losses:
        with compute_context(dtype, device):  # as in an evaluation
            return score_tokens(model, inputs, task, collate, device, packed=bool(packs)).nats

    def padded() -> Losses:
        order = sorted(range(len(inputs.reader)), key=lambda i: -len(inputs.reader[i].input_ids))
        losses = np.zeros(len(order))
        for start in range(0, len(order), options.batch_rows):
            part = order[start : start + options.batch_rows]
            losses[part] = score_padded(model, [inputs.reader[i] for i in part], device, dtype)
        return losses

    return {"llmtune": ours, "transformers, padded": padded}


def label(example: Example) -> torch.Tensor:
    """Return the ids [T] of an example, with -100 outside the answer."""
    labels_T = torch.full((len(example.input_ids),), -100)
    for start, end in zip(example.spans[::2], example.spans[1::2], strict=True):
        labels_T[start:end] = torch.tensor(example.input_ids[start:end])
    return labels_T


def score_padded(model: Any, examples: list[Example], device: str, dtype: torch.dtype) -> Losses:
    """Return the loss of each example, from all logits of a padded batch."""
    texts = [torch.tensor(example.input_ids) for example in examples]
    marks = [label(example) for example in examples]
    ids_BT = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
    labels_BT = torch.nn.utils.rnn.pad_sequence(marks, batch_first=True, padding_value=-100).to(device)
    mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in texts], batch_first=True).to(device)
    with compute_context(dtype, device):
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    targets_BT = labels_BT[:, 1:]
    loss_BT = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().transpose(1, 2), targets_BT, reduction="none", ignore_index=-100
    )
    return loss_BT.double().sum(1).cpu().numpy()


if __name__ == "__main__":
    sys.exit(main())
