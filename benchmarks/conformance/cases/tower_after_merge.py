"""A merged text tune has the vision tower of its base."""

from conformance.case import Case
from conformance.conversations import row
from conformance.shipped import judge_tower_of_merged

CASE = Case(
    title="The vision tower of a merged text tune",
    group="what ships",
    question="Gemma 3 is tuned on text and merged. Does the folder have every tensor of the base's vision tower and "
    "projector, equal in each value?",
    threads=[
        "https://github.com/unslothai/unsloth/issues/1436",
        "https://github.com/huggingface/transformers/pull/45953",
    ],
    rows=[row(("user", "Which colour is the sky?"), ("assistant", "Blue."))],
    settings={"model": "gemma3", "method": "lora", "ask": {"merged": True}},
    reason=r"vision.{0,60}\b(drop|remov|ignor|skip|not)\w*",
    judge=judge_tower_of_merged,
)
