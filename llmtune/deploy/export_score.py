"""The score of an export: its own runtime answers the run's test rows, each paired with the tuned model's answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtune.adapter.injection import adapter_settings
from llmtune.deploy.exported_model import ExportedModel, weight_bytes
from llmtune.deploy.folder_settings import stated_recipe
from llmtune.deploy.tuned_model import TunedModel, load_tuned
from llmtune.display.number_format import count, score, signed, size
from llmtune.errors import LlmtuneError
from llmtune.evaluate.cache_keys import base_inputs
from llmtune.evaluate.calibration import run_temperature
from llmtune.evaluate.eval_inputs import EvalContext, limit_inputs, make_inputs
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.generation import generate_completions
from llmtune.evaluate.inference import Answers, compute_metrics, inference_on, predict
from llmtune.evaluate.metric import paired_difference
from llmtune.evaluate.metric_info import better_side
from llmtune.evaluate.opened_runs import OpenedRun, ScoredRun, keep_asked, open_run_scores, pair_measures
from llmtune.evaluate.per_row_scores import PerRowScores, name_test_rows, save_measures
from llmtune.evaluate.results import load_base
from llmtune.model.device import release_memory
from llmtune.plan import RunContext
from llmtune.records import Json, Row
from llmtune.store.atomic_files import plain


@dataclass(frozen=True)
class Usage:
    """What answering rows takes, on one device and with the threads of this process."""

    rows_per_second: float
    peak_bytes: int | None
    """Peak main memory that loading and answering added; None on a GPU, or if the system does not count it."""
    device: str


def time_tuned(context: RunContext) -> tuple[TunedModel, Json]:
    """Load the tuned model; return it, and its speed, memory and size for a score."""
    resting = reset_peak()
    tuned, plan = load_tuned(context), context.plan
    usage = time_rows(tuned.model, tuned.processor, tuned, resting)
    full = plan.recipe.adapter.method == "full"  # the weights of its base count unless they were tuned
    total = weight_bytes(context.trained_folder) + (0 if full else weight_bytes(plan.model_ref.path))
    return tuned, {"tuned_usage": plain(usage), "tuned_bytes": total}


def time_export(exported: ExportedModel, tuned: TunedModel, resting: int | None) -> Json:
    """Return an export's runtime, size, speed and memory; `unmeasured` has the reason if it cannot answer."""
    timed: Json = {"runtime": exported.runtime, "bytes": exported.size, "usage": None}
    try:
        timed["usage"] = plain(time_rows(exported.model, exported.processor, tuned, resting))
    except LlmtuneError as error:  # such as a template that cannot render a prompt
        timed["unmeasured"] = error.problems[0].what
    return timed


def score_export(context: RunContext, exported: ExportedModel, timed: Json, out: Path) -> Json:
    """Return the scores of an export on the run's test rows, each paired with the tuned model's.

    They follow `timed`, the result of `time_export`; an export that cannot answer has no scores. Saves `measures.npz`
    in the folder `out`.
    """
    device = str(exported.model.device)

    def answer(evaluated: EvalContext) -> Answers:
        recipe = stated_recipe(evaluated.recipe, exported)
        return predict(exported.model, exported.format, replace(evaluated, device=device, recipe=recipe), packs=False)

    return timed if "unmeasured" in timed else {**timed, **score_answers(context, exported.processor, answer, out)}


def score_answers(
    context: RunContext, processor: PreTrainedTokenizerBase, answer: Callable[[EvalContext], Answers], out: Path
) -> Json:
    """Score the answers of an export to the run's test rows, and pair them with the tuned model's.

    At most `deploy.limit` rows. Saves `measures.npz` in the folder `out`. If the test rows or the tuned model's scores
    are missing, `unmeasured` has the reason.
    """
    plan, rows, examples = context.plan, context.rows, context.examples
    try:
        run = open_run_scores(context.folder.path, "tuned")
        whole = make_inputs(rows, examples, plan.task, processor, plan.recipe)
    except LlmtuneError as error:
        return {"unmeasured": error.problems[0].what}
    inputs = limit_inputs(whole, plan.recipe.deploy.limit)
    evaluated = EvalContext(plan.recipe, plan.task, processor, inputs, plan.device, context.console)
    base_hash = base_inputs(plan.recipe, adapter_settings(plan.recipe), plan.model_ref, rows, examples, plan.device)
    answers = replace(answer(evaluated), temperature=run_temperature(context.folder))
    base = load_base(context.folder.path / "evaluation", base_hash).answers or answers
    measured, names = compute_metrics(evaluated, answers, base), name_test_rows(rows, inputs.rows)
    measured = {metric: one for metric, one in measured.items() if metric not in plan.task.adapter_metrics}
    measures = PerRowScores({}, measured, names, inputs.clusters)
    save_measures(out, measures)
    scored = len(inputs.measured or inputs.rows)
    return {"rows": scored, "test_rows": len(inputs.rows), **compare_with_tuned(run, measures)}


def compare_with_tuned(run: OpenedRun, measures: PerRowScores) -> Json:
    """Return both models' scores on their common rows, and the differences: the export's minus the tuned model's."""
    export = ScoredRun("the export", run.recipe, run.evaluation, keep_asked(measures, run.recipe))
    pairs, left_out = pair_measures(run, export)
    seed = run.recipe.seed
    difference = {metric: paired_difference(before, after, seed) for metric, (before, after) in pairs.items()}
    return {
        "tuned": {metric: before.value for metric, (before, _) in pairs.items()},
        "export": {metric: after.value for metric, (_, after) in pairs.items()},
        "difference": {metric: asdict(change) for metric, change in difference.items()},
        "left_out": left_out,
    }


# Speed and memory


def time_rows(
    model: PreTrainedModel, processor: PreTrainedTokenizerBase, tuned: TunedModel, resting: int | None
) -> Usage | None:
    """Answer the tuned model's rows one by one, as a client would ask them, after a first one that is not timed.

    `resting` is the return value of `reset_peak` before the model was loaded. None without rows, or if the task's
    models answer nothing.
    """
    task, recipe, device = tuned.task, tuned.recipe, str(model.device)
    answerable = [row for row in tuned.rows if task.rates_answers or task.can_answer(row, processor)]
    questions = [task.split_answer(row)[0] for row in answerable]
    if not questions or not (task.predicts or recipe.variant.generates):
        return None

    def answer(row: Row) -> None:
        if task.predicts:
            task.predict([row], LoadedModel(model, processor, recipe, device))
        else:
            generate_completions(model, [task.prompt(row, processor, recipe)], processor, recipe, device=device)

    with inference_on(model, EvalContext(recipe, task, processor, None, device, Console(quiet=True))):
        answer(questions[0])
        started = time.perf_counter()
        for row in questions:
            answer(row)
        seconds = time.perf_counter() - started
    peak = highest_memory() if device == "cpu" else None
    added = peak - resting if peak is not None and resting is not None else None
    return Usage(len(questions) / seconds, added, device)


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> int | None:
    """Restart the count of this process's peak memory, and return its current memory; None if the system cannot."""
    release_memory()
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    return highest_memory()


def highest_memory() -> int | None:
    """Return the highest resident memory of this process since `reset_peak`."""
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")] if STATUS.exists() else []
    return int(lines[0].split()[1]) * 1024 if lines else None


def describe_export(scored: Json) -> list[str]:
    """Write an export's scores next to the tuned model's, a line per metric, then its size and speed."""
    usage, before = scored["usage"], scored["tuned_usage"]
    speed = f"; {usage['rows_per_second']:.3g} rows per second, one at a time" if usage else ""
    speed += f", tuned {before['rows_per_second']:.3g}" if usage and before else ""
    return [*describe_differences(scored, scored["runtime"]), f"  {size(scored['bytes'])} on disk{speed}"]


def describe_differences(scored: Json, by: str) -> list[str]:
    """Write the scores of an export and of the tuned model with their paired difference, a line per metric."""
    if "unmeasured" in scored:
        return [f"not scored: {scored['unmeasured']}"]
    rows, every = scored["rows"], scored["test_rows"]
    of_all = "" if rows == every else f" of {count(every)}"
    lines = [f"scored by {by} on {count(rows)}{of_all} test rows, compared with the tuned model:"]
    for metric, change in scored["difference"].items():
        both = f"{score(scored['export'][metric])}, tuned {score(scored['tuned'][metric])}"
        interval = f"{signed(change['value'])} ({signed(change['low'])} to {signed(change['high'])})"
        side = better_side(metric)
        worse = (side > 0 and change["high"] < 0) or (side < 0 and change["low"] > 0)
        lines.append(f"  {metric} {both}: {interval}{', worse' if worse else ''}")
    return [*lines, *(f"  {metric} is not compared: {why}" for metric, why in scored["left_out"].items())]
