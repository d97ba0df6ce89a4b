"""An export loaded by its own runtime, called like the transformers model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.deploy.parity import LIMITS, Limits, load_product
from llmtune.deploy.tuned_model import TunedModel, served_by_folder
from llmtune.errors import RecipeError
from llmtune.model.processor import load_processor
from llmtune.model.towers import image_text_class, patch_text_forward
from llmtune.plan import Plan
from llmtune.recipe.model_section import ModelSection
from llmtune.records import ModelRef

ModelSource = Plan | TunedModel
"""What an export was made from: the plan of a run, or its tuned model."""
TRANSFORMERS = f"transformers {transformers.__version__}"
SAVED_WITH_WEIGHTS: dict[str, object] = {"chat_template": None, "chat_template_kwargs": {}, "add_tokens": ()}
"""Keys of the recipe's model section that a saved folder already contains."""


@dataclass(frozen=True)
class ExportedModel:
    """An export, loaded by the runtime that its users run it with."""

    format: str
    """As in the recipe's `deploy`, or `foreign`."""
    runtime: str
    """Name and version of the runtime."""
    model: PreTrainedModel
    processor: PreTrainedTokenizerBase
    """The tokenizer or processor that ships with the export."""
    path: Path
    """A file or a folder."""
    limits: Limits
    """How far its number format may move it from the tuned model."""
    served_prompts: Callable[[TunedModel], list[list[int]]]
    """Returns the ids that its own tokenizer and template make of the questions to a model that continues a text."""
    ends: Collection[int] | None = None
    """Tokens that end its answers; None: those of the model's settings and of the processor."""
    encode: Callable[[str], list[int]] | None = None
    """Encodes a text by the tokenizer inside the file of a classifier; None if `processor` is its tokenizer."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a plain model folder."""
        return self.path.is_dir() and self.runtime == TRANSFORMERS

    @property
    def size(self) -> int:
        """Bytes of the weights on disk."""
        return weight_bytes(self.path)


def check_pictures(source: ModelSource, where: str, fix: str) -> None:
    """Raise RecipeError if a model was tuned with pictures: this export of it would not read them."""
    if source.task.model_kind.takes_images:
        raise RecipeError.of("this run was tuned with pictures, which such an export would not read", where, fix)


WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".onnx", ".data", ".onnx_data")


def weight_bytes(path: Path) -> int:
    """Return the bytes of the weight files at `path`, a file or a folder; pickles next to safetensors do not count."""
    files = [path] if path.is_file() else [one for one in path.iterdir() if one.suffix in WEIGHT_FILES]
    if any(one.suffix == ".safetensors" for one in files):
        files = [one for one in files if one.suffix != ".bin"]
    return sum(file.stat().st_size for file in files)


def borrow_class(
    kind: type[PreTrainedModel], config: PretrainedConfig, network: Callable[..., Any], **members: object
) -> PreTrainedModel:
    """Return a model without weights of the class `kind`, or of an Auto class, whose forward pass is `network`.

    Its class's own methods, such as `generate`, work as usual. `members` are further methods that replace those of the
    class.
    """
    with torch.device("meta"):
        model = kind(config) if hasattr(kind, "forward") else kind.from_config(config, trust_remote_code=True)
    model_class = type(model)
    shown = wraps(model_class.forward)(network)  # with the arguments of the class
    on_cpu = property(lambda self: torch.device("cpu"))
    model.__class__ = type(model_class.__name__, (model_class,), {"device": on_cpu, "forward": shown, **members})
    return model.eval()


def open_folder(folder: Path, source: ModelSource, name: str = "folder") -> ExportedModel:
    """Load a plain model folder with transformers alone, as its users do."""
    processor = saved_processor(folder, source.model_ref, source.recipe.model)  # also refuses a damaged configuration
    kind = source.task.model_kind
    options = {"local_files_only": True, "trust_remote_code": source.recipe.model.trust_remote_code}

    def load() -> Any:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        on_cpu_half = source.device == "cpu" and config.dtype == torch.float16  # loaded in 16 bits, computed in 32
        dtype = torch.float32 if on_cpu_half else "auto"
        complete = image_text_class(config)
        sees = kind.image_text_class and complete and complete.__name__ in (config.architectures or ())
        auto_class = getattr(transformers, str(kind.image_text_class if sees else kind.auto_class))
        model, info = auto_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
        patch_text_forward(model)
        return model, info

    model = cast(PreTrainedModel, load_product(load, str(folder)).to(source.device))
    limits = LIMITS["exact" if model.dtype == torch.float32 else "rounded"]
    served = partial(served_by_folder, folder)
    return ExportedModel(name, TRANSFORMERS, model, processor, folder, limits, served)


def saved_processor(folder: Path, model_ref: ModelRef, section: ModelSection) -> PreTrainedTokenizerBase:
    """Load the processor of an exported folder, without what the recipe adds to that of the base."""
    return load_processor(replace(model_ref, path=folder), section.model_copy(update=SAVED_WITH_WEIGHTS))
