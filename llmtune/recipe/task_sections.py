"""The sections that only one task has, each named for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from llmtune.recipe.base_section import Many, Section, by_kind

Label = Annotated[str, Field(min_length=1)]
ClassWeights = Annotated[
    Annotated[Literal["balanced"], Tag("text")] | Annotated[dict[str, Annotated[float, Field(gt=0)]], Tag("items")],
    by_kind({str: "text"}, "items"),
]
PROMPT = (
    "Default none: what the task says for a decoder (in the chat template, where the model has one), the bare text for "
    "an encoder-decoder; T5 was trained with words before the text, so give them here."
)


class CompletionSection(Section):
    """What only the task `completion` has."""

    objective: Literal["causal", "masked"] = Field(
        default="causal",
        description="Predict the next token (a decoder), or masked ones (an encoder such as BERT). Default `causal`.",
    )
    mask_probability: float = Field(
        default=0.15,
        gt=0,
        lt=1,
        description="With `masked`, the share of tokens that are predicted; of them 80 % are masked, 10 % replaced and "
        "10 % left. Default 0.15, as in the BERT paper.",
    )


class TranslateSection(Section):
    """What only the task `translate` has."""

    source_language: str | None = Field(
        default=None,
        min_length=1,
        description="Language of the sources: a word for the prompt of a decoder (`English`), the model's own code for "
        "mBART and NLLB (`eng_Latn`). Default none: a row's own column `source_language`, if it has one.",
    )
    target_language: str | None = Field(
        default=None,
        min_length=1,
        description="Language of the targets, likewise. Default none: a row's own column `target_language`.",
    )
    prompt: str | None = Field(
        default=None,
        min_length=1,
        description="Words around the text, with `{source}` and maybe `{source_language}` and `{target_language}`. "
        + PROMPT,
    )


class SummarizeSection(Section):
    """What only the task `summarize` has."""

    prompt: str | None = Field(
        default=None, min_length=1, description="Words around the text, with `{document}`. " + PROMPT
    )


class QaSection(Section):
    """What only the task `qa` has."""

    style: Literal["auto", "extractive", "generative"] = Field(
        default="auto",
        description="Point at the answer in the context, or write it. Default `auto`: an encoder points, a decoder or "
        "an encoder-decoder writes.",
    )
    stride: int = Field(
        default=128,
        ge=0,
        description="Extractive: tokens of context that two windows of a long row share. Default 128, as in the SQuAD "
        "scripts: more than the longest answers.",
    )
    max_answer_length: int = Field(
        default=30, ge=1, description="Extractive: longest answer in tokens. Default 30, as in the SQuAD scripts."
    )
    null_score_diff_threshold: float | None = Field(
        default=None,
        description="Extractive: `no answer` is said where its score is above that of the best answer by more than "
        "this. Default none: 0, whichever is higher; but never, where every training row has an answer.",
    )
    prompt: str | None = Field(
        default=None,
        min_length=1,
        description="Generative: words around the row, with `{question}` and `{context}`. " + PROMPT,
    )
    no_answer: str = Field(
        default="unanswerable",
        min_length=1,
        description="Generative: what the model says where the context holds no answer. Default `unanswerable`.",
    )


class ClassifySection(Section):
    """What only the task `classify` has."""

    kind: Literal["auto", "single", "multi", "regression"] = Field(
        default="auto",
        description="One label a row, any number of labels, or a number. Default `auto`: lists of labels are `multi`, "
        "numbers with a decimal point `regression`, all else `single`.",
    )
    labels: Many[Label] | None = Field(
        default=None,
        min_length=2,
        description="The labels there are, in the order of the model's outputs; a row with another one is bad. Default "
        "none: those in the rows, sorted.",
    )
    class_weights: ClassWeights | None = Field(
        default=None,
        description="`balanced` weighs each class by the inverse of its share of the training rows; or a weight a "
        "label. Default none: every row counts the same.",
    )


class TokenClassifySection(Section):
    """What only the task `token-classify` has."""

    labels: Many[Label] | None = Field(
        default=None,
        min_length=1,
        description="Kinds of entities, without `B-` and `I-`; a row with another one is bad. Default none: those in "
        "the rows, sorted.",
    )


class SpeechSection(Section):
    """What only the task `speech` has."""

    language: str | None = Field(
        default=None,
        min_length=1,
        description="Language that is spoken, for a multilingual Whisper: a code (`en`) or a name. Default none, for "
        "models of one language.",
    )
    task: Literal["transcribe", "translate"] = Field(
        default="transcribe",
        description="What a multilingual Whisper writes: what was said, or its English translation. Default "
        "`transcribe`.",
    )
    normalizer: Literal["none", "basic", "whisper"] = Field(
        default="basic",
        description="What is done to both texts before they are compared: nothing; lower case without punctuation; or "
        "Whisper's own, which also evens out spellings and numbers of English. Default `basic`.",
    )
    window_seconds: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Longest stretch of audio that the model hears at once, in seconds: longer recordings are heard in "
        "windows, and cannot be trained on. Default 30: what Whisper was made for.",
    )


class PreferenceSection(Section):
    """What only the task `preference` has."""

    loss: Literal["dpo", "ipo", "kto", "orpo", "reward"] = Field(
        default="dpo",
        description="`dpo` and `ipo` learn from pairs against the untuned model, `kto` from single answers with a "
        "thumb, `orpo` from pairs without a reference, `reward` trains a model that scores answers. Default `dpo`.",
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="How hard preferences pull away from the untuned model: lower is harder; with `orpo` the weight of "
        "the preference beside the likelihood. Default 0.1, as in the papers.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="With `dpo`, the share of pairs that are taken to be the wrong way round. Default 0.",
    )
    desirable_weight: float = Field(
        default=1.0, gt=0, le=1000, description="With `kto`, weight of answers with a thumb up. Default 1."
    )
    undesirable_weight: float = Field(
        default=1.0, gt=0, le=1000, description="With `kto`, weight of answers with a thumb down. Default 1."
    )
    center_rewards_coefficient: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="With `reward`, pulls the mean of the scores towards zero. Default none: scores may lie anywhere.",
    )
