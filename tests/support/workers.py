"""What workers of the launcher run in tests; arguments come as text."""

import os
import signal
import sys
import time
from pathlib import Path

from llmtune.errors import DataError
from llmtune.launch.worker import note


def train_tiny(folder: str, run: str) -> dict[str, float]:
    """Train as `support.training` does, from a recipe and examples that the test left in `folder`."""
    from rich.console import Console

    from llmtune.recipe.loader import load_recipe
    from support.training import read_examples, run_training

    recipe = load_recipe(str(Path(folder) / "recipe.yaml")).recipe
    console = Console(file=sys.stderr, width=200)
    trained = run_training(Path(run), recipe, read_examples(Path(folder) / "examples"), console=console)
    return {"steps": trained.steps, "train_loss": trained.train_loss}


def succeed(*words: str) -> dict[str, object]:
    """Say how the world looks from rank 0."""
    note(heard=list(words))
    return {"world": int(os.environ["WORLD_SIZE"]), "threads": os.environ["OMP_NUM_THREADS"]}


def fail_in_rank_one() -> None:
    """Meet a user's mistake in one process, while the other would go on for a long time."""
    if os.environ["RANK"] == "1":
        raise DataError.of("row 7 has no answer", "rows.jsonl:7", "Give it one.")
    time.sleep(60)


def crash_in_rank_one() -> None:
    """Meet a bug in one process."""
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("a bug")
    time.sleep(60)


def die_in_rank_one() -> None:
    """Be killed by the system in one process."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
