"""The recipe: all of its keys, and the JSON Schema generated from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from llmtune.errors import Problem
from llmtune.recipe.adapter_section import AdapterSection
from llmtune.recipe.class_names import follow_renames
from llmtune.recipe.control_run import ControlRun, find_control_run_problem
from llmtune.recipe.data_section import DataSection
from llmtune.recipe.distil_section import DistilSection
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.recipe.model_kind import TEMPLATE_KEYS, ModelKind
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.reinforce_section import ReinforceSection
from llmtune.recipe.section import Positive, RecipeSection, Seed, descriptions, find_section, one_or_more
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.task_sections import (
    EMBED_KEYS,
    QA_KEYS,
    ChatSection,
    ClassifySection,
    CompletionSection,
    EmbedSection,
    PreferenceSection,
    QaSection,
    RerankSection,
    SpeechSection,
    SummarizeSection,
    TaskSection,
    TokenClassifySection,
    TranslateSection,
)
from llmtune.recipe.task_variant import TaskVariant
from llmtune.recipe.train_section import TrainSection

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASK_FACTS)]
EXTENDS = "A recipe file to inherit from, relative to this one. Values set here override inherited ones."
Product = Literal["merged", "gguf", "gguf-q8_0", "gguf-q4_k_m", "onnx", "onnx-int8", "w4a16", "w8a8", "fp8", "release"]
RELEASE = "release"
"""The product that is no export: it is promoted after all gates."""
QUANTIZED = ("w4a16", "w8a8", "fp8")
"""Those in the compressed-tensors format."""
Products = Annotated[tuple[Product, ...], BeforeValidator(one_or_more, json_schema_input_type=Product | list[Product])]


class GenerationSection(RecipeSection):
    """How answers are generated, in evaluate, generate, chat and serve, by the names of `GenerationConfig`."""

    max_new_tokens: Positive = 128
    """Longest answer in tokens. Default 128: a paragraph."""
    do_sample: bool = False
    """Sample tokens at random. Default false: answers repeat exactly, so scores can be compared."""
    temperature: float | None = Field(default=None, gt=0, le=100)
    """Sampling temperature: above 1 is more random, below 1 less. Default none: 1. Only with `do_sample`."""
    top_k: Positive | None = None
    """Sample from this many of the likeliest tokens. Default none: all. Only with `do_sample`."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the likeliest tokens that reach this total probability. Default none: 1. Only with `do_sample`."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Sample from tokens at least this likely, relative to the likeliest. Default none: 0. Only with `do_sample`."""
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    """Above 1 makes repeated tokens less likely. Default none: 1, no penalty."""
    num_beams: int = Field(default=1, ge=1, le=64)
    """Number of beams in beam search. Default 1: no beam search, which is fastest."""

    def check(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report settings if the task generates nothing, and sampling settings if `do_sample` is off."""
        if not variant.generates:
            for name in type(self).model_fields:
                why, fix = f"with task: {variant.task}", "Remove it: nothing is generated."
                diagnostics.no_effect(f"generation.{name}", why, fix, "task")
        if not self.do_sample:
            why, fix = "without generation.do_sample", "Set generation.do_sample to true, or remove it."
            names = ("temperature", "top_k", "top_p", "min_p")
            diagnostics.none_has_effect(self, "generation", names, why, fix, "generation.do_sample")


class DeploySection(RecipeSection):
    """What is made of a trained model. A list, or one name, is short for `products`."""

    products: Products = ()
    """Exports that `run` makes at the end, each certified, and scored on the test rows by its own runtime: `merged`,
    `gguf` (F16), `gguf-q8_0`, `gguf-q4_k_m`, `onnx`, `onnx-int8`; for vLLM `w4a16`, `w8a8`, `fp8`. With `release`, the
    model becomes the current release of the recipe's `name` once all gates and certificates have passed. Default none:
    the adapter is the result."""
    limit: Positive | None = None
    """Most test rows that each export is scored on, spread evenly over all of them: runtimes on the CPU are slow.
    Intervals get wider accordingly, and certificates have the number. Default none: all test rows."""


def as_products(value: object) -> object:
    """Convert the short forms of `deploy`, a list or one name, to the section."""
    return {"products": value} if isinstance(value, str | list | tuple) else value


Deploy = Annotated[
    DeploySection, BeforeValidator(as_products, json_schema_input_type=Product | list[Product] | DeploySection)
]


class Recipe(RecipeSection):
    """A complete recipe: model, rows, training and evaluation. It does not say where to run."""

    recipe_version: Literal[1] = 1
    """Version of the recipe format. Default 1, the only version so far."""
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run and its folder. Default: the recipe's file name without extension."""
    task: TaskName
    """Task the model learns. Required: rows, loss and metrics depend on it."""
    seed: Seed = 42
    """Seed of every random choice. Default 42: any number works; keep it to repeat a run."""
    data: DataSection
    """The rows. Required."""
    model: ModelSection
    """The model to start from. Required."""
    adapter: AdapterSection = AdapterSection()
    """The trained parameters. Default: LoRA on all linear layers."""
    train: TrainSection = TrainSection()
    """How the training loop runs. Default: one epoch."""
    generation: GenerationSection = GenerationSection()
    """How answers are generated. Default: greedily."""
    evaluate: EvaluateSection = EvaluateSection()
    """Metrics to compute and gates to pass. Default: the task's metrics, no gates."""
    deploy: Deploy = DeploySection()
    """What `run` makes at the end: a list of products, or a section. Default none: the adapter is the result."""
    completion: CompletionSection | None = None
    """Settings of `task: completion`. Default none: the defaults of its keys."""
    preference: PreferenceSection | None = None
    """Settings of `task: preference`. Default none: the defaults of its keys."""
    qa: QaSection | None = None
    """Settings of `task: qa`. Default none: the defaults of its keys."""
    translate: TranslateSection | None = None
    """Settings of `task: translate`. Default none: the defaults of its keys."""
    summarize: SummarizeSection | None = None
    """Settings of `task: summarize`. Default none: the defaults of its keys."""
    classify: ClassifySection | None = None
    """Settings of `task: classify`. Default none: the defaults of its keys."""
    token_classify: TokenClassifySection | None = None
    """Settings of `task: token-classify`. Default none: the defaults of its keys."""
    chat: ChatSection | None = None
    """Settings of `task: chat`. Default none: the defaults of its keys."""
    speech: SpeechSection | None = None
    """Settings of `task: speech`. Default none: the defaults of its keys."""
    embed: EmbedSection | None = None
    """Settings of `task: embed`. Default none: the defaults of its keys."""
    rerank: RerankSection | None = None
    """Settings of `task: rerank`. Default none: the defaults of its keys."""
    reinforce: ReinforceSection | None = None
    """Settings of `task: reinforce`, which needs `rewards`. Default none."""
    distil: DistilSection | None = None
    """Learn from a teacher, next to the labels. Default none: the labels are all that the model learns."""

    @property
    def exports(self) -> tuple[str, ...]:
        """Return the products that are exports: all but `release`."""
        return tuple(product for product in self.deploy.products if product != RELEASE)

    @property
    def control_run(self) -> ControlRun | None:
        """Return the control run of one of its sections, also if it is turned off; None without test rows."""
        return next(self._control_runs(), None) if self.data.test else None

    def _control_runs(self) -> Iterator[ControlRun]:
        controls = (value.as_control() for _, value in self if isinstance(value, RecipeSection))
        return (one for one in controls if one is not None)

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
            hindrance = "with adapter.method: full no adapter can be switched off"
        elif adapter.bias != "none":
            hindrance = f"with adapter.bias: {adapter.bias} a model differs from its base even with its adapter off"
        section = self._own_section()
        return TaskVariant(
            self.task,
            objective=section.objective if isinstance(section, CompletionSection) else None,
            style=section.style if isinstance(section, QaSection) else None,
            loss=section.loss if isinstance(section, PreferenceSection) else None,
            images=section.images if isinstance(section, ChatSection) else None,
            kl_hindrance=hindrance,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of classes or entity types that the recipe lists, or that were inferred."""
        section = self._own_section()
        return section.labels or () if isinstance(section, ClassifySection | TokenClassifySection) else ()

    def with_section(self, **update: object) -> Recipe:
        """Return the recipe with these values in the section of its task."""
        section = self._own_section()
        assert section is not None
        return self.model_copy(update={str(TASK_FACTS[self.task].section): section.model_copy(update=update)})

    def with_classes(self, names: Sequence[str]) -> Recipe:
        """Return the recipe with these names of classes or entity types; unchanged without any."""
        section = self._own_section()
        if not names or not isinstance(section, ClassifySection | TokenClassifySection):
            return self
        return self.with_section(labels=tuple(names))

    @property
    def renames(self) -> dict[str, str]:
        """Return the last new name of each class that the recipe renames."""
        section = self._own_section()
        return (
            follow_renames(section.rename or {}) if isinstance(section, ClassifySection | TokenClassifySection) else {}
        )

    def task_section(self, *, measuring: bool = False) -> dict[str, object] | None:
        """Return the task's own section, including inferred labels once they are known, without its control run.

        With `measuring`, without keys that change the training alone.
        """
        name, section = TASK_FACTS[self.task].section, self._own_section()
        left_out = {"control", *(section.training_keys if measuring else ())}
        return section.model_dump(mode="json", exclude=left_out) if name and getattr(self, name) else None

    def _own_section(self) -> TaskSection:
        """Return the task's own section; keys the recipe does not set have their defaults."""
        name = TASK_FACTS[self.task].section
        if name is None:
            return TaskSection()
        section: TaskSection | None = getattr(self, name)
        kind = find_section(type(self).model_fields[name].annotation)
        assert kind is not None
        assert issubclass(kind, TaskSection)
        return section or kind()

    def check(self, diagnostics: Diagnostics) -> None:
        """Report every error in a recipe that already fits the schema."""
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
        if self.distil:
            self.distil.check(diagnostics, variant, self.train.loss_type)
        self.generation.check(diagnostics, variant)
        self.evaluate.check(diagnostics, variant, bool(self.data.test), self.exports, bool(self.data.validation))
        for one in () if self.data.test else self._control_runs():
            fix = "Give data.test a share of the rows or sources, or remove it."
            diagnostics.no_effect(one.key, "without test rows", fix, "data.test")
        for key, gate in self.evaluate.parsed_gates():
            if problem := find_control_run_problem(gate, control := self.control_run):
                diagnostics.add(key, *problem, *([control.key] if control else []))
        self._check_deploy(diagnostics, variant)

    def _check_deploy(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        if "merged" in self.exports and self.adapter.method == "full":
            fix = "Remove it: `weights/` in the run folder is already the complete model."
            diagnostics.add("deploy", "'merged' has no effect with adapter.method: full", fix, "adapter.method")
        unmergeable = self.adapter.unmergeable
        for product in self.exports if unmergeable else ():
            what = f"'deploy: {product}' cannot be made with adapter.method: {self.adapter.method}: {unmergeable}"
            diagnostics.add("deploy", what, "Remove it; the adapter is the result.", "adapter.method")
        readable = (variant.facts.decodes and not variant.is_masked) or variant.facts.answer_kind == "labels"
        for product in self.exports if not readable else ():
            if product.startswith("gguf"):
                what = (
                    f"'deploy: {product}' has no effect with task: {self.task}: llama.cpp does not support its models"
                )
                diagnostics.add("deploy", what, "Remove it.", "task")
        reason, key = variant.without_decoder or ("", "task")
        for product in self.exports if reason else ():
            if product in QUANTIZED:
                what = f"'deploy: {product}' is for models that continue a text: {reason}"
                diagnostics.add("deploy", what, "Remove it.", key)
        if RELEASE in self.deploy.products and not self.data.test:
            fix = "Give data.test a share of the rows, or remove it from `deploy`."
            diagnostics.add("deploy", "'release' needs scores, but there are no test rows", fix, "data.test")
        diagnostics.repeated("deploy", self.deploy.products, "the same thing")
        if not self.data.test:
            fix = "Give data.test a share of the rows or sources, or remove it."
            diagnostics.no_effect("deploy.limit", "without test rows", fix, "data.test")


def find_idle_keys(recipe: Recipe, kind: ModelKind, style: str | None) -> Iterator[Problem]:
    """Yield the keys of a resolved recipe that have no effect on its kind of model and of rows, or do not fit them.

    `style` is that of a qa model.
    """
    if not kind.takes_images:
        yield from _idle_problems("adapter", recipe.adapter, ["train_projector"], "without pictures")
        yield from _idle_problems("model", recipe.model, ["image_pixels"], "without pictures")
    elif recipe.adapter.is_prompt:
        what = f"'adapter.method' is {recipe.adapter.method}, which does not work with pictures"
        yield Problem(f"{what}: it gives the model vectors instead of tokens", "adapter.method", "Use lora.")
    if recipe.qa is not None and style is not None:
        others = (name for other, names in QA_KEYS.items() if other != style for name in names)
        fix = f"Remove it, and set qa.style: {style}."
        yield from _idle_problems("qa", recipe.qa, others, f"the model's style is {style}", fix)
    if recipe.embed is not None:
        others = (name for name, losses in EMBED_KEYS.items() if recipe.embed.loss not in losses)
        yield from _idle_problems("embed", recipe.embed, others, f"the loss of these rows is {recipe.embed.loss}")
    if not kind.reads_template and recipe.variant.facts.templated:
        for name, section in (("data", recipe.data), ("model", recipe.model)):
            yield from _idle_problems(name, section, TEMPLATE_KEYS[name], "this kind of model reads no chat template")
    if style == "extractive":
        generation = recipe.generation
        yield from _idle_problems("generation", generation, type(generation).model_fields, "the model marks answers")


def _idle_problems(
    name: str, section: RecipeSection, keys: Iterable[str], why: str, fix: str = "Remove it."
) -> Iterator[Problem]:
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            yield Problem(f"'{name}.{key}' has no effect: {why}", f"{name}.{key}", fix)


def json_schema() -> dict[str, object]:
    """Return the JSON Schema (2020-12). Only `llmtune recipes check` knows how keys depend on each other.

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
    """Copy the docstring of each key to its description, in a section and its subclasses."""
    for inner in section.__subclasses__():
        describe_keys(inner)
    texts = descriptions(section)
    for name, field in section.model_fields.items():
        field.description = texts.get(name)
    section.model_rebuild(force=True)
