"""A LoRA takes the step that its matrices and its scale say, on every linear layer."""

from conformance.case import Case
from conformance.cases.accumulation import ROWS
from conformance.conversations import ALL, learns, qwen, row

CASE = Case(
    title="An adapter that is wired and saved",
    group="what is computed",
    question="One step of SGD on a LoRA: has each saved matrix B the gradient that the full model's gradient, A and "
    "the scale give?",
    threads=[
        "https://github.com/huggingface/transformers/pull/34068",
        "https://github.com/vllm-project/vllm/issues/55193",
    ],
    rows=[row(*turns) for turns in ROWS],
    settings={"method": "lora", "batch_size": 4},
    right=learns(qwen, ROWS, ALL),
    wrong={"nothing is trained": lambda reference: {name: 0 * weight for name, weight in reference.start.items()}},
)
