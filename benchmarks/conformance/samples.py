"""Policy gradients of the answers that a tool sampled, in plain torch.

An adapter returns each sampled answer with its row and its tokens. The reference rewards them itself, and computes the
gradient of the first step, at which the ratio of probabilities is one: advantage times log-probability, summed over
tokens, over a divisor that the loss names.

- `dr_grpo`: answers times the longest possible answer, https://arxiv.org/abs/2503.20783
- `grpo`: answers, after each is divided by its own tokens, https://arxiv.org/abs/2402.03300
- `dapo`: tokens of the step, https://arxiv.org/abs/2503.14476
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev
from typing import Any

import torch
from conformance.case import Finding, Result
from conformance.conversations import qwen
from conformance.reference import TOLERANCE, Reference, Weights, distance
from conformance.reward import score

LOSSES = "dr_grpo", "grpo", "dapo"
SCALES = {"advantages": False, "advantages over the group's deviation": True}
"""Name -> whether advantages are divided by the standard deviation of their group."""
EPSILON = 1e-4
"""Added to the standard deviation by all tools."""
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
"""What a job states unless its case is about something else: the model's own distribution."""
END, OTHER_END = "<|im_end|>", "<|endoftext|>"
SYSTEM = "You are brief."


@dataclass(frozen=True)
class Sample:
    """A sampled answer as the adapter returned it."""

    row: int
    ids: Sequence[int]


def prompt(question: str, constant: float = 0.0, per_letter: float = 0.1) -> dict[str, Any]:
    """Return a row that ends with a question, and the prices of its reward."""
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return {"messages": turns, "constant": constant, "per_letter": per_letter}


class SampledStep:
    """The answers of one step, with the losses of their tokens under the reference model."""

    def __init__(self, reference: Reference, rows: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> None:
        self.reference, self.rows, self.samples = reference, rows, samples
        self.losses = [
            torch.nn.functional.cross_entropy(
                self.logits(one)[1], torch.tensor(one.ids, dtype=torch.long), reduction="none"
            )
            for one in samples
        ]
        self.used = {one.row for one in samples}
        self.lengths = [len(sample.ids) for sample in samples]

    def logits(self, sample: Sample) -> tuple[list[int], torch.Tensor]:
        """Return the tokens of an answer's prompt, and the logits of each token of the answer."""
        question = self.rows[sample.row]["messages"][-1]["content"]
        text = [*qwen(("system", SYSTEM), ("user", question)), *qwen(("assistant", ""))[:2]]
        before, _ = self.reference.encode(text)
        logits = self.reference.model(torch.tensor([[*before, *sample.ids]])).logits[0, len(before) - 1 : -1]
        return before, logits

    def rewards(self) -> list[float]:
        decode = self.reference.tokenizer.decode
        return [score(self.rows[one.row], decode(one.ids, skip_special_tokens=True)) for one in self.samples]

    def advantages(self, scaled: bool) -> list[float]:
        """Return the advantage of each answer; equal rewards give zero."""
        rewards = self.rewards()
        groups = {row: [r for r, one in zip(rewards, self.samples, strict=True) if one.row == row] for row in self.used}
        scales = {row: stdev(group) + EPSILON if scaled else 1.0 for row, group in groups.items()}
        means = {row: fmean(group) if len({*group}) > 1 else group[0] for row, group in groups.items()}
        pairs = zip(rewards, self.samples, strict=True)
        return [(reward - means[one.row]) / scales[one.row] for reward, one in pairs]

    def gradient(
        self,
        loss: str,
        advantages: Sequence[float],
        longest: int,
        learned: Sequence[int] | None = None,
        counted: Sequence[int] | None = None,
        answers: int | None = None,
    ) -> Weights:
        """Return the gradient of a step.

        Args:
            loss: the name of the divisor.
            advantages: one for each answer.
            longest: tokens of the longest possible answer.
            learned: how many tokens of each answer are learned; default: all.
            counted: how many tokens of each answer are in the divisor of `dapo`; default: those that are learned.
            answers: how many answers are in the divisor of the other losses; default: all.
        """
        learned = self.lengths if learned is None else learned
        count = len(self.samples) if answers is None else answers
        divisors: Mapping[str, Sequence[int]] = {
            "dr_grpo": [count * longest] * len(learned),
            "grpo": [count * max(tokens, 1) for tokens in learned],
            "dapo": [sum(learned if counted is None else counted)] * len(learned),
        }
        parts = zip(self.losses, advantages, learned, divisors[loss], strict=True)
        total = sum(weight * losses[:tokens].sum() / divisor for losses, weight, tokens, divisor in parts)
        return self.reference.differentiate(total, again=True)

    def ways(self, losses: Sequence[str] = LOSSES) -> Iterator[tuple[str, str, list[float]]]:
        """Yield the name of each way to learn, its loss, and its advantages."""
        for loss, (name, scaled) in product(losses, SCALES.items()):
            yield f"{loss}, {name}", loss, self.advantages(scaled)


def read_samples(result: Result) -> list[Sample]:
    """Return the sampled answers of a result, in the order of their steps."""
    return [Sample(one["row"], one["ids"]) for one in result.found["samples"]]


def check_samples(reference: Reference, result: Result, ends: Sequence[str]) -> Finding | None:
    """Return a finding if an answer goes on after an end token, or is longer than allowed, or has another reward."""
    stops = reference.tokenizer.convert_tokens_to_ids(list(ends))
    samples, longest = read_samples(result), result.job["extra"]["max_new_tokens"]
    if late := sum(any(token in stops for token in one.ids[:-1]) for one in samples):
        return Finding("silently wrong", f"answers continue after an end token: {late} of {len(samples)}")
    if any(len(one.ids) > longest for one in samples):
        return Finding("unexplained", f"answers of more than {longest} tokens")
    expected = SampledStep(reference, result.job["rows"], samples).rewards()
    given = [one["reward"] for one in result.found["samples"]]
    other = [pair for pair in zip(given, expected, strict=True) if abs(pair[0] - pair[1]) > 1e-6]
    return Finding("unexplained", f"rewards differ: {other[:3]}") if other else None


def name_step(
    reference: Reference, result: Result, right: Mapping[str, Weights], wrong: Mapping[str, Weights]
) -> Finding:
    """Compare the step that a job took with gradients, and name the first that fits."""
    assert result.model is not None, "a job that is done has a model"
    step, project = reference.step_taken(result.model, result.job["learning_rate"])
    far = {name: distance(step, project(gradient)) for name, gradient in {**right, **wrong}.items()}
    nearest = min(far[name] for name in right)
    learned = next((name for name, apart in far.items() if apart < TOLERANCE), None)
    if learned is None:
        return Finding("unexplained", "none of the known results", nearest)
    return Finding("right" if learned in right else "silently wrong", learned, nearest)


def join_findings(findings: Mapping[str, Finding]) -> Finding:
    """Return the finding on jobs: the verdict of the first that is not right, and what all such jobs learned."""
    worst = {name: one for name, one in findings.items() if one.verdict != "right"}
    if not worst:
        return max(findings.values(), key=lambda one: one.distance or 0.0)
    first = next(iter(worst.values()))
    learned = "; ".join(f"{name}: {one.learned}" for name, one in worst.items())
    return Finding(first.verdict, learned, first.distance)
