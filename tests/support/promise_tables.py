"""The tables of docs/promises.md: their places, all of them, and the promises that each place makes or refuses."""

from llmtune.recipe.peft_options import REFUSED_METHODS, peft_methods
from llmtune.recipe.task_facts import DECISIONS, TASK_FACTS
from support.task_cases import PLACES

EXPORTS = ("GGUF", "ONNX", "ONNX int8", "quantized")
TASK = ("loss and gradient", "answers and scores", "resume", "two processes", "plain library", "merged", *EXPORTS)
METHOD = ("loss and gradient", "answers", "resume", "two processes", "opens in PEFT", "merged")
AFTER = ("served", "reproduce", "verify")
"""Promises that hold for any finished run."""
METHODS = sorted({*peft_methods(), "qlora", "full"} - {*REFUSED_METHODS})
METRICS = {metric for facts in TASK_FACTS.values() for metric in facts.metrics} | {*sum(DECISIONS.values(), ())}
METRICS |= {"own (bool)", "own (share)", "own (number)", "judge.win_rate"}
FOLDERS = ["chat", "completion", "encoder-decoder", "classes", "tags", "spans", "whisper", "ctc", "vectors", "pairs"]
FAULTS = ("adapter dropped", "adapter halved", "labels swapped", "tokenizer", "template", "end token")
FAULTS += ("template of later turns", "positions", "network")
FAULTS += ("sampling settings", "length", "truncation side", "pooling", "prompt", "normalisation", "activation")
FAULTS += ("temperature", "threshold", "problem type", "audio features", "language")
TABLES: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "rows": ("Rows, by task", [*TASK_FACTS], ("leakage", "leakage by a word", "contrast pairs")),
    "task": ("Task variants", PLACES, (*TASK, *AFTER)),
    "method": ("PEFT methods", METHODS, (*METHOD, *AFTER)),
    "metric": ("Metrics", sorted(METRICS), ("referee", "own interval", "paired interval", "gates")),
    "folder": ("Merged folders, by planted fault", FOLDERS, (*FAULTS, "without a fault")),
}
"""Table -> title, places, promises."""
