"""The section `model`: the model to start from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from llmtune.recipe.builtin import recipes_folder
from llmtune.recipe.model_kind import TEMPLATE_KEYS
from llmtune.recipe.section import (
    Many,
    NonEmpty,
    Positive,
    RecipeSection,
    absolute,
    absolute_model,
    by_type,
    is_folder,
    one_or_more,
)
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_variant import TaskVariant

BUILTIN = "builtin:"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
Attention = Annotated[
    Annotated[Literal["auto", "eager", "sdpa"], Tag("switch")]
    | Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?$"), Tag("text")],
    Discriminator(lambda value: "text" if isinstance(value, str) and "/" in value else "switch"),
]


def absolute_template(name: str, folder: Path) -> str:
    """Return the path of a chat template: `builtin:NAME` ships with llmtune, other paths are relative to `folder`."""
    if name.startswith(BUILTIN):
        return str(recipes_folder() / "templates" / f"{name.removeprefix(BUILTIN)}.jinja")
    return absolute(name, folder)


class CatalogueQuery(RecipeSection):
    """A query of the catalogue of `llmtune models list`. Models that cannot do the task never match."""

    family: Annotated[tuple[NonEmpty, ...], BeforeValidator(one_or_more)] = ()
    """One or more model families, such as `Qwen2.5`. Default none: all."""
    language: NonEmpty | None = None
    """A language named in the model card, such as `en` or `de`. Default none: any."""
    max_parameters: float | None = Field(default=None, ge=1)
    """Maximum number of parameters, such as `2.0e9`. Default none: memory is the only limit."""


Candidates = Annotated[
    Annotated[Many[NonEmpty], Field(min_length=1), Tag("items")] | Annotated[CatalogueQuery, Tag("query")],
    by_type({dict: "query", CatalogueQuery: "query"}, "items"),
]


class ModelSection(RecipeSection):
    """The model to start from: a name, or candidates from which llmtune picks the best for the rows."""

    name: NonEmpty | None = None
    """A folder, a name on the hub (`owner/model`), or `builtin:NAME` for a packaged model. Required unless
    `candidates` is set. No default, because the model is your decision."""
    candidates: Candidates | None = None
    """Models to choose from, instead of `name`: a list, or a catalogue query such as
    `{family: Qwen2.5, language: de, max_parameters: 2.0e9}`. Models that cannot do the task or do not fit in memory
    are skipped. The rest are ranked on a sample of the rows, by bits per byte, embedding models by nDCG@10 (rows with
    scores: Spearman correlation). Default none: ranking loads every candidate."""
    licences: Many[NonEmpty] = ()
    """Licences that a candidate may have, by the hub's names, such as `apache-2.0`. Candidates with another or an
    unknown licence are skipped. Default none: any licence."""
    trials: int = Field(default=0, ge=0)
    """Steps of a short trial training of each candidate. The better half continues with twice as many steps until one
    is left. Needs `data.validation`; not for embedding models. Default 0: rank before training, which takes seconds."""
    revision: NonEmpty = "main"
    """Branch, tag or commit on the hub. Default `main`; the lock file pins its commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights and the computation. Default `auto`: bfloat16 if the device supports it, else
    float32, because float16 needs loss scaling."""
    chat_template: NonEmpty | None = None
    """File with a Jinja chat template that replaces the model's own. `builtin:chatml` ships with llmtune and supports
    tools and reasoning. Default none: use the template the model was trained with."""
    chat_template_kwargs: dict[str, object] = Field(default={})
    """Values for variables of the chat template, e.g. `enable_thinking: false`. They become defaults of the saved and
    served template, so clients need not send them. Default none: the template's own defaults."""
    add_tokens: Many[NonEmpty] = ()
    """Tokens to add to the vocabulary; their embeddings are trained with the adapter. Default none: new embeddings
    start untrained and make the adapter larger."""
    image_pixels: Annotated[Many[Positive], Field(min_length=2, max_length=2)] | None = None
    """Fewest and most pixels of a picture, such as `[65536, 1048576]`: others are resized before they are read. Saved
    with the model, so it is served with the same limits. For models whose processor has such limits, such as Qwen's.
    Default none: the model's own, which may make thousands of tokens of a photo."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Default false: that code can do anything on the machine."""
    use_safetensors: bool = True
    """Load only weights in safetensors format; false also allows pickled weights. Default true: loading a pickle can
    run code."""
    attn_implementation: Attention = "auto"
    """Attention implementation: `eager`, `sdpa`, or a kernel on the hub (`kernels-community/NAME`, which needs the
    package `kernels` and the network). Default `auto`: exact packed attention in training, elsewhere the fastest one
    the model supports."""
    check_memory: bool = True
    """Refuse a model whose minimum memory exceeds the device. Default true; set false to override a plan that you know
    is wrong."""

    paths: ClassVar = {"name": absolute_model, "candidates": absolute_model, "chat_template": absolute_template}

    def check(self, diagnostics: Diagnostics, variant: TaskVariant, validates: bool) -> None:
        """Report a missing model, a model named twice, and settings that the model or the task ignores."""
        both = ("model.name", "model.candidates")
        if self.name is None and self.candidates is None:
            diagnostics.add("model", "neither 'model.name' nor 'model.candidates' is given", "Name a model.", *both)
        elif self.name is not None and self.candidates is not None:
            fix = "Keep one of them; set the other to null if it comes from an extended recipe."
            diagnostics.add("model.candidates", "both 'model.name' and 'model.candidates' are given", fix, *both)
        if self.image_pixels and self.image_pixels[0] > self.image_pixels[1]:
            what = f"'model.image_pixels' is {list(self.image_pixels)}: the fewest are more than the most"
            diagnostics.add("model.image_pixels", what, "Write the smaller number first.")
        names = {"model.name": self.name} if self.name is not None else {}
        listed = self.candidates if isinstance(self.candidates, tuple) else ()
        names |= {f"model.candidates.{i}": name for i, name in enumerate(listed)}
        locals_ = [_check_model_name(diagnostics, key, name) for key, name in names.items()]
        diagnostics.repeated("model.candidates", listed, "a model")
        if self.name is not None:
            fix = "Remove it, or name model.candidates."
            diagnostics.none_has_effect(self, "model", ("licences", "trials"), "with 'model.name'", fix, "model.name")
        if locals_ and all(locals_):
            diagnostics.no_effect("model.revision", "except for a model on the hub", "Remove it.", *both)
        if not variant.facts.templated or variant.is_extractive:
            why, fix = f"with task: {variant.task}", "Remove it, or use task: chat."
            diagnostics.none_has_effect(self, "model", TEMPLATE_KEYS["model"], why, fix, "task")
        facts = variant.facts
        if self.candidates is not None and not facts.searches and (not facts.ranks or variant.is_masked):
            has_head = not facts.decodes and not facts.takes_audio
            head = "its models start from a new head, which scores at random"
            why = head if has_head else "no score compares its models before tuning"
            what = f"'model.candidates' cannot be ranked for task: {variant.task}: {why}"
            diagnostics.add("model.candidates", what, "Set model.name to one model.", "task")
        if self.candidates is not None and self.trials and facts.searches:
            what = f"'model.trials' compares bits per byte, which task: {variant.task} does not measure"
            diagnostics.add("model.trials", what, "Remove it: candidates are ranked before tuning.", "task")
        if self.trials and not validates:
            what = "'model.trials' needs validation rows, but 'data.validation' is 0"
            diagnostics.add("model.trials", what, "Set data.validation, such as 0.1.", "data.validation")


def _check_model_name(diagnostics: Diagnostics, key: str, name: str) -> bool:
    """Return whether a model is packaged or a folder; report a name that cannot be a model's."""
    what, folder = f"'{key}' is {name!r}", diagnostics.source_map.folder(key)
    if name.startswith(BUILTIN):
        if not name.removeprefix(BUILTIN).strip():
            diagnostics.add(key, f"{what}, without a name", "Write builtin:NAME.")
        return True
    if is_folder(name, folder):
        return True
    if name.startswith("hub:"):
        diagnostics.add(key, what, f"Write hub models without `hub:`: {name.removeprefix('hub:')}.")
    elif not HUB_NAME.fullmatch(name):
        fix = f"Name an existing folder (this one is not in {folder}), or a hub model as `owner/name`."
        diagnostics.add(key, what, fix)
    return False
