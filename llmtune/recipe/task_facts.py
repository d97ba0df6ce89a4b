"""Static facts of each task: metrics, recipe section, row formats, and settings without effect. Imports no library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmtune.recipe.format_names import PROMPT_ALONE, ROW_KINDS, WITH_ROLES

LANGUAGE = ("loss", "perplexity", "bits_per_byte", "accuracy")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
GENERATED = ("exact_match", *ROUGE, "chrf")
"""Metrics of chat and completion on generated answers."""
MACHINE_TRANSLATION = ("bleu", "chrf", "ter", "exact_match")
TOOL_METRICS = ("tool_call_valid", "tool_name", "tool_arguments", "tool_arguments_f1", "no_call")
CALIBRATION = ("ece", "brier", "nll")
"""Metrics of the probabilities of a task with a fixed set of labels."""
LABEL_METRICS = ("accuracy", "f1_macro", "f1_micro", "f1_weighted", "matthews", "auroc", *CALIBRATION)
CLASSIFICATION = (*LABEL_METRICS, "mse", "mae", "pearson", "spearman")
CHOICE_METRICS = ("choice_accuracy", *CALIBRATION)
"""Metrics of chat and completion that need choices."""
DECISIONS: Mapping[str, tuple[str, ...]] = {
    "decide": ("decided", "decided_error"),
    "sets": ("set_coverage", "set_size"),
    "out_of_scope": ("false_alarms",),
}
"""Metrics of the tuned model's decisions on test rows, by the key of `evaluate` that adds them."""
SAMPLED = ("reward", "greedy_reward", "pass@1", "pass@8", "answer_tokens", "samples_cut", "kl")
"""Metrics of sampled answers and their rewards. The k of `pass@k` is at most `reinforce.samples`."""
RANKING = ("ndcg@10", "mrr@10", "recall@1", "recall@5", "recall@10", "map")
"""Metrics of ranked passages; each cutoff after the @ may be another number."""
NEAREST_TO_ONE = frozenset({"length_ratio"})
"""Metrics that are best near 1: neither more nor less is better."""
COST = "_cost"
"""Ending of a metric's name for which lower is better; so users mark their own metrics."""
CONTROLS: Mapping[str, str] = {"blind": "a grey picture", "swapped": "another row's picture"}
"""Pictures that replace those of test rows, by the names that gates use."""
CONTROL_RUNS: Mapping[str, str] = {
    "sft": "the same recipe without a teacher",
    "filter": "supervised training on the samples that the rewards accept",
}
"""Variants of a recipe that a run also trains, by the names that gates use."""
CUT_METRIC = "answers_cut"
"""Share of truncated answers; measured whenever another metric generates answers."""
PREDICTED = frozenset(
    {*SAMPLED[:-1], *GENERATED, *MACHINE_TRANSLATION, *TOOL_METRICS, CUT_METRIC, "length_ratio", "f1", "wer", "cer"}
)
"""Metrics of generated answers, whose number `evaluate.limit` limits."""


@dataclass(frozen=True)
class TaskFacts:
    """Allowed recipe values and report words of one task."""

    name: str
    summary: str
    metrics: tuple[str, ...]
    default_metrics: tuple[str, ...]
    rows: str
    """The kind of the task's rows: a key of `ROW_KINDS`."""
    models: tuple[str, ...]
    """Supported kinds of models: decoder, encoder, encoder-decoder, speech; `llmtune init` proposes the first."""
    rates_answers: bool = False
    """Whether rewards rate the model's own answers: rows need none, and keep all columns."""
    columns: tuple[str, ...] = ()
    """Columns to map from files with other column names: inputs first, the target last."""
    first_metrics: tuple[str, ...] = ()
    """Metrics of the recipe that `llmtune init` writes; if empty, the default metrics."""
    first_lines: tuple[str, ...] = ()
    """Lines of the task's section in that recipe."""
    section: str | None = None
    """Name of the task's own section."""
    section_measures: bool = True
    """Whether keys of that section change what a metric measures; otherwise runs with other values are comparable."""
    hashes_missing_section: bool = True
    """Whether a recipe without the section is hashed with an empty one; not if the task got its section later."""
    packs: bool = False
    """Whether some models of the task train on packed rows."""
    templated: bool = False
    """Whether some models of the task use the chat template."""
    generates: bool = False
    """Whether models of the task generate answers."""
    ranks: bool = False
    """Whether candidates can be ranked by the likelihood of the answers."""
    overlong: tuple[str, ...] = ("error", "drop")
    """Allowed values of `data.on_overlong`."""
    decodes: bool = True
    """Whether some models of the task are text decoders."""
    has_turns: bool = False
    """Whether `data.train_on` chooses among the turns of a row."""
    unswapped: str | None = None
    """Why fairness does not swap group words in rows of the task; None if it does."""
    takes_audio: bool = False
    """Whether rows are recordings."""
    takes_images: bool = False
    """Whether prompts may have pictures."""
    packages: tuple[str, ...] = ()
    """Import names of optional packages that rows of the task need, installed by an extra with the task's name."""
    answer_kind: str = "text"
    """Type of an answer: `text`, `labels` (in any order), `tags` of words, a `rating`, or `relevances` of passages."""
    prompt_name: str = "prompt"
    """Word for a prompt in the report."""
    metric_notes: Mapping[str, str] = field(default_factory=dict)
    """Meaning of metrics that differs from other tasks."""
    pipeline: str | None = None
    """The hub's name of the task, if the kind of model does not imply it."""
    loader: str | None = None
    """Class of sentence-transformers that loads complete models of the task; None: transformers loads them."""
    tags: tuple[str, ...] = ()
    """The hub's tags for models of the task."""
    searches: bool = False
    """Whether test queries are searched in passages, such as those of `data.corpus`."""
    distils: bool = False
    """Whether its models can learn the predictions of a teacher (`distil`)."""
    mines: bool = False
    """Whether negatives can be mined (`data.negatives`)."""
    after: str | None = None
    """Task that `llmtune init` proposes before this one for a file that both read."""
    simple_baselines: tuple[str, ...] = ()
    """The baselines of `SIMPLE_BASELINES` that are scored on the same test rows."""
    baseline_metrics: tuple[str, ...] = ()
    """Metrics of those baselines."""
    split_by: str | None = None
    """Column that groups rows if the recipe does not set `data.split_by`; all rows of the task have it once parsed."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Return the row formats of the task by name."""
        return (*ROW_KINDS[self.rows], *((PROMPT_ALONE,) if self.rates_answers else ()))

    @property
    def library(self) -> str:
        """Return the hub's name of the library that loads complete models of the task."""
        return "sentence-transformers" if self.loader else "transformers"

    @property
    def has_messages(self) -> bool:
        """Return whether rows may be conversations, rendered by the chat template."""
        return self.templated and not set(WITH_ROLES).isdisjoint(self.formats)

    @property
    def splits_text(self) -> bool:
        """Return whether a long row can be split into several; only for language modelling tasks."""
        return "split" in self.overlong


def answer_kind(task: str | None) -> str:
    """Return the type of a task's answers; `text` if the task is unknown."""
    return TASK_FACTS[task].answer_kind if task in TASK_FACTS else "text"


_ANY_LENGTH = ("error", "drop", "truncate", "split")

_TASKS = (
    TaskFacts(
        "chat",
        "answer in a conversation",
        (*LANGUAGE, *GENERATED, *CHOICE_METRICS, *TOOL_METRICS, CUT_METRIC),
        (*LANGUAGE, "exact_match", "rougeL", "chrf", "choice_accuracy", *TOOL_METRICS),
        rows="messages",
        models=("decoder",),
        columns=("prompt", "completion"),
        first_metrics=("loss", "rougeL", "chrf"),
        section="chat",
        section_measures=False,
        hashes_missing_section=False,
        takes_images=True,
        packs=True,
        templated=True,
        generates=True,
        ranks=True,
        overlong=_ANY_LENGTH,
        has_turns=True,
        simple_baselines=("tfidf",),
        baseline_metrics=CHOICE_METRICS,
        distils=True,
    ),
    TaskFacts(
        "completion",
        "continue a text, or fill in masked tokens",
        (*LANGUAGE, *GENERATED, *CHOICE_METRICS, CUT_METRIC),
        LANGUAGE,
        rows="pairs",
        models=("decoder",),
        columns=("prompt", "completion"),
        first_metrics=("loss", "bits_per_byte"),
        section="completion",
        packs=True,
        generates=True,
        ranks=True,
        overlong=_ANY_LENGTH,
        simple_baselines=("tfidf",),
        baseline_metrics=CHOICE_METRICS,
        distils=True,
    ),
    TaskFacts(
        "translate",
        "translate a text into another language",
        ("loss", "perplexity", "accuracy", *MACHINE_TRANSLATION, CUT_METRIC),
        ("loss", "bleu", "chrf"),
        rows="translation",
        models=("decoder", "encoder-decoder"),
        columns=("source", "target"),
        first_lines=(
            "source_language: English  # DECIDE: the source language",
            "target_language: German  # DECIDE: the target language",
        ),
        section="translate",
        packs=True,
        templated=True,
        generates=True,
        ranks=True,
        prompt_name="source",
        pipeline="translation",
        unswapped="a translation may have to change with the group",
        distils=True,
    ),
    TaskFacts(
        "summarize",
        "summarize a text",
        ("loss", "perplexity", "accuracy", *ROUGE, "chrf", "length_ratio", CUT_METRIC),
        ("loss", *ROUGE, "length_ratio"),
        rows="summary",
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
        simple_baselines=("lead3",),
        baseline_metrics=(*ROUGE, "chrf", "length_ratio"),
        distils=True,
    ),
    TaskFacts(
        "qa",
        "find the answer in a text",
        ("loss", "exact_match", "f1", CUT_METRIC),
        ("exact_match", "f1"),
        rows="question",
        models=("encoder", "decoder", "encoder-decoder"),
        columns=("question", "context", "answer"),
        section="qa",
        overlong=("error", "drop", "truncate"),
        packs=True,
        templated=True,
        generates=True,
        prompt_name="question and context",
        metric_notes={"loss": "nats of the right answer, by its start and end or per token"},
    ),
    TaskFacts(
        "classify",
        "assign one class, several classes or a number to a text",
        ("loss", *CLASSIFICATION),
        ("loss", "accuracy", "f1_macro", "f1_micro", "matthews", "auroc"),
        rows="labelled",
        models=("encoder", "decoder"),
        columns=("text", "label"),
        first_metrics=("loss", "accuracy", "f1_macro"),
        section="classify",
        packs=True,
        overlong=("error", "drop", "truncate"),
        answer_kind="labels",
        simple_baselines=("tfidf", "frozen"),
        baseline_metrics=CLASSIFICATION,
        prompt_name="text",
        metric_notes={"loss": "loss per row, as in training", "accuracy": "label is right; with several, all of them"},
        decodes=False,
        distils=True,
    ),
    TaskFacts(
        "token-classify",
        "mark words in a text",
        ("loss", "f1", "precision", "recall", "accuracy", *CALIBRATION),
        ("loss", "f1", "precision", "recall"),
        rows="tags",
        models=("encoder",),
        section="token_classify",
        packs=True,
        overlong=("error", "drop"),
        answer_kind="tags",
        simple_baselines=("unigram",),
        baseline_metrics=("f1", "precision", "recall", "accuracy"),
        prompt_name="text",
        metric_notes={
            "loss": "nats per tag",
            "accuracy": "tag is right; most words are outside entities",
            "f1": "harmonic mean of precision and recall",
            "precision": "share of found entities that are right",
            "recall": "share of true entities that were found",
        },
        decodes=False,
        distils=True,
    ),
    TaskFacts(
        "speech",
        "transcribe a recording",
        ("loss", "wer", "cer", CUT_METRIC),
        ("loss", "wer", "cer"),
        rows="audio",
        models=("speech",),
        columns=("audio", "text"),
        section="speech",
        generates=True,
        takes_audio=True,
        packages=("jiwer", "soundfile", "soxr"),
        prompt_name="recording",
        metric_notes={"loss": "nats per token of the right transcript"},
        decodes=False,
        unswapped="a recording has no words to swap",
    ),
    TaskFacts(
        "preference",
        "prefer one answer to another",
        ("loss", "accuracy", "margin", "likelihood_accuracy", "kl"),
        ("loss", "accuracy", "margin", "kl"),
        rows="preference",
        models=("decoder",),
        columns=("prompt", "chosen", "rejected"),
        section="preference",
        templated=True,
        answer_kind="rating",
        metric_notes={"loss": "loss per pair, as in training", "accuracy": "better answer has the higher reward"},
    ),
    TaskFacts(
        "reinforce",
        "sample answers and learn from their rewards",
        (*SAMPLED, "pass@10", *GENERATED, *TOOL_METRICS, CUT_METRIC),
        SAMPLED,
        rows="messages",
        models=("decoder",),
        columns=("prompt", "completion"),
        first_lines=("rewards: {exact_match: 1.0}  # DECIDE: what makes an answer good",),
        section="reinforce",
        rates_answers=True,
        packs=True,
        templated=True,
        generates=True,
    ),
    TaskFacts(
        "embed",
        "turn texts into vectors that are close if the texts belong together",
        (*RANKING, "spearman", "pearson", "random_cosine", "effective_rank"),
        ("ndcg@10", "recall@1", "mrr@10", "map", "random_cosine", "effective_rank"),
        rows="retrieval",
        models=("encoder", "decoder"),
        columns=("query", "passage"),
        section="embed",
        section_measures=False,
        packs=True,
        overlong=("error", "drop", "truncate"),
        prompt_name="query",
        decodes=False,
        unswapped="queries and passages may have to change together",
        searches=True,
        mines=True,
        simple_baselines=("bm25",),
        baseline_metrics=RANKING,
        split_by="query",
        pipeline="sentence-similarity",
        loader="SentenceTransformer",
        tags=("sentence-transformers", "feature-extraction"),
    ),
    TaskFacts(
        "rerank",
        "rank passages for a query",
        ("loss", *RANKING),
        ("loss", *RANKING),
        rows="ranking",
        models=("encoder", "decoder"),
        columns=("query", "passage", "relevance"),
        first_metrics=("loss", "ndcg@10", "mrr@10"),
        section="rerank",
        packs=True,
        overlong=("error", "drop", "truncate"),
        answer_kind="relevances",
        prompt_name="query with passages",
        metric_notes={"loss": "binary cross-entropy per passage"},
        pipeline="text-ranking",
        loader="CrossEncoder",
        after="embed",
        tags=("cross-encoder", "reranker"),
        mines=True,
        simple_baselines=("bm25",),
        baseline_metrics=RANKING,
        split_by="query",
        decodes=False,
        unswapped="other passages may be relevant for a swapped query",
    ),
)
TASK_FACTS = {facts.name: facts for facts in _TASKS}
"""Every task by name, in the order of the documentation."""
DEFAULT_TASK = _TASKS[0].name
RETRIEVAL_TASKS = tuple(facts.name for facts in _TASKS if facts.mines)
"""Tasks that learn from queries and passages; `llmtune init` proposes the first for a retrieval set."""
