"""Which parts of a model that reads pictures are trained: its projector on request, and nothing else of its towers."""

from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedModel

from llmtune.errors import RecipeError
from llmtune.model.config import in_heads
from llmtune.model.towers import find_projectors, tower_modules
from llmtune.recipe.adapter_section import AdapterSection


def name_projectors(model: PreTrainedModel, adapter: AdapterSection) -> list[str]:
    """Return the modules of `adapter.train_projector`, if set; raises RecipeError if the model has no separate one."""
    names = find_projectors(model) if adapter.train_projector else []
    if adapter.train_projector and not names:
        what = f"in a {type(model).__name__} no module is the projector: it is a part of the model's towers"
        raise RecipeError.of(what, "adapter.train_projector", "Omit it: the towers stay as they are.")
    return names


def freeze_rest(model: PeftModel, adapter: AdapterSection) -> None:
    """Freeze biases of towers, which PEFT trains with `bias: all`, in place.

    Raises RecipeError for a method that adapts modules of towers: the method chooses them, not the recipe.
    """
    towers = tower_modules(model.get_base_model())
    for name, parameter in model.named_parameters() if towers else ():
        inner = name.removeprefix("base_model.model.")
        if not parameter.requires_grad or ".modules_to_save." in name or not in_heads(inner, towers):
            continue
        if not (adapter.bias == "all" and inner.endswith("bias")):
            what = f"{adapter.method} would train {inner}, a part that reads images, and these stay frozen"
            raise RecipeError.of(what, "adapter.method", "Use lora, or name modules in adapter.target_modules.")
        parameter.requires_grad_(False)
