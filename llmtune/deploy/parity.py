"""Whether two models say the same: logits, first choices and greedy answers on the same prompts, held against limits.

Shapes: T positions of a prompt and its answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig

from llmtune.data.chat_template import clean
from llmtune.evaluate.generation import answer_ends, generate_batch, only_these_settings
from llmtune.records import Row
from llmtune.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
    "List three things to pack for a walk in the rain.",
    "Translate into German: The train leaves at nine o'clock.",
    "12 apples cost 6 euros. How much do 30 apples cost?",
    "Summarize: The committee met on Tuesday, talked for three hours and decided nothing.",
    "Once upon a time there was a small town by the sea, and",
)
CONTEXT = "Paris is the capital of France. The train to Berlin leaves at nine o'clock, and 30 apples cost 15 euros."
"""What the fixed prompts are asked about, where a task finds answers in a text."""
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Trace:
    """What one model said to one prompt, with its logits [T, V] over prompt and answer, on the CPU in float32."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True)
class Parity:
    """How far one model is from another; kl in nats a position."""

    prompts: int
    positions: int
    largest_logit_difference: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    """Share of positions where both have the same first choice."""
    answer_agreement: float
    """Share of prompts with the same greedy answer."""
    same_ids: bool
    """Whether the saved tokenizer and template make the same token ids."""
    effect_kl: float | None
    """How far tuning had moved the model from its base on the same positions; None where that cannot be told."""


@dataclass(frozen=True)
class Distance:
    """How far two models are from each other: by position the KL in nats and whether the first choice is the same."""

    kls: torch.Tensor
    agreed: torch.Tensor
    largest: float
    """The largest difference of a logit."""

    def as_parity(self, *, prompts: int, answer_agreement: float, same_ids: bool, effect: float | None) -> Parity:
        """Put it together with what else was compared."""
        return Parity(
            prompts=prompts,
            positions=len(self.kls),
            **self.as_numbers(),
            answer_agreement=answer_agreement,
            same_ids=same_ids,
            effect_kl=effect,
        )

    def as_numbers(self) -> dict[str, float]:
        """Return means and extremes, by their names in a certificate."""
        return {
            "largest_logit_difference": self.largest,
            "kl_mean": float(self.kls.mean()),
            "kl_max": float(self.kls.max()),
            "top1_agreement": float(self.agreed.float().mean()),
        }


@dataclass(frozen=True)
class Limits:
    """What is admitted: a mean KL of a share of what tuning did, but at least `kl_floor` and at most `kl_cap`.

    With `noise`, at most half of what tuning did in any case, or so much: else a product of a gentle tuning could pass
    that has lost its adapter.
    """

    kl_floor: float
    kl_cap: float
    top1: float
    logit_difference: float | None = None
    noise: float | None = None

    def kl(self, effect: float | None) -> float:
        """The limit of `kl_mean` for a tuning that moved the model by `effect`."""
        admitted = max(self.kl_floor, min(self.kl_cap, EFFECT_SHARE * (effect or 0.0)))
        if effect is None or self.noise is None:
            return admitted
        return min(admitted, max(self.noise, effect / 2))


EFFECT_SHARE = 0.05
"""A merge may undo so much of what tuning did."""
LIMITS = {
    "exact": Limits(kl_floor=1e-5, kl_cap=1e-4, top1=0.99, logit_difference=0.05),
    "rounded": Limits(kl_floor=1e-2, kl_cap=2e-2, top1=0.9, noise=5e-3),
    "other base": Limits(kl_floor=2e-2, kl_cap=1e-1, top1=0.85),
}
"""exact: float32 throughout. rounded: 16 bits on one side, which alone moves SmolLM2 in bfloat16 by 3e-3 to 5e-3. other
base: a 4-bit adapter on the original weights."""


def render_prompts(
    task: AnyTask, processor: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Row] = ()
) -> list[list[int]]:
    """Return the ids of `PROMPTS`, and of `rows` without their answers, as the task makes them."""
    return [task.prompt_ids(row, processor, recipe) for row in list_questions(task, rows)]


def serve_prompts(task: AnyTask, folder: Path, recipe: Recipe, rows: Sequence[Row] = ()) -> list[list[int]]:
    """Return the same ids as a server makes them that knows the saved folder alone, by `apply_chat_template`."""
    trust = recipe.model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust)
    if not task.is_conversational or not tokenizer.chat_template:
        return render_prompts(task, tokenizer, recipe, rows)  # who asks such a model writes its prompt himself
    texts = [
        tokenizer.apply_chat_template(
            clean(row["messages"]),
            tools=row.get("tools"),
            add_generation_prompt=True,
            tokenize=False,
            **recipe.model.chat_template_kwargs,
        )
        for row in list_questions(task, rows)
    ]
    return [cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def list_questions(task: AnyTask, rows: Sequence[Row]) -> list[Row]:
    """Return `PROMPTS` as rows of the task, and `rows` without their answers."""
    fixed = [task.make_row({"prompt": text, "context": CONTEXT}) for text in PROMPTS]
    return [*fixed, *(task.split_answer(row)[0] for row in rows)]


def trace_answers(
    model: PreTrainedModel, processor: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> list[Trace]:
    """Let `model` answer each prompt greedily; keep answers and logits."""
    traces = []
    for prompt in prompts:
        answer = answer_greedily(model, processor, prompt)
        traces.append(Trace(tuple(prompt), tuple(answer), logits_over(model, [*prompt, *answer])))
    return traces


def answer_greedily(model: PreTrainedModel, processor: PreTrainedTokenizerBase, prompt: Sequence[int]) -> list[int]:
    """Return the first `ANSWER_TOKENS` ids of the greedy answer."""
    stops = answer_ends(model, processor)
    settings = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=stops or None, pad_token_id=processor.pad_token_id
    )
    with only_these_settings(model):
        return generate_batch(model, [prompt], settings, str(model.device))[0]


@torch.no_grad()
def logits_over(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits [T, V] of every position, on the CPU in float32."""
    logits_BTV = cast(Any, model)(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits
    return cast(torch.Tensor, logits_BTV[0].float().cpu())


def measure_effect(model: torch.nn.Module, traces: Sequence[Trace]) -> float | None:
    """Return the mean KL from the tuned model to its own base; None if there is no adapter that can be switched off."""
    if not isinstance(model, PeftModel) or any(config.bias != "none" for config in model.peft_config.values()):
        return None  # trained biases stay when adapters are switched off
    with model.disable_adapter():
        kls = [divergence(t.logits, logits_over(cast(Any, model), [*t.prompt, *t.answer])) for t in traces]
    return float(torch.cat(kls).mean())


def divergence(wanted_TV: torch.Tensor, got_TV: torch.Tensor) -> torch.Tensor:
    """Return KL(wanted || got) of each position, in nats [T]."""
    wanted_TV, got_TV = wanted_TV.log_softmax(-1), got_TV.log_softmax(-1)
    return (wanted_TV.exp() * (wanted_TV - got_TV)).sum(-1).clamp_min(0)


def measure_distance(traces: Sequence[Trace], model: PreTrainedModel) -> Distance:
    """Hold what `model` predicts over the same prompts and answers against what the other one did."""
    pairs = [(trace.logits, logits_over(model, [*trace.prompt, *trace.answer])) for trace in traces]
    return Distance(
        kls=torch.cat([divergence(wanted_TV, got_TV) for wanted_TV, got_TV in pairs]),
        agreed=torch.cat([wanted_TV.argmax(-1) == got_TV.argmax(-1) for wanted_TV, got_TV in pairs]),
        largest=max(float((wanted_TV - got_TV).abs().max()) for wanted_TV, got_TV in pairs),
    )


def measure_parity(
    traces: Sequence[Trace],
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase,
    made: Sequence[Sequence[list[int]]],
    effect: float | None,
) -> Parity:
    """Hold `model`, and the prompts `made` with its own tokenizer in one way and another, against the other model."""
    same = [answer_greedily(model, processor, trace.prompt) == list(trace.answer) for trace in traces]
    return measure_distance(traces, model).as_parity(
        prompts=len(traces),
        answer_agreement=sum(same) / len(same),
        same_ids=all(prompts == [list(trace.prompt) for trace in traces] for prompts in made),
        effect=effect,
    )


def find_breaches(parity: Parity, limits: Limits) -> list[str]:
    """Say, in words, which limits are broken."""
    breaches = []
    if not parity.same_ids:
        breaches.append("the saved tokenizer and chat template make other token ids")
    kl = limits.kl(parity.effect_kl)
    if not parity.kl_mean <= kl:  # NaN is a breach
        breaches.append(f"mean KL is {parity.kl_mean:.2g} nats a position, and at most {kl:.2g} is admitted")
    if not parity.top1_agreement >= limits.top1:
        said = f"the first choice agrees at {parity.top1_agreement:.1%} of positions"
        breaches.append(f"{said}, and at least {limits.top1:.0%} is wanted")
    highest = limits.logit_difference
    if highest is not None and not parity.largest_logit_difference <= highest:
        said = f"the largest logit difference is {parity.largest_logit_difference:.2g}"
        breaches.append(f"{said}, and at most {highest:.2g} is admitted")
    return breaches
