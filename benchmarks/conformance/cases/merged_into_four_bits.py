"""A merged QLoRA keeps what was learned."""

from pathlib import Path

from conformance.case import Case, Finding
from conformance.cases.evaluation_loss import TESTED, TRAINED
from conformance.conversations import row
from conformance.reference import distance, read_weights
from conformance.shipped import tuned_weights


def judge(case, reference, results):
    [result] = results.values()
    tuned = tuned_weights(reference, result.model)
    merged = read_weights(Path(result.found["merged"]))
    names = [name for name in reference.start if name.endswith("proj.weight")]
    if any(name not in merged or merged[name].shape != reference.start[name].shape for name in names):
        return Finding("silently wrong", "the merged weights are packed in 4 bits, which rounds away the step")
    far = distance({name: merged[name].float() for name in names}, {name: tuned[name] for name in names})
    if far < 1e-3:
        return Finding("right", "added to the full-precision weights", far)
    base = {name: merged[name].float() - (tuned[name] - reference.start[name]) for name in names}
    if all(count_levels(weight) <= 16 for weight in base.values()):
        return Finding("right", "added to the weights that were trained on, as 4 bits hold them", far)
    if all(count_levels(merged[name].float()) <= 16 for name in names):
        return Finding("silently wrong", "rounded to 4 bits after the merge", far)
    return Finding("silently wrong", "neither the base nor its 4-bit form plus the step", far)


def count_levels(weight):
    """Return the number of different values in the first block of 64, of which 4 bits allow 16."""
    return len((weight.flatten()[:64] / weight.flatten()[:64].abs().max()).mul(1e4).round().unique())


CASE = Case(
    title="A merged QLoRA",
    group="what ships",
    question="The adapter of a 4-bit base, merged by the tool's own command: is the step added in full precision, or "
    "lost by rounding to 4 bits again?",
    threads=[
        "https://github.com/huggingface/transformers/issues/31293",
        "https://github.com/huggingface/peft/issues/2321",
    ],
    rows=[row(*TRAINED)],
    settings={"test_rows": [row(*TESTED)], "method": "qlora", "learning_rate": 0.01, "ask": {"merged": True}},
    reason=r"merg\w*\b.{0,60}(4.?bit|quantiz)|(4.?bit|quantiz).{0,60}\bmerg|rounding error",
    judge=judge,
)
