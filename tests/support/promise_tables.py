"""The four tables of docs/promises.md: their places, all of them, and the promises that each place makes or refuses."""

from support.task_cases import PLACES

TASK = (
    "loss and gradient",
    "answers and scores",
    "resume",
    "two processes",
    "plain library",
    "merged",
    "GGUF",
    "ONNX",
    "ONNX int8",
    "quantized",
    "served",
    "reproduce",
    "verify",
)
TABLES: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "task": ("Task variants", PLACES, TASK),
}
"""Table -> title, places, promises."""
