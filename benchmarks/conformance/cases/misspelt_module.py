"""A misspelt module next to a right one is refused, not ignored."""

from conformance.case import Case, Finding
from conformance.conversations import row
from conformance.reference import read_weights


def judge(case, reference, results):
    [result] = results.values()
    saved = {name.split(".lora_B")[0].rpartition(".")[2] for name in read_weights(result.model) if ".lora_B" in name}
    return Finding("silently wrong", f"the misspelt module is ignored; the adapter has {', '.join(sorted(saved))}")


CASE = Case(
    title="One misspelt module of two",
    group="what is computed",
    question="`target_modules: [q_proj, vproj]`: is the misspelt name reported, or does the adapter silently get one "
    "module?",
    threads=["https://github.com/huggingface/peft/issues/1959", "https://github.com/huggingface/peft/pull/3603"],
    rows=[row(("user", "Which colour is the sky?"), ("assistant", "Blue."))],
    settings={"method": "lora", "extra": {"lora": {"target_modules": ["q_proj", "vproj"]}}},
    reason=r"vproj\b.{0,60}\b(not?|unknown|missing)\b|\b(not found|unknown|missing)\b.{0,60}vproj",
    judge=judge,
)
