"""Sampled answers that do not depend on the batch: each token has a random number of its own.

Shapes: N samples, B rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from llmtune.evaluate.generation import MOST_ROWS, cache_budget, generate_batch, only_these_settings
from llmtune.evaluate.greedy_decoding import column_bytes_of, decode_tokens
from llmtune.evaluate.token_batches import GENERATION_BUDGET, budget_for, run_in_batches
from llmtune.model.self_checks import positions_depend_on_neighbours
from llmtune.recipe.reinforce_section import ReinforceSection
from llmtune.records import Advance, Prompt

BELOW_ONE = 1 - 2**-20
"""Largest random number: rounding must not lift it to the end of the distribution."""


@dataclass(frozen=True)
class SampledAnswer:
    """A sampled answer as token ids."""

    ids: list[int]
    """With its end token, if it has one."""
    logps: list[float]
    """Log-probability of each token at the temperature, before top_k and top_p."""
    truncated: bool
    """Whether `max_new_tokens` ended it."""


class TokenSampler(LogitsProcessor):  # type: ignore[misc]
    """Picks the next tokens of a batch by their own random numbers, with the stated settings alone."""

    def __init__(self, keys: Sequence[Sequence[int]], section: ReinforceSection, start: int = 0) -> None:
        """Draw the random numbers of each sample from its key; `start` is the width of the prompts."""
        streams = (np.random.Generator(np.random.Philox(np.random.SeedSequence(key))) for key in keys)
        numbers = np.stack([stream.random(section.max_new_tokens) for stream in streams])
        self.numbers_NT = torch.from_numpy(numbers.clip(max=BELOW_ONE).astype(np.float32))
        self.start, self.temperature = start, section.temperature
        self.logps: list[list[float]] = [[] for _ in keys]
        """Log-probabilities of the picked tokens, by sample."""
        self.warpers = LogitsProcessorList()
        if section.top_k:
            self.warpers.append(TopKLogitsWarper(section.top_k))
        if section.top_p < 1:
            self.warpers.append(TopPLogitsWarper(section.top_p))

    def pick(self, logits_BV: torch.Tensor, rows: Sequence[int], written: int) -> torch.Tensor:
        """Return the next token [B] of samples that have `written` tokens: inverse transform sampling."""
        scores_BV = logits_BV.float() / self.temperature
        cumulative_BV = self.warpers(None, scores_BV).softmax(-1).cumsum(-1)
        numbers_B1 = self.numbers_NT[list(rows), written, None].to(logits_BV.device)
        tokens_B1 = torch.searchsorted(cumulative_BV, numbers_B1 * cumulative_BV[:, -1:], right=True)
        logps_B = scores_BV.gather(1, tokens_B1)[:, 0] - scores_BV.logsumexp(-1)
        for row, logp in zip(rows, logps_B.tolist(), strict=True):
            self.logps[row].append(logp)
        return tokens_B1[:, 0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave only the picked tokens, for the loop of transformers."""
        tokens_B = self.pick(scores, range(len(scores)), input_ids.shape[1] - self.start)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)


def sample_answers(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    section: ReinforceSection,
    stops: set[int],
    device: str,
    advance: Advance = lambda rows: None,
) -> list[SampledAnswer]:
    """Sample one answer per prompt, in batches; a prompt with several samples is given several times.

    A sample depends on its prompt and its key alone: numbers such as seed, round, row and sample. Settings of the
    model's `generation_config` are ignored. The model is in evaluation mode.
    """
    new, lengths = section.max_new_tokens, [len(prompt) + section.max_new_tokens for prompt in prompts]
    alone = positions_depend_on_neighbours(model, max(lengths, default=0))
    column_bytes = None if alone else column_bytes_of(model, device)

    def work(batch: list[int]) -> list[SampledAnswer]:
        chosen = [list(prompts[i]) for i in batch]
        sampler = TokenSampler([keys[i] for i in batch], section, max(map(len, chosen)))
        if column_bytes is not None:
            answers = decode_tokens(model, chosen, new, stops, device, sampler.pick)
        else:
            settings = GenerationConfig(max_new_tokens=new, eos_token_id=sorted(stops) or None, pad_token_id=0)
            run = partial(generate_batch, model, [*map(Prompt, chosen)], settings, device)
            answers = run(logits_processor=LogitsProcessorList([sampler]))
        return [end_sample(*pair, stops) for pair in zip(answers, sampler.logps, strict=True)]

    if column_bytes is not None:
        most = budget_for(device, MOST_ROWS)
        return run_in_batches(lengths, cache_budget(device, column_bytes), work, advance, most=most)
    with only_these_settings(model):
        return run_in_batches(lengths, budget_for(device, GENERATION_BUDGET), work, advance, most=1)


def end_sample(ids: Sequence[int], logps: Sequence[float], stops: set[int]) -> SampledAnswer:
    """Cut a sample after its first end token."""
    end = next((at + 1 for at, token in enumerate(ids) if token in stops), None)
    return SampledAnswer(list(ids[:end]), list(logps[:end]), end is None)
