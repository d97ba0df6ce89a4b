"""A small chat run up to evaluation: rows, examples, and a model before and after it has learned the test rows."""

import io
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.benchmark_tasks import write_tasks
from support.learning import learn_by_heart
from support.runs import write_colours

from llmtune.data.examples import ExampleReader, encode_rows
from llmtune.data.preparation import prepare_rows
from llmtune.evaluate import intervals
from llmtune.evaluate.eval_inputs import EvalContext, make_inputs
from llmtune.evaluate.evaluator import ModelLoaders
from llmtune.evaluate.scoring import ScoreRequest, score_run
from llmtune.evaluate.text_metrics import METRICS
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.report.terminal import print_scored
from llmtune.tasks.registry import get_task

RECIPE = """
recipe_version: 1
name: colours
task: chat
data: {{train: {rows}, test: 0.4, validation: 0, deduplicate: exact}}
model: {{name: {model}, dtype: float32}}
generation: {{max_new_tokens: 6}}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with tasks of lm-eval."""
    write_tasks(tmp_path)
    return tmp_path


@dataclass
class Bench:
    """Evaluation inputs, and the order in which evaluation enters the models."""

    recipe: Recipe
    rows: Any
    examples: Any
    processor: Any
    load: Callable[[], Any]
    console: Any
    entered: list[str] = field(default_factory=list)
    steps: int = 80
    """Training options for the tuned model."""

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

    def teach(self, model):
        """Memorize the test rows: a gain that evaluation must detect."""
        learn_by_heart(model, list(self.reader), self.task, self.processor.pad_token_id, self.steps)

    def evaluate(self, folder: Path | None = None, **settings):
        recipe = self.recipe.model_copy(
            update={"evaluate": self.recipe.evaluate.model_copy(update=settings)} if settings else {}
        )
        has_rows = self.examples.counts.get("test")
        inputs = make_inputs(self.rows, self.examples, self.task, self.processor, recipe) if has_rows else None
        context = EvalContext(recipe, self.task, self.processor, inputs, "cpu", self.console, folder)
        scored = score_run(ScoreRequest(ModelLoaders(self.model("base"), self.model("tuned")), context, self.rows))
        print_scored(scored, recipe, self.console)
        return scored.evaluation


def build_bench(folder: Path, rows: Path, model: Path, text: str = RECIPE, **data) -> Bench:
    console = Console(file=io.StringIO(), width=120)
    file = folder / "recipe.yaml"
    file.write_text(text.format(rows=rows, model=model))
    recipe = load_recipe(str(file)).recipe
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
    for name in ("rows", "examples"):
        (folder / name).mkdir(exist_ok=True)
    prepared = prepare_rows(recipe, folder / "rows", console)
    place = resolve_model(str(recipe.model.name), recipe.model, console, True)
    processor = load_processor(place, recipe.model)
    task = get_task(recipe.task)
    examples = encode_rows(prepared, task, processor, recipe, folder / "examples", console)

    def load():
        return load_model(place, recipe, task, processor, device="cpu", training=False).model

    return Bench(recipe, prepared, examples, processor, load, console)


@pytest.fixture(scope="session")
def build():
    """Build a bench on any rows and any model."""
    return build_bench


@pytest.fixture
def make_bench(tmp_path, tiny_llama, chat_rows):
    def make(text: str = RECIPE, rows: list[dict] | None = None, **data) -> Bench:
        if rows is not None:
            chat_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return build_bench(tmp_path, chat_rows, tiny_llama, text, **data)

    return make


@pytest.fixture(scope="session")
def colours(tmp_path_factory, tiny_llama) -> Bench:
    """The rows and examples of the plain bench; tests do not change them."""
    folder = tmp_path_factory.mktemp("colours")
    return build_bench(folder, write_colours(folder / "chat.jsonl"), tiny_llama)


@pytest.fixture
def bench(colours, console) -> Bench:
    return replace(colours, console=console, entered=[])


@pytest.fixture(scope="session")
def measured(colours, tmp_path_factory):
    """Every metric of the plain bench: the bench, the results, and the folder of the predictions."""
    folder = tmp_path_factory.mktemp("measured")
    bench = replace(colours, entered=[])
    return bench, bench.evaluate(folder, metrics=METRICS, gates=("loss < base",)), folder


@pytest.fixture
def drawn_once(monkeypatch):
    """Reuse the weights in each trial to save time: rows are new in each, so trials stay independent."""
    draw = intervals.draw_weights
    again = cache(lambda units, total, seed, resamples: list(draw(units, total, 0, resamples)))
    monkeypatch.setattr(intervals, "draw_weights", again)
