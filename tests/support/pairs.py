"""Rows of translations, summaries and preferences, and complete runs on them in this process."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from llmtune.adapter.data_init import sample_rows
from llmtune.adapter.injection import inject
from llmtune.data.examples import load_examples
from llmtune.data.row_store import load_rows
from llmtune.model.config import read_model_config
from llmtune.model.resolve import resolve_model
from llmtune.pipeline import run_pipeline
from llmtune.recipe.adapter_section import DATA_STARTS
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel, Examples
from llmtune.store.processes import rank, world_size
from llmtune.store.run_request import RunRequest
from llmtune.tasks.base import AnyTask
from llmtune.tasks.registry import choose_variant, get_task
from llmtune.train.accumulation import step_gradients, validation_loss
from llmtune.train.distributed import join_processes
from llmtune.train.setup import TrainContext, set_up
from llmtune.train.sharding import share_model
from support.adapting import open_model, quiet
from support.audio import write_tone
from support.families import build_bert, build_t5, build_whisper
from support.models import build_llama
from support.rows import write_jsonl
from support.runs import write_recipe

COLOURS = {"red": "rouge", "green": "vert", "blue": "bleu", "black": "noir", "white": "blanc"}
THINGS = {"sky": "ciel", "fox": "renard", "cat": "chat", "dog": "chien", "house": "maison", "river": "fleuve"}
PAIRS = [
    {"source": f"The {thing} is {colour}.", "target": f"{there} {tint}"}
    for thing, there in THINGS.items()
    for colour, tint in COLOURS.items()
]
DOCUMENTS = [
    {"document": f"{pair['source']} Nobody else is here. We have seen it twice.", "summary": pair["target"]}
    for pair in PAIRS
]
_TOLD = [
    (thing, colour) for thing in ["cat", "dog", "bird", "fish", "fox", "house", "river", "stone"] for colour in COLOURS
]
LIKED = [
    {"prompt": f"{i}. Which colour has the {t}?", "chosen": f"The {t} is {c}.", "rejected": f"one two {c}"}
    for i, (t, c) in enumerate(_TOLD)
]
THUMBS = [
    {"prompt": row["prompt"], "completion": row["rejected" if i % 3 == 0 else "chosen"], "label": i % 3 != 0}
    for i, row in enumerate(LIKED)
]
LANGUAGES = {
    "nllb": {"source_language": "eng_Latn", "target_language": "fra_Latn"},
    "mbart": {"source_language": "en_XX", "target_language": "fr_XX"},
}


def recipe_of(folder: Path, model: Path, rows: Iterable[object], task: str, /, **sections: Any) -> Path:
    """Write rows and a recipe for them into `folder`, with the metrics of the task."""
    folder.mkdir(parents=True, exist_ok=True)
    file = write_jsonl(folder / "rows.jsonl", rows)
    if sections.get("adapter", {}).get("method") == "full":
        sections["adapter"] = {"r": None, "lora_alpha": None, **sections["adapter"]}
    sections = {"evaluate": {"metrics": None}, **sections}
    return write_recipe(folder / "recipe.yaml", model, file, task=task, **sections)


def run_recipe(folder: Path, *about: Any, **sections: Any) -> dict[str, Any]:
    """Run all steps of `recipe_of` in `folder / run`; returns the report."""
    recipe = recipe_of(folder, *about, **sections)
    return run_pipeline(load_recipe(str(recipe)), RunRequest(out=folder / "run"), quiet())


def prepare_training(path: Path, folder: Path, sharded: bool = False) -> tuple[AdaptedModel, Examples, AnyTask, Recipe]:
    """Encode the rows of a recipe, and load its model with an adapter on the CPU, as the pipeline would."""
    loaded = load_recipe(str(path))
    run_pipeline(loaded, RunRequest(out=folder, until="prepare"), quiet())
    rows = load_rows(folder / "data" / "rows")
    recipe = get_task(loaded.recipe.task).infer_section(loaded.recipe, rows)
    place = resolve_model(str(recipe.model.name), recipe.model, quiet(), True)
    config = read_model_config(place, recipe.model)
    task = choose_variant(recipe, config, place.name)
    recipe = task.infer_labels(recipe, rows, config)

    examples = load_examples(folder / "data" / "examples")

    def make() -> AdaptedModel:
        selected, starts = open_model(recipe), recipe.adapter.init_lora_weights in DATA_STARTS
        return inject(selected, recipe, quiet(), sample_rows(examples, task, selected, recipe) if starts else None)

    if sharded:
        join_processes("cpu")
    return share_model(make) if sharded else make(), examples, task, recipe


def start_training(path: Path, folder: Path) -> TrainContext:
    """Set up a training on the examples of a recipe, as the pipeline would, before its first step."""
    return set_up(*prepare_training(path, folder), folder, quiet(), "inputs")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, gathered if it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def learn_a_little(path: Path, sharded: bool = False, mode: bool = False) -> list[list[float]]:
    """Take three steps and validate; return losses, gradient norms, and how far the weights moved.

    In training `mode` there are dropout, noise and recomputed activations.
    The first process leaves the trained weights in `weights-N.pt`, with N processes.
    """
    folder = path.parent / f"prepared-by-{world_size()}"
    sharded = sharded and world_size() > 1
    training = set_up(*prepare_training(path, folder, sharded), folder, quiet(), "inputs", sharded)
    before = [whole(weight) for weight in training.parameters]
    training.model.train(mode)
    numbers = []
    for step in (1, 2, 3):
        found = step_gradients(training, step, 100, 1.0)
        numbers.append([found.mean, found.grad_norm])
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
    after = [whole(weight) for weight in training.parameters]  # all processes gather
    moved = [now - then for now, then in zip(after, before, strict=True)]
    if rank() == 0:
        torch.save(after, path.parent / f"weights-{world_size()}.pt")
    total = sum(float(part.double().square().sum()) for part in moved)
    validation = validation_loss(training, 100) if training.validation is not None else 0.0
    return [*numbers, [float(validation or 0.0), total**0.5]]


def gradient(training: TrainContext, budget: int) -> tuple[float, torch.Tensor]:
    """Return the loss of the first step and its gradient, with micro-batches of `budget` tokens.

    Sinusoidal positions (Marian) have no gradient before transformers 5.24, though they are parameters.
    """
    training.optimizer.zero_grad(set_to_none=True)
    found = step_gradients(training, 1, budget, 1.0)
    return found.mean, torch.cat([p.grad.flatten() for p in training.parameters if p.grad is not None])


LABELS = ("red", "green", "blue")


def tones(folder: Path) -> list[dict[str, Any]]:
    return [
        {"audio": str(write_tone(folder / f"{i}.wav", 0.3 + i / 50, pitch_hz=200 + 40 * i)), "text": f"number {i}"}
        for i in range(12)
    ]


def entities(i: int) -> dict[str, Any]:
    return {"tokens": ["the", LABELS[i % 3], "cat", str(i)], "tags": ["O", "B-COLOUR", "O", "O"]}


def about(i: int) -> dict[str, Any]:
    said = f"The cat number {i} is {LABELS[i % 3]}."
    return {
        "question": f"Which colour has cat {i}?",
        "context": said,
        "answers": [{"text": LABELS[i % 3], "answer_start": said.index(LABELS[i % 3])}],
    }


TASKS: dict[str, Any] = {
    "classify": (build_bert, [{"text": f"{LABELS[i % 3]} cat {i}", "label": LABELS[i % 3]} for i in range(30)]),
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
