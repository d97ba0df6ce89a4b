"""Facts about a model without its weights: configuration, class, modules, shapes, head."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import cast

import jinja2
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from llmtune.data.task_interface import TaskInterface
from llmtune.errors import EnvironmentProblem, Problem, RecipeError, first_line, system_errno
from llmtune.model.device import is_out_of_memory
from llmtune.model.mean_layer import name_mean_layer
from llmtune.model.quantized_base import check_training, is_quantized, kept_quantization, prepare_reading
from llmtune.model.towers import image_text_class, remove_towers
from llmtune.recipe.model_kind import CAUSAL, CLASSES, MASKED, VECTORS, ModelKind
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.schema import Recipe
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import ModelRef
from llmtune.store.resource_limits import LimitExceeded

NEWER = "The file is damaged, or the model is newer than the installed transformers: pip install -U transformers."
_NOT_BUILT = "Install the package that it names, download the file again, or use another model."
OTHER_CLASSES = "llmtune_other_classes"
"""Set on a configuration whose trained head has other classes than the recipe."""
OTHER_ORDER = "llmtune_other_order"
"""Set on a configuration whose trained head has the recipe's classes in another order: each one's position there."""
UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, ArithmeticError, RuntimeError),
    *(AssertionError, EOFError, StrictDataclassError, SafetensorError, UnpicklingError, re.error, LimitExceeded),
    *(struct.error, jinja2.TemplateError, StopIteration),
)
"""Errors that libraries raise for files that are damaged or unknown to them."""
MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**13,
    "num_key_value_heads": 2**13,
}
"""Counts of a configuration with upper bounds that no model reaches: building one with more would not end."""


def find_class(
    model_ref: ModelRef, recipe: Recipe, task: TaskInterface
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class that loads this model for `task`, and the model's configuration with its head's size set.

    For a model with its own code this is an Auto class. Raises RecipeError if the model cannot do the task, such as an
    encoder for chat.
    """
    config = read_model_config(model_ref, recipe.model)
    kind, auto_class = task.model_kind, getattr(transformers, task.model_kind.auto_class)
    own_code = recipe.model.trust_remote_code and kind.auto_class in (getattr(config, "auto_map", None) or {})
    if not own_code and not supports_task(config, task):
        raise explain_unsupported(model_ref.name, config, task.name, [kind])
    if recipe.adapter.is_prompt and not kind.decodes:
        what = f"{recipe.adapter.method} puts its vectors before a decoder's prompt"
        raise RecipeError.of(f"{what}, but {model_ref.name} is not a decoder", "adapter.method", "Use lora.")
    check_training(config, recipe.adapter, kind.has_head, model_ref.name)
    model_class = auto_class if own_code else _mapped_class(config, kind)
    if getattr(model_class, "config_class", "") == config.sub_configs.get("text_config"):  # as Auto classes do
        text = config.get_text_config()
        for name in {"_name_or_path", "architectures", "quantization_config"} & vars(config).keys():
            setattr(text, name, getattr(config, name))
        config = text
    task.configure_head(config, recipe)
    return cast(type[PreTrainedModel], model_class), config


def _mapped_class(config: PreTrainedConfig, kind: ModelKind) -> type[PreTrainedModel] | None:
    """Return transformers' class of this kind for a model; None if it has none.

    A checkpoint for text and images is loaded by the class for both, unless it names the class for text.
    """
    model_class = getattr(transformers, kind.auto_class)._model_mapping.get(type(config), None)
    complete = image_text_class(config)
    if kind.is_bare:
        return None if model_class is complete is not None else model_class  # it has scores, not vectors
    is_named = getattr(model_class, "__name__", None) in _architectures(config)
    return model_class if is_named or complete is None or kind.image_text_class is None else complete


def describe_config(config: PreTrainedConfig) -> str:
    """Describe a model by its configuration."""
    named = _architectures(config)
    return named[0] if named else f"model type {config.model_type}"


def _architectures(config: PreTrainedConfig) -> list[str]:
    return list(getattr(config, "architectures", None) or [])


def supports_task(config: PreTrainedConfig, task: TaskInterface) -> bool:
    """Whether a model with this configuration can do this variant of the task.

    If the task adds its own head, any model of a kind that takes one does; otherwise the model must have the head.
    """
    model_class = _mapped_class(config, task.model_kind)
    if model_class is None or not task.supports(config):
        return False
    if task.model_kind.may_miss_weights or not (named := _architectures(config)):
        return True
    return model_class.__name__ in named or _is_relative(named, model_class.__name__)


def explain_unsupported(model: str, config: PreTrainedConfig, task: str, kinds: Sequence[ModelKind]) -> RecipeError:
    """Return the error for a model that none of a task's kinds supports."""
    needed = " or ".join(dict.fromkeys(kind.auto_class for kind in kinds))
    what = f"{model} is a {describe_config(config)}: it cannot be used for the task {task}, which needs {needed}"
    fix = " Or: ".join(dict.fromkeys(kind.fix for kind in kinds))
    if CLASSES in kinds and _mapped_class(config, CAUSAL) and not _mapped_class(config, CLASSES):
        what += f"; transformers has no class for sequence classification of the type {config.model_type}"
        chat = (
            ", or set `task: chat` with the classes in evaluate.choices"
            if TASK_FACTS[task].loader != "CrossEncoder"
            else ""
        )
        fix = f"Name a model of text alone{chat}."
    return cast(RecipeError, RecipeError.of(what, "model.name", fix))


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model reads text in both directions and generates none: BERT and its relatives."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        return False
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in _architectures(config)):
        return False
    return type(config) in getattr(transformers, MASKED.auto_class)._model_mapping


def trains_in_float32(recipe: Recipe, task: TaskInterface, config: PreTrainedConfig) -> bool:
    """Whether weights are float32 in training, whatever the number format of the products."""
    return recipe.adapter.method == "full" or keeps_float32(recipe, task, config)


def predicts_in_float32(recipe: Recipe, task: TaskInterface, config: PreTrainedConfig) -> bool:
    """Whether weights are float32 outside training, whatever the device multiplies fast."""
    return task.model_kind.predicts_in_float32 and keeps_float32(recipe, task, config)


def keeps_float32(recipe: Recipe, task: TaskInterface, config: PreTrainedConfig) -> bool:
    """Whether `model.dtype: auto` leaves the weights in float32: those of an encoder whose task `needs_float32`.

    The sums between its layers are then float32 too. In bfloat16 they cost nDCG and save no time
    (docs/embed-evidence.md).
    """
    plain = recipe.adapter.method != "qlora" and kept_quantization(config) is None
    return plain and task.needs_float32(recipe) and recipe.model.dtype == "auto" and is_encoder(config)


def _is_relative(named: list[str], class_name: str) -> bool:
    """Accept the bare or multimodal class of a decoder: `LlamaModel`, `Gemma3ForConditionalGeneration`."""
    family = class_name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    decoder = class_name.endswith(("ForCausalLM", "LMHeadModel")) and "Bert" not in class_name
    return decoder and any(name in (f"{family}Model", f"{family}ForConditionalGeneration") for name in named)


def architecture_class(config: PreTrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    """Return the class named in a configuration: one of transformers', or the Auto class for the model's own code."""
    bare = VECTORS.auto_class
    auto_classes = sorted(getattr(config, "auto_map", None) or (), key=lambda name: name == bare)  # heads first
    names = [name for name in auto_classes if trust_remote_code and name.startswith(bare)]
    class_names = [name for name in (*names, *_architectures(config)) if hasattr(transformers, name)]
    return cast(type[PreTrainedModel], getattr(transformers, class_names[0] if class_names else bare))


def read_model_config(model_ref: ModelRef, model: ModelSection) -> PreTrainedConfig:
    """Read the configuration with transformers' own class; raises EnvironmentProblem if that fails."""
    path = str(model_ref.path / "config.json")
    with readable(f"transformers {transformers.__version__} cannot read this configuration", path, NEWER):
        config = AutoConfig.from_pretrained(
            str(model_ref.path), trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    prepare_reading(config)
    layers = layer_configs(config.get_text_config())
    wrong = (
        Problem(f"{name} is {value!r}, but must be a number from 1 to {most:,}", path, NEWER)
        for name, most in MOST.items()
        for layer in layers
        for value in as_list(getattr(layer, name, None))
        if type(value) is not int or not 1 <= value <= most
    )
    EnvironmentProblem.collect(dict.fromkeys(wrong))
    return config


def layer_configs(text: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the configuration of each layer of a language model if they differ, else the one for all layers."""
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]


def as_list(value: object) -> list[object]:
    """Return the values of a setting that is per model or per layer; none if it is not set."""
    return [] if value is None else [*value] if isinstance(value, list | tuple) else [value]


@contextmanager
def readable(what: str, where: str, fix: str) -> Iterator[None]:
    """Turn a library's errors on a damaged or unknown file into an EnvironmentProblem."""
    try:
        yield
    except Exception as error:
        is_unreadable = isinstance(error, UNREADABLE) or type(error) is Exception  # the tokenizers library's type
        if not is_unreadable or system_errno(error) is not None or is_out_of_memory(error):
            raise
        fix = "Install the package that it names." if isinstance(error, ImportError) else fix
        raise EnvironmentProblem.of(f"{what}: {first_line(error)}", where, fix) from error


def head_names(model: torch.nn.Module) -> list[str]:
    """Return the names of the modules that turn hidden states into scores: never quantised, never given a LoRA.

    They are a model's children other than its body, and an added layer that averages tokens; for a model without a
    separate body (T5), its output layer.
    """
    if not isinstance(model, PreTrainedModel):
        return ["lm_head"]
    body = model.base_model
    if body is not model:
        heads = [name for name, child in model.named_children() if child is not body and [*child.parameters()]]
        if heads:
            return [*name_mean_layer(model), *heads]
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if output is not None and module is output] or ["lm_head"]


def in_heads(name: str, heads: Iterable[str]) -> bool:
    """Whether a module (or parameter) is one of the heads or inside one."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


@torch.no_grad()
def put_in_order(model: PreTrainedModel, heads: Sequence[str], order: Sequence[int]) -> None:
    """Move the outputs of a trained head to the recipe's order of the same classes, in place."""
    for name, parameter in model.named_parameters():
        if in_heads(name, heads) and parameter.shape[0] == len(order):
            parameter.copy_(parameter[list(order)].clone())
    setattr(model.config, OTHER_ORDER, None)


def build_skeleton(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, recipe: Recipe, *, towers: bool = False
) -> PreTrainedModel:
    """Build the model on the meta device: names and shapes, no memory; its towers only if requested.

    Raises EnvironmentProblem if this configuration does not give a model.
    """
    where = os.path.join(str(config.name_or_path), "config.json")
    with readable("transformers cannot build a model from this configuration", where, _NOT_BUILT), torch.device("meta"):
        if hasattr(model_class, "from_config"):  # an Auto class, for a model with its own code
            trust = recipe.model.trust_remote_code
            return cast(PreTrainedModel, model_class.from_config(config, trust_remote_code=trust))
        skeleton = cast(PreTrainedModel, model_class._from_config(config))
    if not towers:
        remove_towers(skeleton)
    return skeleton


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of every linear module by name, including quantised ones."""
    return {name: shape for name, module in model.named_modules() if (shape := linear_shape(module))}


def linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """Return inputs and outputs of a linear module; None for other modules."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    linear = isinstance(module, torch.nn.Linear) or is_quantized(module)
    return (cast(int, module.in_features), cast(int, module.out_features)) if linear else None


def expert_parameters(model: torch.nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of fused experts, [experts, ...], by parameter name."""
    return {
        f"{name}.{leaf}": parameter.shape
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "expert" in f"{name} {type(module).__name__}".lower()
    }


# Heads


_UNNAMED = "LABEL_"
SHOWN_NAMES = 6


def name_outputs(config: PreTrainedConfig, names: Sequence[str], problem_type: str | None) -> None:
    """Set the number and names of a head's outputs in a configuration, in place.

    If the model's files have a head for other classes (or for as many without names), the configuration is marked:
    those weights do not fit these classes. A head for the same classes in another order is reordered when loaded.
    """
    stated = output_names(config)
    if names:
        unnamed = all(name.startswith(_UNNAMED) for name in stated)
        order = find_outputs(stated, names)
        setattr(config, OTHER_CLASSES, order is None and not (unnamed and len(names) == 1))
        setattr(config, OTHER_ORDER, order if order != list(range(len(names))) else None)
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    if problem_type is not None:
        config.problem_type = problem_type


def output_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of a head's outputs, in their order."""
    return [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]


def find_outputs(stated: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """Return the output of a head for each class, or None if the head has other classes.

    Names may differ in case if that is unambiguous. Classes 0 to n-1 are the numbers of the outputs.
    """
    if len(stated) != len(names):
        return None
    for spell in (str, str.casefold):
        places = {spell(name): place for place, name in enumerate(stated)}
        if len(places) == len(names) and places.keys() == {spell(name) for name in names}:
            return [places[spell(name)] for name in names]
    numbers = {str(place): place for place in range(len(names))}
    return [numbers[name] for name in names] if numbers.keys() == set(names) else None


def set_padding(model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> None:
    """Set the token that pads a decoder's rows, in place: its head reads the last token that is not padding."""
    model.config.get_text_config().pad_token_id = processor.pad_token_id
    model.config.pad_token_id = processor.pad_token_id


def head_is_new(model_ref: ModelRef, recipe: Recipe, task: TaskInterface) -> bool:
    """Whether the model's files lack a trained head for the recipe; reads headers, not weights.

    Pickled weights cannot be inspected without loading them: for those the configuration decides.
    """
    if not task.model_kind.has_head:
        return False
    model_class, config = find_class(model_ref, recipe, task)
    if getattr(config, OTHER_CLASSES, False):
        return True
    skeleton = build_skeleton(model_class, config, recipe)
    heads = head_names(skeleton)
    expected = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if in_heads(name, heads)}
    stored: dict[str, tuple[int, ...]] = {}
    if not any(model_ref.path.glob("*.safetensors")):
        return model_class.__name__ not in (getattr(config, "architectures", None) or ())
    for path in model_ref.path.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if name in expected}  # noqa: SIM118
    return stored != expected


def why_headless(model_ref: ModelRef, recipe: Recipe, task: TaskInterface) -> str:
    """Return the reason why the base cannot answer before its head is trained; empty if it can."""
    if not head_is_new(model_ref, recipe, task):
        return ""
    model_class, config = find_class(model_ref, recipe, task)
    if model_class.__name__ not in _architectures(config):
        return "the base model has no trained head for this task"
    before, after = (_some_of(output_names(one)) for one in (read_model_config(model_ref, recipe.model), config))
    return f"the base model's head for {before} is replaced by a new one for {after}"


def _some_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return f"{{{', '.join(names[:SHOWN_NAMES])}{more}}}"
