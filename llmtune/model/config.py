"""What a model is before its weights are there: its configuration, its class, its modules and their shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.data.task_interface import TaskInterface
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.records import ModelRef

if TYPE_CHECKING:
    from llmtune.recipe import ModelSection, Recipe

OTHER_CLASSES = "llmtune_other_classes"
"""Set on a configuration whose trained head is for other classes than the recipe's."""
OTHER_ORDER = "llmtune_other_order"
"""Set on a configuration whose trained head has the recipe's classes in another order: where each is in the files."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)
"""What transformers raises for files that are damaged or that it does not know."""


def find_class(place: ModelRef, recipe: Recipe, task: TaskInterface) -> tuple[type[PreTrainedModel], Any]:
    """Return the class that loads this model for `task`, and the model's configuration, its head's size set.

    Raises RecipeError where the model cannot do the task, such as an encoder for chat.
    """
    config = read_model_config(place, recipe.model)
    auto_class = getattr(transformers, task.auto_class)
    own = (getattr(config, "auto_map", None) or {}).get(task.auto_class)
    if own and recipe.model.trust_remote_code:
        task.configure_head(config, recipe)
        return auto_class, config
    if not fits(config, task):
        described = describe_config(config)
        raise RecipeError.of(
            f"{place.name} is a {described}: it cannot be used for the task {task.name}, which needs {task.auto_class}",
            "model.name",
            NEEDS[task.auto_class],
        )
    task.configure_head(config, recipe)
    return auto_class._model_mapping[type(config)], config


NEEDS = {
    "AutoModelForCausalLM": "Name a decoder model (its config.json names a class that ends in ForCausalLM or "
    "LMHeadModel).",
    "AutoModelForMaskedLM": "Name an encoder with its masked-token head (its config.json names a class that ends in "
    "ForMaskedLM).",
    "AutoModelForSeq2SeqLM": "Name an encoder-decoder model, such as T5, BART, Marian or NLLB.",
    "AutoModelForQuestionAnswering": "Name an encoder, such as BERT or RoBERTa.",
    "AutoModelForSequenceClassification": "Name an encoder, such as BERT or ModernBERT, or a decoder.",
    "AutoModelForTokenClassification": "Name a model that transformers can mark tokens with, such as BERT.",
    "AutoModelForSpeechSeq2Seq": "Name a Whisper model.",
    "AutoModelForCTC": "Name a wav2vec2 model or one of its relatives.",
}
"""By Auto class, what to do where a model is none of it."""


def describe_config(config: Any) -> str:
    """Say what a model is, by its configuration."""
    named = list(getattr(config, "architectures", None) or [])
    return str(named[0]) if named else f"model type {config.model_type}"


def fits(config: Any, task: TaskInterface) -> bool:
    """Whether a model with this configuration can do this variant of the task.

    Where the task brings a head of its own, any model of a kind that takes one does; else the model must have the head.
    """
    known = getattr(transformers, task.auto_class)._model_mapping
    fitting = known.get(type(config), None)
    if fitting is None or not task.supports(config):
        return False
    named = list(getattr(config, "architectures", None) or [])
    return task.trains_head or not named or fitting.__name__ in named or _is_relative(named, fitting.__name__)


def is_encoder(config: Any) -> bool:
    """Whether a model reads a text in both directions and writes none: BERT and its relatives."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        return False
    named = list(getattr(config, "architectures", None) or [])
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        return False
    return type(config) in transformers.AutoModelForMaskedLM._model_mapping


def _is_relative(named: list[str], fitting: str) -> bool:
    """Accept the bare or multimodal class of a decoder: `LlamaModel`, `Gemma3ForConditionalGeneration`."""
    family = fitting.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    decoder = fitting.endswith(("ForCausalLM", "LMHeadModel")) and "Bert" not in fitting
    return decoder and any(name in (f"{family}Model", f"{family}ForConditionalGeneration") for name in named)


def read_model_config(place: ModelRef, model: ModelSection) -> Any:
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
    """Return the names of the modules that turn hidden states into scores: never quantised, never given a LoRA.

    They are what a model has beside its body; a model without a body of its own (T5) has its output layer.
    """
    if not isinstance(model, PreTrainedModel):
        return ["lm_head"]
    body = model.base_model
    if body is not model:
        heads = [name for name, child in model.named_children() if child is not body and [*child.parameters()]]
        if heads:
            return heads
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if output is not None and module is output] or ["lm_head"]


def in_heads(name: str, heads: Iterable[str]) -> bool:
    """Whether a module (or parameter) is one of the heads or a part of one."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


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
