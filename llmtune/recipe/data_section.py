"""The section `data`: sources of the rows, splits, and the tokens to learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, Tag

from llmtune.errors import nearest
from llmtune.recipe.format_names import COLUMNS, ROW_FORMATS, WITH_ROLES
from llmtune.recipe.model_kind import TEMPLATE_KEYS
from llmtune.recipe.section import (
    REMOTE,
    STORES,
    Many,
    NonEmpty,
    Positive,
    RecipeSection,
    absolute,
    absolute_model,
    by_type,
    one_or_more,
    sections_by,
)
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_variant import TaskVariant

SPLITS = ("train", "validation", "test")
ENCODING_KEYS = (
    *("max_length", "on_overlong", "train_on"),
    *("reasoning", "special_tokens_in_text", "unknown_tokens", "system_prompt", "negatives"),
)
"""Keys that affect encoded examples but not rows."""
Container = Literal["jsonl", "json", "csv", "parquet", "excel"]
MessageRole = Literal["system", "user", "assistant", "tool"]
DATA_ENDINGS: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".xlsx": "excel",
    ".xlsm": "excel",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
"""Reader of a file, by file extension."""
BINARY = ("parquet", "excel")
"""Readers of files that state no encoding."""
PACKED = (".gz", ".zst", ".zstd")
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(dict.fromkeys((*get_args(Container), "text", *ROW_FORMATS)))]


def absolute_source(path: str, folder: Path) -> str:
    """Make a source's path absolute unless it is `hub:NAME`, `builtin:NAME` or a URL."""
    return path if path.startswith((*REMOTE, *STORES)) else absolute(path, folder, pattern=True)


class Source(RecipeSection):
    """A source of rows. A plain string is its `path`."""

    path: NonEmpty
    """A file, a glob, a folder, a URL (`s3://`, `gs://`, `https://`), `hub:NAME` or `builtin:NAME`. Relative to the
    recipe file that sets it."""
    config: NonEmpty | None = None
    """Configuration of a hub data set, or sheet of an Excel workbook. Default none: the data set's default; the first
    sheet."""
    split: NonEmpty | None = None
    """Split of a hub data set. Default none: `train`, or the only split."""
    revision: NonEmpty | None = None
    """Branch, tag or commit of a hub data set. Default none: the newest commit. The lock file detects changes; name a
    commit to pin it."""
    format: Format | None = None
    """File format (`jsonl`, `json`, `csv`, `parquet`, `excel`, `text`) or row format (such as `messages` or
    `text-label`, depending on the task). Default none: detected from the file."""
    columns: dict[str, str] = Field(default={})
    """Column mapping. The left side is llmtune's name. The right side is the file's column, a nested key such as
    `thread.messages`, or a template such as `"{subject}\\n\\n{body}"`. Default none: `data.columns`."""
    encoding: NonEmpty | None = None
    """Encoding of a text file, by Python's name, such as `cp1252` or `utf-16`. A file that turns out to be in another
    one is refused. Default none: UTF-8."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Weight of these rows relative to other sources. Default 1: each row counts once."""
    limit: Positive | None = None
    """Maximum number of rows to read. Default none: all."""

    paths: ClassVar = {"path": absolute_source}

    def check(self, diagnostics: Diagnostics, key: str, variant: TaskVariant) -> None:
        """Report errors in the source at `key`."""
        kind, _, name = self.path.partition(":")
        if self.path.startswith(REMOTE) and not name.strip():
            diagnostics.add(f"{key}.path", f"'{key}.path' is {self.path!r}, without a name", f"Write {kind}:NAME.")
        elif self.path.startswith(STORES):
            self._check_address(diagnostics, f"{key}.path", variant)
        elif "://" in self.path:
            what = f"'{key}.path' is {self.path!r}, a kind of address that llmtune cannot read"
            fix = f"Use a file, a glob, a folder, {', '.join(STORES)}, hub:NAME or builtin:NAME."
            diagnostics.add(f"{key}.path", what, fix)
        if kind != "hub":
            fix = "Remove it, or name a hub data set."
            reader = self.format if self.format in BINARY else DATA_ENDINGS.get(data_ending(PurePath(self.path)))
            if reader in BINARY and self.encoding is not None:
                diagnostics.no_effect(f"{key}.encoding", f"for {reader} files", "Remove it.", f"{key}.path")
            hub_keys = ("split", "revision", *(("config",) if reader != "excel" else ()))
            diagnostics.none_has_effect(self, key, hub_keys, "except for hub:NAME", fix, f"{key}.path")
        elif self.format in get_args(Container):
            fix = "Remove it, or name a row format."
            diagnostics.no_effect(f"{key}.format", "for a hub data set", fix, f"{key}.path")
        elif self.encoding is not None:
            diagnostics.no_effect(f"{key}.encoding", "for a hub data set", "Remove it.", f"{key}.path")
        if self.encoding is not None and not _is_encoding(self.encoding):
            what = f"'{key}.encoding' is {self.encoding!r}, which Python does not know"
            diagnostics.add(f"{key}.encoding", what, "Use Python's name, such as cp1252, latin-1 or utf-16.")
        formats = variant.facts.formats
        if self.format in ROW_FORMATS and self.format not in formats:
            what = f"'{key}.format' is '{self.format}', which task: {variant.task} cannot use"
            diagnostics.add(f"{key}.format", what, f"Use a row format of this task: {', '.join(formats)}.", "task")
        check_names(self.columns, f"{key}.columns", diagnostics)

    def _check_address(self, diagnostics: Diagnostics, key: str, variant: TaskVariant) -> None:
        """Report addresses that may contain a secret, without showing them, and addresses that name no file."""
        address = urlsplit(self.path)
        web = address.scheme.startswith("http")
        if "@" in address.netloc or (web and (address.query or address.fragment)):
            what = f"'{key}' is an address with a password or a query, which every report would show"
            fix = "Put passwords in ~/.netrc. Instead of signed addresses, use s3:// or gs:// with credentials."
            diagnostics.add(key, what, fix)
        elif not address.netloc or not address.path.strip("/"):
            diagnostics.add(key, f"'{key}' is {self.path!r}, which names no file", "Append BUCKET/FILE.")
        elif web and ("*" in self.path or self.path.endswith("/")):
            diagnostics.add(key, f"'{key}' is {self.path!r}: web servers do not list files", "Name each file.")
        if variant.facts.takes_audio:
            diagnostics.add(key, f"'{key}' is an address; recordings are read from disk", "Download them.", "task")


def data_ending(path: PurePath) -> str:
    """Return the extension of the file's format, without the extension of its compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def check_names(columns: Mapping[str, str], key: str, diagnostics: Diagnostics) -> None:
    """Report mappings of columns that llmtune does not know."""
    for column in columns:
        if column not in COLUMNS:
            what = f"'{key}' maps '{column}', which is not a column that llmtune knows"
            fix = f"{nearest(column, COLUMNS)} Write llmtune's name on the left: {', '.join(COLUMNS)}.".strip()
            diagnostics.add(f"{key}.{column}", what, fix)


def _is_encoding(name: str) -> bool:
    try:
        "a".encode(name)
    except LookupError:  # unknown, or a bytes-to-bytes codec
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


class NegativesSection(RecipeSection):
    """Passages mined as negatives: those that a model finds nearest to a query, without the query's own."""

    mine: int = Field(ge=1, le=1000)
    """Negatives per query. Required."""
    below: float = Field(default=0.95, gt=0, le=1)
    """Highest score of a negative, relative to the query's own passage. Nearer passages are skipped, because they are
    often right too. Default 0.95, as in NV-Retriever."""
    model: NonEmpty | None = None
    """Embedding model that scores the passages. Default none: the base model."""

    paths: ClassVar = {"model": absolute_model}


class DataSection(RecipeSection):
    """The rows: their sources, their splits, and the tokens to learn."""

    train: Sources
    """The training rows: a source or a list of sources. Required."""
    validation: ShareOrSources = 0.05
    """Validation rows, for the loss during training, early stopping and the best checkpoint: a share of the rows, or
    sources. 0 means none. Default 0.05: enough for a stable loss."""
    test: ShareOrSources = 0.1
    """Test rows, used only by `evaluate`: a share of the rows, or sources. 0 means none. Default 0.1: enough rows for
    a confidence interval, and most rows remain for training."""
    corpus: Sources | None = None
    """Passages that test queries are searched in, with the passages of the test rows; `negatives` are mined among them
    too. Default none: only the passages and negatives of the test rows."""
    negatives: NegativesSection | None = None
    """Mine negatives for each query among the training passages and those of `corpus`. Default none: those in the
    rows."""
    columns: dict[str, str] = Field(default={})
    """Column mapping for all sources without their own. The left side is llmtune's name. The right side is the file's
    column, a nested key such as `thread.messages`, or a template such as `"{subject}\\n\\n{body}"`, of which empty
    parts between blank lines are left out. Files without any of these columns use their own names. Default none:
    columns are detected from the rows by their usual names."""
    roles: dict[MessageRole, Annotated[Many[NonEmpty], BeforeValidator(one_or_more)]] = Field(default={})
    """Role mapping for messages: llmtune's role on the left, its name or names in the rows on the right, such as
    `{user: customer, assistant: [agent, bot]}`. Default none: the usual names are recognised."""
    split_by: NonEmpty | None = None
    """Column that groups rows. A group stays in one split and is resampled as one for confidence intervals. Default
    none: rows are independent, but those of embedding models and rerankers are grouped by `query`, or by `text` if they
    have classes."""
    deduplicate: Literal["none", "exact", "near"] = "near"
    """Drop exact duplicates, or near duplicates too. Default `near`: the model memorises repeated rows, and a near
    copy in test inflates the score."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """Highest share of bad rows, and of too long rows unless `on_overlong` is `drop`. Default 0.05: a higher share
    means a mistake in the data or the recipe."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Turns to learn: all assistant turns, the last one, or every token. Exclude a message with `train: false`.
    Default `assistant`: the turns that the model will write."""
    system_prompt: NonEmpty | None = None
    """System message of conversations without one: in training, evaluation, chat, serving and the saved chat template.
    Default none: the template's own system message, if any; the data report shows it."""
    reasoning: Literal["learn", "keep", "drop"] = "learn"
    """Reasoning in answers: learn it, keep it as context without learning it, or drop it. A row may override this with
    `train_reasoning`. Default `learn`: a reasoning model has to write its reasoning."""
    special_tokens_in_text: Literal["text", "refuse", "allow"] = "text"
    """Special tokens, such as `<|im_end|>`, in the text of messages: encode them as plain text, refuse the row, or
    allow them as special tokens. Applies to training, evaluation and chat. Default `text`: message text cannot end a
    turn."""
    unknown_tokens: Literal["refuse", "allow"] = "refuse"
    """Rows whose target has characters unknown to the tokenizer (`<unk>`): refuse or allow them. Default `refuse`: the
    model would learn to write `<unk>`."""
    max_length: int = Field(default=1024, ge=8)
    """Longest row in tokens. Default 1024: most chats fit; memory grows with it."""
    on_overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What to do with rows longer than `max_length`. Default `error`: nothing is truncated unless you ask for it."""
    packing: bool = True
    """Pack the rows of a step without padding; attention stays within each row. Encoders are packed if a check proves
    it exact for the model. Otherwise rows of similar length are padded, and the run says why. Default true: the same
    loss, and no computation on padding."""

    def check(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report errors in sources and splits, and keys that the task ignores."""
        if not variant.facts.has_turns:
            fix = "Remove it: the task learns the answer of each row."
            diagnostics.no_effect("data.train_on", f"with task: {variant.task}", fix, "task")
        if not variant.facts.templated or variant.is_extractive:
            fix = "Remove it: the task uses no chat template."
            diagnostics.none_has_effect(
                self,
                "data",
                TEMPLATE_KEYS["data"],
                f"with task: {variant.task}",
                fix,
                "task",
            )
        if not variant.generates:
            fix = "Remove it: the task learns no text."
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
        self._check_search(diagnostics, variant)
        share = sum(part for part in (self.validation, self.test) if isinstance(part, float))
        if self.split_by is not None and not self.splits_rows:
            fix = "Give data.validation or data.test a share of the rows, or data.test a file, or remove it."
            because = ("data.validation", "data.test")
            diagnostics.no_effect("data.split_by", "if no rows are split off", fix, *because)
        if share >= 1:
            what = f"data.validation and data.test together take {share:g} of the rows"
            diagnostics.add("data.test", what, "Leave some for training.", "data.validation")

    def _check_search(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report a corpus that nothing is searched in, and mined negatives that nothing learns from."""
        mines = variant.facts.mines and self.negatives is not None
        if not variant.facts.searches and not mines:
            other = (
                ", or set data.negatives to mine in it." if variant.facts.mines else ": the task searches no passages."
            )
            diagnostics.no_effect("data.corpus", f"with task: {variant.task}", f"Remove it{other}", "task")
        elif not self.test and not mines:
            diagnostics.no_effect("data.corpus", "without test rows", "Remove it, or set data.test.", "data.test")
        if not variant.facts.mines:
            fix = "Remove it: the task learns from no passages."
            diagnostics.no_effect("data.negatives", f"with task: {variant.task}", fix, "task")
        for i, source in enumerate(self.corpus or ()):
            source.check(diagnostics, f"data.corpus.{i}", variant)
            unread = ("weight", *(["format"] if source.format in ROW_FORMATS else []))
            for key in (f"data.corpus.{i}.{name}" for name in unread):
                diagnostics.no_effect(key, "in a corpus", "Remove it: a corpus has passages, each of them once.")

    def _check_mappings(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report column and role mappings without effect, and a name mapped to two roles."""
        check_names(self.columns, "data.columns", diagnostics)
        if self.columns and all(source.columns for split in SPLITS for source in self.sources(split)):
            fix = "Remove it, or the `columns` of the sources."
            diagnostics.no_effect("data.columns", "if every source has its own mapping", fix, "data.train.0.columns")
        if not set(variant.facts.formats) & set(WITH_ROLES):
            diagnostics.no_effect("data.roles", f"with task: {variant.task}", "Remove it: rows have no roles.", "task")
        names = Counter(name.strip().lower() for theirs in self.roles.values() for name in theirs)
        for name in (name for name, count in names.items() if count > 1):
            diagnostics.add("data.roles", f"'data.roles' maps '{name}' to two roles", "Keep one of them.")

    @property
    def splits_rows(self) -> bool:
        """Return whether `split_by` can matter: rows are split off, or a test file may share groups with them."""
        return isinstance(self.test, tuple) or any(
            isinstance(part, float) and part for part in (self.validation, self.test)
        )

    def sources(self, place: str) -> tuple[Source, ...]:
        """Return the sources of a split or of `corpus`; empty if it has none."""
        value = getattr(self, place)
        return value if isinstance(value, tuple) else ()

    def named_sources(self) -> Iterator[tuple[str, str, Source]]:
        """Yield every source that the recipe names, with its key and its place: a split, or `corpus`."""
        for place in (*SPLITS, "corpus"):
            sources = self.sources(place)
            for number, source in enumerate(sources):
                yield f"data.{place}" if len(sources) == 1 else f"data.{place}[{number}]", place, source

    def _check_weight(self, diagnostics: Diagnostics, split: str, key: str) -> None:
        if split != "train":
            diagnostics.no_effect(key, "outside data.train", "Remove it: these rows are all used once.")
        elif len(self.train) == 1:
            diagnostics.no_effect(key, "with a single source", "Remove it, or add another source.", "data.train")
