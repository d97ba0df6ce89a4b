"""Run in a process that has its own settings, such as a notebook: as in a new process, and without leaving a trace.

Libraries keep settings per process: Accelerate its precision and plugins, torch its default dtype and random state, the
hub its offline switch. A run depends on none that its user made before, and changes none that its user has afterwards.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from llmtune.store.process_environment import OFFLINE_CONSTANTS, offline_switches

_RUNNING = threading.RLock()
"""One run at a time: all of them share the process's settings."""
LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_")
"""Environment variables in which Accelerate keeps precision and plugins; the recipe decides both."""
SWITCH, BARS = "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"
SINGLETONS = ("AcceleratorState", "GradientState", "PartialState")


@contextmanager
def as_in_new_process() -> Iterator[None]:
    """Give the block the settings of a new process; afterwards restore all that it or the block changed."""
    with _RUNNING, ExitStack() as stack:
        for keep in (
            _collector,
            _offline_switches,
            _messages,
            _random_states,
            _torch_settings,
            _accelerate,
            _environment,
        ):
            stack.enter_context(keep())
        yield


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    for name in before:
        if name.startswith(LAUNCHER_PREFIXES):
            del os.environ[name]
    try:
        yield
    finally:
        for name in [name for name in os.environ if name not in before]:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _collector() -> Iterator[None]:
    """Unfreeze the objects that fast imports froze: they include the user's, whose memory would never be freed."""
    frozen = gc.get_freeze_count()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


@contextmanager
def _offline_switches() -> Iterator[None]:
    """Keep the hub's offline switches; if the block imports their modules, read them again from the environment."""
    before = {name: vars(sys.modules[name])[SWITCH] for name in OFFLINE_CONSTANTS if name in sys.modules}
    try:
        yield
    finally:
        for name in OFFLINE_CONSTANTS:
            if name in sys.modules:
                vars(sys.modules[name])[SWITCH] = before.get(name, bool(offline_switches()))


@contextmanager
def _messages() -> Iterator[None]:
    """Hide transformers' messages and all progress bars; if the block imports transformers, both get their defaults."""
    logs, bars = _message_settings()
    before = (logs.get_verbosity(), logs.is_progress_bar_enabled(), vars(bars)[BARS]) if logs else None
    if logs:
        vars(bars)[BARS] = True
        logs.set_verbosity_error()
        logs.disable_progress_bar()
    try:
        yield
    finally:
        logs, bars = _message_settings()
        if logs:
            _restore_messages(logs, bars, before)


def _restore_messages(logs: Any, bars: Any, before: tuple[int, bool, bool | None] | None) -> None:
    shows_bars = BARS not in os.environ
    default = logging.WARNING, shows_bars, None if shows_bars else vars(bars)[BARS]
    verbosity, enabled, switch = before or default
    if before or "TRANSFORMERS_VERBOSITY" not in os.environ:
        logs.set_verbosity(verbosity)
    vars(bars)[BARS] = switch
    if enabled:
        logs.enable_progress_bar()


def _message_settings() -> tuple[Any, Any]:
    """Return the modules that keep them, or None twice if transformers is not imported."""
    transformers = sys.modules.get("transformers")
    return (transformers.logging, sys.modules["huggingface_hub.utils.tqdm"]) if transformers else (None, None)


@contextmanager
def _random_states() -> Iterator[None]:
    """Keep the states of Python's, numpy's and torch's random numbers; seed anew what the block imports."""
    python = random.getstate()
    with ExitStack() as stack:
        new = {name for name in ("numpy", "torch") if name not in sys.modules}
        if "numpy" not in new:
            stack.callback(sys.modules["numpy"].random.set_state, sys.modules["numpy"].random.get_state())
        if "torch" not in new:
            torch = sys.modules["torch"]
            cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
            stack.enter_context(torch.random.fork_rng(devices=cards))
        try:
            yield
        finally:
            random.setstate(python)
            reseed: dict[str, Callable[[], object]] = {
                "numpy": lambda: sys.modules["numpy"].random.seed(),
                "torch": lambda: sys.modules["torch"].seed(),
            }
            for name in new & {*sys.modules}:
                reseed[name]()


@contextmanager
def _torch_settings() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    dtype, threads, precision = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
    )
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])


@contextmanager
def _accelerate() -> Iterator[None]:
    """Give Accelerate's singletons new states; the user's objects share the old ones, which stay as they are."""
    states: dict[str, object] = {}
    if state := sys.modules.get("accelerate.state"):
        states = {name: vars(getattr(state, name))["_shared_state"] for name in SINGLETONS}
        _set_states(state, {name: {} for name in SINGLETONS})
    try:
        yield
    finally:
        if state := sys.modules.get("accelerate.state"):
            _set_states(state, states or {name: {} for name in SINGLETONS})


def _set_states(module: object, states: dict[str, object]) -> None:
    for name, state in states.items():
        getattr(module, name)._shared_state = state
