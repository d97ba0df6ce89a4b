"""Completions by vLLM, from the same prompt ids, end tokens and generation settings as by our own loop."""

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
"""Value of vLLM's `max_model_len` for as many tokens as fit into memory."""


class VllmModel(torch.nn.Module):
    """A model that vLLM runs, with or without an adapter.

    `module` is the transformers model without weights: the source of the configuration and the end tokens of answers.
    `engine` is vLLM's `LLM`.
    """

    def __init__(self, skeleton: PreTrainedModel, engine: Any, adapter: Path | None) -> None:
        super().__init__()
        self.module, self.engine, self.adapter, self.device = skeleton, engine, adapter, torch.device("cpu")

    @property
    def context(self) -> int:
        """Maximum number of tokens of a prompt with its answer."""
        return int(self.engine.model_config.max_model_len)

    def complete(
        self, prompts: Sequence[Prompt], recipe: Recipe, stops: Collection[int], advance: Callable[[int], None]
    ) -> list[list[int]]:
        """Return the ids of the answer to each prompt; an end token, if there is one, is the last.

        Calls `advance` with the number of newly finished answers. Raises EnvironmentProblem if vLLM fails.
        """
        if not prompts:
            return []
        vllm, lora = import_vllm(), import_module("vllm.lora.request")
        adapter = lora.LoRARequest("tuned", 1, str(self.adapter)) if self.adapter else None
        inputs = [vllm.TokensPrompt(prompt_token_ids=list(prompt.ids)) for prompt in prompts]
        params = [vllm.SamplingParams(**sampling_arguments(recipe, stops, at)) for at in range(len(prompts))]
        with _explain_failure("answer"):
            bar = partial(progress_bar, advance)
            outputs = self.engine.generate(inputs, params, use_tqdm=bar, lora_request=adapter)
        return [list(output.outputs[0].token_ids) for output in outputs]


def progress_bar(advance: Callable[[int], None], requests: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a silent progress bar for vLLM.

    vLLM makes one bar over the `requests` that it reads, and one without them for the answers: only updates of the
    second call `advance`.
    """
    bar = tqdm(requests, **options, file=io.StringIO())
    if requests is None:
        bar.update = advance
    return bar


def sampling_arguments(recipe: Recipe, stops: Collection[int], at: int) -> dict[str, Any]:
    """Return the arguments of vLLM's `SamplingParams` for the prompt with the index `at`.

    Each sampled answer has its own seed (`seed` + `at`), so its random numbers do not depend on the rest of the batch.
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
        longest: Maximum number of tokens of a prompt with its answer, or `AUTO`.
        rank: vLLM's `max_lora_rank`; None without an adapter.
    """
    arguments: dict[str, Any] = {
        "model": str(weights),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": longest,
        "generation_config": "vllm",  # the recipe's settings, not those of the checkpoint
        "trust_remote_code": recipe.model.trust_remote_code,
        "use_tqdm_on_load": False,
    }
    return arguments if rank is None else {**arguments, "enable_lora": True, "max_loras": 1, "max_lora_rank": rank}


def start_vllm(arguments: Mapping[str, Any]) -> Any:
    """Start vLLM's `LLM`; its engine process ends with the object. Raises EnvironmentProblem if it does not start."""
    with _explain_failure("load this model"):
        return import_vllm().LLM(**arguments)


def import_vllm() -> Any:
    """Import vLLM, with its messages on stderr, as standard output is for results.

    Sets environment variables of vLLM that are not set yet. Raises EnvironmentProblem if the import fails, for example
    because vLLM was built for another torch.
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
    """Raise EnvironmentProblem for errors of vLLM, whose own messages state the cause."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, import_module("vllm.exceptions").VLLMError) as error:
        fix = "See its messages above. Free GPU memory (on a CPU, set VLLM_CPU_KVCACHE_SPACE=4), or omit --engine."
        raise EnvironmentProblem.of(f"vLLM cannot {doing}: {first_line(error)}", "--engine vllm", fix) from error
