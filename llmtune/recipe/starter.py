"""Text of a recipe to start from."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.errors import RecipeError, nearest
from llmtune.recipe.task_facts import TASK_FACTS


@dataclass(frozen=True)
class Start:
    """What a new recipe for one task begins with."""

    rows: str
    """A row, as it may stand in the file."""
    model: str
    gates: str
    metrics: str
    section: str = ""
    """Lines of the task's own section."""
    max_length: int = 1024
    max_new_tokens: int | None = 128
    """None where nothing is generated."""
    learning_rate: str = "2e-4"
    train: str = "data/train.jsonl"


STARTS = {
    "chat": Start(
        rows='{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        metrics="[loss, exact_match, rougeL]",
        gates='["rougeL.low > base"]',
    ),
    "completion": Start(
        rows='{"prompt": "...", "completion": "..."} or {"text": "..."}',
        model="HuggingFaceTB/SmolLM2-135M",
        metrics="[loss, perplexity, bits_per_byte]",
        gates='["loss < base"]',
    ),
    "translate": Start(
        rows='{"source": "...", "target": "..."}',
        model="facebook/nllb-200-distilled-600M",
        metrics="[loss, bleu, chrf]",
        gates='["chrf.low > base"]',
        section="translate:\n"
        "  source_language: eng_Latn  # SET: the model's own code; for a decoder a word, such as English\n"
        "  target_language: deu_Latn  # SET: likewise\n",
        max_length=256,
    ),
    "summarize": Start(
        rows='{"document": "...", "summary": "..."}',
        model="facebook/bart-base",
        metrics="[loss, rouge1, rouge2, rougeLsum, length_ratio]",
        gates='["rougeLsum.low > base"]',
    ),
    "qa": Start(
        rows='{"question": "...", "context": "...", "answers": {"text": ["..."], "answer_start": [17]}}',
        model="deepset/tinyroberta-squad2",
        metrics="[exact_match, f1]",
        gates='["f1.low > base"]',
        section="qa:\n  style: auto  # SET: extractive points at the answer (encoders), generative writes it\n",
        max_length=384,
        max_new_tokens=None,
    ),
    "classify": Start(
        rows='{"text": "...", "label": "..."}',
        model="answerdotai/ModernBERT-base",
        metrics="[loss, accuracy, f1_macro]",
        gates='["accuracy.low > base"]',
        section="classify:\n  kind: single  # SET: single (one label a row), multi (any number) or regression\n",
        max_length=256,
        max_new_tokens=None,
    ),
    "token-classify": Start(
        rows='{"tokens": ["Ada", "lives", "here"], "tags": ["B-PERSON", "O", "O"]}',
        model="answerdotai/ModernBERT-base",
        metrics="[loss, f1, precision, recall]",
        gates='["f1.low > base"]',
        max_length=256,
        max_new_tokens=None,
    ),
    "speech": Start(
        rows="file_name,text in a metadata.csv beside the recordings",
        model="openai/whisper-small",
        metrics="[loss, wer, cer]",
        gates='["wer.high < base"]',
        section="speech:\n"
        "  language: en  # SET: what is spoken; remove it for a model of one language\n"
        "  normalizer: basic  # SET: none, basic or whisper: what is done to texts before they are compared\n",
        max_length=440,
        learning_rate="1e-3",
        train="data/recordings",
    ),
    "preference": Start(
        rows='{"prompt": "...", "chosen": "...", "rejected": "..."}',
        model="Qwen/Qwen3-0.6B",
        metrics="[loss, accuracy, margin, kl]",
        gates='["accuracy.low > base"]',
        section="preference:\n  loss: dpo  # SET: dpo, ipo, orpo (pairs), kto (thumbs) or reward (scores)\n",
        max_new_tokens=None,
        learning_rate="5e-5",
    ),
}

TEMPLATE = """\
# {summary}: set the lines marked SET, then `llmtune recipes check FILE` and `llmtune run FILE`.
# An editor helps with the keys after `llmtune recipes schema > recipe.schema.json` and this line:
# yaml-language-server: $schema=recipe.schema.json
recipe_version: 1
name: my-{task}  # SET: names the run and its folder
task: {task}
seed: 42
data:
  train: {train}  # SET: your rows, e.g. {rows}
  validation: 0.05  # share of the rows, or a file
  test: 0.1  # share of the rows, or a file; never seen in training
  max_length: {max_length}  # SET: longest row in tokens
model:
  name: {model}  # SET: a folder, or a model on the hub
{section}adapter:
  method: lora  # lora, qlora (4-bit base, less memory) or full
  r: 16
  lora_alpha: 32
train:
  learning_rate: {learning_rate}
  num_train_epochs: 1
  batch_size: 16  # rows in one optimiser step
{generation}evaluate:
  metrics: {metrics}
  gates: []  # SET, once you know what is good enough: e.g. {gates}
"""


def new_recipe(task: str) -> str:
    """Return a recipe for `task` that passes the check as it is, with `SET` where a person has to decide.

    Raises RecipeError if there is no such task.
    """
    if task not in TASK_FACTS:
        tasks = ", ".join(TASK_FACTS)
        raise RecipeError.of(
            f"there is no task '{task}'", "--task", f"{nearest(task, list(TASK_FACTS))} Tasks: {tasks}.".strip()
        )
    summary, start = TASK_FACTS[task].summary, STARTS[task]
    generation = f"generation:\n  max_new_tokens: {start.max_new_tokens}  # SET: longest answer in tokens\n"
    return TEMPLATE.format(
        task=task,
        summary=f"{summary[0].upper()}{summary[1:]}",
        rows=start.rows,
        train=start.train,
        model=start.model,
        section=start.section,
        max_length=start.max_length,
        learning_rate=start.learning_rate,
        generation="" if start.max_new_tokens is None else generation,
        metrics=start.metrics,
        gates=start.gates,
    )
