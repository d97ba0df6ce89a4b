"""Truncated answers are masked, and the sum of the losses is divided as the loss says."""

from conformance.case import Case, Finding
from conformance.samples import (
    END,
    LOSSES,
    SAMPLING,
    SampledStep,
    check_samples,
    join_findings,
    name_step,
    prompt,
    read_samples,
)

LONGEST = 4


def judge(case, reference, results):
    finding = join_findings(
        {name: check_samples(reference, one, [END]) or judge_loss(reference, one) for name, one in results.items()}
    )
    seen = any(any(ends_at_the_limit(reference, result)) for result in results.values())
    if finding.verdict == "right" and not seen:
        return Finding("unexplained", "no answer ends at the longest length")
    return finding


def ends_at_the_limit(reference, result):
    """Return whether each answer is as long as answers may be, and has its end token."""
    end = reference.tokenizer.convert_tokens_to_ids(END)
    return [len(sample.ids) == LONGEST and sample.ids[-1] == end for sample in read_samples(result)]


def judge_loss(reference, result):
    samples = read_samples(result)
    step = SampledStep(reference, result.job["rows"], samples)
    long = [tokens == LONGEST for tokens in step.lengths]
    ended = ends_at_the_limit(reference, result)
    cut = [is_long and not has_end for is_long, has_end in zip(long, ended, strict=True)]
    if not any(cut) or all(cut):
        return Finding("unexplained", "no truncated answer, or no other")
    masks = {"": cut, "answers that end at the longest length masked": long}
    right, wrong = {}, {}
    for way, loss, advantages in step.ways([result.job["extra"]["loss"]]):
        wrong[f"truncated answers learned: {way}"] = step.gradient(loss, advantages, LONGEST)
        for name, mask in masks.items():
            kept = [0 if masked else tokens for masked, tokens in zip(mask, step.lengths, strict=True)]
            usual = step.gradient(loss, advantages, LONGEST, kept)
            if loss == "dapo":
                divided = "truncated answers in the divisor"
                other = step.gradient(loss, advantages, LONGEST, kept, step.lengths)
            else:
                divided = "truncated answers left out of the divisor"
                other = step.gradient(loss, advantages, LONGEST, kept, answers=len(mask) - sum(mask))
            (wrong if name else right)[f"{name}: {way}" if name else way] = usual
            wrong[", ".join(filter(None, (divided, name))) + f": {way}"] = other
    return name_step(reference, result, right, wrong)


CASE = Case(
    title="Truncated answers in the divisor",
    group="what is computed",
    question="Truncated answers are masked. Are they, and only they, left out of the sum of losses? Is the sum divided"
    " as each loss says: `dapo` by the trained tokens, `grpo` by all answers, `dr_grpo` by all answers times the"
    " longest possible?",
    threads=["https://github.com/huggingface/trl/issues/6369"],
    rows=[prompt("Which colour is the sky?"), prompt("Red?")],
    settings={"model": "qwen2.5-words", "kind": "prompts", "batch_size": 2},
    jobs={
        loss: {
            "seed": seed,
            "extra": {
                "samples": 16,
                "max_new_tokens": LONGEST,
                "mask_truncated": True,
                "loss": loss,
                "sampling": SAMPLING,
            },
        }
        for seed, loss in enumerate(LOSSES, start=7)
    },
    judge=judge,
)
