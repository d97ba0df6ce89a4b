"""Library messages that a user can neither fix nor use, kept off the console."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

# It looks for an optional hub kernel when it is imported, and warns where there is none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def unreported() -> Iterator[None]:
    """Hide transformers' table of weights that were missing or left over: we check them, and say what matters.

    A filter, not a level: at another level transformers logs more. Standard output, which is for results, is hidden
    too: gptqmodel prints a banner.
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
    """Hide a deprecation that PEFT runs into with this transformers, and its word on trained biases.

    With trained biases PEFT's switch does not give the base back; the base is always evaluated as a model of its own.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
        yield
