"""Make a recipe, a loaded model and a batch from plain numbers, for tests of `llmtune.model` and `llmtune.adapter`."""

import io
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.adapter.injection import inject, trained_parameters
from llmtune.data.collators import collate_packed, collate_padded
from llmtune.data.example import Example
from llmtune.errors import EnvironmentProblem
from llmtune.model.config import read_model_config
from llmtune.model.loading import load_model
from llmtune.model.packed_attention import PACKED, install_packed
from llmtune.model.processor import load_processor
from llmtune.model.resolve import resolve_model
from llmtune.recipe.loader import load_recipe
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel, SelectedModel
from llmtune.tasks.base import AnyTask
from llmtune.tasks.registry import choose_variant
from support.models import train_tokenizer
from support.runs import write_recipe

SHAPE = {
    "vocab_size": 425,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 3,
}


def build_family(folder: Path, family: str, **config: object) -> Path:
    """Build a tiny random decoder of any family, with weights large enough for attention to matter."""
    train_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def recipe_with(folder: Path | str, **sections: dict[str, Any]) -> Recipe:
    """A chat recipe in float32 for `model`; a section's keys are added to it."""
    content: dict[str, Any] = {"task": "chat", "data": {"train": "/nowhere.jsonl"}}
    content["model"] = {"name": str(folder), "dtype": "float32"}
    for name, keys in sections.items():
        content[name] = {**content.get(name, {}), **keys}
    return Recipe.model_validate(content)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def task_for(recipe: Recipe) -> AnyTask:
    place = resolve_model(str(recipe.model.name), recipe.model, quiet())
    return choose_variant(recipe, read_model_config(place, recipe.model), place.name)


def open_model(
    recipe: Recipe,
    training: bool = True,
    console: Console | None = None,
    device: str = "cpu",
    masters: bool = True,
) -> SelectedModel:
    """Locate and load the recipe's model."""
    assert recipe.model.name is not None
    console = console or quiet()
    place = resolve_model(recipe.model.name, recipe.model, console)
    processor = load_processor(place, recipe.model)
    task = task_for(recipe)
    options = {"device": device, "training": training, "masters": masters, "console": console}
    return load_model(place, recipe, task, processor, **options)


def sharpened(folder: Path, attention: str | None = None) -> Any:
    """A fresh decoder with larger weights, as otherwise it barely attends to earlier tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    if attention == PACKED:
        install_packed(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def documents(lengths: Sequence[int], vocabulary: int = 400, seed: int = 0) -> list[Example]:
    """Return random documents; all but the first third of each is predicted."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(4, vocabulary, (length,), generator=generator).tolist()
        found.append(Example(ids, [max(1, length // 3), length], target_bytes=length))
    return found


def packed(examples: Sequence[Example]) -> dict[str, Any]:
    return collate_packed(examples, 0)


def padded(examples: Sequence[Example]) -> dict[str, Any]:
    return collate_padded(examples, 0)


def train_a_little(folder: Path, **adapter: object) -> AdaptedModel:
    """Train an adapter until every parameter has moved from its start."""
    sections = {name: adapter.pop(name) for name in ("model", "data") if name in adapter}
    recipe = recipe_with(folder, adapter={"r": 8, **adapter}, **sections)
    adapted = inject(open_model(recipe), recipe, quiet())
    nudge(adapted.model)
    return adapted


def nudge(model: torch.nn.Module) -> None:
    """Move every trained parameter a little."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits[0]


def load_without_room(small: str, large: str) -> None:
    """Print the errors of loading a large model and a large adapter with 20 MB of address space left."""
    selected = open_model(recipe_with(small))  # with everything imported and its threads started
    recipe = recipe_with(small, adapter={"r": 4096})
    attempts: list[Callable[[], object]] = [
        lambda: open_model(recipe_with(large)),
        lambda: inject(selected, recipe, quiet()),
    ]
    for attempt in attempts:
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 20_000_000, resource.RLIM_INFINITY))
        try:
            attempt()
        except EnvironmentProblem as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


Tuned = tuple[AdaptedModel, Recipe]
Tune = Callable[..., Tuned]


def tuner(model: Path, rows: Path, folder: Path, console: Console) -> Tune:
    """Return a function that builds `model`, or another base, with an adapter of `strength` and its recipe."""

    def build(base: Path = model, strength: float = 0.3, **sections: object) -> Tuned:
        recipe = load_recipe(write_recipe(folder / "tiny.yaml", base, rows, **sections)).recipe
        adapted = inject(open_model(recipe, training=False, console=console), recipe, console)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.data = strength * torch.randn(parameter.shape, generator=generator)
        return adapted, recipe

    return build
