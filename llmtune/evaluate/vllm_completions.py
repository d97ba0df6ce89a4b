"""Completions by vLLM: of the same prompt ids, with the end tokens and settings of our own loop."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from llmtune.errors import EnvironmentProblem, first_line
from llmtune.recipe.schema import Recipe
from llmtune.records import Prompt

AUTO = -1
"""vLLM's `max_model_len` for as many tokens as fit into its memory."""


class VllmModel(torch.nn.Module):
    """A model that vLLM computes, with or without an adapter.

    `module` is the transformers model without weights. It has the configuration, and the end tokens of answers.
    """

    def __init__(self, skeleton: PreTrainedModel, engine: Any, adapter: Path | None) -> None:
        super().__init__()
        self.module, self.engine, self.adapter, self.device = skeleton, engine, adapter, torch.device("cpu")

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        return int(self.engine.model_config.max_model_len)

    def complete(
        self, prompts: Sequence[Prompt], recipe: Recipe, stops: Collection[int], advance: Callable[[int], None]
    ) -> list[list[int]]:
        """Return the ids of the answer to each prompt; an end token, if there is one, is the last.

        `advance` gets the number of answers as they finish. Raises EnvironmentProblem if vLLM fails.
        """
        if not prompts:
            return []
        vllm, lora = import_vllm(), import_module("vllm.lora.request")
        adapter = lora.LoRARequest("tuned", 1, str(self.adapter)) if self.adapter else None
        given = [vllm.TokensPrompt(prompt_token_ids=list(prompt.ids)) for prompt in prompts]
        params = [vllm.SamplingParams(**sampling_arguments(recipe, stops, at)) for at in range(len(prompts))]
        with _explain_failure("answer"):
            outputs = self.engine.generate(given, params, use_tqdm=partial(progress_bar, advance), lora_request=adapter)
        return [list(output.outputs[0].token_ids) for output in outputs]


def progress_bar(advance: Callable[[int], None], requests: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a silent bar for vLLM, which calls `advance` for answers, not for the `requests` it reads."""
    bar = tqdm(requests, **options, file=io.StringIO())
    if requests is None:
        bar.update = advance
    return bar


def sampling_arguments(recipe: Recipe, stops: Collection[int], at: int) -> dict[str, Any]:
    """Return the arguments of vLLM's `SamplingParams` for the prompt with the index `at`.

    Each sampled answer has a seed of its own, so it does not depend on the other prompts of its batch.
    """
    section = recipe.generation
    settings = section.model_dump(exclude_none=True, exclude={"do_sample", "max_new_tokens", "num_beams"})
    settings |= {"seed": recipe.seed + at} if section.do_sample else {"temperature": 0.0}
    return settings | {"max_tokens": section.max_new_tokens, "stop_token_ids": sorted(stops), "detokenize": False}


def engine_arguments(
    weights: Path, recipe: Recipe, *, dtype: torch.dtype, longest: int, rank: int | None
) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM`.

    Args:
        weights: The folder of the base, or of complete tuned weights.
        recipe: The run's recipe.
        dtype: The dtype of weights and computation.
        longest: Most tokens of a prompt and its answer, or `AUTO`.
        rank: vLLM's `max_lora_rank`; None without an adapter.
    """
    arguments: dict[str, Any] = {
        "model": str(weights),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": longest,
        "generation_config": "vllm",  # not that of the checkpoint: the recipe decides
        "trust_remote_code": recipe.model.trust_remote_code,
        "use_tqdm_on_load": False,
    }
    return arguments if rank is None else {**arguments, "enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def start_vllm(arguments: Mapping[str, Any]) -> Any:
    """Return vLLM's `LLM`, whose process ends with it. Raises EnvironmentProblem if it does not start."""
    with _explain_failure("load this model"):
        return import_vllm().LLM(**arguments)


def import_vllm() -> Any:
    """Return the package, whose messages go to stderr: standard output is for results.

    Raises EnvironmentProblem if it cannot be imported, as with another torch than it was built for.
    """
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads
    try:
        return import_module("vllm")
    except ImportError as error:
        fix = "Install a vLLM that fits this Python and torch, or omit --engine."
        raise EnvironmentProblem.of(f"vLLM cannot be imported: {first_line(error)}", "--engine", fix) from error


@contextmanager
def _explain_failure(doing: str) -> Iterator[None]:
    """Raise EnvironmentProblem for errors of vLLM, which prints their cause itself."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, import_module("vllm.exceptions").VLLMError) as error:
        fix = "Its own messages are above. Free memory of the GPU (CPU: VLLM_CPU_KVCACHE_SPACE=4), or omit --engine."
        raise EnvironmentProblem.of(f"vLLM cannot {doing}: {first_line(error)}", "--engine vllm", fix) from error
