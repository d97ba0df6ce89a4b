"""One process of a training: `python -m llmtune.launch.worker MODULE:FUNCTION ARGUMENT...`, started by `launch.local`.

The function gets the arguments as text. What it returns (rank 0) or raises is left as JSON in the folder that the
parent named in the environment, so that the parent can go on, or fail in the same way.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.records import Json
from llmtune.store.atomic_files import plain, write_json
from llmtune.store.process_environment import prepare_environment

if TYPE_CHECKING:
    from llmtune.records import ModelRef
    from llmtune.session import RunContext

RESULTS = "LLMTUNE_WORKER_RESULTS"
"""Environment variable: the folder in which workers leave what came of them."""
LAST_WORDS = "stderr-{}.log"
"""In that folder: what a process wrote, by its rank. The first of a machine writes to the terminal."""
QUIET = "LLMTUNE_WORKER_QUIET"
"""Environment variable: set where nothing is to be printed."""
PARENT = "LLMTUNE_WORKER_PARENT"
"""Environment variable: the process that workers must not outlive."""


def main(arguments: Sequence[str]) -> int:
    """Run the function named first in `arguments`; return the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if int(os.environ.get("LOCAL_RANK", "0")):
        log = os.open(Path(os.environ[RESULTS]) / LAST_WORDS.format(_rank()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stderr.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print, and --json has one document there
    faulthandler.enable()  # the last words of a process that breaks
    own = f"rank-{_rank()}.json"
    before = Path(os.environ[RESULTS]) / own
    if before.exists() and "exit" in (left := json.loads(before.read_text())):
        return int(left["exit"])  # started again after an error that comes again
    before.unlink(missing_ok=True)
    try:
        value = _find(arguments[0])(*arguments[1:])
    except LlmtuneError as error:
        problems = [[problem.what, problem.where, problem.fix] for problem in error.problems]
        _leave(own, {"kind": type(error).__name__, "problems": problems, "exit": error.exit_code})
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        _leave(own, {"traceback": traceback.format_exc()})
        sys.excepthook = lambda *_: None  # the parent shows it, if nothing else explains the end of this process
        raise
    if _rank() == 0:
        _leave("result.json", value)
    _leave_group()
    return 0


def note(**findings: Any) -> None:
    """Tell the parent, from rank 0, what was found out so far; it reads it even if the training fails afterwards."""
    path = Path(os.environ[RESULTS]) / "notes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**known, **findings})


def train_run(run: str, strategy: str) -> Json:
    """Adapt and train in one of several processes, from the run folder alone; return the facts of both steps."""
    context, model_ref = _open(run)
    from llmtune.adapter.injection import describe
    from llmtune.data.examples import load_examples

    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if again:
        most = os.environ["TORCHELASTIC_MAX_RESTARTS"]
        context.console.print(f"[yellow]All processes are started again ({again} of {most} times).[/]")
    folder = context.folder
    examples, inputs = load_examples(folder.path / "data" / "examples"), folder.manifest["steps"]["train"]["inputs"]
    adapted = context.make_adapted(model_ref, context.read_processor(model_ref), examples, sharded=strategy == "fsdp")
    adapt = describe(adapted)
    told = lambda tokens: note(micro_batch_tokens=tokens)  # noqa: E731
    trained = context.train_adapted(adapted, examples, inputs, told, sharded=strategy == "fsdp")
    return {"adapt": adapt, "train": trained}


def evaluate_run(run: str, folder: str, base: str) -> None:
    """Evaluate in one of several processes, each with a share of the rows; the first writes `folder`."""
    context, model_ref = _open(run)
    from llmtune.data.examples import load_examples
    from llmtune.data.row_store import load_rows
    from llmtune.executor import score
    from llmtune.train.distributed import join_processes

    join_processes(context.device)
    context.base = Path(base) if base else None
    rows, examples = load_rows(Path(run) / "data" / "rows"), load_examples(Path(run) / "data" / "examples")
    processor = context.read_processor(model_ref)
    score(context, model_ref, processor, rows, examples, folder=Path(folder), keeps=_rank() == 0)


def _open(run: str) -> tuple[RunContext, ModelRef]:
    """Open the run that the parent has prepared; raises EnvironmentProblem where another machine does not see it."""
    if not Path(run).is_dir():
        what = "this machine does not see the run folder"
        fix = "Give --out a folder on a disk that all machines share, at the same path."
        raise EnvironmentProblem.of(what, run, fix)
    prepare_environment(network=False)
    import torch

    from llmtune.data.row_store import load_rows
    from llmtune.report.render_terminal import VisibleConsole
    from llmtune.session import RunContext, locate_pinned
    from llmtune.store.run_folder import read_run, recipe_of_run
    from llmtune.store.run_lock import own_pins

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    quiet = _rank() != 0 or QUIET in os.environ
    console = VisibleConsole(stderr=True, quiet=quiet, soft_wrap=not sys.stderr.isatty(), highlight=False)
    folder = read_run(Path(run))
    recipe = recipe_of_run(folder).recipe
    pins = own_pins(folder.path)
    assert pins is not None, "the parent has written the lock"
    context = RunContext(recipe, folder, console, True, pins)  # offline: the parent has fetched what there is
    model_ref = locate_pinned(context, pins.model)
    context.infer_labels(model_ref, load_rows(folder.path / "data" / "rows"))
    return context, model_ref


def _find(entry: str) -> Callable[..., Any]:
    module, _, name = entry.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _end_with_parent() -> None:
    """Die when the parent does, by whatever: what goes on alone would write into the folder of the next run."""
    while os.getppid() == int(os.environ[PARENT]):
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _leave(name: str, value: Any) -> None:
    write_json(Path(os.environ[RESULTS]) / name, plain(value))


def _leave_group() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
