"""Fixtures of all tests: tiny real models, chat rows, a quiet console. No network, one thread."""

import functools
import gc
import importlib
import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # set for background jobs; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import settings
from rich.console import Console
from typer.main import get_command

settings.register_profile("same-examples", derandomize=True)
settings.load_profile("same-examples")  # `make test-random` draws new ones


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `needs` if one of their packages is not installed: `make test-optional` installs them."""
    for item in items:
        packages = {name for mark in item.iter_markers("needs") for name in mark.args}
        if missing := sorted(name for name in packages if find_spec(name) is None):
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)} (make test-optional)"))


FROZEN = itertools.count()
"""How often imports were frozen."""
imported = 0
"""The number of imported modules when they were last frozen."""


@pytest.fixture(autouse=True)
def imports_are_no_garbage() -> None:
    """Freeze imported objects, as the command line does: every run collects garbage five times.

    Libraries import modules late, at their first use in a test, so this counts the modules before each test.
    """
    global imported
    if len(sys.modules) > imported + 20:
        if next(FROZEN) % 20 == 0:
            gc.unfreeze()  # each command freezes all objects, garbage included
        gc.collect()
        gc.freeze()
        imported = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def waits_are_left_out() -> Iterator[None]:
    """Skip what takes time and proves nothing here.

    A run calls os.fsync 70 times; a killed process loses nothing without it, and no test cuts the power. Typer's test
    runner builds the tree of commands for each call, in 50 ms; a process of a user builds it once.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr("typer.testing._get_command", functools.cache(get_command))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.models import build_llama

    return build_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`image_run("gemma3")` is a run of a tiny model tuned with pictures, which no test may change."""
    from support.image_runs import finish_image_run

    return functools.cache(lambda family: finish_image_run(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.models import build_gpt2

    return build_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`built("bert", **config)` is the folder of a tiny model, which no test may change."""
    made: dict[tuple[str, str], Path] = {}

    def build(family: str, **config: object) -> Path:
        from support import families, models

        key = family, json.dumps(config, sort_keys=True)
        if key not in made:
            name = f"build_{family}"
            builder = getattr(families, name, None) or getattr(models, name)
            made[key] = builder(tmp_path_factory.mktemp("models") / family, **config)
        return made[key]

    return build


@pytest.fixture(scope="module")
def load_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of `benchmarks/` by its name."""
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def console() -> Console:
    """A console that writes to memory: `console.file.getvalue()` is its output."""
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def chat_rows(tmp_path: Path) -> Path:
    """Forty chat rows, all different, in OpenAI's messages form."""
    from support.runs import write_colours

    return write_colours(tmp_path / "chat.jsonl")
