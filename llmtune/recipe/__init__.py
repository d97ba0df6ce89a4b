"""The recipe: its schema, how it is read, checked and written, and each task's facts; without torch or transformers."""

from llmtune.recipe.adapter_section import AdapterSection
from llmtune.recipe.builtin import find_recipe, list_recipes, new_recipe
from llmtune.recipe.data_section import DataSection, Source
from llmtune.recipe.gate_grammar import Gate, parse_gate
from llmtune.recipe.loader import LoadedRecipe, load_recipe, reload_recipe
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.schema import GenerationSection, Recipe, json_schema
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.task_sections import (
    ClassifySection,
    CompletionSection,
    PreferenceSection,
    QaSection,
    SpeechSection,
    TokenClassifySection,
    TranslateSection,
)
from llmtune.recipe.train_section import TrainSection

__all__ = [
    "TASK_FACTS",
    "AdapterSection",
    "ClassifySection",
    "CompletionSection",
    "DataSection",
    "Gate",
    "GenerationSection",
    "LoadedRecipe",
    "ModelSection",
    "PreferenceSection",
    "QaSection",
    "Recipe",
    "Source",
    "SpeechSection",
    "TokenClassifySection",
    "TrainSection",
    "TranslateSection",
    "find_recipe",
    "json_schema",
    "list_recipes",
    "load_recipe",
    "new_recipe",
    "parse_gate",
    "reload_recipe",
]
