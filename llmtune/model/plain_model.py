"""A model as its files have it, without a recipe: for looking at it, not for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import transformers

from llmtune.errors import EnvironmentProblem
from llmtune.model.config import first_line
from llmtune.model.library_logging import unreported
from llmtune.model.oom import enough_memory
from llmtune.records import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmtune.recipe import ModelSection


def load_plain(
    place: ModelRef, config: Any, settings: ModelSection, *, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Load a model in the class that its configuration names, with eager attention, in eval mode.

    Raises:
        EnvironmentProblem: the weights cannot be loaded, or memory runs out.
    """
    transformers.utils.logging.disable_progress_bar()
    with enough_memory(f"loading {place.name}", device), unreported():
        try:
            model = named_class(config, settings.trust_remote_code).from_pretrained(
                str(place.path),
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=settings.use_safetensors,
                local_files_only=True,
                **({"trust_remote_code": True} if settings.trust_remote_code else {}),
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise EnvironmentProblem.of(
                f"the weights cannot be loaded: {first_line(error)}",
                str(place.path),
                "Get the model again from where it comes from; `llmtune doctor` shows what this machine has.",
            ) from error
    return cast("PreTrainedModel", model.to(device).eval())


def named_class(config: Any, trusted: bool) -> Any:
    """Return the class that a configuration names: one of transformers', or the Auto class of the model's own."""
    own = sorted(getattr(config, "auto_map", None) or (), key=lambda name: name == "AutoModel")  # heads first
    if trusted and (found := [name for name in own if name.startswith("AutoModel")]):
        return getattr(transformers, found[0])
    named = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
    return next((found for found in named if found is not None), transformers.AutoModel)
