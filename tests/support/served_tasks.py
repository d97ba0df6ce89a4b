"""Runs of the tasks whose answer is no conversation, on tiny models and a few rows."""

from pathlib import Path
from typing import Any

from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest
from support.adapting import quiet
from support.audio import write_tone
from support.families import build_bert, build_t5, build_whisper
from support.models import build_llama
from support.rows import write_jsonl
from support.runs import write_recipe

COLOURS = ("red", "green", "blue")


def tones(folder: Path) -> list[dict[str, Any]]:
    return [
        {"audio": str(write_tone(folder / f"{i}.wav", 0.3 + i / 50, pitch_hz=200 + 40 * i)), "text": f"number {i}"}
        for i in range(12)
    ]


def entities(i: int) -> dict[str, Any]:
    return {"tokens": ["the", COLOURS[i % 3], "cat", str(i)], "tags": ["O", "B-COLOUR", "O", "O"]}


def about(i: int) -> dict[str, Any]:
    said = f"The cat number {i} is {COLOURS[i % 3]}."
    return {
        "question": f"Which colour has cat {i}?",
        "context": said,
        "answers": [{"text": COLOURS[i % 3], "answer_start": said.index(COLOURS[i % 3])}],
    }


TASKS: dict[str, Any] = {
    "classify": (build_bert, [{"text": f"{COLOURS[i % 3]} cat {i}", "label": COLOURS[i % 3]} for i in range(30)]),
    "token-classify": (build_bert, [entities(i) for i in range(30)]),
    "qa": (build_bert, [about(i) for i in range(30)]),
    "translate": (build_t5, [{"source": f"number {i} is red", "target": "blue"} for i in range(24)]),
    "summarize": (build_llama, [{"document": f"number {i} is red", "summary": "blue"} for i in range(24)]),
    "speech": (build_whisper, tones),
}


def finish(task: str, folder: Path) -> Path:
    """Train a model of `task`; returns the run folder."""
    build, rows = TASKS[task]
    rows = rows(folder) if callable(rows) else rows
    path = write_jsonl(folder / "rows.jsonl", rows)
    sections: dict[str, Any] = {"task": task}
    if task not in ("translate", "summarize", "speech"):
        sections["generation"] = {"max_new_tokens": None}
    if task == "qa":
        sections["qa"] = {"stride": 32}
    if task == "speech":
        sections["speech"] = {"language": "en"}
    return finish_with(folder, build(folder / "model"), path, **sections)


def finish_with(folder: Path, model: Path, rows: Path, **sections: Any) -> Path:
    """Train for one epoch; returns the run folder."""
    folder.mkdir(exist_ok=True)
    quick = {"train": {"num_train_epochs": 1}, "evaluate": {"metrics": ["loss"]}}
    recipe = write_recipe(folder / "tiny.yaml", model, rows, **quick, **sections)
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=folder / "run"), quiet())
    return folder / "run"
