"""A sampled answer ends at each of the model's end tokens, and that token is learned."""

from conformance.case import Case, Finding
from conformance.samples import END, OTHER_END, SAMPLING, SampledStep, check_samples, name_step, prompt, read_samples

LONGEST = 12


def judge(case, reference, results):
    [result] = results.values()
    if finding := check_samples(reference, result, [END, OTHER_END]):
        return finding
    end, other = reference.tokenizer.convert_tokens_to_ids([END, OTHER_END])
    samples = read_samples(result)
    step = SampledStep(reference, result.job["rows"], samples)
    last = [sample.ids[-1] if sample.ids else None for sample in samples]
    endless = [token not in (end, other) and len(s.ids) < LONGEST for s, token in zip(samples, last, strict=True)]
    if not any(endless) and not {end, other} <= {*last}:
        return Finding("unexplained", "no answer ended with one of the end tokens")
    cut = [token not in (end, other) and len(s.ids) == LONGEST for s, token in zip(samples, last, strict=True)]
    lengths = [0 if is_cut else tokens for is_cut, tokens in zip(cut, step.lengths, strict=True)]
    other_masked = [0 if token == other else tokens for token, tokens in zip(last, lengths, strict=True)]
    other_unlearned = [tokens - (token == other) for token, tokens in zip(last, lengths, strict=True)]
    right, wrong = {}, {}
    for way, loss, advantages in step.ways():
        right[way] = step.gradient(loss, advantages, LONGEST, lengths)
        wrong[f"answers with the other end token masked: {way}"] = step.gradient(
            loss, advantages, LONGEST, other_masked
        )
        wrong[f"the other end token not learned: {way}"] = step.gradient(loss, advantages, LONGEST, other_unlearned)
    finding = name_step(reference, result, right, wrong)
    if finding.verdict == "right" and any(endless):
        learned = f"the sampled end token is not learned in {sum(endless)} of {len(samples)} answers"
        return Finding("silently wrong", f"{learned}: {finding.learned}", finding.distance)
    return finding


CASE = Case(
    title="Several end tokens",
    group="what is computed",
    question="The model's `generation_config` has two end tokens, as that of Qwen has. Do sampled answers end at both,"
    " and is the end token that was sampled learned? Truncated answers are masked.",
    threads=["https://github.com/huggingface/trl/pull/7039"],
    rows=[prompt("Which colour is the sky?"), prompt("Red?")],
    settings={
        "model": "qwen2.5-words-ends",
        "kind": "prompts",
        "batch_size": 2,
        "extra": {"samples": 8, "max_new_tokens": LONGEST, "mask_truncated": True, "sampling": SAMPLING},
    },
    judge=judge,
)
