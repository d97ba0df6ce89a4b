"""A small chat run up to evaluation: rows, examples, and a model before and after it has learned the test rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.data.collators import collate_padded
from llmtune.data.examples import ExampleReader, encode_rows
from llmtune.data.preparation import prepare_rows
from llmtune.evaluate.evaluator import evaluate
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe import Recipe, load_recipe
from llmtune.tasks.registry import get_task

RECIPE = """
recipe_version: 1
name: colours
task: chat
data: {{train: {rows}, test: 0.4, validation: 0, deduplicate: exact}}
model: {{name: {model}, dtype: float32}}
generation: {{max_new_tokens: 6}}
"""


@dataclass
class Bench:
    """What evaluate needs, and the order in which it enters the models."""

    recipe: Recipe
    rows: Any
    examples: Any
    processor: Any
    load: Callable[[], Any]
    console: Any
    entered: list[str]

    @property
    def task(self):
        return get_task(self.recipe.task)

    @property
    def reader(self):
        return ExampleReader(self.examples, "test")

    def model(self, name: str):
        @contextmanager
        def enter():
            self.entered.append(name)
            model = self.load()
            if name == "tuned":
                self.teach(model)
            yield model
            self.entered.append(f"{name} left")

        return enter

    def teach(self, model, steps: int = 80):
        """Learn the test rows by heart: a gain that evaluation has to see."""
        batch = collate_padded(list(self.reader), self.processor.pad_token_id)
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            loss = self.task.loss(model, batch, False)
            (loss.sum / loss.count).backward()
            optimizer.step()
            optimizer.zero_grad()

    def evaluate(self, folder: Path | None = None, **settings):
        recipe = self.recipe.model_copy(
            update={"evaluate": self.recipe.evaluate.model_copy(update=settings)} if settings else {}
        )
        models = {"tuned": self.model("tuned"), "base": self.model("base")}
        return evaluate(
            models,
            self.processor,
            self.rows,
            self.examples,
            self.task,
            recipe,
            self.console,
            device="cpu",
            folder=folder,
        )


@pytest.fixture
def make_bench(tmp_path, tiny_llama, chat_rows, console):
    def make(text: str = RECIPE, rows: list[dict] | None = None, model: Path = tiny_llama, **data) -> Bench:
        if rows is not None:
            chat_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = tmp_path / "recipe.yaml"
        file.write_text(text.format(rows=chat_rows, model=model))
        recipe = load_recipe(str(file)).recipe
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
        for name in ("rows", "examples"):
            (tmp_path / name).mkdir(exist_ok=True)
        prepared = prepare_rows(recipe, tmp_path / "rows", console)
        place = resolve_model(str(recipe.model.name), recipe.model, console, True)
        processor = load_processor(place, recipe.model)
        task = get_task(recipe.task)
        examples = encode_rows(prepared, task, processor, recipe, tmp_path / "examples", console)

        def load():
            return load_model(place, recipe, task, processor, device="cpu", training=False).model

        return Bench(recipe, prepared, examples, processor, load, console, [])

    return make


@pytest.fixture
def bench(make_bench) -> Bench:
    return make_bench()
