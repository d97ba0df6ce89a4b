"""JSON files of a run folder, checked against what llmtune writes: a damaged one is refused by file and key."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.store.atomic_files import explained, plain, read_json

FIX = "Put the file back as it was, or run the recipe again with --fresh."
Count = Annotated[int, Field(ge=0, lt=2**63)]
Counts = dict[str, Count]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = Finite | None
Moment = Annotated[float, Field(ge=0, lt=1e11)]
"""Seconds since 1970, up to the year 5138."""


class PreparedFacts(TypedDict):
    """Rows that were read, kept by split, and dropped by reason."""

    rows_in: Count
    kept: Counts
    dropped: Counts


class Lengths(TypedDict):
    """A histogram: `counts[i]` lies between `edges[i]` and `edges[i + 1]`."""

    edges: list[Finite]
    counts: list[Count]


class EncodedFacts(TypedDict):
    """Examples and tokens by split."""

    dropped: Counts
    examples: Counts
    tokens: Counts
    supervised: Counts
    longest: Counts
    supervised_share: Number
    histogram: Lengths
    example: list[tuple[str, bool]]
    classes: NotRequired[dict[str, Counts] | None]
    lost: NotRequired[Counts | None]


class SelectedFacts(TypedDict):
    """The model, the ranking it comes from, and its `records.MemoryPlan`."""

    name: str
    revision: NotRequired[str | None]
    sha256: str
    ranking: NotRequired[dict[str, Any] | None]
    plan: NotRequired[dict[str, Any]]


class AdapterShape(TypedDict):
    """What was put into the model."""

    method: str
    trainable: Count
    matched_modules: NotRequired[Count]
    targets: NotRequired[Counts]
    r: NotRequired[Count]
    lora_alpha: NotRequired[Number]


class AdaptedFacts(AdapterShape):
    """The same, as the step `adapt` notes it."""

    total: Count
    adapter_bytes: NotRequired[Count]


class HardRow(TypedDict):
    """A training row whose loss stayed above that of the steps it was in; in nats per prediction."""

    origin: str
    id: str
    loss: Number
    excess: Number
    seen: Count
    prompt: str
    reference: str


class TrainedFacts(TypedDict):
    """Losses, steps and speed."""

    steps: Count
    tokens: NotRequired[Count]
    epochs: NotRequired[Number]
    train_loss: NotRequired[Number]
    first_loss: NotRequired[Number]
    validation_loss: NotRequired[Number]
    best_step: NotRequired[Count | None]
    tokens_per_second: NotRequired[Number]
    wall_seconds: NotRequired[Number]
    peak_bytes: NotRequired[Number]
    padding_share: NotRequired[Number]
    processes: NotRequired[Count]
    strategy: NotRequired[str]
    stopped_early: NotRequired[str | None]
    resumed_from: NotRequired[Count | None]
    hardest_rows: NotRequired[list[HardRow]]


class EvaluatedFacts(TypedDict, total=False):
    """Hashes of what was evaluated, and of the keys of the recipe that decide how."""

    trained: str
    recipe: dict[str, str]


class Checkpointing(TypedDict):
    """What `gradient_checkpointing: auto` came to."""

    inputs: str
    on: bool


class Findings(TypedDict, total=False):
    """What a run keeps for its next start."""

    micro_batch_tokens: Count
    gradient_checkpointing: Checkpointing
    next_steps: object
    look: str | None
    start_from: object
    ranking: dict[str, object]


class CurveLine(TypedDict):
    """A line of metrics.jsonl."""

    step: Count
    epoch: NotRequired[Number]
    loss: NotRequired[Number]
    learning_rate: NotRequired[Number]
    grad_norm: NotRequired[Number]
    tokens_per_second: NotRequired[Number]
    peak_bytes: NotRequired[Number]
    validation_loss: NotRequired[Number]
    validation_metrics: NotRequired[dict[str, Number]]


STEP_FACTS: dict[str, Any] = {
    "prepare": PreparedFacts,
    "encode": EncodedFacts,
    "select": SelectedFacts,
    "adapt": AdaptedFacts,
    "train": TrainedFacts,
    "evaluate": EvaluatedFacts,
}
"""What each step leaves in the manifest; there may be more."""


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def find_misfit(content: object, shape: Any) -> str | None:
    """Return the first key of a JSON value that does not have the type that `shape` says, and why; None if all do."""
    try:
        _adapter(shape).validate_json(json.dumps(plain(content)), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"
    return None


def check_shape(
    content: object, shape: Any, path: Path, *, below: str = "", fix: str = FIX, kind: type[LlmtuneError] | None = None
) -> None:
    """Raise an error (EnvironmentProblem unless `kind` is given) that names the first key that does not fit `shape`."""
    if misfit := find_misfit(content, shape):
        raise (kind or EnvironmentProblem).of(f"damaged ({below}{misfit})", str(path), fix)


def read_record(path: Path, shape: Any, *, fix: str = FIX, kind: type[LlmtuneError] | None = None) -> Any:
    """Read a JSON file of our own; None if it is missing or holds no JSON. Raises as `check_shape` does."""
    with explained(path):
        content = read_json(path)
    if content is not None:
        check_shape(content, shape, path, fix=fix, kind=kind)
    return content
