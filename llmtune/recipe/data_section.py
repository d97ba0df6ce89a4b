"""The section `data`: where the rows come from, how they are split, and what of them is learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, Tag

from llmtune.errors import nearest
from llmtune.recipe.section import (
    REMOTE,
    STORES,
    Many,
    NonEmpty,
    Positive,
    RecipeSection,
    absolute,
    by_type,
    one_or_more,
    sections_by,
)
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import COLUMNS, ROW_FORMATS, WITH_ROLES, TaskVariant

SPLITS = ("train", "validation", "test")
ENCODING_KEYS = (
    *("max_length", "on_overlong", "train_on"),
    *("reasoning", "special_tokens_in_text", "unknown_tokens", "system_prompt"),
)
"""Keys that encoded examples depend on, and rows do not."""
Container = Literal["jsonl", "json", "csv", "parquet"]
MessageRole = Literal["system", "user", "assistant", "tool"]
DATA_ENDINGS: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
"""How a file is read, by the ending of its name."""
PACKED = (".gz", ".zst", ".zstd")
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(dict.fromkeys((*get_args(Container), "text", *ROW_FORMATS)))]


def absolute_source(path: str, folder: Path) -> str:
    """Make a source's path absolute unless it is `hub:NAME`, `builtin:NAME` or an address."""
    return path if path.startswith((*REMOTE, *STORES)) else absolute(path, folder, pattern=True)


class Source(RecipeSection):
    """Where rows come from. A plain text stands for its `path`."""

    path: NonEmpty
    """A file, a glob, a folder, an address (`s3://`, `gs://`, `https://`), `hub:NAME` or `builtin:NAME`. Relative to
    the file that states it."""
    config: NonEmpty | None = None
    """Configuration of a hub data set. Default none: the set's own default."""
    split: NonEmpty | None = None
    """Split of a hub data set. Default none: `train`, or the only one there is."""
    revision: NonEmpty | None = None
    """Branch, tag or commit of a hub data set. Default none: the newest. The lock file notices when it has changed; a
    commit keeps it still."""
    format: Format | None = None
    """How a file is read (`jsonl`, `json`, `csv`, `parquet`, `text`) or what its rows are (such as `messages` or
    `text-label`; each task knows its own). Default none: found out by looking."""
    columns: dict[str, str] = Field(default={})
    """Names of columns: ours on the left, on the right the file's, a key within one such as `thread.messages`, or a
    template of them such as `"{subject}\\n\\n{body}"`. Default none: `data.columns`."""
    encoding: NonEmpty | None = None
    """Encoding of a text file, by its name in Python, such as `cp1252` or `utf-16`. Default none: UTF-8."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often these rows count beside those of the other sources. Default 1: as they are."""
    limit: Positive | None = None
    """Read at most so many rows. Default none: all of them."""

    paths: ClassVar = {"path": absolute_source}

    def check(self, diagnostics: Diagnostics, key: str, variant: TaskVariant) -> None:
        """Report what is wrong with the source at `key`."""
        kind, _, name = self.path.partition(":")
        if self.path.startswith(REMOTE) and not name.strip():
            diagnostics.add(f"{key}.path", f"'{key}.path' is {self.path!r}, without a name", f"Write {kind}:NAME.")
        elif self.path.startswith(STORES):
            self._check_address(diagnostics, f"{key}.path", variant)
        elif "://" in self.path:
            what = f"'{key}.path' is {self.path!r}, an address that is not read"
            fix = f"Use a file, a glob, a folder, {', '.join(STORES)}, hub:NAME or builtin:NAME."
            diagnostics.add(f"{key}.path", what, fix)
        if kind != "hub":
            fix = "Remove it, or name a hub data set."
            hub_keys = ("config", "split", "revision")
            diagnostics.none_has_effect(self, key, hub_keys, "except for hub:NAME", fix, f"{key}.path")
        elif self.format in get_args(Container):
            fix = "Remove it, or name a row format."
            diagnostics.no_effect(f"{key}.format", "for a hub data set", fix, f"{key}.path")
        elif self.encoding is not None:
            diagnostics.no_effect(f"{key}.encoding", "for a hub data set", "Remove it.", f"{key}.path")
        if self.encoding is not None and not _is_encoding(self.encoding):
            what = f"'{key}.encoding' is {self.encoding!r}, which Python does not know"
            diagnostics.add(f"{key}.encoding", what, "Write its name in Python, such as cp1252, latin-1 or utf-16.")
        formats = variant.facts.formats
        if self.format in ROW_FORMATS and self.format not in formats:
            what = f"'{key}.format' is '{self.format}', which task: {variant.task} cannot use"
            diagnostics.add(f"{key}.format", what, f"Row formats of this task: {', '.join(formats)}.", "task")
        check_names(self.columns, f"{key}.columns", diagnostics)

    def _check_address(self, diagnostics: Diagnostics, key: str, variant: TaskVariant) -> None:
        """Refuse what may be a secret, which does not belong into a recipe, and is not shown here either."""
        address = urlsplit(self.path)
        web = address.scheme.startswith("http")
        if "@" in address.netloc or (web and (address.query or address.fragment)):
            what = f"'{key}' is an address with a password or a query, which would stand in every report"
            fix = "Put passwords into ~/.netrc; for signed addresses use s3:// or gs:// with credentials."
            diagnostics.add(key, what, fix)
        elif not address.netloc or not address.path.strip("/"):
            diagnostics.add(key, f"'{key}' is {self.path!r}, which names no file", "Write BUCKET/FILE behind it.")
        elif web and ("*" in self.path or self.path.endswith("/")):
            diagnostics.add(key, f"'{key}' is {self.path!r}: web servers list no files", "Name each file.")
        if variant.facts.takes_audio:
            diagnostics.add(key, f"'{key}' is an address; recordings are read from disk", "Fetch them first.", "task")


def data_ending(path: PurePath) -> str:
    """Return the ending that tells the kind of file, with what it is packed in taken off."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def check_names(columns: Mapping[str, str], key: str, diagnostics: Diagnostics) -> None:
    """Report mapped columns that llmtune does not know."""
    for column in columns:
        if column not in COLUMNS:
            what = f"'{key}' maps '{column}', which is not a column that llmtune knows"
            fix = f"{nearest(column, COLUMNS)} Write ours on the left: {', '.join(COLUMNS)}.".strip()
            diagnostics.add(f"{key}.{column}", what, fix)


def _is_encoding(name: str) -> bool:
    try:
        "a".encode(name)
    except LookupError:  # unknown, or an encoding of bytes
        return False
    return True


Sources = Annotated[
    tuple[Source, ...],
    Field(min_length=1),
    BeforeValidator(sections_by("path"), json_schema_input_type=str | Source | list[str | Source]),
]
ShareOrSources = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag("share")] | Annotated[Sources, Tag("sources")],
    by_type({bool: "share", int: "share", float: "share"}, "sources"),
]


class DataSection(RecipeSection):
    """The rows: where they come from, how they are split, and what of them is learned."""

    train: Sources
    """The rows to learn from: a source or a list of them. Required."""
    validation: ShareOrSources = 0.05
    """All that training may look at (its loss, early stopping, best checkpoint): a share of the rows, or sources. 0 is
    none. Default 0.05: enough for a steady loss."""
    test: ShareOrSources = 0.1
    """Read by `evaluate` alone: a share of the rows, or sources. 0 is none. Default 0.1: enough rows for an interval,
    few enough to keep rows for training."""
    columns: dict[str, str] = Field(default={})
    """Names of columns in all sources that do not map their own: ours on the left, on the right the file's, a key
    within one such as `thread.messages`, or a template such as `"{subject}\\n\\n{body}"`. A file that has none of
    them is read by its own names. Default none: found by looking at the rows; the usual names are known."""
    roles: dict[MessageRole, Annotated[Many[NonEmpty], BeforeValidator(one_or_more)]] = Field(default={})
    """Who speaks in messages: our role on the left, on the right its name in the rows, or a list of names, such as
    `{user: customer, assistant: [agent, bot]}`. Default none: the usual names are known."""
    split_by: NonEmpty | None = None
    """Column whose equal values stay in one split, and are one group for intervals. Default none: each row is alone."""
    deduplicate: Literal["none", "exact", "near"] = "near"
    """Drop rows that are equal, or nearly so. Default `near`: repeated rows are learned by heart, and a near copy in
    test flatters the score."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """Highest share of bad rows, and of over-long ones unless `on_overlong` says drop. Default 0.05: more than that is
    a mistake in the data or in the recipe."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which turns are learned: all of the assistant's, its last one, or every token. A message may say `train: false`.
    Default `assistant`: what the model has to say."""
    system_prompt: NonEmpty | None = None
    """The system message of conversations that have none: in training, evaluation, chat and serving, and in the chat
    template that is saved. Default none: what the template adds by itself, which the data report names."""
    reasoning: Literal["learn", "keep", "drop"] = "learn"
    """What becomes of the thoughts of answers: learned, read as context and not learned, or left out. A row may say
    `train_reasoning`. Default `learn`: a model that is to think before it answers has to write its thoughts."""
    special_tokens_in_text: Literal["text", "refuse", "allow"] = "text"
    """What becomes of special tokens, such as `<|im_end|>`, that stand in what is said: encoded as plain text, refused
    with the row, or allowed to be what they are. The same in training, evaluation and chat. Default `text`: nobody can
    end a turn by talking about it."""
    unknown_tokens: Literal["refuse", "allow"] = "refuse"
    """What becomes of a row whose target holds characters that the tokenizer does not know (`<unk>`). Default
    `refuse`: a model that learns to write `<unk>` writes it."""
    max_length: int = Field(default=1024, ge=8)
    """Longest row in tokens. Default 1024: holds most chats; memory grows with it."""
    on_overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What becomes of a longer row. Default `error`: nothing is cut without being asked for."""
    packing: bool = True
    """Join rows of one step without padding; attention stays within each row. Encoders too, where that is proven for
    the model; others are padded among rows of like length, and the run says why. Default true: the same loss, and no
    work on padding."""

    def check(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report what is wrong with the rows and their split, and keys that the task does not read."""
        if not variant.facts.has_turns:
            fix = "Remove it: what the row names as its answer is what is learned."
            diagnostics.no_effect("data.train_on", f"with task: {variant.task}", fix, "task")
        if not variant.facts.templated or variant.is_extractive:
            fix = "Remove it: no chat template is used."
            diagnostics.none_has_effect(
                self,
                "data",
                ("reasoning", "special_tokens_in_text", "system_prompt"),
                f"with task: {variant.task}",
                fix,
                "task",
            )
        if not variant.generates:
            fix = "Remove it: no text is learned."
            diagnostics.no_effect("data.unknown_tokens", f"with task: {variant.task}", fix, "task")
        if not variant.facts.packs:
            fix = "Remove it: these rows are padded."
            diagnostics.no_effect("data.packing", f"with task: {variant.task}", fix, "task")
        self._check_mappings(diagnostics, variant)
        if self.on_overlong not in variant.on_overlong:
            what = f"'data.on_overlong' is '{self.on_overlong}', which task: {variant.task} cannot do"
            diagnostics.add("data.on_overlong", what, f"Allowed: {', '.join(variant.on_overlong)}.", "task")
        for split in SPLITS:
            for i, source in enumerate(self.sources(split)):
                source.check(diagnostics, f"data.{split}.{i}", variant)
                self._check_weight(diagnostics, split, f"data.{split}.{i}.weight")
        share = sum(part for part in (self.validation, self.test) if isinstance(part, float))
        if self.split_by is not None and not share and not isinstance(self.test, tuple):
            fix = "Give data.validation or data.test a share of the rows, or data.test a file, or remove it."
            because = ("data.validation", "data.test")
            diagnostics.no_effect("data.split_by", "where no rows are split off", fix, *because)
        if share >= 1:
            what = f"data.validation and data.test together take {share:g} of the rows"
            diagnostics.add("data.test", what, "Leave some for training.", "data.validation")

    def _check_mappings(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report columns and roles that nothing reads, and a name mapped to two roles."""
        check_names(self.columns, "data.columns", diagnostics)
        if self.columns and all(source.columns for split in SPLITS for source in self.sources(split)):
            fix = "Remove it, or the `columns` of the sources."
            diagnostics.no_effect("data.columns", "where every source maps its own", fix, "data.train.0.columns")
        if not set(variant.facts.formats) & set(WITH_ROLES):
            diagnostics.no_effect("data.roles", f"with task: {variant.task}", "Remove it: rows have no roles.", "task")
        names = Counter(name.strip().lower() for theirs in self.roles.values() for name in theirs)
        for name in (name for name, count in names.items() if count > 1):
            diagnostics.add("data.roles", f"'data.roles' maps '{name}' to two roles", "Keep one of them.")

    def sources(self, split: str) -> tuple[Source, ...]:
        """Return the sources of a split; none where it is a share of the rows."""
        value = getattr(self, split)
        return value if isinstance(value, tuple) else ()

    def _check_weight(self, diagnostics: Diagnostics, split: str, key: str) -> None:
        if split != "train":
            diagnostics.no_effect(key, "outside data.train", "Remove it: these rows are all used once.")
        elif len(self.train) == 1:
            diagnostics.no_effect(key, "with a single source", "Remove it, or add another source.", "data.train")
