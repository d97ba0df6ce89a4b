"""Settings to make before heavy libraries are imported: network switches, telemetry, threads."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.errors import EnvironmentProblem, Problem

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

LOCAL_TRACKERS = {"tensorboard"}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
OFFLINE_CONSTANTS = ("huggingface_hub.constants", "datasets.config")
"""Modules that read the switches at import, into HF_HUB_OFFLINE."""
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's cache of compiled matrix products on a CPU, and torch's cache in front of it."""
KERNELS_KEPT = 128
"""Compiled products to cache; a forward and backward pass of one length needs about 40."""


def prepare_environment(*, network: bool, threads: int | None = None) -> None:
    """Set the process environment; call it before importing torch, transformers or datasets.

    Args:
        network: whether the recipe needs the network. If not, the hub's offline switches are set, because some
            libraries access the network on their own.
        threads: CPU threads for torch and tokenizers; None leaves the choice to them.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA
    # On import it looks for an optional hub kernel, and warns if it is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not network:
        for name in OFFLINE:
            os.environ[name] = "1"
        for name in OFFLINE_CONSTANTS:
            if name in sys.modules:  # imported by a user's program before
                vars(sys.modules[name])["HF_HUB_OFFLINE"] = True
    # oneDNN compiles a product for every number of tokens. By default it caches 1,024 of 0.5 MB each. Steps differ in
    # length, so memory would grow by 8 MB per step.
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):  # RAYON: tokenizers
            os.environ[name] = str(threads)
        if "torch" in sys.modules:  # `processes.join` has already imported it
            sys.modules["torch"].set_num_threads(threads)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable garbage collection during imports, and exclude their objects from later collections.

    The collector would scan hundreds of thousands of new objects repeatedly, which takes a fifth of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def offline_switches() -> list[str]:
    """Return the names of the libraries' offline switches that are on."""
    return [name for name in OFFLINE if os.environ.get(name, "0") not in {"", "0"}]


def refuse_network(recipe: Recipe, *, offline: bool) -> None:
    """Raise EnvironmentProblem if a recipe needs the network with --offline; cached models and data do not need it.

    Remote trackers, attention kernels from the hub, data at a URL and a remote judge need the network.
    """
    if not offline:
        return
    from llmtune.recipe.eval_suites_section import is_local  # late: slow for --help
    from llmtune.recipe.section import STORES

    problems = []
    trackers = sorted(set(recipe.train.report_to) - LOCAL_TRACKERS)
    if trackers:
        what = f"{', '.join(trackers)} would send metrics over the network, which --offline forbids"
        fix = "Remove it (--set train.report_to=[]), or omit --offline."
        problems.append(Problem(what, "train.report_to", fix))
    attention = recipe.model.attn_implementation
    if "/" in attention:
        what = f"the kernel {attention} must be downloaded from the hub, which --offline forbids"
        fix = "Set it to auto (--set model.attn_implementation=auto), or omit --offline."
        problems.append(Problem(what, "model.attn_implementation", fix))
    for key, _, source in recipe.data.named_sources():
        if source.path.startswith(STORES):
            what = f"{source.path} is read over the network, which --offline forbids"
            problems.append(Problem(what, key, "Download it and use the file, or omit --offline."))
    judge = recipe.evaluate.judge
    if judge is not None and not is_local(judge.endpoint):
        what = f"{judge.endpoint} is asked over the network, which --offline forbids"
        problems.append(Problem(what, "evaluate.judge.endpoint", "Use a judge on this machine, or omit --offline."))
    EnvironmentProblem.collect(problems)


def is_remote_model(name: str) -> bool:
    """Return whether a model's name refers to the hub."""
    return not name.startswith(("builtin:", "/")) and not Path(name).exists()
