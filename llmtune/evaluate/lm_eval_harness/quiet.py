"""lm-eval without its log, its bars and what it prints, and with the random numbers of others left alone."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

import numpy as np
import torch


@contextmanager
def quietly() -> Iterator[None]:
    """Run lm-eval in the block: nothing of it reaches the terminal, and the seeds that it sets are taken back.

    Standard errors that it would resample, in processes of its own, are left out: paired intervals stand for them.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task
    from tqdm import tqdm

    log = logging.getLogger("lm_eval")
    level, bars = log.level, datasets.are_progress_bars_disabled()
    states = random.getstate(), np.random.get_state()
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    seeded = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(seeded),
        redirect_stdout(io.StringIO()),
        replaced(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)),  # the bar of building requests has no switch
        replaced(lm_eval.api.metrics, "bootstrap_stderr", lambda *_, **__: "N/A"),
    ):
        try:
            yield
        finally:
            log.setLevel(level)
            random.setstate(states[0])
            np.random.set_state(states[1])
            if not bars:
                datasets.enable_progress_bars()


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Let a name of a module stand for something else within the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
