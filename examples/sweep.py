"""Search values of a recipe's keys with Optuna. Run: python examples/sweep.py RECIPE [TRIALS].

Trials see training and validation rows only. The lowest of many validation losses is optimistic: a part of its gain is
chance. The last lines therefore compare the winner with the recipe on the test rows, once.
"""

import subprocess
import sys
from pathlib import Path

import optuna

import llmtune
from llmtune.errors import TrainingError

RECIPE, TRIALS = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20
RUNS = Path("runs") / f"{Path(RECIPE).stem}-sweep"
KEPT = {"evaluate.gates": []}


def measure(trial: optuna.Trial) -> float:
    """Train with the values of a trial, and return its validation loss."""
    values = {
        "train.learning_rate": trial.suggest_float("train.learning_rate", 1e-5, 1e-3, log=True),
        "adapter.r": trial.suggest_categorical("adapter.r", [8, 16, 32]),
    }
    run = llmtune.run(RECIPE, set=KEPT | values, until="train", out=RUNS / str(trial.number), quiet=True)
    return float(run.report["train"]["validation_loss"])


RUNS.mkdir(parents=True, exist_ok=True)
storage = f"sqlite:///{RUNS / 'study.db'}"
sampler = optuna.samplers.TPESampler(seed=7)
study = optuna.create_study(storage=storage, study_name="sweep", sampler=sampler, load_if_exists=True)
study.optimize(measure, n_trials=TRIALS - len(study.trials), catch=(TrainingError,))
print("lowest validation loss:", study.best_value, study.best_params)
for name, values in {"recipe": {}, "winner": study.best_params}.items():
    llmtune.run(RECIPE, set=KEPT | values, out=RUNS / name, quiet=True)
subprocess.run([sys.executable, "-m", "llmtune", "compare", RUNS / "recipe", RUNS / "winner"], check=True)  # noqa: S603
