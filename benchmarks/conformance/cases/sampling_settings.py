"""Answers are sampled with the stated settings, not with those of the model's generation_config."""

from itertools import combinations

import torch
from conformance.case import Case, Finding
from conformance.models import SETTINGS
from conformance.samples import END, SAMPLING, SampledStep, check_samples, prompt, read_samples

LONGEST, LIMIT = 8, 4.5
MARGIN = 3.0
"""Settings fit as well if their log-likelihood is less than this below the greatest."""
PICKY = {name: value for name, value in SETTINGS["picky"].items() if name in SAMPLING}


def judge(case, reference, results):
    """Name the settings with the greatest likelihood, the fewest of the model's if several fit; all tokens must fit."""
    [result] = results.values()
    if finding := check_samples(reference, result, [END]):
        return finding
    step = SampledStep(reference, result.job["rows"], read_samples(result))
    sizes = range(len(PICKY) + 1)
    with torch.no_grad():
        tokens = list(read_tokens(step))
        fits = {
            names: measure(tokens, SAMPLING | {name: PICKY[name] for name in names})
            for size in sizes
            for names in combinations(PICKY, size)
        }
    best = max(likelihood for likelihood, _ in fits.values())
    names, far = next((names, far) for names, (likelihood, far) in fits.items() if likelihood >= best - MARGIN)
    if not abs(far) < LIMIT:
        return Finding("unexplained", "another distribution")
    learned = f"{', '.join(names)} of the model" if names else f"surprise {far:+.1f} standard deviations from expected"
    return Finding("silently wrong" if names else "right", learned)


def read_tokens(step):
    """Yield each sampled token, the tokens before it, and its logits."""
    for sample in step.samples:
        before, logits = step.logits(sample)
        for place, token in enumerate(sample.ids):
            yield token, [*before, *sample.ids[:place]], logits[place].double()


def measure(tokens, settings):
    """Return the log-likelihood of tokens, and how far it is from its expectation, in standard deviations."""
    likelihood = total = variance = 0.0
    for token, before, logits in tokens:
        log_p = warp(logits, before, settings).log_softmax(-1)
        surprise = -log_p[log_p > -torch.inf]
        entropy = (surprise * (-surprise).exp()).sum()
        likelihood += float(log_p[token])
        total += float(-log_p[token] - entropy)
        variance += float(((surprise - entropy).square() * (-surprise).exp()).sum())
    return likelihood, total / max(variance, 1e-9) ** 0.5


def warp(logits, before, settings):
    """Apply the settings in the order of transformers."""
    seen = torch.tensor(sorted({*before}))
    logits = logits.clone()
    penalty = settings["repetition_penalty"]
    logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    logits = logits / settings["temperature"]
    if settings["top_k"]:
        logits[logits < logits.topk(settings["top_k"]).values[-1]] = -torch.inf
    if settings["top_p"] < 1:
        ordered, places = logits.sort(descending=True)
        unlikely = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1) >= settings["top_p"]
        logits[places[unlikely]] = -torch.inf
    return logits


CASE = Case(
    title="Stated sampling settings",
    group="what is computed",
    question="The model's `generation_config` sets temperature, top_k, top_p and repetition_penalty. The job states"
    " others: 1, 0 (all tokens), 1 and 1. Which ones are used to sample?",
    threads=["https://github.com/huggingface/trl/issues/5783"],
    rows=[prompt("Which colour is the sky?"), prompt("Red?")],
    settings={
        "model": "qwen2.5-words-picky",
        "kind": "prompts",
        "batch_size": 2,
        "extra": {"samples": 16, "max_new_tokens": LONGEST, "sampling": SAMPLING},
    },
    judge=judge,
)
