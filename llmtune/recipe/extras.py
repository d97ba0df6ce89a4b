"""Optional packages: the extras of `llmtune-cli` that one feature needs, and the check that they are installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from llmtune.errors import EnvironmentProblem, Problem
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS

EXTRAS = {
    "benchmarks": ("lm_eval",),
    "excel": ("openpyxl",),
    "images": ("PIL", "torchvision"),
    "judge": ("openai",),
    "labels": ("cleanlab",),
    "quantized": ("compressed_tensors",),
    "ray": ("ray",),
    "serve": ("fastapi", "openai", "python_multipart", "uvicorn"),
    **{name: facts.packages for name, facts in TASK_FACTS.items() if facts.packages},
}
"""The packages of each extra, by their import names."""


def find_missing_extra(extra: str, where: str) -> Iterator[Problem]:
    """Yield a problem if packages of an extra are not installed; `where` is the key or command that needs them."""
    if missing := [name for name in EXTRAS[extra] if find_spec(name) is None]:
        verb = "are" if len(missing) > 1 else "is"
        yield Problem(f"{', '.join(missing)} {verb} not installed", where, f"pip install 'llmtune-cli[{extra}]'")


def require_extra(extra: str, where: str) -> None:
    """Raise EnvironmentProblem if packages of an extra are not installed."""
    EnvironmentProblem.collect(find_missing_extra(extra, where))


def require_vllm() -> None:
    """Raise EnvironmentProblem if vLLM is not installed; it is no extra, as its versions fit few other packages."""
    if find_spec("vllm") is None:
        fix = "Install it (pip install vllm; it needs a GPU), or omit --engine: llmtune's own loop needs none."
        raise EnvironmentProblem.of("vLLM is not installed: package vllm not found", "--engine", fix)


def find_missing_extras(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each extra that a recipe's task and keys need before training."""
    if TASK_FACTS[recipe.task].packages:
        yield from find_missing_extra(recipe.task, "task")
    if recipe.evaluate.judge:
        yield from find_missing_extra("judge", "evaluate.judge")
