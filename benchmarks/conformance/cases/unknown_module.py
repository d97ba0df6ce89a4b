"""A LoRA for modules that the model lacks is refused."""

from conformance.case import Case, Finding
from conformance.conversations import row

CASE = Case(
    title="An adapter for modules that do not exist",
    group="what is computed",
    question="The target modules are those of another architecture: is the run refused?",
    threads=["https://github.com/huggingface/peft/issues/3533", "https://github.com/huggingface/peft/issues/1206"],
    rows=[row(("user", "Which colour is the sky?"), ("assistant", "Blue."))],
    settings={"method": "lora", "extra": {"lora": {"target_modules": ["query_key_value"]}}},
    reason=r"target.?modules.{0,80}not found|query_key_value\b.{0,60}\b(not?|unknown|missing)\b",
    judge=lambda case, reference, results: Finding("silently wrong", "trained without the module"),
)
