"""The towers of a checkpoint, which read images, video or sound: found, proved unused by text, and dropped."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from llmtune.model.device import SuppressRefusal
from llmtune.recipe.model_kind import CAUSAL

_DROPPED = "llmtune_dropped_modules"
"""Attribute of a model without its towers: the names of all their modules."""
_PROBE_TOKENS = 8


def image_text_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return transformers' class for text and images of a decoder; None for a model of text alone."""
    if config.is_encoder_decoder:
        return None
    model_class = getattr(transformers, str(CAUSAL.image_text_class))._model_mapping.get(type(config), None)
    return model_class if isinstance(model_class, type) else None


def text_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return transformers' class for the text of a model that also reads images; None if it has none."""
    model_class = getattr(transformers, CAUSAL.auto_class)._model_mapping.get(type(config.get_text_config()), None)
    return model_class if image_text_class(config) is not None else None


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of a model's text, if transformers has a class for it alone; else all of it."""
    if (model_class := text_class(config)) is None:
        return config
    text = copy.deepcopy(config.get_text_config())
    text.architectures = [model_class.__name__]
    return text


def take_text(model: PreTrainedModel) -> PreTrainedModel:
    """Return the language model of a complete model, with its head: the `text_class` with the same weights.

    A model of text alone, or of a text without a class, is returned as it is.
    """
    model_class, decoder, head = text_class(model.config), model.get_decoder(), model.get_output_embeddings()
    if model_class is None:
        return model
    if isinstance(decoder, model_class):
        return cast(PreTrainedModel, decoder)
    config = text_config(model.config)
    config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    with torch.device("meta"):
        text = cast(PreTrainedModel, model_class._from_config(config))
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(head)
    text.generation_config = model.generation_config
    return text


def find_towers(model: PreTrainedModel) -> list[str]:
    """Return the outermost modules outside the language model and the heads; none if the model reads only text."""
    if image_text_class(model.config) is None or not hasattr(model, "get_decoder"):
        return []
    output = model.get_output_embeddings()
    heads = (
        [output] if output is not None else [one for one in model.children() if model.base_model not in (model, one)]
    )
    return list(_outside(model, {model.get_decoder(), model.get_input_embeddings(), *heads}, ""))


def _outside(module: torch.nn.Module, text: set[torch.nn.Module], prefix: str) -> Iterator[str]:
    """Yield the names of modules with weights that contain none of `text`."""
    for name, child in module.named_children():
        if module in text or child in text:
            continue
        if text & {*child.modules()}:
            yield from _outside(child, text, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}"


def drop_towers(model: PreTrainedModel) -> None:
    """Remove the towers of a loaded model in eval mode, in place, if it scores a text the same, to the bit, without.

    Otherwise they stay, frozen.
    """
    towers = {name: model.get_submodule(name) for name in find_towers(model)}
    with SuppressRefusal(), torch.inference_mode():
        before = _text_scores(model) if towers else None
        remove_towers(model)
        if before is None or torch.equal(_text_scores(model), before):
            return
    for name, tower in towers.items():
        _put(model, name, tower)
    setattr(model, _DROPPED, ())
    freeze_towers(model)


def freeze_towers(model: PreTrainedModel) -> None:
    """Exclude the towers of a model from training, in place, and the parameters next to them."""
    if towers := find_towers(model):
        loose = {f"{owner}." if owner else "" for owner in {name.rpartition(".")[0] for name in towers}}
        for name, parameter in model.named_parameters():
            inside = any(name.startswith(f"{tower}.") for tower in towers)
            if inside or name.removesuffix(name.rpartition(".")[2]) in loose:
                parameter.requires_grad_(False)


def find_projectors(model: PreTrainedModel) -> list[str]:
    """Return the modules between the encoder of images and the language model; none if none are separate.

    They are the towers that are no models of their own, or else the mergers in an encoder. Lists are given by their
    parts.
    """
    towers = {name: model.get_submodule(name) for name in find_towers(model) if "audio" not in name}
    parts = {name: tower for name, tower in towers.items() if not isinstance(tower, PreTrainedModel)} or {
        f"{name}.{child}": part
        for name, tower in towers.items()
        for child, part in tower.named_children()
        if "merger" in child
    }
    every = (_split_list(name, part) for name, part in parts.items())
    return [name for names in every for name in names]


def _split_list(name: str, part: torch.nn.Module) -> list[str]:
    return [f"{name}.{i}" for i in range(len(part))] if isinstance(part, torch.nn.ModuleList) else [name]


def tower_modules(model: torch.nn.Module) -> Sequence[str]:
    """Return the names of all modules in the towers of a model, also of those that it lost."""
    if (dropped := dropped_modules(model)) or not isinstance(model, PreTrainedModel):
        return dropped
    inside = tuple(f"{name}." for name in find_towers(model))
    return [name for name, _ in model.named_modules() if f"{name}.".startswith(inside)] if inside else ()


def remove_towers(model: PreTrainedModel) -> None:
    """Set the towers of a model to None, in place, and note the names of all their modules."""
    names = find_towers(model)
    inside = tuple(f"{name}." for name in names)
    setattr(model, _DROPPED, [name for name, _ in model.named_modules() if f"{name}.".startswith(inside)])
    for name in names:
        _put(model, name, None)


def _put(model: PreTrainedModel, name: str, module: torch.nn.Module | None) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def dropped_modules(model: torch.nn.Module) -> Sequence[str]:
    """Return the names of all modules in the towers that a model lost; none for a complete model."""
    return cast(Sequence[str], getattr(model, _DROPPED, ()))


def describe_towers(model: PreTrainedModel) -> str | None:
    """Return the sentence to print about a model's towers; None for a model of text alone."""
    dropped = dropped_modules(model)
    if names := [name for name in dropped if name.rpartition(".")[0] not in dropped]:
        return f"Towers left out: {', '.join(names)}. Without them a text has the same scores, to the bit."
    if not (names := find_towers(model)):
        return None
    if hasattr(model, _DROPPED):
        return f"Towers frozen: {', '.join(names)}. A text does not have the same scores without them."
    parts = {name: model.get_submodule(name) for name in find_projectors(model)}
    trained = [name for name, part in parts.items() if any(one.requires_grad for one in part.parameters())]
    frozen = f"Towers frozen: {', '.join(name for name in names if name not in trained) or 'none'}"
    return f"{frozen}, except {', '.join(trained)}, which are trained completely." if trained else f"{frozen}."


def patch_text_forward(model: PreTrainedModel) -> None:
    """Let two classes of transformers read text alone, in place.

    Before 5.25 Llama 4's wrapper reads an output `image_outputs` that its language model does not return. Molmo 2
    requires the kinds of its tokens in training.
    """
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        model.language_model.register_forward_hook(lambda *inputs: setattr(inputs[-1], "image_outputs", None))
    if type(model).__name__ == "Molmo2ForConditionalGeneration":
        model.model.register_forward_pre_hook(_mark_text, with_kwargs=True)


def _mark_text(model: torch.nn.Module, args: tuple[object, ...], inputs: dict[str, Any]) -> tuple[Any, Any]:
    if not model.training or inputs.get("mm_token_type_ids") is not None:
        return args, inputs
    return args, {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}


def _text_scores(model: PreTrainedModel) -> torch.Tensor:
    """Return the model's first output for a few tokens."""
    size = int(model.get_input_embeddings().weight.shape[0])
    ids_1T = torch.arange(1, _PROBE_TOKENS + 1, device=model.device)[None] * size // (_PROBE_TOKENS + 2)
    return cast(torch.Tensor, model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))[0])
