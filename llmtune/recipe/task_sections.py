"""The sections that only one task has, each named for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from llmtune.recipe.section import Many, NonEmpty, Positive, RecipeSection, by_type
from llmtune.recipe.source_map import Diagnostics

ClassWeights = Annotated[
    Annotated[Literal["balanced"], Tag("text")] | Annotated[dict[str, Annotated[float, Field(gt=0)]], Tag("items")],
    by_type({str: "text"}, "items"),
]
QA_KEYS = {
    "extractive": ("stride", "max_answer_length", "null_score_diff_threshold"),
    "generative": ("prompt", "no_answer"),
}
"""Keys of `qa` that one style alone reads."""
LOSS_KEYS = {
    "beta": ("dpo", "ipo", "kto", "orpo"),
    "label_smoothing": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "center_rewards_coefficient": ("reward",),
}
"""Keys of `preference`, and the losses that read them."""


class TaskSection(RecipeSection):
    """A section that only one task has."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report what is wrong with it; `max_length` is that of the section `data`."""


def check_prompt(diagnostics: Diagnostics, key: str, prompt: str | None, fields: tuple[str, ...]) -> None:
    """Report a prompt that does not hold one of a row's texts."""
    missing = [name for name in fields if prompt is not None and f"{{{name}}}" not in prompt]
    if missing:
        diagnostics.add(
            key, f"'{key}' does not contain {{{missing[0]}}}", f"Put {{{missing[0]}}} where the text belongs."
        )


class CompletionSection(TaskSection):
    """What only the task `completion` has."""

    objective: Literal["causal", "masked"] = "causal"
    """Predict the next token (a decoder), or masked ones (an encoder such as BERT). Default `causal`."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """With `masked`, the share of tokens that are predicted; of them 80 % are masked, 10 % replaced and 10 % left.
    Default 0.15, as in the BERT paper."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report a setting of masked tokens where none are predicted."""
        if self.objective != "masked":
            why, fix = "without completion.objective: masked", "Remove it, or set completion.objective: masked."
            diagnostics.no_effect("completion.mask_probability", why, fix, "completion.objective")


class TranslateSection(TaskSection):
    """What only the task `translate` has."""

    source_language: NonEmpty | None = None
    """Language of the sources: a word for the prompt of a decoder (`English`), the model's own code for mBART and NLLB
    (`eng_Latn`). Default none: a row's own column `source_language`, if it has one."""
    target_language: NonEmpty | None = None
    """Language of the targets, likewise. Default none: a row's own column `target_language`."""
    prompt: NonEmpty | None = None
    """Words around the text, with `{source}` and maybe `{source_language}` and `{target_language}`. Default none: what
    the task says for a decoder (in the chat template, where the model has one), the bare text for an encoder-decoder;
    T5 was trained with words before the text, so give them here."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report a prompt without the text."""
        check_prompt(diagnostics, "translate.prompt", self.prompt, ("source",))


class SummarizeSection(TaskSection):
    """What only the task `summarize` has."""

    prompt: NonEmpty | None = None
    """Words around the text, with `{document}`. Default none: what the task says for a decoder (in the chat template,
    where the model has one), the bare text for an encoder-decoder; T5 was trained with words before the text, so give
    them here."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report a prompt without the text."""
        check_prompt(diagnostics, "summarize.prompt", self.prompt, ("document",))


class QaSection(TaskSection):
    """What only the task `qa` has."""

    style: Literal["auto", "extractive", "generative"] = "auto"
    """Point at the answer in the context, or write it. Default `auto`: an encoder points, a decoder or an
    encoder-decoder writes."""
    stride: int = Field(default=128, ge=0)
    """Extractive: tokens of context that two windows of a long row share. Default 128, as in the SQuAD scripts: more
    than the longest answers."""
    max_answer_length: Positive = 30
    """Extractive: longest answer in tokens. Default 30, as in the SQuAD scripts."""
    null_score_diff_threshold: float | None = None
    """Extractive: `no answer` is said where its score is above that of the best answer by more than this. Default none:
    0, whichever is higher; but never, where every training row has an answer."""
    prompt: NonEmpty | None = None
    """Generative: words around the row, with `{question}` and `{context}`. Default none: what the task says for a
    decoder (in the chat template, where the model has one), the bare text for an encoder-decoder; T5 was trained with
    words before the text, so give them here."""
    no_answer: NonEmpty = "unanswerable"
    """Generative: what the model says where the context holds no answer. Default `unanswerable`."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report a prompt without question or context, keys of the other style, and windows that do not move on.

        With `auto` the model decides on the style, so the keys of both are read.
        """
        check_prompt(diagnostics, "qa.prompt", self.prompt, ("question", "context"))
        for style, names in QA_KEYS.items():
            if self.style not in ("auto", style):
                for name in names:
                    why, fix = f"with qa.style: {self.style}", f"Remove it, or set qa.style: {style}."
                    diagnostics.no_effect(f"qa.{name}", why, fix, "qa.style")
        if self.style != "generative" and self.stride >= max_length // 2:
            what = f"'qa.stride' is {self.stride}, and a window has {max_length} tokens (data.max_length)"
            fix = "Windows must move on: less than half of data.max_length."
            diagnostics.add("qa.stride", what, fix, "data.max_length")


class ClassifySection(TaskSection):
    """What only the task `classify` has."""

    kind: Literal["auto", "single", "multi", "regression"] = "auto"
    """One label a row, any number of labels, or a number. Default `auto`: lists of labels are `multi`, numbers with a
    decimal point `regression` (0.0 and 1.0 alone are two classes), all else `single`."""
    labels: Many[NonEmpty] | None = Field(default=None, min_length=2)
    """The labels there are, in the order of the model's outputs; a row with another one is bad. Default none: those in
    the rows, sorted."""
    class_weights: ClassWeights | None = None
    """`balanced` weighs each class by the inverse of its share of the training rows; or a weight a label. Default none:
    every row counts the same."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report names and weights of classes that do not go together."""
        labels = self.labels or ()
        diagnostics.repeated("classify.labels", labels, "a label")
        if self.kind == "regression":
            why, because = "with classify.kind: regression", "classify.kind"
            diagnostics.none_has_effect(self, "classify", ("labels", "class_weights"), why, "Remove it.", because)
        if isinstance(self.class_weights, dict) and labels:
            for name in set(self.class_weights) - set(labels):
                what = f"'classify.class_weights' weighs '{name}', which is none of the labels"
                diagnostics.add("classify.class_weights", what, f"Labels: {', '.join(labels)}.", "classify.labels")


class TokenClassifySection(TaskSection):
    """What only the task `token-classify` has."""

    labels: Many[NonEmpty] | None = Field(default=None, min_length=1)
    """Kinds of entities, without `B-` and `I-`; a row with another one is bad. Default none: those in the rows,
    sorted."""


class SpeechSection(TaskSection):
    """What only the task `speech` has."""

    language: NonEmpty | None = None
    """Language that is spoken, for a multilingual Whisper: a code (`en`) or a name. Default none, for models of one
    language."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """What a multilingual Whisper writes: what was said, or its English translation. Default `transcribe`."""
    normalizer: Literal["none", "basic", "whisper"] = "basic"
    """What is done to both texts before they are compared: nothing; lower case without punctuation; or Whisper's own,
    which also evens out spellings and numbers of English. Default `basic`."""
    window_seconds: float = Field(default=30.0, gt=0, le=3600)
    """Longest stretch of audio that the model hears at once, in seconds: longer recordings are heard in windows, and
    cannot be trained on. Default 30: what Whisper was made for."""


class PreferenceSection(TaskSection):
    """What only the task `preference` has."""

    loss: Literal["dpo", "ipo", "kto", "orpo", "reward"] = "dpo"
    """`dpo` and `ipo` learn from pairs against the untuned model, `kto` from single answers with a thumb, `orpo` from
    pairs without a reference, `reward` trains a model that scores answers. Default `dpo`."""
    beta: float = Field(default=0.1, gt=0, le=100)
    """How hard preferences pull away from the untuned model: lower is harder; with `orpo` the weight of the preference
    beside the likelihood. Default 0.1, as in the papers."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """With `dpo`, the share of pairs that are taken to be the wrong way round. Default 0."""
    desirable_weight: float = Field(default=1.0, gt=0, le=1000)
    """With `kto`, weight of answers with a thumb up. Default 1."""
    undesirable_weight: float = Field(default=1.0, gt=0, le=1000)
    """With `kto`, weight of answers with a thumb down. Default 1."""
    center_rewards_coefficient: float | None = Field(default=None, gt=0, le=100)
    """With `reward`, pulls the mean of the scores towards zero. Default none: scores may lie anywhere."""

    def check(self, diagnostics: Diagnostics, max_length: int) -> None:
        """Report settings that the loss does not read."""
        for name, losses in LOSS_KEYS.items():
            if self.loss not in losses:
                why, fix = f"with preference.loss: {self.loss}", f"Remove it; it belongs to: {', '.join(losses)}."
                diagnostics.none_has_effect(self, "preference", (name,), why, fix, "preference.loss")
