"""What workers of the launcher run in tests; arguments come as text."""

import os
import signal
import sys
import time
from pathlib import Path

from llmtune.errors import DataError
from llmtune.launch.worker import QUIET, note


def train_tiny(folder: str, run: str, strategy: str = "ddp") -> dict[str, float]:
    """Train as `support.training` does, from a recipe and examples that the test left in `folder`."""
    from rich.console import Console

    from llmtune.recipe.loader import load_recipe
    from support.training import read_examples, run_training

    recipe = load_recipe(str(Path(folder) / "recipe.yaml")).recipe
    console = Console(file=sys.stderr, width=200)
    examples = read_examples(Path(folder) / "examples")
    trained = run_training(Path(run), recipe, examples, console=console, strategy=strategy)
    return {"steps": trained.steps, "train_loss": trained.train_loss}


def learn_all(folder: str, strategy: str) -> dict[str, list[list[float]]]:
    """Take the first steps of every recipe that the test left in `folder`; return their losses and gradient norms."""
    from support.pairs import learn_a_little

    recipes = sorted(Path(folder).glob("*/recipe.yaml"))
    return {path.parent.name: learn_a_little(path, strategy) for path in recipes}


def is_quiet() -> bool:
    """Say whether this worker is to print nothing."""
    return QUIET in os.environ


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


def break_in_rank_one() -> None:
    """Break in C, after saying why, in one process."""
    if os.environ["RANK"] == "1":
        print("the disk is on fire", file=sys.stderr)
        os.abort()
    time.sleep(60)
