"""Servers for tests: a real process, or the application in uvicorn in a thread of this process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import uvicorn

from llmtune.serve.engine import Engine
from llmtune.serve.http_app import build_app
from llmtune.serve.served_model import ServedModel
from llmtune.serve.server import ServeOptions, load_models, open_served
from llmtune.tasks.registry import get_task
from support.adapting import quiet


class Process:
    """`llmtune deploy serve` in its own process, ready once constructed."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        command = [sys.executable, "-m", "llmtune", "deploy", "serve", *map(str, arguments), "--port", "0", "--json"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables)
        assert self.process.stdout is not None
        text = ""
        while line := self.process.stdout.readline():
            text += line
            if line.startswith("}"):
                break
        assert text, self.process.communicate()[1]
        self.about = json.loads(text)
        self.url = self.about["url"]

    @property
    def memory_bytes(self) -> int:
        """Resident memory."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def terminate(self) -> None:
        """Send SIGTERM without waiting."""
        self.process.send_signal(signal.SIGTERM)

    def end(self, timeout: float = 40) -> tuple[int, str]:
        """Wait for the end; return the exit code and stderr."""
        _, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, errors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def serving(*models: ServedModel, max_queue: int = 64, key: str | None = None) -> Iterator[str]:
    """Serve in this process; yield the address."""
    with serving_engine(*models, max_queue=max_queue, key=key) as (url, _):
        yield url


@contextlib.contextmanager
def serving_engine(*models: ServedModel, max_queue: int = 64, key: str | None = None) -> Iterator[tuple[str, Engine]]:
    """Serve in this process; yield the address and the engine."""
    engine = Engine({served.name: served for served in models}, max_queue=max_queue)
    del models  # the engine may free them
    engine.start()
    with running(build_app(engine, body_bytes=2**20, key=key)) as url:
        yield url, engine
    engine.close(10)
    assert not engine.thread.is_alive()


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Run an application with uvicorn in a thread."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def load_served(options: ServeOptions | None = None, **runs: Path) -> dict[str, ServedModel]:
    """Load a finished run as `llmtune deploy serve` does, under the name of its keyword."""
    options = options or ServeOptions()
    ((name, path),) = runs.items()
    return load_models(name, open_served(path, options, quiet()), options)


def served_of(tuned: Any, name: str = "tiny", *, is_base: bool = False) -> ServedModel:
    """Return the served model of an adapted model and its recipe."""
    adapted, recipe = tuned
    processor, task = adapted.selected.processor, get_task(recipe.task)
    return ServedModel(name, adapted.model.eval(), processor, recipe, task, is_base=is_base)


def wait_until(holds: Any, seconds: float = 10) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
