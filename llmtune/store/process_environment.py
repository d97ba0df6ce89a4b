"""What must be set before the heavy libraries are imported: network switches, telemetry, threads."""

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
from llmtune.records import SPLITS

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe

LOCAL_TRACKERS = {"tensorboard"}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own cache of compiled products on a CPU, and the one that torch keeps in front of it."""
KERNELS_KEPT = 128
"""Products that stay compiled: a forward and backward pass of one length needs some 40 of them."""


def prepare_environment(*, network: bool, threads: int | None = None) -> None:
    """Set the process environment; call it before torch, transformers or datasets are imported.

    Args:
        network: whether the recipe names something remote. Otherwise the hub's offline switch is set, since some
            libraries look things up by themselves.
        threads: CPU threads for torch and tokenizers; None leaves their own choice.
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
    # A product is compiled for every number of tokens. By default 1,024 stay, half a megabyte each: steps differ in
    # length, and memory would grow by 8 MB a step.
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))
    if threads is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):  # the last one is the tokenizers'
            os.environ[name] = str(threads)
        if "torch" in sys.modules:  # several processes have met through it before
            sys.modules["torch"].set_num_threads(threads)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Import in the block without looking for garbage, then or later: imports leave none.

    The collector would go through hundreds of thousands of new objects again and again: a fifth of the time.
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
    """Names of the libraries' offline switches that are on."""
    return [name for name in OFFLINE if os.environ.get(name, "0") not in {"", "0"}]


def refuse_network(recipe: Recipe, *, offline: bool) -> None:
    """Raise EnvironmentProblem where --offline meets what must reach the network; caches of models and data need none.

    That is a tracker that sends numbers elsewhere, an attention kernel of the hub, and data at an address.
    """
    if not offline:
        return
    from llmtune.recipe.section import STORES  # not for --help

    problems = []
    trackers = sorted(set(recipe.train.report_to) - LOCAL_TRACKERS)
    if trackers:
        what = f"{', '.join(trackers)} would send numbers over the network, which --offline forbids"
        fix = "omit it (--set train.report_to=[]), or omit --offline"
        problems.append(Problem(what, "train.report_to", fix))
    attention = recipe.model.attn_implementation
    if "/" in attention:
        what = f"the kernel {attention} is fetched from the hub, which --offline forbids"
        fix = "set it to auto (--set model.attn_implementation=auto) or omit --offline"
        problems.append(Problem(what, "model.attn_implementation", fix))
    for split in SPLITS:
        for source in recipe.data.sources(split):
            if source.path.startswith(STORES):
                what = f"{source.path} is read over the network, which --offline forbids"
                problems.append(Problem(what, f"data.{split}", "fetch it and give the file, or omit --offline"))
    EnvironmentProblem.collect(problems)


def is_remote_model(name: str) -> bool:
    """Whether a model's name is that of a hub."""
    return not name.startswith(("builtin:", "/")) and not Path(name).exists()
