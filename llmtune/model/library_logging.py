"""Hide library messages that a user can neither fix nor use."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

# On import it looks for an optional hub kernel, and warns if none is found.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def unreported() -> Iterator[None]:
    """Hide transformers' table of missing or superfluous weights: we check them, and report what matters.

    This is a filter, not a level: at another level transformers logs more. It hides standard output too, which is for
    results: gptqmodel prints a banner.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


@contextmanager
def hushed() -> Iterator[None]:
    """Hide a deprecation that PEFT triggers with this transformers, and PEFT's warning about trained biases.

    With trained biases PEFT's switch does not restore the base; the base is therefore always evaluated separately.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
        yield


@contextmanager
def silent(level: int = logging.WARNING) -> Iterator[None]:
    """Hide all messages up to a level, such as warnings of torch's exporter, which name its own inner steps."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
