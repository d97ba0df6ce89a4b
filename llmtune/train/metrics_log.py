"""Training output while it runs: metrics.jsonl, trackers, and a progress bar or plain lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llmtune.display.console import LiveProgress
from llmtune.records import Json
from llmtune.store.atomic_files import explained, plain, read_json, read_json_lines, write_json, write_text
from llmtune.store.process_environment import LOCAL_TRACKERS
from llmtune.store.report_record import Report


class MetricsLine(TypedDict):
    """A line of metrics.jsonl: figures since the previous line."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    peak_bytes: int
    figures: NotRequired[dict[str, float]]
    """Figures of the task's objective: means over the steps."""
    validation_loss: NotRequired[float | None]
    validation_metrics: NotRequired[dict[str, float]]


@dataclass(frozen=True)
class TrainedRun:
    """The result of a training: the final adapter (or weights) and its numbers."""

    adapter: Path
    """A plain PEFT folder; with `method: full` a plain model folder."""
    steps: int
    epochs: float
    train_loss: float
    """Mean over the last logged steps, nats per supervised token."""
    first_loss: float
    validation_loss: float | None
    best_step: int | None
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    wall_seconds: float
    peak_bytes: int
    micro_batch_tokens: int
    stopped_early: str | None = None
    collapse: str | None = None
    """The last warning that vectors came too close."""
    resumed_from: int | None = None
    skipped_steps: int = 0
    """Steps without a gradient, which changed no weight."""
    padding_share: float | None = None
    """Share of computed positions without a token; 0 if rows were packed."""
    rehearsal_seconds: float = 0.0
    seconds_to_first_step: float | None = None
    """From the start of the process to the end of its first optimiser step, without the rehearsal; None without one."""

    def as_facts(self) -> Json:
        """Return JSON values for the manifest; the adapter is the name of its folder in the run."""
        return {**asdict(self), "adapter": self.adapter.name}


@dataclass
class Display:
    """Show training progress: a bar on a terminal, a line for each log step elsewhere."""

    console: Console
    bar: Progress
    task: TaskID
    total: int

    def step(
        self, step: int, loss: float, tokens_per_second: float, peak_bytes: int, figures: Mapping[str, float]
    ) -> None:
        """Move the bar; `figures` are those of the objective."""
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {peak_bytes / 1e9:.2f} GB{write_figures(figures)}"
        self.bar.update(self.task, completed=step, figures=text)

    def line(self, line: MetricsLine) -> None:
        """Print a line of metrics if there is no bar, and every validation."""
        validation = line.get("validation_loss")
        scores = "".join(f"  {name} {value:.4f}" for name, value in line.get("validation_metrics", {}).items())
        if self.bar.disable:
            tail = f"  validation {validation:.4f}{scores}" if validation is not None else ""
            self.console.print(
                f"step {line['step']}/{self.total}  loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  "
                f"{line['tokens_per_second']:,.0f} tokens/s  {line['peak_bytes'] / 1e9:.2f} GB"
                f"{write_figures(line.get('figures', {}))}{tail}",
                highlight=False,
                soft_wrap=True,
            )
        elif validation is not None:
            self.console.print(f"step {line['step']}: validation loss {validation:.4f}{scores}", highlight=False)


def write_figures(figures: Mapping[str, float]) -> str:
    """Return figures of the objective for display."""
    return "".join(f"  {name.replace('_', ' ')} {value:.3g}" for name, value in figures.items())


@contextmanager
def show_training(console: Console, done: int, total: int) -> Iterator[Display]:
    """Show progress from step `done` on inside the block."""
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with LiveProgress(*columns, console=console, speed_estimate_period=300) as bar:
        yield Display(console, bar, bar.add_task("train", completed=done, total=total, figures=""), total)


def append_line(path: Path, line: MetricsLine) -> None:
    """Add a line to metrics.jsonl and flush it to disk; numbers that JSON cannot hold become null.

    Raises EnvironmentProblem if the disk is full or not writable.
    """
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(line)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut_back(path: Path, step: int) -> None:
    """Remove the lines after `step` from metrics.jsonl, and an incomplete last one; the file need not exist."""
    if not path.exists():
        return
    kept = [line for line in read_json_lines(path) if isinstance(number := line.get("step"), int) and number <= step]
    with explained(path):
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


# Trackers


NAMED = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}
"""The option that names a run, by tracker; the project is named after the recipe. Other trackers name runs
themselves."""
FOLDER, IDS = "trackers", "ids.json"
TrackedValue = str | int | float | bool


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], project: str, run: Path, settings: Mapping[str, TrackedValue] | None
) -> None:
    """Start the trackers of a run, or resume its earlier entries; `settings` are shown with it."""
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


def end_trackers(accelerator: Accelerator) -> None:
    """Finish the trackers; Accelerate's `end_training` would also end the process group."""
    for tracker in accelerator.trackers:
        tracker.finish()


def log_results(report: Report, trackers: Sequence[str], run: Path, device: str, *, offline: bool) -> None:
    """Send scores, verdict and run folder to the trackers of the training; offline only to local ones."""
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
    accelerator.log(tracker_names(values), step=report.train["steps"])
    end_trackers(accelerator)


def tracker_names(values: Mapping[str, object]) -> dict[str, object]:
    """Return values by names that every tracker accepts: MLflow refuses the @ of `ndcg@10`."""
    return {name.replace("@", "_at_"): value for name, value in values.items()}


def tracker_folder(run: Path) -> ProjectConfiguration:
    """Return the folders for trackers that write files."""
    return ProjectConfiguration(project_dir=str(run), logging_dir=str(run / FOLDER))
