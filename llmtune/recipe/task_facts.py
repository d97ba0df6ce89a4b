"""The facts of each task that need no library: its metrics, its section, the rows it reads, and what has no effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LANGUAGE = ("loss", "perplexity", "bits_per_byte", "accuracy")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
GENERATED = ("exact_match", *ROUGE, "chrf")
"""Metrics that chat and completion take on generated answers."""
MACHINE_TRANSLATION = ("bleu", "chrf", "ter", "exact_match")
TOOL_METRICS = ("tool_call_valid", "tool_name", "tool_arguments", "tool_arguments_f1", "no_call")
NEAREST_TO_ONE = frozenset({"length_ratio"})
"""Neither more nor less is better."""
CUT_METRIC = "answers_cut"
"""Measured wherever answers are generated for other metrics."""
PREDICTED = frozenset(
    {*GENERATED, *MACHINE_TRANSLATION, *TOOL_METRICS, CUT_METRIC, "length_ratio", "f1", "wer", "cer"},
)
"""Metrics of answers whose number `evaluate.limit` bounds."""

WITH_ROLES = ("messages", "sharegpt", "prompt-completion", "conversation-pair", "conversation-thumb", "chosen-rejected")
"""Formats whose rows may hold messages."""
COLUMNS = (
    *("answer", "answers", "audio", "chosen", "completion", "context", "conversations", "document", "file_name"),
    *("functions", "history", "input", "instruction", "label", "messages", "output", "pair", "prompt", "question"),
    *("rejected", "source", "source_language", "spans", "summary", "system", "tags", "target", "target_language"),
    *("text", "tokens", "tools", "train_reasoning", "translation"),
)
"""Names of columns that rows are made of: what the keys of a source's `columns` may be."""


@dataclass(frozen=True)
class TaskFacts:
    """What a recipe may say about one task."""

    name: str
    summary: str
    metrics: tuple[str, ...]
    default_metrics: tuple[str, ...]
    formats: tuple[str, ...]
    """Row formats by name, as in a source's `format`."""
    models: tuple[str, ...]
    """The kinds of models that do it: decoder, encoder, encoder-decoder, speech; `llmtune init` proposes the first."""
    columns: tuple[str, ...] = ()
    """Columns that are looked for in files of other names: what is given first, what is learned last."""
    first_metrics: tuple[str, ...] = ()
    """Metrics of the recipe that `llmtune init` writes; without them the default ones."""
    first_lines: tuple[str, ...] = ()
    """Lines of the task's section in that recipe."""
    section: str | None = None
    """Name of the section that only this task has."""
    packs: bool = False
    """Whether some of its models train on packed rows."""
    templated: bool = False
    """Whether the chat template is used, by some of its models."""
    generates: bool = False
    """Whether answers are generated."""
    ranks: bool = False
    """Whether candidates can be ranked by how well they know the answers."""
    overlong: tuple[str, ...] = ("error", "drop")
    """What may become of a row that is too long."""
    decodes: bool = True
    """Whether some of its models are decoders of written language."""
    has_turns: bool = False
    """Whether `data.train_on` chooses among the turns of a row."""
    unswapped: str | None = None
    """Why words for groups are not swapped in its rows; None where they are."""
    takes_audio: bool = False
    """Whether rows are recordings."""
    answer_kind: str = "text"
    """What an answer is: `text`, `labels` (their order does not count), `tags` of words or a `rating`."""
    prompt_name: str = "prompt"
    """What a prompt is called in the report."""
    metric_notes: Mapping[str, str] = field(default_factory=dict)
    """What a metric is, where its name means something else than in other tasks."""
    pipeline: str | None = None
    """The hub's name of the task, where the kind of model does not say it."""

    @property
    def has_messages(self) -> bool:
        """Whether rows may be conversations that the chat template writes."""
        return self.templated and not set(WITH_ROLES).isdisjoint(self.formats)

    @property
    def splits_text(self) -> bool:
        """Whether a long row can be split into several: tasks of a language model alone."""
        return "split" in self.overlong


def answer_kind(task: str | None) -> str:
    """Return the kind of a task's answers; `text` where the task is not known."""
    return TASK_FACTS[task].answer_kind if task in TASK_FACTS else "text"


_ANY_LENGTH = ("error", "drop", "truncate", "split")

_TASKS = (
    TaskFacts(
        "chat",
        "answer in a conversation",
        (*LANGUAGE, *GENERATED, "choice_accuracy", *TOOL_METRICS, CUT_METRIC),
        (*LANGUAGE, "exact_match", "rougeL", "chrf", "choice_accuracy", *TOOL_METRICS),
        formats=("messages", "sharegpt", "alpaca", "prompt-completion"),
        models=("decoder",),
        columns=("prompt", "completion"),
        first_metrics=("loss", "rougeL", "chrf"),
        packs=True,
        templated=True,
        generates=True,
        ranks=True,
        overlong=_ANY_LENGTH,
        has_turns=True,
    ),
    TaskFacts(
        "completion",
        "go on with a text, or fill in what is masked",
        (*LANGUAGE, *GENERATED, "choice_accuracy", CUT_METRIC),
        LANGUAGE,
        formats=("prompt-completion", "alpaca", "text"),
        models=("decoder",),
        columns=("prompt", "completion"),
        first_metrics=("loss", "bits_per_byte"),
        section="completion",
        packs=True,
        generates=True,
        ranks=True,
        overlong=_ANY_LENGTH,
    ),
    TaskFacts(
        "translate",
        "put a text into another language",
        ("loss", "perplexity", "accuracy", *MACHINE_TRANSLATION, CUT_METRIC),
        ("loss", "bleu", "chrf"),
        formats=("source-target", "translation"),
        models=("decoder", "encoder-decoder"),
        columns=("source", "target"),
        first_lines=(
            "source_language: English  # DECIDE: what you translate from",
            "target_language: German  # DECIDE: and into",
        ),
        section="translate",
        packs=True,
        templated=True,
        generates=True,
        ranks=True,
        prompt_name="source",
        pipeline="translation",
        unswapped="a translation may have to change with the group",
    ),
    TaskFacts(
        "summarize",
        "say a text in fewer words",
        ("loss", "perplexity", "accuracy", *ROUGE, "chrf", "length_ratio", CUT_METRIC),
        ("loss", *ROUGE, "length_ratio"),
        formats=("document-summary",),
        models=("decoder", "encoder-decoder"),
        columns=("document", "summary"),
        first_metrics=("loss", "rougeL", "length_ratio"),
        section="summarize",
        packs=True,
        templated=True,
        generates=True,
        ranks=True,
        overlong=("error", "drop", "truncate"),
        prompt_name="document",
        pipeline="summarization",
    ),
    TaskFacts(
        "qa",
        "find the answer in a text",
        ("loss", "exact_match", "f1", CUT_METRIC),
        ("exact_match", "f1"),
        formats=("squad", "question-answer"),
        models=("encoder", "decoder", "encoder-decoder"),
        columns=("question", "context", "answer"),
        section="qa",
        overlong=("error", "drop", "truncate"),
        packs=True,
        templated=True,
        generates=True,
        prompt_name="question and context",
        metric_notes={
            "loss": "nats of the right answer, by its ends or per token",
        },
    ),
    TaskFacts(
        "classify",
        "put a text into a class, into several, or on a scale",
        (
            *("loss", "accuracy", "f1_macro", "f1_micro", "f1_weighted", "matthews", "auroc"),
            *("mse", "mae", "pearson", "spearman"),
        ),
        ("loss", "accuracy", "f1_macro", "f1_micro", "matthews", "auroc"),
        formats=("text-label",),
        models=("encoder", "decoder"),
        columns=("text", "label"),
        first_metrics=("loss", "accuracy", "f1_macro"),
        section="classify",
        packs=True,
        overlong=("error", "drop", "truncate"),
        answer_kind="labels",
        prompt_name="text",
        metric_notes={
            "loss": "loss per row, as in training",
            "accuracy": "label is right; of many, all of them",
        },
        decodes=False,
    ),
    TaskFacts(
        "token-classify",
        "mark words in a text",
        ("loss", "f1", "precision", "recall", "accuracy"),
        ("loss", "f1", "precision", "recall"),
        formats=("tokens-tags", "text-spans"),
        models=("encoder",),
        section="token_classify",
        packs=True,
        overlong=("error", "drop"),
        answer_kind="tags",
        prompt_name="text",
        metric_notes={
            "loss": "nats per tag",
            "accuracy": "tag is right; most words lie outside",
            "f1": "entities found whole: precision and recall in one",
            "precision": "share of entities found that are right",
            "recall": "share of the right entities that were found",
        },
        decodes=False,
    ),
    TaskFacts(
        "speech",
        "write down what is said",
        ("loss", "wer", "cer", CUT_METRIC),
        ("loss", "wer", "cer"),
        formats=("audio-text", "audio-folder"),
        models=("speech",),
        columns=("audio", "text"),
        section="speech",
        generates=True,
        takes_audio=True,
        prompt_name="recording",
        metric_notes={
            "loss": "nats of the right transcript, by its tokens",
        },
        decodes=False,
        unswapped="a recording has no words to swap",
    ),
    TaskFacts(
        "preference",
        "prefer one answer to another",
        ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
        ("loss", "accuracy", "margin", "kl"),
        formats=("chosen-rejected", "conversation-pair", "answer-thumb", "conversation-thumb"),
        models=("decoder",),
        columns=("prompt", "chosen", "rejected"),
        section="preference",
        templated=True,
        answer_kind="rating",
        metric_notes={
            "loss": "loss per pair, as in training",
            "accuracy": "better answer has the higher reward",
        },
    ),
)
TASK_FACTS = {facts.name: facts for facts in _TASKS}
"""Every task by name, in the order of the documentation."""
DEFAULT_TASK = _TASKS[0].name
ROW_FORMATS = tuple(dict.fromkeys(name for facts in _TASKS for name in facts.formats))


MASKED_METRICS = ("loss", "perplexity", "accuracy")
"""Metrics of masked tokens; bits per byte are of a whole text, and nothing is generated."""
LOSS_METRICS = {
    "dpo": ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
    "ipo": ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
    "kto": ("accuracy", "margin", "kl"),
    "orpo": ("accuracy", "margin", "likelihood_accuracy", "kl"),
    "reward": ("loss", "accuracy", "margin"),
}
"""Metrics of task preference that each loss has: the loss of KTO and ORPO depends on which rows share a step."""


@dataclass(frozen=True)
class TaskVariant:
    """One task as a recipe trains it."""

    task: str
    objective: str | None = None
    """`completion.objective`; None for another task, as below."""
    style: str | None = None
    """`qa.style`; with `auto` the model decides."""
    loss: str | None = None
    """`preference.loss`."""
    kl_hindrance: str | None = None
    """Why the adapter cannot be switched off to compare with the base; None where it can."""

    @property
    def facts(self) -> TaskFacts:
        """What holds for the task whatever the recipe."""
        return TASK_FACTS[self.task]

    @property
    def is_masked(self) -> bool:
        """Whether masked tokens are predicted."""
        return self.objective == "masked"

    @property
    def is_extractive(self) -> bool:
        """Whether answers are pointed at for certain."""
        return self.style == "extractive"

    @property
    def is_reward(self) -> bool:
        """Whether a model is trained that scores answers and writes none."""
        return self.loss == "reward"

    @property
    def generates(self) -> bool:
        """Whether answers are generated, if by `llmtune generate` alone."""
        if self.loss is not None:
            return not self.is_reward
        return self.facts.generates and not self.is_masked and not self.is_extractive

    @property
    def on_overlong(self) -> tuple[str, ...]:
        """What may become of a row that is too long."""
        return ("error", "drop") if self.is_extractive else self.facts.overlong

    @property
    def unmeasured(self) -> dict[str, str]:
        """The metrics of task preference that its loss or its adapter does not have, each with the reason."""
        if self.loss is None:
            return {}
        known = LOSS_METRICS[self.loss]
        reason = f"preference.loss: {self.loss} has no such thing"
        missing = {name: reason for name in self.facts.metrics if name not in known}
        if self.kl_hindrance:
            missing.setdefault("kl", self.kl_hindrance)
        return missing

    @property
    def metrics(self) -> tuple[str, ...]:
        """The task's metrics that can be measured."""
        if self.is_masked:
            return MASKED_METRICS
        return tuple(name for name in self.facts.metrics if name not in self.unmeasured)

    @property
    def eval_metrics(self) -> tuple[str, ...]:
        """Metrics that need no base model: measured while training, in addition to the loss."""
        of_two = {"accuracy", "margin"} if self.loss in ("dpo", "ipo", "kto") else set[str]()
        return tuple(name for name in self.metrics if name not in {"loss", *of_two})

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """The task's own choice of metrics, as far as they can be measured."""
        return tuple(name for name in self.facts.default_metrics if name in self.metrics)

    @property
    def without_decoder(self) -> tuple[str, str] | None:
        """Return why no model of this recipe continues a text, and the key that decides it, or None."""
        if not self.facts.decodes:
            return f"models of task: {self.task} give text none", "task"
        if self.is_masked:
            return "with completion.objective: masked a model only fills in words", "completion.objective"
        if self.is_extractive:
            return "with qa.style: extractive a model only points at answers", "qa.style"
        if self.is_reward:
            return "with preference.loss: reward a model only gives scores", "preference.loss"
        return None
