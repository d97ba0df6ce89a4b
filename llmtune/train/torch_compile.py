"""`train.torch_compile`: compile the parts of a model's layers that allow it, and explain compiler errors."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError
from transformers import PreTrainedModel

from llmtune.errors import EnvironmentProblem, LlmtuneError, RecipeError


def compile_parts(model: torch.nn.Module, inner: PreTrainedModel) -> int:
    """Set parts of the layers of `model`, in place, to be compiled at their first call; return the number of parts.

    They are compiled for rows of any length. Parts are modules that only take tensors: norms, gated layers, outputs.
    Attention takes document lengths, so it would be recompiled for each number of documents. Layers are the model's
    `_no_split_modules`; raises RecipeError if it names none.
    """
    names = set(getattr(inner, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    parts = [part for layer in layers for part in _closed_parts(layer)]
    if not parts:
        what = f"{type(inner).__name__} does not name its layers, or none of their parts can be compiled"
        raise RecipeError.of(what, "train.torch_compile", "Remove it.")
    for part in parts:
        # Draw the same random numbers as without compiling: a repeated step seeds them again.
        part.compile(dynamic=True, options={"fallback_random": True})
    return len(parts)


def _closed_parts(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the largest parts of `layer` whose forward takes no `**kwargs`, except modules of torch and PEFT.

    Those are single operations, with nothing to fuse.
    """
    for part in layer.children():
        arguments = inspect.signature(part.forward).parameters.values()
        single = type(part).__module__.startswith(("torch.", "peft.", "bitsandbytes."))
        if not single and not any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
            yield part
        elif not single:
            yield from _closed_parts(part)


@contextmanager
def check_compiled(console: Console) -> Iterator[None]:
    """Check that layers are compiled in the block, print the time it took, and explain compiler errors.

    Raises EnvironmentProblem if compiling fails, or if nothing was compiled.
    """
    before, started = _count_graphs(), time.perf_counter()
    try:
        yield
    except (TorchDynamoException, InductorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _not_compiled(" ".join(lines[:2]) or type(error).__name__) from error
    if not _count_graphs():
        raise _not_compiled("torch.compile produced no graphs")
    console.print(
        f"Compiled: {_count_graphs() - before} graphs; the rehearsal took {time.perf_counter() - started:.0f} s."
    )


def _count_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _not_compiled(reason: str) -> LlmtuneError:
    return EnvironmentProblem.of(
        f"the model's layers cannot be compiled here: {reason}",
        "train.torch_compile",
        "Remove it; the result is the same except for the last digits.",
    )
