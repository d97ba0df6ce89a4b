"""One process of a training: `python -m llmtune.launch.worker MODULE:FUNCTION ARGUMENT...`, started by `launch.local`.

The function gets the arguments as text. What it returns (rank 0) or raises is left as JSON in the folder that the
parent named in the environment, so that the parent can go on, or fail in the same way.
"""

from __future__ import annotations

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
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.records import Json
from llmtune.store.atomic_files import plain, write_json
from llmtune.store.process_environment import prepare_environment

RESULTS = "LLMTUNE_WORKER_RESULTS"
"""Environment variable: the folder in which workers leave what came of them."""
PARENT = "LLMTUNE_WORKER_PARENT"
"""Environment variable: the process that workers must not outlive."""


def main(arguments: Sequence[str]) -> int:
    """Run the function named first in `arguments`; return the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        value = _find(arguments[0])(*arguments[1:])
    except LlmtuneError as error:
        problems = [[problem.what, problem.where, problem.fix] for problem in error.problems]
        _leave(f"rank-{_rank()}.json", {"kind": type(error).__name__, "problems": problems, "exit": error.exit_code})
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        _leave(f"rank-{_rank()}.json", {"traceback": traceback.format_exc()})
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


def train_run(run: str) -> Json:
    """Adapt and train in one of several processes, from the run folder alone; return the facts of both steps."""
    prepare_environment(network=False)
    import torch

    from llmtune.adapter.injection import describe
    from llmtune.data.examples import load_examples
    from llmtune.data.row_store import load_rows
    from llmtune.report.render_terminal import VisibleConsole
    from llmtune.session import RunContext, locate_pinned
    from llmtune.store.run_folder import read_run, recipe_of_run
    from llmtune.store.run_lock import own_pins

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    console = VisibleConsole(stderr=True, quiet=_rank() != 0, soft_wrap=not sys.stderr.isatty(), highlight=False)
    folder = read_run(Path(run))
    recipe = recipe_of_run(folder).recipe
    pins = own_pins(folder.path)
    assert pins is not None, "the parent has written the lock"
    context = RunContext(recipe, folder, console, True, pins)  # offline: the parent has fetched what there is
    model_ref = locate_pinned(context, pins.model)
    context.infer_labels(model_ref, load_rows(folder.path / "data" / "rows"))
    adapted = context.make_adapted(model_ref, context.read_processor(model_ref))
    adapt = describe(adapted)
    examples, inputs = load_examples(folder.path / "data" / "examples"), folder.manifest["steps"]["train"]["inputs"]
    trained = context.train_adapted(adapted, examples, inputs, lambda tokens: note(micro_batch_tokens=tokens))
    return {"adapt": adapt, "train": trained}


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
