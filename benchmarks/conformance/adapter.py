"""Shared by all adapters: read jobs, catch errors, write results.

Standard library only, as each tool has its own environment.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from conformance.reward import score

Job = dict[str, Any]
Configuration = dict[str, Any]


class NotRun(Exception):
    """The adapter cannot do this yet, although the tool may; the message says what is missing."""


class NotOffered(Exception):
    """The tool documents no way to do this; the message says what is missing."""


def serve(
    package: str,
    configure: Callable[[Job], Configuration],
    train: Callable[[Job, Configuration], Mapping[str, Any]],
    torchrun: bool = True,
) -> None:
    """Do the jobs of the file named on the command line: `python tools/NAME.py jobs.json`.

    Args:
        package: the distribution whose version is reported.
        configure: returns the tool's own settings for a job. `job["column"]` is `default` or `documented`.
        train: trains, and returns `{"model": folder}` and whatever the job asks for.
        torchrun: start several processes of this file by torchrun for a job with `processes`; or `train` does it.
    """
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out, child = Path(job["out"]), "RANK" in os.environ
        result: dict[str, Any] = {"status": "done", "message": "", "version": version(package)}
        columns = [settings_for(job, column, configure) for column in ("default", "documented")]
        result["same"] = columns[0] == columns[1]
        with logged(out / "log.txt"):
            try:
                result["configuration"] = configure(job)
                if torchrun and job["processes"] > 1 and not child:
                    start_processes(job)
                    continue
                result.update(train(job, result["configuration"]))
            except (NotOffered, NotRun) as missing:
                status = "not run" if isinstance(missing, NotRun) else "not offered"
                result.update(status=status, message=str(missing))
            except (Exception, SystemExit) as error:  # the runner reads the reason
                traceback.print_exc()
                result.update(status="error", message=f"{type(error).__name__}: {error}"[:2000])
        if os.environ.get("RANK", "0") == "0":
            (out / "result.json").write_text(json.dumps(result, default=str, indent=1))


def settings_for(job: Job, column: str, configure: Callable[[Job], Configuration]) -> Configuration | str:
    """Return the settings of a column, or why there are none."""
    try:
        return configure({**job, "column": column})
    except Exception as error:
        return str(error)


def start_processes(job: Job) -> None:
    """Do one job in several processes of this file; the first one writes the result."""
    file = Path(job["out"]) / "job.json"
    file.write_text(json.dumps([job]))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job['processes']}"]
    failed = subprocess.run([*start, sys.argv[0], str(file)]).returncode
    if failed and not (file.parent / "result.json").exists():
        raise RuntimeError("a process failed")


def command(*arguments: object, **environment: str) -> None:
    """Run a command of the tool; raise its last lines if it fails."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stdout[-1500:]}")


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write everything that this process and its children print into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)


def isolated(run: Callable[[], object]) -> None:
    """Run in a child process with all imports so far: patches of a tool must not reach the next job."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        message = b""
        try:
            run()
        except (Exception, SystemExit) as error:  # the parent raises it
            if not (isinstance(error, SystemExit) and not error.code):
                traceback.print_exc()
                message = f"{type(error).__name__}: {error}".encode()[:4000] or b"error"
        os.write(write, message)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    if message or status:
        raise RuntimeError(message.decode() or f"the process ended with status {status}")


def rewrite(job: Job, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the rows of a job by those that its tool documents: `change` gets a row and returns it in that format."""
    for path in (Path(job[name]) for name in ("rows", "test_rows") if job[name] and job["file"] == "jsonl"):
        rows = [change(row) for row in read_lines(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def given(settings: Configuration) -> Configuration:
    """Return the settings that have a value."""
    return {name: value for name, value in settings.items() if value is not None}


def trainer_arguments(job: Job) -> Configuration:
    """Return the job in the arguments of transformers' Trainer, which several tools take.

    A row that is a prompt counts as often as it is answered.
    """
    answers = job["extra"].get("samples", 1)
    micro = job["micro_batch_size"] * answers
    settings = {name: job[name] for name in ("learning_rate", "optim", "seed")}
    settings |= {"use_cpu": True, "report_to": "none", "logging_steps": 1}
    settings |= {"num_train_epochs": job["epochs"]} if job["epochs"] else {"max_steps": job["steps"]}
    settings |= {"lr_scheduler_type": job["schedule"]}
    settings |= {name: job[name] for name in ("max_grad_norm", "weight_decay", "warmup_steps")}
    settings |= {"label_smoothing_factor": job["extra"]["label_smoothing"]} if "label_smoothing" in job["extra"] else {}
    settings |= {"per_device_train_batch_size": micro, "save_steps": job["save_steps"] or job["steps"]}
    settings["gradient_accumulation_steps"] = job["batch_size"] * answers // micro // job["processes"]
    return settings | evaluation(job)


def evaluation(job: Job) -> Configuration:
    """Return the arguments of transformers' Trainer that evaluate before the first step and after the last."""
    if "losses" not in job["ask"]:
        return {}
    settings = {"eval_strategy": "steps", "eval_steps": job["steps"], "eval_on_start": True}
    return settings | {"per_device_eval_batch_size": job["micro_batch_size"], "save_steps": job["steps"]}


def checkpoint(job: Job) -> str | None:
    """Return the checkpoint to resume from, where adapters write to `model`."""
    return f"{job['resume_from']}/model/checkpoint-{job['save_steps']}" if job["resume_from"] else None


def read_losses(folder: Path) -> dict[str, Any]:
    """Return all evaluation losses that transformers' Trainer wrote into its newest checkpoint, if any."""
    states = sorted(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(states[-1].read_text())["log_history"] if states else []
    return {"losses": [float(entry["eval_loss"]) for entry in history if "eval_loss" in entry]}


def reward(job: Job, numbers: Sequence[int], texts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[float]:
    """Return the rewards of sampled answers, and note them with their tokens; `numbers` are those of their rows."""
    rows = read_lines(Path(job["rows"]))
    rewards = [score(rows[number], text) for number, text in zip(numbers, texts, strict=True)]
    with Path(job["out"], "samples.jsonl").open("a") as file:
        for number, ids, value in zip(numbers, answers, rewards, strict=True):
            file.write(json.dumps({"row": int(number), "ids": [int(token) for token in ids], "reward": value}) + "\n")
    return rewards


def read_samples(job: Job) -> dict[str, Any]:
    """Return the sampled answers that `reward` noted, if any."""
    path = Path(job["out"], "samples.jsonl")
    return {"samples": read_lines(path)} if path.exists() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(main: Callable[[], object], *words: str) -> None:
    """Run a tool's command in a process of its own."""

    def run() -> None:
        sys.argv = list(words)
        main()

    isolated(run)


def do_without(name: str) -> None:
    """Replace a module by an empty one if it cannot be loaded, as a build for CUDA next to a CPU torch."""
    try:
        import_module(name)
    except (ImportError, OSError):
        sys.modules[name] = module_from_spec(ModuleSpec(name, None))


def in_this_process(owner: type, *methods: str) -> None:
    """Ignore `num_proc` in calls of these methods: for a few rows, a pool of processes costs seconds."""

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def called(*arguments: Any, num_proc: int | None = None, **named: Any) -> Any:
            return method(*arguments, **named)

        return called

    for name in methods:
        setattr(owner, name, wrap(getattr(owner, name)))
