"""The training loss of each row, recorded during training: rows that stay hard are often labelled wrongly.

Shapes: N training examples.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmtune.data.examples import ExampleReader
from llmtune.data.row_kind import write_prompt
from llmtune.data.row_store import iterate_ids, iterate_texts
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.recipe.secrets import redact
from llmtune.records import Examples, Json, Rows
from llmtune.store.atomic_files import explained
from llmtune.train.accumulation import StepLoss

FILE = "row_losses.npz"
"""File in the run folder with `row` (index in the training split), `loss`, `excess` and `seen`, [N] each."""
LossTable = npt.NDArray[np.float32]
"""[N, 3]: for each example the sum of its loss, the sum of its excess over its step, and how often it was seen."""
MOST_LISTED, LONGEST = 10, 400
FEWEST_ROWS = 20


def add_step(table_N3: LossTable, loss: StepLoss, supervised: npt.NDArray[np.int32]) -> None:
    """Add the row losses of a step to the table, in place, in nats per prediction.

    The excess over the step's mean is independent of how far training was.
    """
    means = loss.row_sums / np.maximum(1, supervised[loss.rows])
    if np.isfinite(means).all():
        table_N3[loss.rows] += np.stack([means, means - loss.mean, np.ones(len(means))], axis=1)


def save_row_losses(table_N3: LossTable, examples: ExampleReader, folder: Path) -> None:
    """Write the file, unless no row has a loss of its own."""
    seen_N = table_N3[:, 2]
    if not seen_N.any():
        return
    means_N2 = table_N3[:, :2] / np.maximum(1, seen_N)[:, None]
    loss_N, excess_N = means_N2.T
    with explained(folder / FILE):
        np.savez_compressed(folder / FILE, row=examples.rows, loss=loss_N, excess=excess_N, seen=seen_N)


def list_hardest(folder: Path, rows: Rows, examples: Examples, task: EvaluatedTask) -> list[Json]:
    """Return the training rows whose loss was farthest above the mean of their steps, the hardest first.

    Such rows are often labelled wrongly: Swayamdipta and others, "Dataset Cartography", 2020.
    """
    if not (folder / FILE).exists() or examples.counts.get("train", 0) < FEWEST_ROWS:
        return []
    with np.load(folder / FILE, allow_pickle=False) as saved:
        row_N, excess_N, loss_N, seen_N = (saved[name] for name in ("row", "excess", "loss", "seen"))
    worst: dict[int, int] = {}
    for at in np.argsort(-excess_N, kind="stable").tolist():
        if excess_N[at] > 0 and len(worst) < MOST_LISTED:
            worst.setdefault(int(row_N[at]), at)
    records = {}
    named = zip(iterate_texts(rows, "train"), iterate_ids(rows, "train"), strict=True)
    for number, ((origin, text), name) in enumerate(named):
        if number in worst:
            question, answer = task.split_answer(json.loads(text))
            at = worst[number]
            records[number] = Json(
                origin=Path(origin).name,
                id=name,
                loss=float(loss_N[at]),
                excess=float(excess_N[at]),
                seen=int(seen_N[at]),
                prompt=redact(write_prompt(question))[:LONGEST],
                reference=redact(answer)[:LONGEST],
            )
    return [records[number] for number in worst]
