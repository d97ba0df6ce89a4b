"""What a model is before its weights are there: its configuration, its class, its modules and their shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.records import ModelPlace, Task

if TYPE_CHECKING:
    from llmtune.recipe import ModelSection, Recipe

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)
"""What transformers raises for files that are damaged or that it does not know."""


def find_class(place: ModelPlace, recipe: Recipe, task: Task) -> tuple[type[PreTrainedModel], Any]:
    """Return the class that loads this model for `task`, and the model's configuration.

    Raises RecipeError where the model cannot do the task: an encoder or a sequence-to-sequence model for chat.
    """
    config = read_model_config(place, recipe.model)
    auto_class = getattr(transformers, task.auto_class)
    named = list(getattr(config, "architectures", None) or [])
    own = (getattr(config, "auto_map", None) or {}).get(task.auto_class)
    if own and recipe.model.trust_remote_code:
        return auto_class, config
    known = auto_class._model_mapping
    fitting = known.get(type(config), None)
    if fitting is None or (named and fitting.__name__ not in named and not _is_relative(named, fitting.__name__)):
        described = named[0] if named else f"model type {config.model_type}"
        raise RecipeError.of(
            f"{place.name} is a {described}: it cannot be used for the task {task.name}, which needs {task.auto_class}",
            "model.name",
            "Name a decoder model (its config.json names a class that ends in ForCausalLM or LMHeadModel).",
        )
    return fitting, config


def _is_relative(named: list[str], fitting: str) -> bool:
    """Accept the bare or multimodal class of a decoder: `LlamaModel`, `Gemma3ForConditionalGeneration`."""
    family = fitting.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    decoder = fitting.endswith(("ForCausalLM", "LMHeadModel")) and "Bert" not in fitting
    return decoder and any(name in (f"{family}Model", f"{family}ForConditionalGeneration") for name in named)


def read_model_config(place: ModelPlace, model: ModelSection) -> Any:
    """Read the configuration as transformers' own class; raises EnvironmentProblem where it cannot."""
    try:
        return AutoConfig.from_pretrained(
            str(place.path), trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except UNREADABLE as error:
        raise EnvironmentProblem.of(
            f"transformers {transformers.__version__} cannot read this configuration: {first_line(error)}",
            str(place.path / "config.json"),
            "The file is damaged, or the model is newer than the installed transformers: pip install -U transformers.",
        ) from error


def head_names(model: torch.nn.Module) -> list[str]:
    """Return the names of the modules that turn hidden states into scores: never quantised, never given a LoRA."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    names = [name for name, module in model.named_modules() if output is not None and module is output]
    return names or ["lm_head"]


def build_skeleton(model_class: Any, config: Any, recipe: Recipe) -> PreTrainedModel:
    """Build the model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        if hasattr(model_class, "from_config"):  # an Auto class, for a model with its own code
            trust = recipe.model.trust_remote_code
            return cast(PreTrainedModel, model_class.from_config(config, trust_remote_code=trust))
        return cast(PreTrainedModel, model_class._from_config(config))


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of every linear module by its name, 4-bit ones too."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.weight.shape[0], module.weight.shape[1])
    return found


def first_line(error: BaseException) -> str:
    """Return what a library's error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
