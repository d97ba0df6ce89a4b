"""Trackers: a run by its name, its settings and metrics while it trains; scores, verdict and folder after that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from llmtune.store.atomic_files import explained, read_json, write_json

NAMED = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}
"""What a tracker calls the name of a run; the project has the name of the recipe. Others name runs themselves."""
FOLDER, IDS = "trackers", "ids.json"
Scalar = str | int | float | bool


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], project: str, run: Path, settings: Mapping[str, Scalar] | None
) -> None:
    """Start the trackers of a run, or go on with what they have of it already; `settings` are shown with it."""
    ids = read_json(run / FOLDER / IDS) or {}
    options = {name: {**({NAMED[name]: run.name} if name in NAMED else {}), **ids.get(name, {})} for name in names}
    accelerator.init_trackers(project, config=settings and {**settings}, init_kwargs=options)
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            ids["wandb"] = {"id": tracker.tracker.id, "resume": "allow"}
        elif tracker.name == "mlflow":
            ids["mlflow"] = {"run_id": tracker.tracker.info.run_id}
    if ids:
        with explained(run):
            (run / FOLDER).mkdir(exist_ok=True)
            write_json(run / FOLDER / IDS, ids)


def log_results(
    names: Sequence[str], project: str, run: Path, device: str, values: Mapping[str, str | float], step: int
) -> None:
    """Send what a run came to, to the trackers that have its training."""
    accelerator = Accelerator(cpu=device == "cpu", log_with=list(names), project_config=tracker_folder(run))
    start_trackers(accelerator, names, project, run, None)
    accelerator.log({**values}, step=step)
    accelerator.end_training()


def tracker_folder(run: Path) -> ProjectConfiguration:
    """Return where trackers that write files have them."""
    return ProjectConfiguration(project_dir=str(run), logging_dir=str(run / FOLDER))
