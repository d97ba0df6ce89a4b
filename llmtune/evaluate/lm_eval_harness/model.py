"""A loaded model as lm-eval wants one: its own class for transformers, fed in batches of our token budgets.

Shapes: B rows of a batch, T positions, V words of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from llmtune.evaluate.token_batches import GENERATION_BUDGET, TOKEN_BUDGET, budget_for, run_in_batches
from llmtune.model import compute_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_WINDOWS = 512
"""Windows of a long text that lm-eval hands over at a time; they are cut into batches here."""
Request = tuple[Any, list[int], list[int]]
"""What it is called by, tokens of the context, tokens of what follows."""


class Live:
    """A model that answers as evaluation does: in the recipe's number format, and never changed.

    It is no torch module, so that lm-eval does not tie the weights of an adapted model anew; and the number format is
    set here, since lm-eval switches autocast off around each call.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, device: str) -> None:
        self.inner, self.compute, self.place = model.eval(), dtype, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output, with logits [B, T, V]."""
        with torch.inference_mode(), compute_context(self.compute, self.place):
            return self.inner(*args, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        """Return token ids [B, T]."""
        with torch.inference_mode(), compute_context(self.compute, self.place):
            return self.inner.generate(**kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Subject(HFLM):  # type: ignore[misc]  # the library has no annotations
    """lm-eval's transformers model around one that is loaded already."""

    def __init__(
        self,
        model: torch.nn.Module,
        processor: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        device: str,
        expect: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> None:
        """`expect` hears of so many requests more, `advance` of so many done."""
        tokenizer = copy.deepcopy(processor)  # lm-eval sets its padding
        super().__init__(
            pretrained=Live(model, dtype, device), backend="causal", tokenizer=tokenizer, batch_size=MOST_WINDOWS
        )
        self.where, self.expect, self.advance = device, expect, advance
        self.cut = 0
        """Requests whose beginning was left out, since they are longer than the model's context."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Return (nats, whether each token is the likeliest) for each pair of a context and what follows."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Return the nats of whole texts."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Answer in batches; requests that differ in their last token alone stay together, since one pass does all."""
        self.expect(len(requests))
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, following) in enumerate(requests):
            alike.setdefault((*context, *following[:-1]), []).append(i)
        groups, found = list(alike.values()), [(0.0, False)] * len(requests)

        def work(batch: list[int]) -> None:
            rows = [i for group in batch for i in groups[group]]
            said = super(Subject, self)._loglikelihood_tokens([requests[i] for i in rows], disable_tqdm=True)
            for i, answer in zip(rows, said, strict=True):
                found[i] = answer
            self.advance(len(rows))

        self.cut += sum(len(group) for ids, group in alike.items() if len(ids) > self.max_length)
        lengths = [min(len(ids), self.max_length) for ids in alike]
        run_in_batches(lengths, budget_for(self.where, TOKEN_BUDGET), work)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Return generated texts, in batches."""
        self.expect(len(requests))
        found = [""] * len(requests)

        def work(batch: list[int]) -> None:
            self.batch_size_per_gpu = len(batch)
            said = super(Subject, self).generate_until([requests[i] for i in batch], disable_tqdm=True)
            for i, text in zip(batch, said, strict=True):
                found[i] = text
            self.advance(len(batch))

        lengths = [len(self.tok_encode(one.args[0])) + self.new_tokens(one.args[1]) for one in requests]
        self.cut += sum(length > self.max_length for length in lengths)
        try:
            run_in_batches(lengths, budget_for(self.where, GENERATION_BUDGET), work)
        finally:
            self.batch_size_per_gpu = MOST_WINDOWS
        return found

    def new_tokens(self, settings: dict[str, Any]) -> int:
        """Return the longest answer that a request asks for, in tokens."""
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        return int(next((settings[name] for name in names if settings.get(name)), self.max_gen_toks))
