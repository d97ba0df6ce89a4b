"""Trackers: a run by its name, its settings and metrics while it trains; scores, verdict and folder after that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from llmtune.report.report_record import Report
from llmtune.store.atomic_files import explained, read_json, write_json
from llmtune.store.process_environment import LOCAL_TRACKERS

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


def log_results(report: Report, trackers: Sequence[str], run: Path, device: str, *, offline: bool) -> None:
    """Send scores, verdict and run folder to the trackers that have the training; offline to those on this machine."""
    names = [name for name in trackers if name in LOCAL_TRACKERS or not offline]
    if not names or report.evaluation is None or report.train is None:
        return
    values: dict[str, str | float] = {
        f"evaluation/{model}/{metric}": score
        for model in ("base", "tuned")
        for metric, score in report.evaluation.by_name(model).items()
    }
    values |= {f"evaluation/difference/{name}": one.value for name, one in report.evaluation.differences().items()}
    values |= {"verdict": f"{report.verdict.word}: {report.verdict.reason}", "run_folder": str(run)}
    accelerator = Accelerator(cpu=device == "cpu", log_with=names, project_config=tracker_folder(run))
    start_trackers(accelerator, names, report.name, run, None)
    accelerator.log(values, step=report.train["steps"])
    accelerator.end_training()


def tracker_folder(run: Path) -> ProjectConfiguration:
    """Return where trackers that write files have them."""
    return ProjectConfiguration(project_dir=str(run), logging_dir=str(run / FOLDER))
