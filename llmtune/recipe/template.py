"""Text of a recipe to start from."""

from __future__ import annotations

from llmtune.errors import RecipeError, nearest
from llmtune.recipe.tasks import AVAILABLE, TASK_FACTS

ROWS = {
    "chat": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "completion": '{"prompt": "...", "completion": "..."} or {"text": "..."}',
}
MODELS = {"chat": "HuggingFaceTB/SmolLM2-135M-Instruct", "completion": "HuggingFaceTB/SmolLM2-135M"}
METRICS = {"chat": "[loss, exact_match, rougeL]", "completion": "[loss, perplexity, bits_per_byte]"}
GATES = {"chat": '["rougeL.low > base"]', "completion": '["loss < base"]'}

TEMPLATE = """\
# {summary}: set the lines marked SET, then `llmtune recipes check FILE` and `llmtune run FILE`.
# An editor helps with the keys after `llmtune recipes schema > recipe.schema.json` and this line:
# yaml-language-server: $schema=recipe.schema.json
recipe_version: 1
name: my-{task}  # SET: names the run and its folder
task: {task}
seed: 42
data:
  train: data/train.jsonl  # SET: your rows, e.g. {rows}
  validation: 0.05  # share of the rows, or a file
  test: 0.1  # share of the rows, or a file; never seen in training
  max_length: 1024  # SET: longest row in tokens
model:
  name: {model}  # SET: a folder, or a model on the hub
adapter:
  method: lora  # lora, qlora (4-bit base, less memory) or full
  r: 16
  lora_alpha: 32
train:
  learning_rate: 2e-4
  num_train_epochs: 1
  batch_size: 16  # rows in one optimiser step
generation:
  max_new_tokens: 128  # SET: longest answer in tokens
evaluate:
  metrics: {metrics}
  gates: []  # SET, once you know what is good enough: e.g. {gates}
"""


def new_recipe(task: str) -> str:
    """Return a recipe for `task` that passes the check as it is, with `SET` where a person has to decide.

    Raises RecipeError if there is no such task, or not yet.
    """
    tasks = ", ".join(AVAILABLE)
    if task not in TASK_FACTS:
        raise RecipeError.of(
            f"there is no task '{task}'", "--task", f"{nearest(task, AVAILABLE)} Tasks: {tasks}.".strip()
        )
    if task not in AVAILABLE:
        raise RecipeError.of(
            f"the task '{task}' comes with a later release", "--task", f"Tasks of this release: {tasks}."
        )
    summary = TASK_FACTS[task].summary
    return TEMPLATE.format(
        task=task,
        summary=f"{summary[0].upper()}{summary[1:]}",
        rows=ROWS[task],
        model=MODELS[task],
        metrics=METRICS[task],
        gates=GATES[task],
    )
