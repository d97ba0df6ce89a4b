"""The recipe: its schema, how it is read, checked and written, and each task's facts; without torch or transformers."""

from llmtune.recipe.builtin import Shipped, find_recipe, list_recipes
from llmtune.recipe.gate_grammar import Gate, parse_gate
from llmtune.recipe.jsonschema import json_schema
from llmtune.recipe.loader import LoadedRecipe, keep_origins, load_recipe
from llmtune.recipe.recipe_reference import recipe_reference
from llmtune.recipe.schema import (
    DataSection,
    EvaluateSection,
    GenerationSection,
    Recipe,
    Source,
)
from llmtune.recipe.starter import new_recipe
from llmtune.recipe.task_facts import TASK_FACTS, TaskFacts
from llmtune.recipe.task_sections import (
    ClassifySection,
    CompletionSection,
    PreferenceSection,
    QaSection,
    SpeechSection,
    SummarizeSection,
    TokenClassifySection,
    TranslateSection,
)
from llmtune.recipe.tuning_sections import AdapterSection, ModelSection, TrainSection

__all__ = [
    "TASK_FACTS",
    "AdapterSection",
    "ClassifySection",
    "CompletionSection",
    "DataSection",
    "EvaluateSection",
    "Gate",
    "GenerationSection",
    "LoadedRecipe",
    "ModelSection",
    "PreferenceSection",
    "QaSection",
    "Recipe",
    "Shipped",
    "Source",
    "SpeechSection",
    "SummarizeSection",
    "TaskFacts",
    "TokenClassifySection",
    "TrainSection",
    "TranslateSection",
    "find_recipe",
    "json_schema",
    "keep_origins",
    "list_recipes",
    "load_recipe",
    "new_recipe",
    "parse_gate",
    "recipe_reference",
]
