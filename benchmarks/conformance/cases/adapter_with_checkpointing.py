"""Gradient checkpointing does not cut a LoRA off from its gradient."""

from conformance.case import Case
from conformance.cases.accumulation import ROWS
from conformance.conversations import ALL, learns, qwen, row

CASE = Case(
    title="An adapter with gradient checkpointing",
    group="what is computed",
    question="The embeddings are frozen and activations are recomputed: do all layers of the adapter still get a "
    "gradient?",
    threads=[
        "https://github.com/locuslab/open-unlearning/issues/178",
        "https://github.com/huggingface/peft/issues/1142",
    ],
    rows=[row(*turns) for turns in ROWS],
    settings={"method": "lora", "batch_size": 4, "extra": {"gradient_checkpointing": True}},
    reason="requires_grad|no gradient",
    right=learns(qwen, ROWS, ALL),
    wrong={"nothing is trained": lambda reference: {name: 0 * weight for name, weight in reference.start.items()}},
)
