"""The base of all `llmtune explain` commands: opens a run or model, and turns results into a page."""

from __future__ import annotations

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from markupsafe import Markup
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.display.blocks import Html, Page, Section
from llmtune.errors import LlmtuneError
from llmtune.model.audio_models import SoundWindow
from llmtune.model.config import is_encoder, read_model_config
from llmtune.model.device import pick_device
from llmtune.model.loading import load_plain
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.model.towers import drop_towers, image_text_class
from llmtune.plan import open_finished
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import DEFAULT_TASK, TASK_FACTS
from llmtune.report.render_html import write_page
from llmtune.run_models import Models
from llmtune.store.atomic_files import explained
from llmtune.store.run_folder import MANIFEST
from llmtune.tasks.base import AnyTask
from llmtune.tasks.registry import VARIANTS, get_task

Family = Literal["encoder", "decoder", "encoder-decoder"]
MODEL, BASE, TUNED = "model", "base", "tuned"


@dataclass(frozen=True)
class Target:
    """A run or a model; opening one of its models reads the weights."""

    name: str
    """The argument: a run folder, a model folder, a hub name, or `builtin:NAME`."""
    family: Family
    config: PretrainedConfig
    """The configuration of the model, or of a run's base."""
    processor: PreTrainedTokenizerBase
    models: tuple[str, ...]
    """("base", "tuned") for a run, else ("model",)."""
    open_model: Callable[[str], AbstractContextManager[PreTrainedModel]]
    """Loads one of `models` in eval mode with eager attention. They share weights, so open each once, in this order,
    and close it before you open the next."""
    folder: Path
    """Default folder for pages."""
    recipe: Recipe | None = None
    """The run's resolved recipe; None for a model."""
    task: AnyTask | None = None
    """The run's task, in the variant that its model supports; for a model, only if it reads pictures."""

    @property
    def short_name(self) -> str:
        """The name for headings; for a run, its folder's name."""
        return Path(self.name).name if self.recipe else self.name

    @property
    def is_whisper(self) -> bool:
        """Whether the model transcribes speech with an encoder and a decoder."""
        return bool(self.config.model_type == "whisper")

    @property
    def takes_images(self) -> bool:
        """Whether prompts may have pictures."""
        return self.task is not None and self.task.model_kind.takes_images

    @property
    def takes_audio(self) -> bool:
        """Whether the model reads sound."""
        return self.is_whisper or hasattr(self.config, "conv_kernel")

    def default_recipe(self, *, chat: bool = True) -> Recipe:
        """Return a default recipe for a plain model, with the task that encodes its input."""
        task = "completion"
        if self.takes_audio:
            task = next(name for name, facts in TASK_FACTS.items() if facts.takes_audio)
        elif self.family == "encoder-decoder":
            task = next(name for name, facts in TASK_FACTS.items() if self.family in facts.models)
        elif self.family == "decoder" and self.processor.chat_template and chat:
            task = DEFAULT_TASK
        stated: dict[str, object] = {"recipe_version": 1, "name": "model", "task": task, "data": {"train": "none"}}
        stated |= {"chat": {"images": True}} if self.takes_images else {}
        return Recipe.model_validate({**stated, "model": {"name": self.name}})

    def first_window(self, audio: Path | None, recipe: Recipe) -> SoundWindow:
        """Return the first window of a recording, as `Task.first_window` does."""
        return get_task(recipe.task).first_window(Path(str(audio)), self.processor, recipe)


def open_target(
    name: str, console: Console, *, offline: bool = False, trust_remote_code: bool = False, images: bool = False
) -> Target:
    """Open a run folder, or a model: a folder, a hub name, `builtin:NAME`. Weights are not read yet.

    With `images`, a model that reads pictures keeps its towers; without, texts are read without them.

    Numbers are float32 whatever the recipe says, to avoid rounding. Attention is eager, to make its weights
    readable.

    Raises:
        RecipeError: `name` is neither a run nor a model, or the run was not trained.
        EnvironmentProblem: the model is missing, changed or incomplete.
    """
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        return _open_run(path, console, offline)
    settings = ModelSection(name=name, trust_remote_code=trust_remote_code)
    with _without_recipe(name):
        model_ref = resolve_model(name, settings, console, offline)
    config, device = read_model_config(model_ref, settings), pick_device()
    images = images and image_text_class(config) is not None

    @contextmanager
    def open_model(model: str) -> Iterator[PreTrainedModel]:
        assert model == MODEL
        loaded = load_plain(model_ref, config, settings, dtype=torch.float32, device=device)
        if not images:
            drop_towers(loaded)
        yield loaded

    return Target(
        name=name,
        family=family_of(config),
        config=config,
        processor=load_processor(model_ref, settings),
        models=(MODEL,),
        open_model=open_model,
        folder=Path("explain") / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or MODEL),
        task=next(task for task in VARIANTS[DEFAULT_TASK] if task.model_kind.takes_images) if images else None,
    )


@contextmanager
def _without_recipe(name: str) -> Iterator[None]:
    """Rewrite errors that name recipe keys: here the model is an argument, without a recipe."""
    try:
        yield
    except LlmtuneError as error:
        problems = []
        for problem in error.problems:
            fix = (problem.fix or "").replace("set model.trust_remote_code: true", "give --trust-remote-code")
            fix = fix.replace(", or set model.use_safetensors: false if you trust where they come from", "")
            where = name if problem.where == "model.name" else problem.where
            problems.append(replace(problem, where=where, fix=fix or None))
        raise type(error)(*problems) from error


def _open_run(path: Path, console: Console, offline: bool) -> Target:
    context = open_finished(path, console, offline)
    recipe = context.plan.recipe
    model = recipe.model.model_copy(update={"attn_implementation": "eager", "dtype": "float32"})
    data = recipe.data.model_copy(update={"packing": False})
    context.resolved = replace(context.plan, recipe=recipe.model_copy(update={"model": model, "data": data}))
    plan, models = context.plan, Models(context)

    @contextmanager
    def open_model(name: str) -> Iterator[PreTrainedModel]:
        with {BASE: models.base, TUNED: models.tuned}[name]() as model:
            yield model

    config = read_model_config(plan.model_ref, plan.recipe.model)
    return Target(
        name=str(path),
        family=family_of(config),
        config=config,
        processor=plan.processor,
        models=(BASE, TUNED),
        open_model=open_model,
        folder=path / "explain",
        recipe=plan.recipe,
        task=plan.task,
    )


def family_of(config: PretrainedConfig) -> Family:
    """Return whether a model is an encoder, a decoder or both."""
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    return "encoder" if is_encoder(config) or config.model_type in {"wav2vec2", "hubert"} else "decoder"


# From inputs to a page

PAGE_STYLE = """
p { overflow-wrap: anywhere; } th.number { white-space: normal; }
.heatmap td, .heatmap th { white-space: nowrap; overflow-wrap: normal; vertical-align: middle; }
.figure { background: #fff; border-radius: 8px; overflow-x: auto; }
.figure img { display: block; max-width: max(100%, 620px); }
.many table:not(.stacked) { min-width: 620px; }
"""
"""CSS for pages: figures keep a white background in dark mode; on phones, they and wide tables scroll."""


@dataclass(frozen=True)
class Explanation:
    """The result of a command."""

    values: dict[str, object]
    """The output of `--json`."""
    page: Page
    """The page; the terminal shows its brief sections."""
    files: list[Path]
    """The files written."""


class Explainer(ABC):
    """One command: reads inputs, runs the models, and shows the result as figures, a page and JSON."""

    stem: str
    """The page's file name without .html; set by `read` at the latest."""
    title: str
    lead: str
    """The paragraph at the top of the page."""

    @abstractmethod
    def read(self) -> None:
        """Check the options and make the inputs, without reading weights."""

    @abstractmethod
    def run(self) -> None:
        """Open the models and collect the results."""

    def draw(self, folder: Path) -> list[Path]:
        """Draw the figures into `folder`; returns their files."""
        return []

    @abstractmethod
    def sections(self, figures: Mapping[str, Path]) -> Iterable[Section]:
        """Return the page's sections; `figures` has the drawings by name."""

    @abstractmethod
    def to_json(self) -> dict[str, object]:
        """Return the result as JSON values."""

    def page(self, figures: Mapping[str, Path]) -> Page:
        """Return the page."""
        return Page(self.title, list(self.sections(figures)), lead=self.lead, navigation=False, style=PAGE_STYLE)

    def explain(self, folder: Path) -> Explanation:
        """Run the command, and write page and figures into `folder`.

        Raises:
            RecipeError: an option is missing, out of range or does not apply.
            DataError: a text or a recording cannot be read, or is too long.
            EnvironmentProblem: the model is missing, damaged or of an unsupported kind; or the files cannot
                be written.
        """
        self.read()
        self.run()
        with explained(folder):
            files = self.draw(folder)
            page = self.page({path.stem: path for path in files})
            if (folder.parent / MANIFEST).is_file():  # the folder is `explain` of a run
                back = Html(Markup('<p><a href="../report.html">Report of the run</a></p>'))
                first, *others = page.sections
                page = replace(page, sections=[replace(first, blocks=[back, *first.blocks]), *others])
            return Explanation(self.to_json(), page, [write_page(folder / f"{self.stem}.html", page), *files])


def figure_block(svg: Path, description: str) -> Html:
    """Return an SVG file as a figure, embedded in the page."""
    data = base64.b64encode(svg.read_bytes()).decode("ascii")
    image = Markup('<div class="figure"><img alt="{}" src="data:image/svg+xml;base64,{}"></div>')
    return Html(image.format(description, data))


def in_percent(value: float | None) -> str:
    """Format a share as a percentage with three digits."""
    return "–" if value is None else f"{100 * value:.3g} %"
