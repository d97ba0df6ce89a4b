"""Wrap a loaded model for lm-eval: its transformers class, with batches by our token budgets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.generation import generate
from llmtune.evaluate.suites.lm_eval import replaced
from llmtune.evaluate.token_batches import (
    GENERATION_BUDGET,
    TOKEN_BUDGET,
    batch_size,
    budget_for,
    over_processes,
    run_in_batches,
)
from llmtune.model.causal_lm_loss import virtual_logits, virtual_tokens
from llmtune.model.device import resolve_dtype
from llmtune.records import Advance

Responses = list[Any]
"""One per request: (nats, whether each token is the most likely), nats, or a text."""
Ask = Callable[[Sequence[Instance]], Responses]


class BatchedLM(HFLM):  # type: ignore[misc]  # the library has no annotations
    """lm-eval's transformers model around one already loaded; processes divide the questions."""

    def __init__(self, model: torch.nn.Module, context: EvalContext, advance: Advance) -> None:
        dtype = resolve_dtype(context.recipe.model.dtype, context.device)
        tokenizer = copy.deepcopy(context.processor)  # lm-eval changes its padding
        autocast = None if dtype == torch.float32 else dtype
        # lm-eval ties weights again, which would undo or break an adapter on the embeddings or the head.
        with replaced(model, "tie_weights", lambda *_, **__: None):
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, mixed_precision_dtype=autocast)
        self._max_length = self.max_length - virtual_tokens(model)
        self.where, self.advance = context.device, advance
        self.truncated = 0
        """Number of requests truncated on the left because they exceed the model's context."""

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> Responses:
        """Return (nats, whether each token is the most likely) of continuations."""
        return self._answer(super().loglikelihood, requests, TOKEN_BUDGET)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> Responses:
        """Return the nats of texts."""
        return self._answer(super().loglikelihood_rolling, requests, TOKEN_BUDGET)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> Responses:
        """Return generated texts."""
        with replaced(self.model, "generate", partial(generate, self.model)):
            return self._answer(super().generate_until, requests, GENERATION_BUDGET)

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the logits [B, T, V] of a text."""
        logits_BTV: torch.Tensor = super()._model_call(*args, **kwargs)
        return logits_BTV[:, virtual_logits(self.model) :]

    def _answer(self, ask: Ask, requests: Sequence[Instance], budgets: dict[str, int]) -> Responses:
        """Answer requests in batches; those of one question stay together, since many differ only at the end.

        If any is sampled, every process answers all of them: a sample depends on the others in its batch.
        """
        budget, lengths = budget_for(self.where, budgets), {id(one): self._count_tokens(one) for one in requests}
        sampled = any(isinstance(one.args[-1], dict) and one.args[-1].get("do_sample") for one in requests)

        def answer(questions: Sequence[list[Instance]]) -> list[Responses]:
            flat = list(chain.from_iterable(questions))
            sizes = [min(lengths[id(one)], self.max_length) for one in flat]

            def work(batch: list[int]) -> Responses:
                self.batch_size_per_gpu = batch_size(sizes[batch[0]], budget)
                return ask([flat[i] for i in batch])

            answers = iter(run_in_batches(sizes, budget, work, self.advance))
            return [[next(answers) for _ in question] for question in questions]

        questions = [list(group) for _, group in groupby(requests, key=lambda one: (one.task_name, one.doc_id))]
        return list(chain.from_iterable(over_processes(self.model, questions, answer, divide=not sampled)))

    def _count_tokens(self, request: Instance) -> int:
        """Return how many positions a request takes, and count a truncated one; lm-eval reads texts in windows."""
        text, *rest = request.args
        if not rest:
            return len(self.tok_encode(text))
        if isinstance(rest[0], str):
            length = len(self.tok_encode(text + rest[0])) - 1
        else:
            length = len(self.tok_encode(text)) + normalize_gen_kwargs(rest[0], self.max_gen_toks)["max_gen_toks"]
        self.truncated += length > self.max_length
        return length
