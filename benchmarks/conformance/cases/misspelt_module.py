"""A misspelt module next to a right one is refused, not ignored."""

from conformance.case import Case, Finding
from conformance.conversations import row

CASE = Case(
    title="One misspelt module of two",
    group="what is computed",
    question="`target_modules: [q_proj, vproj]`: is the misspelt name reported, or does the adapter silently get one "
    "module?",
    threads=["https://github.com/huggingface/peft/issues/1959", "https://github.com/huggingface/peft/pull/3603"],
    rows=[row(("user", "Which colour is the sky?"), ("assistant", "Blue."))],
    settings={"method": "lora", "extra": {"lora": {"target_modules": ["q_proj", "vproj"]}}},
    reason="vproj.*|not found",
    judge=lambda case, reference, results: Finding("silently wrong", "the misspelt module is ignored"),
)
