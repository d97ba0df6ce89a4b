"""What must be set before the heavy libraries are imported: network switches, telemetry, threads."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from llmtune.recipe import Recipe, Source

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


def names_remote(recipe: Recipe) -> bool:
    """Whether the recipe names a model or data on a hub, or a tracker that sends numbers elsewhere."""
    models = [recipe.model.name] if recipe.model.name else list(recipe.model.candidates or [])
    sides = (recipe.data.train, recipe.data.validation, recipe.data.test)
    sources = [source for side in sides if isinstance(side, tuple) for source in side]
    remote_trackers = set(recipe.train.report_to) - {"tensorboard"}
    return any(map(_is_remote_model, models)) or any(map(_is_remote_source, sources)) or bool(remote_trackers)


def _is_remote_model(name: str) -> bool:
    return not name.startswith("builtin:") and not Path(name).exists()


def _is_remote_source(source: Source) -> bool:
    return source.path.startswith("hub:")
