"""Heads of classifiers: how many outputs they have, what those are called, and whether a model brings a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safetensors import safe_open

from llmtune.data.task_interface import TaskInterface
from llmtune.model.config import OTHER_CLASSES, OTHER_ORDER, build_skeleton, find_class, head_names, in_heads
from llmtune.records import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe.schema import Recipe

_UNNAMED = "LABEL_"


def name_outputs(config: PreTrainedConfig, names: Sequence[str], problem_type: str | None) -> None:
    """Set number and names of a head's outputs in a configuration, in model_ref.

    Where the model's files hold a head for other classes (or for as many that have no names), it is marked so: those
    weights know nothing of these classes. One for the same classes in another order is put in order when it is loaded.
    """
    own = [str(name) for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    if names:
        unnamed = all(name.startswith(_UNNAMED) for name in own)
        same = len(own) == len(names) and set(own) == set(names)
        setattr(config, OTHER_CLASSES, not same and not (unnamed and len(names) == 1))
        setattr(config, OTHER_ORDER, [own.index(name) for name in names] if same and own != list(names) else None)
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    if problem_type is not None:
        config.problem_type = problem_type


def set_padding(model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> None:
    """Set the token that a decoder's rows are padded with, in place: its head reads the last one that is none."""
    model.config.get_text_config().pad_token_id = processor.pad_token_id
    model.config.pad_token_id = processor.pad_token_id


def head_is_new(model_ref: ModelRef, recipe: Recipe, task: TaskInterface) -> bool:
    """Whether the model's files hold no trained head for what the recipe wants; headers are read, no weights.

    Of pickled weights it cannot be told without loading them: there the configuration decides.
    """
    if not task.trains_head:
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
