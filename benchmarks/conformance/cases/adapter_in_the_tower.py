"""A LoRA of a text tune has no matrices in the part of the model that sees."""

from conformance.case import Case
from conformance.conversations import row
from conformance.shipped import judge_tower_of_adapter

CASE = Case(
    title="A text tune puts no adapter in the vision tower",
    group="what is computed",
    question="Gemma 3 reads text and pictures. The rows are text, the target modules q_proj and v_proj, names that the "
    "vision tower has too. Is the adapter in the language model only?",
    threads=["https://github.com/haotian-liu/LLaVA/issues/1647", "https://github.com/huggingface/peft/issues/2250"],
    rows=[row(("user", "Which colour is the sky?"), ("assistant", "Blue."))],
    settings={"model": "gemma3", "method": "lora", "extra": {"lora": {"target_modules": ["q_proj", "v_proj"]}}},
    reason=r"adapter\b.{0,80}\bvision_?tower|vision_?tower\b.{0,80}\b(exclude|not tuned)",
    judge=judge_tower_of_adapter,
)
