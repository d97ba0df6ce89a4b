"""Compare runs: what each cost and scored, each pair row by row, and which of two is better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from llmtune import __version__
from llmtune.data.row_store import iterate_ids, load_rows
from llmtune.errors import LlmtuneError
from llmtune.evaluate.class_alignment import pair_metrics
from llmtune.evaluate.control_verdict import list_reliances
from llmtune.evaluate.gates import check_gates
from llmtune.evaluate.metric_info import list_targets
from llmtune.evaluate.opened_runs import OpenedRun, find_differing
from llmtune.evaluate.significance import INCONCLUSIVE
from llmtune.evaluate.verdict import judge_run, verdict
from llmtune.records import Difference, Json
from llmtune.store.report_record import Verdict
from llmtune.store.run_folder import trained_name
from llmtune.store.score_records import Evaluation, GateResult, SimpleBaseline

UNTRAINED = (
    *("data.train", "data.validation", "data.test", "evaluate.", "generation.", "seed", "train.seeds", "model.name"),
    *("train.logging_steps", "train.report_to", "train.save_total_limit"),
)
"""Keys that change only the randomness of training on the same rows."""


@dataclass(frozen=True)
class RunSummary:
    """A run's costs and scores, with those of its own base; None if unknown."""

    name: str
    folder: str
    method: str
    model: str | None
    seed: int
    learning_rate: float
    batch: int | None
    steps: int | None
    tokens: int | None
    train_seconds: float | None
    run_seconds: float | None
    peak_bytes: int | None
    trainable: int | None
    parameters: int | None
    share: float | None
    disk_bytes: int | None
    forgotten: float | None
    """Bits per byte of general text, tuned minus base, if the recipe has `evaluate.forgetting`."""
    baseline: str | None
    base: Mapping[str, float]
    tuned: Mapping[str, float]
    difference: Mapping[str, Difference]
    verdict: Verdict
    served_bytes: int | None = None
    """Size of all weights that answers need: base and adapter, or the export; known once a run has an export."""
    row_seconds: float | None = None
    """Seconds per answer, one row at a time; known once a run has an export."""
    rate: str | None = None
    """Origin of its learning rate, if methods are compared."""
    gates: Sequence[GateResult] | None = None
    simple_baselines: dict[str, SimpleBaseline] = field(default_factory=dict)


@dataclass(frozen=True)
class RunPair:
    """Two runs on the same rows: paired differences, second minus first."""

    first: str
    second: str
    difference: Mapping[str, Difference]
    left_out: Mapping[str, str]
    """By metric, the reason it could not be compared."""
    verdict: Verdict
    """better, worse, mixed or inconclusive, for the second run."""


@dataclass(frozen=True)
class DifferingKey:
    """A key whose value differs, and its value in each run."""

    key: str
    values: Sequence[object]


@dataclass(frozen=True)
class Comparison:
    """Several runs, compared."""

    llmtune: str
    task: str
    rows: int
    """Number of test rows."""
    runs: Sequence[RunSummary]
    pairs: Sequence[RunPair]
    settings: Sequence[DifferingKey]
    notes: Sequence[str]
    kind: str
    """runs, or methods of one recipe."""
    name: str
    folder: str = ""


def make_comparison(runs: Sequence[OpenedRun], kind: str, name: str) -> Comparison:
    """Return each run's summary, each pair, and the differences between the recipes."""
    first, *others = runs
    keys = dict.fromkeys(key for one in others for key in find_differing(first, one))
    return Comparison(
        llmtune=__version__,
        task=first.recipe.task,
        rows=len(first.measures.rows),
        runs=[summarize(run) for run in runs],
        pairs=[compare_pair(*pair) for pair in combinations(runs, 2)],
        settings=[DifferingKey(key, [run.settings.get(key) for run in runs]) for key in keys],
        notes=list(find_notes(runs)),
        kind=kind,
        name=name,
    )


def summarize(run: OpenedRun) -> RunSummary:
    """Return a run's costs and scores."""
    train, adapt, evaluation = run.folder.facts("train"), run.folder.facts("adapt"), run.evaluation
    steps = run.folder.manifest["steps"]
    study = evaluation.studies.get("forgetting")
    forgotten = study.difference.get("bits_per_byte") if study else None
    weights = (run.folder.path / trained_name(run.recipe)).rglob("*")  # tokenizer and settings are the same for all
    trained = sum(path.stat().st_size for path in weights if path.suffix in {".safetensors", ".bin"})
    served_bytes, row_seconds = find_usage(run)
    return RunSummary(
        name=run.name,
        folder=str(run.folder.path),
        method=run.recipe.adapter.method,
        model=run.folder.facts("select").get("name"),
        seed=run.recipe.seed,
        learning_rate=run.recipe.train.learning_rate,
        batch=run.recipe.train.batch_tokens or run.recipe.train.batch_size,
        steps=train.get("steps"),
        tokens=train.get("tokens"),
        train_seconds=train.get("wall_seconds"),
        run_seconds=sum(step.get("seconds") or 0 for step in steps.values()),
        peak_bytes=steps["train"].get("peak_bytes"),
        trainable=adapt.get("trainable"),
        parameters=adapt.get("total"),
        share=adapt["trainable"] / adapt["total"] if adapt.get("total") else None,
        disk_bytes=served_bytes if run.export else trained,
        served_bytes=served_bytes,
        row_seconds=row_seconds,
        forgotten=forgotten.value if forgotten else None,
        baseline=evaluation.baseline,
        base=evaluation.base,
        tuned=evaluation.tuned,
        difference=evaluation.difference,
        verdict=judge_run(evaluation, check_gates(run.recipe.evaluate, evaluation), run.recipe.evaluate.alpha),
        simple_baselines=evaluation.simple_baselines,
    )


def find_usage(run: OpenedRun) -> tuple[int | None, float | None]:
    """Return the size and the seconds per answer of an export, or of a run by the certificate of one of its exports."""
    kind = "" if run.export else "tuned_"
    certificates = [run.export] if run.export else [*run.folder.certificates().values()]
    scored: Json = next((one["score"] for one in certificates if "bytes" in one.get("score", {})), {})
    usage = scored.get(f"{kind}usage")
    return scored.get(f"{kind}bytes"), 1 / usage["rows_per_second"] if usage else None


def find_notes(runs: Sequence[OpenedRun]) -> Iterator[str]:
    """Yield notes needed to read the numbers correctly."""
    yield from list_reliances({run.name: run.evaluation for run in runs})
    trained = [run.folder.facts("train") for run in runs]
    for run, train in zip(runs, trained, strict=True):
        if train.get("resumed_from"):
            yield f"{run.name} was resumed at step {train['resumed_from']}: its seconds are those since then."
        if train.get("stopped_early"):
            yield f"{run.name} stopped early: {train['stopped_early']}."
    if len({train.get("steps") for train in trained}) > 1:
        yield "The runs were not trained for the same number of steps."
    scores = {str(sorted(run.evaluation.base.items())) for run in runs}
    if len(scores) > 1 and len({base_identity(run) for run in runs}) > 1:  # with one base they differ only by rounding
        text = "The base scores differ: each run is compared with the base it was trained on; with qlora that is "
        yield text + "the model in 4 bits. The pairs compare the tuned models themselves."


def compare_pair(first: OpenedRun, second: OpenedRun) -> RunPair:
    """Return paired differences, second minus first, with the verdict and the omitted metrics."""
    difference, left_out = pair_metrics(first, second)
    return RunPair(first.name, second.name, difference, left_out, judge(first, second, difference))


def judge(first: OpenedRun, second: OpenedRun, difference: dict[str, Difference]) -> Verdict:
    """Return the verdict on the second run (better, worse, mixed, inconclusive) and the reason.

    The same tuned model twice, or two trainings of one recipe on the same rows, cannot be better or worse. Rounding,
    the seed or the row order may still change their scores.
    """
    if first.export or second.export:
        return verdict(judged_pair(first, second, difference))
    alike = base_identity(first) == base_identity(second)
    trained, other = (run.folder.manifest["steps"]["evaluate"]["facts"].get("trained") for run in (first, second))
    if alike and trained and trained == other:
        return Verdict(INCONCLUSIVE, "Both are the same model, byte for byte.")
    result = verdict(judged_pair(first, second, difference))
    alike = alike and all(key.startswith(UNTRAINED) for key in find_differing(first, second))
    if not alike or (rows := learned_rows(first)) is None or rows != learned_rows(second):
        return result
    reason = "These are two trainings of one recipe on the same rows, which differ in seed, row order or machine"
    moved = "" if result.word == INCONCLUSIVE else f" Between these two: {result.reason[0].lower()}{result.reason[1:]}"
    return Verdict(INCONCLUSIVE, f"{reason}: the difference between them is training noise.{moved}")


def judged_pair(first: OpenedRun, second: OpenedRun, difference: dict[str, Difference]) -> Evaluation:
    """Return what the verdict on a pair reads: low scores alone say nothing about it, except those with a target."""
    decided = second.evaluation.decided
    names = [] if decided is None else [name for name in list_targets(decided) if name in difference]
    before, after = ({name: run.measures.tuned[name].value for name in names} for run in (first, second))
    alone = after if difference else second.evaluation.tuned
    return Evaluation(before, alone, difference, (), 0, decided=decided)


def base_identity(run: OpenedRun) -> tuple[object, ...]:
    """Return the hash of the base model, and how it is loaded; equal means the same weights below an adapter."""
    adapter = run.recipe.adapter
    form = (adapter.method, adapter.bnb_4bit_quant_type, adapter.bnb_4bit_use_double_quant)
    return (run.folder.facts("select")["sha256"], run.recipe.model.dtype, *form)


def learned_rows(run: OpenedRun) -> list[str] | None:
    """Return the rows used for training and selection, as sorted hashes; None if the rows are gone."""
    try:
        rows = load_rows(run.folder.path / "data" / "rows")
        return sorted(f"{side} {row}" for side in ("train", "validation") for row in iterate_ids(rows, side))
    except (LlmtuneError, OSError):
        return None
