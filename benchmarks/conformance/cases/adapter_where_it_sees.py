"""A LoRA of a tune with pictures is in the vision tower only if asked."""

from conformance.case import Case
from conformance.pictures import REFUSED, row
from conformance.shipped import judge_tower_of_adapter

CASE = Case(
    title="A tune with pictures puts no adapter in the vision tower unasked",
    group="what is computed",
    question="A row with a picture; the tool chooses the modules of the adapter. Are they in the language model only?",
    threads=["https://github.com/haotian-liu/LLaVA/issues/1647", "https://github.com/hiyouga/LlamaFactory/issues/5996"],
    rows=[row(("user", "<image>Which colour is it?"), ("assistant", "Blue."), images=["sky.png"])],
    settings={"model": "gemma3", "kind": "pictures", "method": "lora"},
    reason=REFUSED,
    judge=judge_tower_of_adapter,
)
