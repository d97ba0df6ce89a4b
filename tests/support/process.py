"""A training in its own process, to be killed or starved there.

`python -m support.process FOLDER RUN` trains from `recipe.yaml` and `examples` in FOLDER. Options:

--kill line:TEXT       kill the process when it prints TEXT
--kill os.rename:TEXT  kill it when that audit event happens to a path that ends with TEXT
--memory MEGABYTES     limit the address space to this much more than the use before training
--fill TEXT FILE       fill the disk of FILE when TEXT is printed
"""

import argparse
import contextlib
import gc
import io
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("llmtune.adapter.injection", "llmtune.model.loading", "llmtune.model.processor", "llmtune.recipe.loader"),
        *("llmtune.tasks.registry", "llmtune.train.loop", "transformers.models.llama.modeling_llama"),
        "torch._dynamo",
    ]
)


class Watched(io.TextIOBase):
    """Writes to stderr, and calls a function when a text occurs for the first time."""

    def __init__(self, text: str, react: Callable[[], object]) -> None:
        self.text, self.react = text, react

    def write(self, text: str) -> int:
        sys.stderr.write(text)
        sys.stderr.flush()
        if self.text and self.text in text:
            self.text = ""
            self.react()
        return len(text)


def main(words: list[str]) -> int:
    from llmtune.errors import LlmtuneError
    from llmtune.recipe.loader import load_recipe
    from support.training import adapt, read_examples, run_training

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--kill", default="line:")
    parser.add_argument("--memory", type=int)
    parser.add_argument("--fill", nargs=2)
    parser.add_argument("--budget", type=int, default=128)
    asked = parser.parse_args(words)
    event, _, text = asked.kill.partition(":")
    recipe = load_recipe(str(asked.folder / "recipe.yaml")).recipe
    adapted = adapt(recipe)
    if asked.memory:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + asked.memory * 2**20,) * 2)
    if event != "line":
        sys.addaudithook(lambda name, args: kill_at(name, args, event, text))
    try:
        run_training(
            asked.run,
            recipe,
            read_examples(asked.folder / "examples"),
            budget=asked.budget,
            adapted=adapted,
            console=Console(file=_watch(text if event == "line" else "", asked.fill), width=200),
            on_budget=lambda tokens: print(f"budget {tokens}"),
        )
    except LlmtuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _watch(kill: str, fill: list[str] | None) -> Watched:
    if fill:
        return Watched(fill[0], lambda: _fill_disk(Path(fill[1])))
    return Watched(kill, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _fill_disk(ballast: Path) -> None:
    """Fill the disk, except for 100 kB."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - 100_000)


def kill_at(name: str, args: tuple[object, ...], event: str, text: str) -> None:
    """Kill this process if the audit event happens to a path that ends with `text`."""
    if name == event and str(args[0]).endswith(text):
        os.kill(os.getpid(), signal.SIGKILL)


def train_in_process(folder: Path, run: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Run `main`; the recipe and the examples are in `folder`."""
    return run_in_child(_exit_with_main, run, [str(folder), str(run), *map(str, options)])


def _exit_with_main(words: list[str]) -> None:
    sys.exit(main(words))


def run_in_child(work: Callable[..., None], outputs: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Do `work` in a child of a server that has imported everything; its output goes to files next to `outputs`."""
    paths = outputs.with_name(f"{outputs.name}.stdout"), outputs.with_name(f"{outputs.name}.stderr")
    process = SERVER.Process(target=_redirect, args=(paths, work, arguments))
    process.start()
    process.join(300)
    assert process.exitcode is not None, "it takes too long"
    return subprocess.CompletedProcess([], process.exitcode, *(path.read_text() for path in paths))


def _redirect(paths: Sequence[Path], work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    gc.freeze()  # the collector need not scan what the server imported
    for stream, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    work(*arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
