"""The sections of single tasks, each named after its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from llmtune.recipe.class_names import ClassName, find_cycle, show_name
from llmtune.recipe.section import Many, NonEmpty, Positive, RecipeSection, by_type
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import DECISIONS

ClassWeights = Annotated[
    Annotated[Literal["balanced"], Tag("text")]
    | Annotated[dict[ClassName, Annotated[float, Field(gt=0)]], Tag("items")],
    by_type({str: "text"}, "items"),
]
QA_KEYS = {
    "extractive": ("stride", "max_answer_length", "null_score_diff_threshold"),
    "generative": ("prompt", "no_answer"),
}
"""Keys of `qa` that only one style reads."""
LOSS_KEYS = {
    "beta": ("dpo", "ipo", "kto", "orpo"),
    "label_smoothing": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "center_rewards_coefficient": ("reward",),
}
"""Keys of `preference` -> the losses that read them."""


EMBED_KEYS = {"scale": ("ranking", "cosent"), "margin": ("triplet",)}
"""Keys of `embed` -> the losses that read them."""


class TaskSection(RecipeSection):
    """A section that only one task has."""

    training_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that change the training alone: runs that differ in them are measured in the same way."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report errors; `max_length` is `data.max_length`."""


def check_prompt(diagnostics: Diagnostics, key: str, prompt: str | None, fields: tuple[str, ...]) -> None:
    """Report a prompt without a placeholder for each of a row's `fields`."""
    missing = [name for name in fields if prompt is not None and f"{{{name}}}" not in prompt]
    if missing:
        diagnostics.add(
            key, f"'{key}' does not contain {{{missing[0]}}}", f"Insert {{{missing[0]}}} where the text belongs."
        )


def check_rename(diagnostics: Diagnostics, section: str, rename: Mapping[str, str], labels: Sequence[str]) -> None:
    """Report renames that go in a circle, and names that `labels` or another key still has after their rename."""
    key = f"{section}.rename"
    if cycle := find_cycle(rename):
        what = f"'{key}' goes in a circle: {' -> '.join(map(show_name, [*cycle, cycle[0]]))}"
        fix = "Give each class one new name. To swap two names, change the rows: a run cannot know which rows are old."
        diagnostics.add(key, what, fix)
    for name in (name for name in labels if name in rename):
        what = f"'{section}.labels' has {show_name(name)}, which '{key}' renames to {show_name(rename[name])}"
        diagnostics.add(f"{section}.labels", what, f"List {show_name(rename[name])}, or remove the rename.", key)


class ChatSection(TaskSection):
    """Settings of the task `chat`."""

    images: bool | None = None
    """Whether questions may have pictures: the model then keeps its parts that read them. Default none: true if the
    rows have pictures."""


class CompletionSection(TaskSection):
    """Settings of the task `completion`."""

    objective: Literal["causal", "masked"] = "causal"
    """Predict the next token (a decoder), or masked tokens (an encoder such as BERT). Default `causal`."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """With `masked`, the share of tokens to predict: 80 % of them are masked, 10 % replaced and 10 % left unchanged.
    Default 0.15, as in the BERT paper."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report `mask_probability` without masked tokens."""
        if self.objective != "masked":
            why, fix = "without completion.objective: masked", "Remove it, or set completion.objective: masked."
            diagnostics.no_effect("completion.mask_probability", why, fix, "completion.objective")


class TranslateSection(TaskSection):
    """Settings of the task `translate`."""

    source_language: NonEmpty | None = None
    """Source language: a word for the prompt of a decoder (`English`), the model's own code for mBART and NLLB
    (`eng_Latn`). Default none: the row's column `source_language`, if it has one."""
    target_language: NonEmpty | None = None
    """Target language, in the same form. Default none: the row's column `target_language`."""
    prompt: NonEmpty | None = None
    """Prompt around the text, with `{source}` and optionally `{source_language}` and `{target_language}`. Default none:
    the task's prompt for a decoder (in the model's chat template, if any), the bare text for an encoder-decoder. T5
    was trained with a prompt before the text, so set it here."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report a prompt that lacks the placeholder for the text."""
        check_prompt(diagnostics, "translate.prompt", self.prompt, ("source",))


class SummarizeSection(TaskSection):
    """Settings of the task `summarize`."""

    prompt: NonEmpty | None = None
    """Prompt around the text, with `{document}`. Default none: the task's prompt for a decoder (in the model's chat
    template, if any), the bare text for an encoder-decoder. T5 was trained with a prompt before the text, so set it
    here."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report a prompt that lacks the placeholder for the text."""
        check_prompt(diagnostics, "summarize.prompt", self.prompt, ("document",))


class QaSection(TaskSection):
    """Settings of the task `qa`."""

    style: Literal["auto", "extractive", "generative"] = "auto"
    """Mark the answer in the context (`extractive`), or write it (`generative`). Default `auto`: `extractive` for an
    encoder, `generative` for a decoder or an encoder-decoder."""
    stride: int = Field(default=128, ge=0)
    """Extractive: context tokens shared by two neighbouring windows of a long row. Default 128, as in the SQuAD
    scripts: longer than the longest answers; less than half of `data.max_length` if that is shorter."""
    max_answer_length: Positive = 30
    """Extractive: longest answer in tokens. Default 30, as in the SQuAD scripts."""
    null_score_diff_threshold: float | None = None
    """Extractive: predict `no answer` if its score exceeds that of the best answer by more than this. Default none: 0,
    the higher score wins; if every training row has an answer, never predict it."""
    prompt: NonEmpty | None = None
    """Generative: prompt around the row, with `{question}` and `{context}`. Default none: the task's prompt for a
    decoder (in the model's chat template, if any), the bare text for an encoder-decoder. T5 was trained with a prompt
    before the text, so set it here."""
    no_answer: NonEmpty = "unanswerable"
    """Generative: the model's answer if the context does not contain one. Default `unanswerable`."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report a prompt without question or context, keys of the other style, and a too large `stride`.

        With `auto` the model decides the style, so keys of both are allowed.
        """
        check_prompt(diagnostics, "qa.prompt", self.prompt, ("question", "context"))
        for style, names in QA_KEYS.items():
            if self.style not in ("auto", style):
                for name in names:
                    why, fix = f"with qa.style: {self.style}", f"Remove it, or set qa.style: {style}."
                    diagnostics.no_effect(f"qa.{name}", why, fix, "qa.style")
        if self.style != "generative" and self.stride >= max_length // 2:
            what = f"'qa.stride' is {self.stride}, and a window has {max_length} tokens (data.max_length)"
            fix = "Set it below half of data.max_length."
            diagnostics.add("qa.stride", what, fix, "data.max_length")


class RerankSection(TaskSection):
    """Settings of the task `rerank`."""

    max_relevance: float | None = Field(default=None, gt=0)
    """Relevance that the model learns to score as 1; lower ones in proportion. Default none: the highest relevance of
    the training rows, but at least 1."""


class ClassifySection(TaskSection):
    """Settings of the task `classify`."""

    kind: Literal["auto", "single", "multi", "regression"] = "auto"
    """One label per row, any number of labels, or a number. Default `auto`: lists of labels are `multi`, numbers with a
    decimal point `regression` (only 0.0 and 1.0 are two classes), everything else `single`."""
    labels: Many[ClassName] | None = Field(default=None, min_length=2)
    """Allowed labels, in the order of the model's outputs; a row with another label is bad. Default none: the labels in
    the rows, sorted."""
    rename: dict[ClassName, ClassName] | None = Field(default=None, min_length=1)
    """New names of classes, as `{OLD: NEW}`: in all rows, and in the classes of the champion. A name that is renamed
    further gets the last one; two classes with one new name become one class. Default none: labels as in the rows."""
    class_weights: ClassWeights | None = None
    """`balanced` weights each class by the inverse of its share of the training rows; or a weight per label. Default
    none: every row counts the same."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report repeated labels, and labels or weights that conflict with other settings."""
        labels = self.labels or ()
        diagnostics.repeated("classify.labels", labels, "a label")
        check_rename(diagnostics, "classify", self.rename or {}, labels)
        if self.kind == "regression":
            why, because = "with classify.kind: regression", "classify.kind"
            idle = ("labels", "class_weights", "rename")
            diagnostics.none_has_effect(self, "classify", idle, why, "Remove it.", because)
            for key in ("calibrate", *DECISIONS):
                diagnostics.no_effect(f"evaluate.{key}", why, "Remove it.", because)
        if isinstance(self.class_weights, dict) and labels:
            for name in set(self.class_weights) - set(labels):
                what = f"'classify.class_weights' has '{name}', which is not a label"
                diagnostics.add("classify.class_weights", what, f"Use: {', '.join(labels)}.", "classify.labels")


class TokenClassifySection(TaskSection):
    """Settings of the task `token-classify`."""

    labels: Many[ClassName] | None = Field(default=None, min_length=1)
    """Entity types, without `B-` and `I-`; a row with another type is bad. Default none: the types in the rows,
    sorted."""
    rename: dict[ClassName, ClassName] | None = Field(default=None, min_length=1)
    """New names of entity types, as `{OLD: NEW}` without `B-` and `I-`: in all rows, and in the types of the champion.
    Works as `classify.rename` does. Default none: types as in the rows."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report repeated types, and renames that conflict with them."""
        diagnostics.repeated("token_classify.labels", self.labels or (), "a type")
        check_rename(diagnostics, "token_classify", self.rename or {}, self.labels or ())


class SpeechSection(TaskSection):
    """Settings of the task `speech`."""

    language: NonEmpty | None = None
    """Spoken language, for a multilingual Whisper: a code (`en`) or a name. Default none, for models of one
    language."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """Output of a multilingual Whisper: a transcript, or an English translation. Default `transcribe`."""
    normalizer: Literal["none", "basic", "whisper"] = "basic"
    """Normalisation of both texts before comparison: `none`; `basic`, lower case without punctuation; or `whisper`,
    Whisper's own, which also unifies English spellings and numbers. Default `basic`."""
    window_seconds: float = Field(default=30.0, gt=0, le=3600)
    """Longest audio that the model processes at once, in seconds. Longer recordings are transcribed in windows, and
    cannot be used in training. Default 30: Whisper's input length."""


class PreferenceSection(TaskSection):
    """Settings of the task `preference`."""

    loss: Literal["dpo", "ipo", "kto", "orpo", "reward"] = "dpo"
    """`dpo` and `ipo` learn from pairs with the base model as reference, `kto` from single answers with a thumbs up or
    down, `orpo` from pairs without a reference. `reward` trains a model that scores answers. Default `dpo`."""
    beta: float = Field(default=0.1, gt=0, le=100)
    """Strength of the tie to the base model: lower values allow larger changes. With `orpo`, the weight of the
    preference loss relative to the likelihood. Default 0.1, as in the papers."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """With `dpo`, the assumed share of pairs with swapped preference. Default 0."""
    desirable_weight: float = Field(default=1.0, gt=0, le=1000)
    """With `kto`, weight of answers with a thumbs up. Default 1."""
    undesirable_weight: float = Field(default=1.0, gt=0, le=1000)
    """With `kto`, weight of answers with a thumbs down. Default 1."""
    center_rewards_coefficient: float | None = Field(default=None, gt=0, le=100)
    """With `reward`, strength of a pull of the mean score towards zero. Default none: scores are not centred."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report settings that the loss ignores."""
        for name, losses in LOSS_KEYS.items():
            if self.loss not in losses:
                why, fix = f"with preference.loss: {self.loss}", f"Remove it; it belongs to: {', '.join(losses)}."
                diagnostics.none_has_effect(self, "preference", (name,), why, fix, "preference.loss")


class EmbedSection(TaskSection):
    """Settings of the task `embed`."""

    loss: Literal["auto", "ranking", "cosent", "cosine", "triplet"] = "auto"
    """`ranking`: the query's passage against all other passages of the step (InfoNCE, in-batch negatives). `cosent` and
    `cosine` learn scores: their order, or their values. `triplet` learns classes, over all triplets of a step. Default
    `auto`: `ranking` for passages, `cosent` for scores, `triplet` for labels."""
    scale: float = Field(default=20.0, gt=0, le=1000)
    """With `ranking` and `cosent`, factor of the cosine: the inverse of the temperature. Default 20, as in
    sentence-transformers."""
    margin: float = Field(default=0.2, gt=0, le=2)
    """With `triplet`, how much nearer texts of the same class should be, in cosine distance. Default 0.2."""
    dimensions: Many[Positive] | None = Field(default=None, min_length=1)
    """Lengths of vectors to train together (Matryoshka): a vector cut to one of them is useful too. The longest is the
    length of the vectors. Default none: only the model's own."""
    query_prompt: str | None = None
    """Text before each query, in training, evaluation, serving and the saved model. Default none: the base's own prompt
    `query`, if it has one."""
    passage_prompt: str | None = None
    """Text before each passage. Default none: the base's own prompt `document` or `passage`, if it has one."""
    pooling: Literal["auto", "mean", "cls", "max", "lasttoken"] = "auto"
    """How token vectors become one vector. Default `auto`: the base's own; without one, `mean` for an encoder and
    `lasttoken` for a decoder."""
    normalize: bool | None = None
    """Scale vectors to length 1. Default none: as the base does; true if it does not say."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report repeated dimensions, and keys that the loss ignores."""
        diagnostics.repeated("embed.dimensions", [str(size) for size in self.dimensions or ()], "a length")
        for name, losses in EMBED_KEYS.items():
            if self.loss not in ("auto", *losses):
                why, fix = f"with embed.loss: {self.loss}", f"Remove it; it belongs to: {', '.join(losses)}."
                diagnostics.none_has_effect(self, "embed", (name,), why, fix, "embed.loss")
