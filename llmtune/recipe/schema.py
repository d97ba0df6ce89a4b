"""The recipe: every key that one may have, with its meaning, unit and the reason of its default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from llmtune.recipe.base_section import Many, Section, by_kind, one_or_more
from llmtune.recipe.eval_suites_section import BenchmarkSection, FairnessSection, ForgettingSection
from llmtune.recipe.task_facts import TASK_FACTS
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

TaskName = Literal[
    "chat", "completion", "translate", "summarize", "qa", "classify", "token-classify", "speech", "preference"
]
Format = Literal[
    "jsonl",
    "json",
    "csv",
    "parquet",
    "text",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "source-target",
    "translation",
    "document-summary",
    "squad",
    "question-answer",
    "text-label",
    "tokens-tags",
    "text-spans",
    "audio-text",
    "audio-folder",
    "chosen-rejected",
    "conversation-pair",
    "answer-thumb",
    "conversation-thumb",
]


class Source(Section):
    """Where rows come from. A plain text stands for its `path`."""

    path: str = Field(
        min_length=1,
        description="A file, a glob, a folder, `hub:NAME` or `builtin:NAME`. Relative to the file that states it.",
    )
    config: str | None = Field(
        default=None, min_length=1, description="Configuration of a hub data set. Default none: the set's own default."
    )
    split: str | None = Field(
        default=None,
        min_length=1,
        description="Split of a hub data set. Default none: `train`, or the only one there is.",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        description="Branch, tag or commit of a hub data set. Default none: the newest. The lock "
        "file notices when it has changed; a commit keeps it still.",
    )
    format: Format | None = Field(
        default=None,
        description="How a file is read (`jsonl`, `json`, `csv`, `parquet`, `text`) or what its rows are (such as "
        "`messages` or `text-label`; each task knows its own). Default none: found out by looking.",
    )
    columns: dict[str, str] = Field(
        default={},
        description="Names of columns: ours on the left, the file's on the right. Default none: the usual names.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="How often these rows count beside those of the other sources. Default 1: as they are.",
    )
    limit: int | None = Field(default=None, ge=1, description="Read at most so many rows. Default none: all of them.")


def as_sources(value: object) -> object:
    """Turn a source or a list of them into a tuple; a plain text is a source's path."""
    return as_sections(value, "path")


def as_benchmarks(value: object) -> object:
    """Turn a benchmark or a list of them into a tuple; a plain text is a benchmark's task."""
    return as_sections(value, "task")


def as_sections(value: object, key: str) -> object:
    """Turn one or more mappings into a tuple; a plain text is the value of `key`."""
    items = one_or_more(value)
    if not isinstance(items, tuple):
        return value
    return tuple({key: item} if isinstance(item, str) else item for item in items)


Sources = Annotated[
    tuple[Source, ...],
    Field(min_length=1),
    BeforeValidator(as_sources, json_schema_input_type=str | Source | list[str | Source]),
]
Sides = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag("share")] | Annotated[Sources, Tag("sources")],
    by_kind({bool: "share", int: "share", float: "share"}, "sources"),
]


class DataSection(Section):
    """The rows: where they come from, how they are split, and what of them is learned."""

    train: Sources = Field(description="The rows to learn from: a source or a list of them. Required.")
    validation: Sides = Field(
        default=0.05,
        description="All that training may look at (its loss, early stopping, best checkpoint): a share of the "
        "rows, or sources. 0 is none. Default 0.05: enough for a steady loss.",
    )
    test: Sides = Field(
        default=0.1,
        description="Read by `evaluate` alone: a share of the rows, or sources. 0 is none. Default 0.1: enough rows"
        " for an interval, few enough to keep rows for training.",
    )
    split_by: str | None = Field(
        default=None,
        min_length=1,
        description="Column whose equal values stay on one side of the split. Default none: a row's own content "
        "decides.",
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        default="near",
        description="Drop rows that are equal, or nearly so. Default `near`: repeated rows are learned by heart, "
        "and a near copy in test flatters the score.",
    )
    max_dropped: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Highest share of bad rows, and of over-long ones unless `on_overlong` says drop. Default 0.05:"
        " more than that is a mistake in the data or in the recipe.",
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="Which turns are learned: all of the assistant's, its last one, or every token. A message may "
        "say `train: false`. Default `assistant`: what the model has to say.",
    )
    max_length: int = Field(
        default=1024, ge=8, description="Longest row in tokens. Default 1024: holds most chats; memory grows with it."
    )
    on_overlong: Literal["error", "drop", "truncate", "split"] = Field(
        default="error",
        description="What becomes of a longer row. Default `error`: nothing is cut without being asked for.",
    )
    packing: bool = Field(
        default=True,
        description="Join rows of one step without padding; attention stays within each row. Encoders too, where that "
        "is proven for the model; others are padded among rows of like length, and the run says why. Default true: the "
        "same loss, and no work on padding.",
    )


class GenerationSection(Section):
    """How answers are generated, in evaluate, generate, chat and serve, by the names of `GenerationConfig`."""

    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer in tokens. Default 128: a paragraph.")
    do_sample: bool = Field(
        default=False,
        description="Draw tokens at random. Default false: the same answer each time, so that scores can be compared.",
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="Above 1 more random, below 1 less. Default none: 1. Only with `do_sample`.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="Draw among so many of the likeliest tokens. Default none: all. Only with `do_sample`.",
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Draw among tokens that make up this probability. Default none: 1. Only with `do_sample`.",
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Draw among tokens at least so likely, relative to the likeliest. Default none: 0. Only with "
        "`do_sample`.",
    )
    repetition_penalty: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="Above 1 makes repeated tokens less likely. Default none: 1, no penalty.",
    )
    num_beams: int = Field(
        default=1, ge=1, le=64, description="Beams of beam search. Default 1: greedy, and the fastest."
    )


Choices = Annotated[
    Annotated[Literal["auto"], Tag("text")]
    | Annotated[Many[Annotated[str, Field(min_length=1)]], Field(min_length=2), Tag("items")],
    by_kind({str: "text"}, "items"),
]


Benchmarks = Annotated[
    tuple[BenchmarkSection, ...],
    BeforeValidator(as_benchmarks, json_schema_input_type=str | BenchmarkSection | list[str | BenchmarkSection]),
]


class EvaluateSection(Section):
    """What is measured on the test rows, for the base model and the tuned one, and what must hold."""

    metrics: Many[str] = Field(
        default=(),
        description="Metrics to compute, of those that the task knows. Default none stated: the task's own choice "
        "of them.",
    )
    gates: Many[str] = Field(
        default=(),
        description="Conditions such as `exact_match >= 0.8`, `rougeL > base` or `exact_match.low > base`; one that"
        " fails ends the run with exit code 6. Default none: a gate is a decision.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Most test rows that answers are generated for. Default none: all; a limit saves time.",
    )
    choices: Choices | None = Field(
        default="auto",
        description="The possible answers, scored by likelihood as `choice_accuracy`: a list, `auto` (where the "
        "rows' answers are few), or null for never. Default `auto`: a gain in answer format alone is "
        "then not sold as a gain.",
    )
    samples: int = Field(
        default=5,
        ge=0,
        le=1000,
        description="Answers shown side by side in the report, and at most so many (but no more than 5) of the rows"
        " that flipped from wrong to right, or from right to wrong. Default 5: enough to see the manner.",
    )
    slices: Many[str] = Field(
        default=(),
        description="Columns of the rows, used by the task or not: the scores are also given for each value of them, "
        "with their intervals. Numbers of many values are put into four ranges. Default none: a part of "
        "the rows is worth a look where somebody has a question about it.",
    )
    forgetting: ForgettingSection | None = Field(
        default=None,
        description="General text and questions, before and after tuning; `{}` takes its keys' defaults. Default none: "
        "it costs about a minute for each model.",
    )
    fairness: FairnessSection | None = Field(
        default=None,
        description="Paired sentences, swapped words and gaps between groups; `{}` takes its keys' defaults. Default "
        "none: what is fair is a question to be asked on purpose.",
    )
    benchmarks: Benchmarks = Field(
        default=(),
        description="Public benchmarks by lm-evaluation-harness (extra `benchmarks`): names of its tasks or task "
        "files. Default none: most of them are large and come over the network.",
    )

    @property
    def columns(self) -> dict[str, str]:
        """Columns that are kept beside the test rows, each with the key that names it."""
        groups = self.fairness.groups if self.fairness else ()
        return dict.fromkeys(groups, "evaluate.fairness.groups") | dict.fromkeys(self.slices, "evaluate.slices")


Product = Literal["merged", "gguf"]
Products = Annotated[tuple[Product, ...], BeforeValidator(one_or_more, json_schema_input_type=Product | list[Product])]


def own_section(task: str) -> Any:
    """Describe the section that only one task has."""
    return Field(default=None, description=f"What only `task: {task}` has. Default none: its keys' own defaults.")


class Recipe(Section):
    """A whole recipe: what is tuned, on what, how, and what is measured. Where it runs is no part of it."""

    recipe_version: Literal[1] = Field(
        default=1, description="Version of the recipe format. Default 1, the only one so far."
    )
    name: str = Field(
        default="run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Name of the run and of its folder. Default: the recipe file's name without its ending.",
    )
    task: TaskName = Field(description="What the model learns to do. Required: rows, loss and metrics depend on it.")
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**32,
        description="Start of every random choice. Default 42: any number does, as long as it is kept.",
    )
    data: DataSection = Field(description="The rows. Required.")
    model: ModelSection = Field(description="The model to start from. Required.")
    adapter: AdapterSection = Field(
        default=AdapterSection(), description="What is trained. Default: LoRA on all linear layers."
    )
    train: TrainSection = Field(default=TrainSection(), description="How the training loop runs. Default: one epoch.")
    generation: GenerationSection = Field(
        default=GenerationSection(), description="How answers are generated. Default: greedily."
    )
    evaluate: EvaluateSection = Field(
        default=EvaluateSection(),
        description="What is measured, and what must hold. Default: the task's metrics, no gates.",
    )
    deploy: Products = Field(
        default=(),
        description="What `run` makes at the end: `merged`, `gguf`. Default none: the adapter is the result.",
    )
    completion: CompletionSection | None = own_section("completion")
    preference: PreferenceSection | None = own_section("preference")
    qa: QaSection | None = own_section("qa")
    translate: TranslateSection | None = own_section("translate")
    summarize: SummarizeSection | None = own_section("summarize")
    classify: ClassifySection | None = own_section("classify")
    token_classify: TokenClassifySection | None = own_section("token-classify")
    speech: SpeechSection | None = own_section("speech")

    def task_section(self) -> dict[str, Any] | None:
        """Return the section that only this task has; once labels are inferred it holds them too."""
        name = TASK_FACTS[self.task].section
        section: Section | None = getattr(self, name) if name else None
        return section.model_dump(mode="json") if section else None
