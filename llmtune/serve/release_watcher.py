"""Reload a served release when another one becomes current: load it next to the old one, then swap them."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from llmtune.errors import EnvironmentProblem, LlmtuneError, RecipeError
from llmtune.recipe.section import RELEASE_PREFIX
from llmtune.serve.engine import Engine
from llmtune.serve.served_model import ServedModel
from llmtune.store.release_store import is_complete, read_current, resolve_release

POLL_SECONDS = 1.0
RETRY_SECONDS = 60.0
"""After a failure: the files of a release may still be on their way to this machine."""


class ReleaseWatcher(threading.Thread):
    """Polls the pointer of a release, from `start` until `stop`; requests never wait for it."""

    def __init__(
        self,
        name: str,
        serving: str,
        engine: Engine,
        load: Callable[[Path], Mapping[str, ServedModel]],
        console: Console,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        """Watch the releases of `name`; `serving` is loaded, and `load` loads the models of another release."""
        super().__init__(name="release", daemon=True)
        self.release_name, self.serving, self.engine, self.load, self.console = name, serving, engine, load, console
        self.retry_seconds = retry_seconds
        self.ended = threading.Event()

    def stop(self) -> None:
        """Stop polling; a load in progress is not waited for."""
        self.ended.set()

    def run(self) -> None:
        """Poll until stopped."""
        failure, again = "", 0.0
        while not self.ended.wait(POLL_SECONDS):
            current: str | None = None
            try:
                current = read_current(self.release_name)
                if current in (None, self.serving) or (failure.startswith(str(current)) and time.monotonic() < again):
                    continue
                self._reload(str(current))
                failure = ""
            except Exception as error:  # noqa: BLE001 - whatever is wrong with a release, the earlier one serves
                if (message := f"{current} could not be loaded: {error}") != failure:
                    self._report(message)
                    if not isinstance(error, LlmtuneError):
                        traceback.print_exception(error)
                failure, again = message, time.monotonic() + self.retry_seconds

    def _reload(self, digest: str) -> None:
        """Load a release and swap the models; requests in progress keep theirs, which are freed afterwards."""
        folder = resolve_release(f"{RELEASE_PREFIX}{self.release_name}@{digest}")
        if not is_complete(folder):
            fix = "Copy the release to this machine completely."
            raise EnvironmentProblem.of("files of this release are missing or changed", str(folder), fix)
        models = self.load(folder)
        old, new = (next(iter(served.values())) for served in (self.engine.models, models))
        if type(old.task) is not type(new.task):
            what = f"it is for task {new.task.name}, and the server for task {old.task.name}"
            raise RecipeError.of(what, str(folder), "Restart the server.")
        self.engine.replace(models)
        before, self.serving = self.serving, digest
        self.console.print(f"serving {self.release_name}@{digest} now, before {before}", highlight=False)

    def _report(self, failure: str) -> None:
        text = f"{self.release_name}@{failure}\n{self.release_name}@{self.serving} keeps serving"
        self.console.print(text, style="yellow", highlight=False, markup=False)
