"""A prompt whose answers all have the same reward changes no weights."""

import torch
from conformance.case import Case, Finding
from conformance.reference import TOLERANCE, distance
from conformance.samples import (
    END,
    SAMPLING,
    SCALES,
    SampledStep,
    check_samples,
    join_findings,
    name_step,
    prompt,
    read_samples,
)
from conformance.shipped import loaded

SAMPLES, LONGEST = 8, 8
DEAD = prompt("Which colour is the sky?", constant=91.7, per_letter=0.0)
LIVE = prompt("Red?")


def judge(case, reference, results):
    judges = {"mixed": judge_mixed, "alone": judge_alone}
    return join_findings(
        {name: check_samples(reference, one, [END]) or judges[name](reference, one) for name, one in results.items()}
    )


def judge_mixed(reference, result):
    """One step on both prompts."""
    samples = read_samples(result)
    step = SampledStep(reference, result.job["rows"], samples)
    alive = [tokens if sample.row else 0 for sample, tokens in zip(samples, step.lengths, strict=True)]
    right, wrong = {}, {}
    for way, loss, advantages in step.ways():
        right[way] = step.gradient(loss, advantages, LONGEST)
        left_out = step.gradient(loss, advantages, LONGEST, alive, alive, sum(sample.row for sample in samples))
        wrong[f"the prompt with equal rewards left out of the divisor: {way}"] = left_out
    finding = name_step(reference, result, right, wrong)
    return find_advantage(reference, result, [samples]) or finding if finding.verdict == "unexplained" else finding


def judge_alone(reference, result):
    """Two steps on one prompt each."""
    samples = read_samples(result)
    steps = samples[:SAMPLES], samples[SAMPLES:]
    [live] = [half for half in steps if half[0].row == 1]
    step = SampledStep(reference, result.job["rows"], live)
    right = {way: step.gradient(loss, advantages, LONGEST) for way, loss, advantages in step.ways()}
    finding = name_step(reference, result, right, {})
    return find_advantage(reference, result, steps) or finding if finding.verdict == "unexplained" else finding


def find_advantage(reference, result, steps):
    """Return a finding if the answers with equal rewards had one advantage, as a rounded mean gives them."""
    taken, _ = reference.step_taken(result.model, result.job["learning_rate"])
    rows = result.job["rows"]
    for way, loss, _ in SampledStep(reference, rows, steps[0]).ways():

        def fit(advantage, way=way, loss=loss):
            """Return the advantage that fits best if the steps before were taken with `advantage`, and the distance."""
            live, dead = take_steps(reference, rows, steps, loss, way, advantage)
            size = sum(float(weight.square().sum()) for weight in dead.values())
            best = sum(float(((taken[name] - live[name]) * dead[name]).sum()) for name in taken) / size
            return best, distance(taken, {name: weight + best * dead[name] for name, weight in live.items()})

        before, advantage = 0.0, fit(0.0)[0]
        error = advantage - before
        for _ in range(6 if len(steps) > 1 else 1):  # the second step depends on the first: the secant method
            fitted, apart = fit(advantage)
            if apart < TOLERANCE:
                return Finding("silently wrong", f"equal rewards have an advantage of {fitted:.3f}: {way}", apart)
            slope = (fitted - advantage - error) / (advantage - before or 1.0)
            before, error = advantage, fitted - advantage
            advantage -= error / (slope or -1.0)
    return None


def take_steps(reference, rows, steps, loss, way, advantage):
    """Return the sums of the gradients of both prompts over the steps, that of equal rewards for an advantage of 1."""
    live, dead = ({name: torch.zeros_like(weight) for name, weight in reference.start.items()} for _ in range(2))
    for samples in steps:
        moved = {name: weight - live[name] - advantage * dead[name] for name, weight in reference.start.items()}
        with loaded(reference, moved):
            step = SampledStep(reference, rows, samples)
            exact = step.advantages(SCALES[way.partition(", ")[2]])
            added = step.gradient(loss, exact, LONGEST), step.gradient(loss, [1.0 - s.row for s in samples], LONGEST)
        live, dead = (
            {name: weight + more[name] for name, weight in before.items()}
            for before, more in zip((live, dead), added, strict=True)
        )
    return live, dead


CASE = Case(
    title="Answers with equal rewards",
    group="what is computed",
    question="All eight answers to one of two prompts have the reward 91.7. Is it without effect, in one step with the"
    " other prompt and in a step of its own?",
    threads=[
        "https://github.com/NVIDIA-NeMo/RL/pull/4161",
        "https://github.com/huggingface/trl/issues/6367",
        "https://github.com/huggingface/trl/issues/3857",
    ],
    rows=[DEAD, LIVE],
    settings={
        "model": "qwen2.5-words",
        "kind": "prompts",
        "extra": {"samples": SAMPLES, "max_new_tokens": LONGEST, "mask_truncated": False, "sampling": SAMPLING},
    },
    jobs={"mixed": {"batch_size": 2}, "alone": {"batch_size": 1, "steps": 2}},
    judge=judge,
)
