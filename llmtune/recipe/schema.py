"""The recipe: every key that one may have, and the JSON Schema that follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from llmtune.recipe.adapter_section import AdapterSection
from llmtune.recipe.data_section import DataSection
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.section import Positive, RecipeSection, Seed, descriptions, find_section, one_or_more
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import TASK_FACTS, TaskVariant
from llmtune.recipe.task_sections import (
    ClassifySection,
    CompletionSection,
    PreferenceSection,
    QaSection,
    SpeechSection,
    SummarizeSection,
    TaskSection,
    TokenClassifySection,
    TranslateSection,
)
from llmtune.recipe.train_section import TrainSection

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASK_FACTS)]
EXTENDS = "A recipe file to start from, relative to this one: its values hold where this one states none."
Product = Literal["merged", "gguf"]
Products = Annotated[tuple[Product, ...], BeforeValidator(one_or_more, json_schema_input_type=Product | list[Product])]


class GenerationSection(RecipeSection):
    """How answers are generated, in evaluate, generate, chat and serve, by the names of `GenerationConfig`."""

    max_new_tokens: Positive = 128
    """Longest answer in tokens. Default 128: a paragraph."""
    do_sample: bool = False
    """Draw tokens at random. Default false: the same answer each time, so that scores can be compared."""
    temperature: float | None = Field(default=None, gt=0, le=100)
    """Above 1 more random, below 1 less. Default none: 1. Only with `do_sample`."""
    top_k: Positive | None = None
    """Draw among so many of the likeliest tokens. Default none: all. Only with `do_sample`."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Draw among tokens that make up this probability. Default none: 1. Only with `do_sample`."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Draw among tokens at least so likely, relative to the likeliest. Default none: 0. Only with `do_sample`."""
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    """Above 1 makes repeated tokens less likely. Default none: 1, no penalty."""
    num_beams: int = Field(default=1, ge=1, le=64)
    """Beams of beam search. Default 1: greedy, and the fastest."""

    def check(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report settings where nothing is generated, and settings of drawing at random where nothing is drawn."""
        if not variant.generates:
            for name in type(self).model_fields:
                why, fix = f"with task: {variant.task}", "Remove it: nothing is generated."
                diagnostics.no_effect(f"generation.{name}", why, fix, "task")
        if not self.do_sample:
            why, fix = "without generation.do_sample", "Set generation.do_sample to true, or remove it."
            names = ("temperature", "top_k", "top_p", "min_p")
            diagnostics.none_has_effect(self, "generation", names, why, fix, "generation.do_sample")


class Recipe(RecipeSection):
    """A whole recipe: what is tuned, on what, how, and what is measured. Where it runs is no part of it."""

    recipe_version: Literal[1] = 1
    """Version of the recipe format. Default 1, the only one so far."""
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run and of its folder. Default: the recipe file's name without its ending."""
    task: TaskName
    """What the model learns to do. Required: rows, loss and metrics depend on it."""
    seed: Seed = 42
    """Start of every random choice. Default 42: any number does, as long as it is kept."""
    data: DataSection
    """The rows. Required."""
    model: ModelSection
    """The model to start from. Required."""
    adapter: AdapterSection = AdapterSection()
    """What is trained. Default: LoRA on all linear layers."""
    train: TrainSection = TrainSection()
    """How the training loop runs. Default: one epoch."""
    generation: GenerationSection = GenerationSection()
    """How answers are generated. Default: greedily."""
    evaluate: EvaluateSection = EvaluateSection()
    """What is measured, and what must hold. Default: the task's metrics, no gates."""
    deploy: Products = ()
    """What `run` makes at the end: `merged`, `gguf`. Default none: the adapter is the result."""
    completion: CompletionSection | None = None
    """What only `task: completion` has. Default none: its keys' own defaults."""
    preference: PreferenceSection | None = None
    """What only `task: preference` has. Default none: its keys' own defaults."""
    qa: QaSection | None = None
    """What only `task: qa` has. Default none: its keys' own defaults."""
    translate: TranslateSection | None = None
    """What only `task: translate` has. Default none: its keys' own defaults."""
    summarize: SummarizeSection | None = None
    """What only `task: summarize` has. Default none: its keys' own defaults."""
    classify: ClassifySection | None = None
    """What only `task: classify` has. Default none: its keys' own defaults."""
    token_classify: TokenClassifySection | None = None
    """What only `task: token-classify` has. Default none: its keys' own defaults."""
    speech: SpeechSection | None = None
    """What only `task: speech` has. Default none: its keys' own defaults."""

    @property
    def needs_rows_apart(self) -> str | None:
        """Return why rows cannot be packed, or None."""
        noise = "the noise of train.neftune_noise_alpha depends on a row's length"
        return self.adapter.needs_rows_apart or (noise if self.train.neftune_noise_alpha is not None else None)

    @property
    def variant(self) -> TaskVariant:
        """The task as this recipe trains it."""
        adapter, hindrance = self.adapter, None
        if adapter.method == "full":
            hindrance = "with adapter.method: full there is no adapter that could be switched off"
        elif adapter.bias != "none":
            hindrance = f"with adapter.bias: {adapter.bias} a model differs from its base with its adapter off, too"
        own = self._own_section()
        return TaskVariant(
            self.task,
            objective=own.objective if isinstance(own, CompletionSection) else None,
            style=own.style if isinstance(own, QaSection) else None,
            loss=own.loss if isinstance(own, PreferenceSection) else None,
            kl_hindrance=hindrance,
        )

    def task_section(self) -> dict[str, object] | None:
        """Return the section that only this task has; once labels are inferred it holds them too."""
        name = TASK_FACTS[self.task].section
        return self._own_section().model_dump(mode="json") if name and getattr(self, name) else None

    def _own_section(self) -> TaskSection:
        """Return the section that only this task has, with its defaults where the recipe states none."""
        name = TASK_FACTS[self.task].section
        if name is None:
            return TaskSection()
        section: TaskSection | None = getattr(self, name)
        kind = find_section(type(self).model_fields[name].annotation)
        assert kind is not None
        assert issubclass(kind, TaskSection)
        return section or kind()

    def check(self, diagnostics: Diagnostics) -> None:
        """Report everything that is wrong with a recipe whose keys and values fit the schema."""
        variant = self.variant
        for task, facts in TASK_FACTS.items():
            section: TaskSection | None = getattr(self, facts.section) if facts.section else None
            if section and facts.section and task != self.task:
                fix = f"Remove it; it belongs to task: {task}."
                diagnostics.no_effect(facts.section, f"with task: {self.task}", fix, "task")
            if section:
                section.check(diagnostics, self.data.max_length)
        self.data.check(diagnostics, variant)
        self.model.check(diagnostics, variant, bool(self.data.validation))
        self.adapter.check(diagnostics, variant, bool(self.model.add_tokens))
        self.train.check(diagnostics, self.data, self.adapter, self.seed, variant)
        self.train.check_task(diagnostics, variant)
        self.generation.check(diagnostics, variant)
        self.evaluate.check(diagnostics, variant, has_test=bool(self.data.test))
        self._check_deploy(diagnostics, variant)

    def _check_deploy(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        if "merged" in self.deploy and self.adapter.method == "full":
            fix = "Remove it: `weights/` in the run folder is the whole model."
            diagnostics.add("deploy", "'merged' has no effect with adapter.method: full", fix, "adapter.method")
        reason = self.adapter.unmergeable
        for product in self.deploy if reason else ():
            what = f"'deploy: {product}' cannot be made with adapter.method: {self.adapter.method}: {reason}"
            diagnostics.add("deploy", what, "Remove it; the adapter is the result.", "adapter.method")
        readable = (variant.facts.decodes and not variant.is_masked) or variant.facts.answer_kind == "labels"
        if "gguf" in self.deploy and not readable:
            what = f"'deploy: gguf' has no effect with task: {self.task}: llama.cpp has no such model"
            diagnostics.add("deploy", what, "Remove it.", "task")
        diagnostics.repeated("deploy", self.deploy, "the same thing")


def json_schema() -> dict[str, object]:
    """Return the JSON Schema (2020-12). It is looser than `llmtune recipes check`, which knows what rests on what.

    Required keys may come from an extended recipe, so the schema requires them only without `extends`.
    """
    describe_keys(RecipeSection)
    schema = Recipe.model_json_schema()
    required = schema.pop("required")
    schema["$defs"]["DataSection"].pop("required")
    extends = {"extends": {"type": "string", "minLength": 1, "title": "Extends", "description": EXTENDS}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "llmtune recipe",
        "properties": {**extends, **schema["properties"]},
        "anyOf": [{"required": ["extends"]}, {"required": required}],
    }


def describe_keys(section: type[RecipeSection]) -> None:
    """Put the text below each key into its description, in a section and all that are made from it."""
    for inner in section.__subclasses__():
        describe_keys(inner)
    texts = descriptions(section)
    for name, field in section.model_fields.items():
        field.description = texts.get(name)
    section.model_rebuild(force=True)
