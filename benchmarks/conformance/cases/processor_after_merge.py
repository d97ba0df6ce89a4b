"""A merged text tune of a model that sees still reads pictures as its base does."""

from conformance.case import Case
from conformance.conversations import row
from conformance.shipped import judge_processor

CASE = Case(
    title="The processor of a merged text tune",
    group="what ships",
    question="Gemma 3 is tuned on text and merged by the tool's own command. Does AutoProcessor open the folder, and "
    "read a picture as the base's does?",
    threads=[
        "https://github.com/unslothai/unsloth/issues/4671",
        "https://github.com/NVIDIA-NeMo/Automodel/issues/3256",
    ],
    added="2026-12-01",
    failed="the folder had no processor_config.json: a picture became 256 tokens instead of 16",
    passed="2026-12-01, commit baf6398ecc8f",
    rows=[row(("user", "Which colour is the sky?"), ("assistant", "Blue."))],
    settings={"model": "gemma3", "method": "lora", "ask": {"merged": True, "processor": True}},
    reason=r"processor.{0,60}\b(not|no|missing|without)\b",
    judge=judge_processor,
)
