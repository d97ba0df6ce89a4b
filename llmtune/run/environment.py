"""What must be set before the heavy libraries are imported: network switches, telemetry, threads."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from llmtune.errors import EnvironmentProblem
from llmtune.recipe import Recipe, Source

LOCAL_TRACKERS = {"tensorboard"}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def prepare_environment(*, network: bool, threads: int | None = None) -> None:
    """Set the process environment; call it before torch, transformers or datasets are imported.

    Args:
        network: whether the recipe names something remote. Otherwise the hub's offline switch is set, since some
            libraries look things up by themselves.
        threads: CPU threads for torch; None leaves torch's own choice.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA
    # It looks for an optional hub kernel when it is imported, and warns where there is none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not network:
        for name in OFFLINE:
            os.environ[name] = "1"
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)


def offline_switches() -> list[str]:
    """Names of the libraries' offline switches that are on."""
    return [name for name in OFFLINE if os.environ.get(name, "0") not in {"", "0"}]


def refuse_network(recipe: Recipe, *, offline: bool) -> None:
    """Raise EnvironmentProblem where --offline meets a tracker that sends numbers elsewhere; caches need no network."""
    trackers = sorted(set(recipe.train.report_to) - LOCAL_TRACKERS)
    if offline and trackers:
        what = f"{', '.join(trackers)} would send numbers over the network, which --offline forbids"
        raise EnvironmentProblem.of(
            what, "train.report_to", "leave it out (--set train.report_to=[]) or --offline away"
        )


def names_remote(recipe: Recipe) -> bool:
    """Whether the recipe names a model or data on a hub, or a tracker that sends numbers elsewhere."""
    models = [recipe.model.name] if recipe.model.name else list(recipe.model.candidates or [])
    sides = (recipe.data.train, recipe.data.validation, recipe.data.test)
    sources = [source for side in sides if isinstance(side, tuple) for source in side]
    remote_trackers = set(recipe.train.report_to) - LOCAL_TRACKERS
    return any(map(is_remote_model, models)) or any(map(_is_remote_source, sources)) or bool(remote_trackers)


def is_remote_model(name: str) -> bool:
    """Whether a model's name is that of a hub."""
    return not name.startswith("builtin:") and not Path(name).exists()


def _is_remote_source(source: Source) -> bool:
    return source.path.startswith("hub:")
