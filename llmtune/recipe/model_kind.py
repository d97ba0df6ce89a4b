"""The kinds of models: for each, the transformers class that loads it, and what other packages must know about it."""

from __future__ import annotations

from dataclasses import dataclass, replace

TEMPLATE_KEYS = {
    "data": ("reasoning", "special_tokens_in_text", "system_prompt"),
    "model": ("chat_template", "chat_template_kwargs"),
}
"""Keys that only models with a chat template read, by section."""


@dataclass(frozen=True)
class ModelKind:
    """One kind of model. Libraries are named, not imported."""

    auto_class: str
    """Name of the transformers class that loads the model."""
    fix: str
    """What to name instead of a model of another kind."""
    card_pattern: str
    """Pattern of PEFT's task type, or of the class in a model's configuration."""
    hub_task: str | None = None
    """The hub's name of the task that such a model does."""
    peft_task_type: str | None = None
    """PEFT's name for the task, which selects the plain class that loads the adapter; None: `AutoPeftModel`."""
    image_text_class: str | None = None
    """Name of the transformers class that loads a checkpoint for text and images; its text can be tuned."""
    decodes: bool = False
    """Whether the model continues a text, token by token."""
    predicts_tokens: bool = True
    """Whether the outputs are tokens of the vocabulary."""
    has_head: bool = False
    """Whether a head missing from the model is created and fully trained."""
    is_bare: bool = False
    """Whether the model has no head: the files may have any, or none."""
    reads_class_at_token: bool = False
    """Whether the head reads one token of a text, so packed rows are pooled one by one."""
    packs: bool = False
    """Whether rows may be packed end to end in one micro-batch, if the model separates them."""
    predicts_in_float32: bool = False
    """Whether an encoder that `needs_float32` also predicts in float32: scores in bfloat16 are often equal."""
    takes_audio: bool = False
    takes_images: bool = False
    """Whether prompts may have pictures, so the parts that read them stay in the model."""
    reads_template: bool = True
    """Whether a chat template, if the model has one, makes the prompts; only for tasks whose facts say `templated`."""
    answer_column: str = "answer"
    """Column of predictions in files: `answer` has them as text, `vectors` as they are."""
    in_gguf: bool = False
    """Whether llama.cpp computes the model."""
    output_axes: int | None = None
    """Axes of a head's first output; None if exports do not check them."""
    points_at_span: bool = False
    """Whether the outputs are `start_logits` and `end_logits`."""

    @property
    def may_miss_weights(self) -> bool:
        """Return whether parts may be missing in the files: a trained head, or an unused pooling layer."""
        return self.has_head or self.is_bare


CAUSAL = ModelKind(
    "AutoModelForCausalLM",
    "Name a decoder model (its config.json names a class that ends in ForCausalLM or LMHeadModel).",
    r"CAUSAL_LM|ForCausalLM|LMHeadModel$",
    "text-generation",
    "CAUSAL_LM",
    image_text_class="AutoModelForImageTextToText",
    decodes=True,
    packs=True,
    in_gguf=True,
)
IMAGE_TEXT = replace(
    CAUSAL,
    auto_class="AutoModelForImageTextToText",
    fix="Name a model that reads pictures, such as Qwen3-VL, Gemma 3 or SmolVLM.",
    hub_task="image-text-to-text",
    takes_images=True,
    packs=False,
    in_gguf=False,
)
CLASSES = ModelKind(
    "AutoModelForSequenceClassification",
    "Name an encoder, such as BERT or ModernBERT, or a decoder.",
    r"SEQ_CLS|ForSequenceClassification",
    "text-classification",
    "SEQ_CLS",
    predicts_tokens=False,
    has_head=True,
    reads_class_at_token=True,
    packs=True,
    predicts_in_float32=True,
    in_gguf=True,
    output_axes=2,
)
TOKENS = ModelKind(
    "AutoModelForTokenClassification",
    "Name a model with a transformers class for token classification, such as BERT.",
    r"TOKEN_CLS|ForTokenClassification",
    "token-classification",
    "TOKEN_CLS",
    predicts_tokens=False,
    has_head=True,
    packs=True,
    output_axes=3,
)
SPANS = ModelKind(
    "AutoModelForQuestionAnswering",
    "Name an encoder, such as BERT or RoBERTa.",
    r"QUESTION_ANS|ForQuestionAnswering",
    "question-answering",
    predicts_tokens=False,
    has_head=True,
    packs=True,
    reads_template=False,
    output_axes=2,
    points_at_span=True,
)
MASKED = ModelKind(
    "AutoModelForMaskedLM",
    "Name an encoder with its masked-token head (its config.json names a class that ends in ForMaskedLM).",
    r"ForMaskedLM",
    "fill-mask",
    packs=True,
)
CTC = ModelKind(
    "AutoModelForCTC",
    "Name a wav2vec2 model or one of its relatives.",
    r"ForCTC",
    "automatic-speech-recognition",
    predicts_tokens=False,
    has_head=True,
    takes_audio=True,
)
WHISPER = ModelKind(
    "AutoModelForSpeechSeq2Seq",
    "Name a Whisper model.",
    r"^Whisper",
    "automatic-speech-recognition",
    takes_audio=True,
)
SEQ2SEQ = ModelKind(
    "AutoModelForSeq2SeqLM",
    "Name an encoder-decoder model, such as T5, BART, Marian or NLLB.",
    r"SEQ_2_SEQ_LM|ForConditionalGeneration$|MTModel$",
    "text-generation",
    "SEQ_2_SEQ_LM",
    reads_template=False,
)
VECTORS = ModelKind(
    "AutoModel",
    "Name an encoder, such as BERT or ModernBERT, or a decoder.",
    "",
    peft_task_type="FEATURE_EXTRACTION",
    predicts_tokens=False,
    is_bare=True,
    packs=True,
    answer_column="vectors",
)
MODEL_KINDS = (CAUSAL, IMAGE_TEXT, CLASSES, TOKENS, SPANS, MASKED, CTC, WHISPER, SEQ2SEQ, VECTORS)
"""In the order in which their patterns are matched; the last matches every model."""


@dataclass(frozen=True)
class ProposedModels:
    """The models that `llmtune init` proposes."""

    packaged: str
    """Empty if no package has one."""
    hub: tuple[tuple[float, str], ...]
    """Minimum bytes of memory, and the model to propose, in increasing order."""


PROPOSED_MODELS = {
    "decoder": ProposedModels(
        "builtin:smollm2-135m-instruct",
        (
            (0, "HuggingFaceTB/SmolLM2-135M-Instruct"),
            (8e9, "Qwen/Qwen3.5-0.8B"),
            (16e9, "Qwen/Qwen3.5-2B"),
            (24e9, "Qwen/Qwen3.5-4B"),
            (40e9, "Qwen/Qwen3.5-9B"),
        ),
    ),
    "image-text": ProposedModels(
        "",
        (
            (0, "HuggingFaceTB/SmolVLM-256M-Instruct"),
            (8e9, "HuggingFaceTB/SmolVLM-500M-Instruct"),
            (16e9, "Qwen/Qwen3.5-2B"),
            (24e9, "Qwen/Qwen3.5-4B"),
        ),
    ),
    "encoder": ProposedModels("builtin:minilm-l6-v2", ((0, "answerdotai/ModernBERT-base"),)),
    "speech": ProposedModels("builtin:whisper-tiny.en", ((0, "openai/whisper-tiny"), (8e9, "openai/whisper-small"))),
}
"""By kind of model, as in `TaskFacts.models`; `image-text` for rows with pictures."""
