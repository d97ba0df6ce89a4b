"""Types of the JSON files in a run folder; damaged files are refused with file and key."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from llmtune.errors import EnvironmentProblem, LlmtuneError
from llmtune.store.atomic_files import explained, plain, read_json, read_json_lines
from llmtune.store.resource_limits import LARGEST_NUMBER

FIX = "Restore the file, or run the recipe again with --fresh."
Count = Annotated[int, Field(ge=0, lt=2**63)]
Counts = dict[str, Count]
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
Number = Finite | None
Moment = Annotated[float, Field(ge=0, lt=1e11)]
"""Seconds since 1970, until the year 5138."""


class PreparedFacts(TypedDict):
    """Rows read, rows kept by split, rows dropped by reason, and class names that were normalised or renamed."""

    rows_in: Count
    kept: Counts
    dropped: Counts
    class_changes: NotRequired[list[dict[str, str | Count]]]


class Lengths(TypedDict):
    """A histogram: `counts[i]` counts values between `edges[i]` and `edges[i + 1]`."""

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
    """The model, the ranking that selected it, and its `records.MemoryPlan`."""

    name: str
    revision: NotRequired[str | None]
    sha256: str
    ranking: NotRequired[dict[str, Any] | None]
    plan: NotRequired[dict[str, Any]]


class AdapterShape(TypedDict):
    """The adapter in the model."""

    method: str
    trainable: Count
    matched_modules: NotRequired[Count]
    targets: NotRequired[Counts]
    r: NotRequired[Count]
    lora_alpha: NotRequired[Number]


class AdaptedFacts(AdapterShape):
    """The adapter, as recorded by the step `adapt`."""

    total: Count
    adapter_bytes: NotRequired[Count]


class HardRow(TypedDict):
    """A training row whose loss stayed above the mean of its steps; in nats per prediction."""

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
    collapse: NotRequired[str | None]
    resumed_from: NotRequired[Count | None]
    skipped_steps: NotRequired[Count]
    hardest_rows: NotRequired[list[HardRow]]


class EvaluatedFacts(TypedDict, total=False):
    """Hashes of the evaluated weights, and of the recipe keys that affect evaluation."""

    trained: str
    recipe: dict[str, str]


class Checkpointing(TypedDict):
    """The decision of `gradient_checkpointing: auto`."""

    inputs: str
    on: bool


class ReleaseOutcome(TypedDict):
    """What became of `deploy: release`."""

    name: str
    current: str | None
    """Hash of the release that serves from then on."""
    promoted: bool
    message: str
    """The line that the run printed about it."""


class Findings(TypedDict, total=False):
    """Values that a run stores for its next start."""

    micro_batch_tokens: Count
    gradient_checkpointing: Checkpointing
    next_steps: object
    look: str | None
    released: list[str]
    """Addresses of the releases that have this run's weights."""
    release: ReleaseOutcome
    released_from: str
    """In a release: the run folder that it was made from."""
    start_from: object
    ranking: dict[str, object]
    class_hints: list[list[str | int]]
    gates: Literal["passed", "failed", "undecided"] | None
    """The outcome of all gates on the present weights; None until they are judged."""
    reproduces: str
    """The run that this one reproduces."""
    control_failure: str
    """Why its control run could not be trained; empty if it was."""


METRICS = "metrics.jsonl"
KEPT_START = "Training did not improve on its start by the validation rows: this is the frozen base with a regression."
ROLLOUTS = "rollouts"
"""Folder of the sampled answers of a run."""
"""File in the run folder, with a line for each log step."""


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
"""Facts that each step writes to the manifest; more keys are allowed."""


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def read_curve(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without damaged or truncated lines."""
    return [line for line in read_json_lines(run / METRICS) if find_misfit(line, CurveLine) is None]


def find_misfit(content: object, shape: Any) -> str | None:
    """Return the first key of a JSON value whose type does not match `shape`, with the reason; None if all match."""
    try:
        _adapter(shape).validate_json(json.dumps(plain(content)), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
    return None


def check_shape(
    content: object, shape: Any, path: Path, *, below: str = "", fix: str = FIX, kind: type[LlmtuneError] | None = None
) -> None:
    """Raise an error (by default EnvironmentProblem) naming the first key that does not match `shape`."""
    if misfit := find_misfit(content, shape):
        raise (kind or EnvironmentProblem).of(f"damaged ({below}{misfit})", str(path), fix)


def read_record(path: Path, shape: Any, *, fix: str = FIX, kind: type[LlmtuneError] | None = None) -> Any:
    """Read a JSON file written by llmtune; None if it is missing or not JSON. Raises as `check_shape` does."""
    with explained(path):
        content = read_json(path)
    if content is not None:
        check_shape(content, shape, path, fix=fix, kind=kind)
    return content
