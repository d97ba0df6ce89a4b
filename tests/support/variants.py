"""The variants of the tasks by name, and predictions on the CPU."""

from collections.abc import Callable
from typing import Any

import torch

from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.recipe.schema import Recipe
from llmtune.tasks.base import AnyTask
from llmtune.tasks.registry import VARIANTS

CHAT, IMAGE_CHAT = VARIANTS["chat"]
COMPLETION, MASKED = VARIANTS["completion"]
TRANSLATE, TRANSLATE_DECODER = VARIANTS["translate"]
SUMMARIZE, SUMMARIZE_DECODER = VARIANTS["summarize"]
EXTRACTIVE_QA, QA, QA_DECODER = VARIANTS["qa"]
(CLASSIFY,) = VARIANTS["classify"]
(TOKEN_CLASSIFY,) = VARIANTS["token-classify"]
WHISPER, CTC = VARIANTS["speech"]
PREFERENCE, REWARD = VARIANTS["preference"]


def predict(
    task: AnyTask,
    model: torch.nn.Module,
    rows: Any,
    processor: Any,
    recipe: Recipe,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Any]:
    return task.predict(rows, LoadedModel(model, processor, recipe, "cpu", advance))
