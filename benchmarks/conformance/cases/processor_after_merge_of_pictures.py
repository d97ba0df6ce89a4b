"""A merged tune with pictures reads pictures as its base does."""

from conformance.case import Case
from conformance.pictures import REFUSED, row
from conformance.shipped import judge_processor

CASE = Case(
    title="The processor of a merged tune with pictures",
    group="what ships",
    question="A model is tuned on a row with a picture and merged by the tool's own command. Does AutoProcessor open "
    "the folder, and read a picture as the base's does?",
    threads=[
        "https://github.com/2U1/Llama3.2-Vision-Finetune/issues/5",
        "https://github.com/NVIDIA-NeMo/Automodel/issues/3256",
    ],
    rows=[row(("user", "<image>Which colour is it?"), ("assistant", "Blue."), images=["sky.png"])],
    settings={"model": "gemma3", "kind": "pictures", "method": "lora", "ask": {"merged": True, "processor": True}},
    reason=REFUSED,
    judge=judge_processor,
)
