"""A loaded model as lm-eval takes one: its own class for transformers, fed in batches of our token budgets.

Shapes: B rows of a batch, T positions, V words of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from llmtune.evaluate.token_batches import (
    GENERATION_BUDGET,
    TOKEN_BUDGET,
    budget_for,
    over_processes,
    run_in_batches,
)
from llmtune.model.device import compute_context
from llmtune.store.processes import world_size

MOST_WINDOWS = 512
"""Windows of a long text that lm-eval hands over at a time; they are cut into batches here."""
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest answer."""
TokenRequest = tuple[object, list[int], list[int]]
"""What it is called by, tokens of the context, tokens of what follows."""
Answer = TypeVar("Answer")


class InferenceModel:
    """A model that runs as in evaluation: in the recipe's number format, and never changed.

    It is no torch module, so that lm-eval does not tie the weights of an adapted model anew; and the number format is
    set here, since lm-eval switches autocast off around each call.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, device: str) -> None:
        self.model, self.compute_dtype, self.compute_device = model.eval(), dtype, device

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return the model's output, with logits [B, T, V]."""
        with torch.inference_mode(), compute_context(self.compute_dtype, self.compute_device):
            return self.model(*args, **kwargs)

    def generate(self, **kwargs: object) -> object:
        """Return token ids [B, T]."""
        with torch.inference_mode(), compute_context(self.compute_dtype, self.compute_device):
            return self.model.generate(**kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)


class BatchedLM(HFLM):  # type: ignore[misc]  # the library has no annotations
    """lm-eval's transformers model around one that is loaded already."""

    def __init__(
        self,
        model: torch.nn.Module,
        processor: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        device: str,
        bars: Progress,
        name: str,
    ) -> None:
        """Take a loaded model; a bar of this name says how many requests are answered."""
        tokenizer = copy.deepcopy(processor)  # lm-eval sets its padding
        inner = InferenceModel(model, dtype, device)
        super().__init__(pretrained=inner, backend="causal", tokenizer=tokenizer, batch_size=MOST_WINDOWS)
        self.where, self.bars, self.bar, self.asked = device, bars, bars.add_task(name, total=None), 0
        self.truncated = 0
        """Requests whose beginning was left out, since they are longer than the model's context."""

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the nats of whole texts."""
        nats: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return nats

    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], **_: object) -> list[tuple[float, bool]]:
        """Return (nats, whether each token is the likeliest) of what follows a context, in batches.

        Requests that differ in their last token alone stay together, since one pass does all.
        """
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, (_name, context, following) in enumerate(requests):
            alike.setdefault((*context, *following[:-1]), []).append(i)
        groups = list(alike.values())

        def answer(batch: list[int]) -> dict[int, tuple[float, bool]]:
            rows = [i for group in batch for i in groups[group]]
            answers = super(BatchedLM, self)._loglikelihood_tokens([requests[i] for i in rows], disable_tqdm=True)
            return dict(zip(rows, answers, strict=True))

        self.truncated += sum(len(group) for ids, group in alike.items() if len(ids) > self.max_length)
        lengths = [min(len(ids), self.max_length) for ids in alike]
        return self._answer(len(requests), lengths, budget_for(self.where, TOKEN_BUDGET), answer)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return generated texts, in batches."""

        def answer(batch: list[int]) -> dict[int, str]:
            self.batch_size_per_gpu = len(batch)
            texts = super(BatchedLM, self).generate_until([requests[i] for i in batch], disable_tqdm=True)
            return dict(zip(batch, texts, strict=True))

        asked = [next((one.args[1][name] for name in NEW_TOKENS if one.args[1].get(name)), 0) for one in requests]
        new = [int(tokens or self.max_gen_toks) for tokens in asked]
        lengths = [len(self.tok_encode(one.args[0])) + tokens for one, tokens in zip(requests, new, strict=True)]
        self.truncated += sum(length > self.max_length for length in lengths)
        drawn = any(one.args[1].get("do_sample") for one in requests)
        try:
            return self._answer(len(requests), lengths, budget_for(self.where, GENERATION_BUDGET), answer, drawn)
        finally:
            self.batch_size_per_gpu = MOST_WINDOWS

    def _answer(
        self,
        count: int,
        lengths: Sequence[int],
        budget: int,
        answer: Callable[[list[int]], dict[int, Answer]],
        drawn: bool = False,
    ) -> list[Answer]:
        """Answer requests in batches of a token budget; `answer` gives those of one batch by their numbers.

        Several processes share them, but where answers are `drawn`: a draw depends on the answers beside it.
        """
        self.asked += count if drawn else -(-count // world_size())
        self.bars.update(self.bar, total=self.asked)

        def share(own: Sequence[int]) -> list[dict[int, Answer]]:
            found: dict[int, dict[int, Answer]] = {}

            def work(batch: list[int]) -> None:
                found[batch[0]] = answer([own[i] for i in batch])
                self.bars.advance(self.bar, len(found[batch[0]]))

            run_in_batches([lengths[i] for i in own], budget, work)
            return [found.get(i, {}) for i in range(len(own))]

        every = range(len(lengths))
        answers = {
            key: one for part in (share(every) if drawn else over_processes(every, share)) for key, one in part.items()
        }
        return [answers[i] for i in range(count)]
