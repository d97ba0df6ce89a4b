"""Benchmarks: run lm-eval tasks on base and tuned model; return the scores and each question's contribution.

Shapes: N questions, K sums a question, G tasks of a group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from rich.console import Console

from llmtune.display.console import counting_bars
from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.evaluated_task import EvaluatedTask
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.metric import Measure, PairedMeasures, columns, mean_share_bounds, ratio
from llmtune.evaluate.paired_statistics import share_bounds
from llmtune.evaluate.suites.eval_suite import EvalSuite
from llmtune.evaluate.suites.lm_eval import (
    RUN_ERRORS,
    Benchmark,
    check_task_names,
    explain_errors,
    load_benchmarks,
    quietly,
)
from llmtune.evaluate.token_batches import of_first_process
from llmtune.recipe.eval_suites_section import plain_name
from llmtune.recipe.schema import Recipe
from llmtune.recipe.secrets import hide_environment
from llmtune.records import Advance, Rows
from llmtune.store.atomic_files import write_text
from llmtune.store.score_records import Study

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.result_schema import EvalResults

MEANINGS = {
    "acc": "share of questions whose right answer is the most likely",
    "acc_norm": "share of questions whose right answer is the most likely, normalized by length",
    "acc_bytes": "share of questions whose right answer is the most likely, normalized by bytes",
    "exact_match": "share of answers that equal the reference",
    "perplexity": "number of tokens the model effectively chooses between",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "bits_per_byte": "bits per byte of text",
    "bleu": "shared n-grams with the references",
    "chrf": "shared character n-grams with the references",
    "ter": "edits per word of the reference",
    "f1": "harmonic mean of precision and recall",
    "mcc": "Matthews correlation",
}
LIMITS = (
    "A benchmark measures only what its questions ask, in the form in which they are put. The models may "
    "have seen public questions in training. By chance alone, about one score in twenty has an interval that "
    "excludes zero. A score without an interval is not a sum over questions."
)
NO_VERSION = (None, "Yaml", "N/A")
"""Versions that lm-eval reports for a task or group that states none."""
NO_FILTER = "none"
CLOSE = 1e-9


@dataclass(frozen=True)
class BenchmarkScore:
    """One metric of one task or group."""

    metric: str
    value: float
    better: int
    """1 if higher is better, -1 if lower is, 0 if lm-eval does not say."""
    measure: Measure | None
    """Built from each question's contribution, with lm-eval's row numbers. None if the score is not such a sum."""
    signature: str


class BenchmarkSuite(EvalSuite[dict[str, BenchmarkScore]]):
    """Scores by the name that gates use for them."""

    key = "benchmarks"
    decoder_input = "the likelihood of answers, or answers generated from a prompt"

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        self.benchmarks = load_benchmarks(context.recipe, context.console)

    @classmethod
    def read(cls, recipe: Recipe) -> None:
        """Check task files and the names of tasks. Raises as `check_task_names` does."""
        check_task_names(recipe)

    @classmethod
    def try_out(cls, recipe: Recipe, task: EvaluatedTask, rows: Rows, console: Console) -> None:
        """Read the tasks with their rows, which may download them. Raises as `load_benchmarks` does."""
        load_benchmarks(recipe, console)

    def run(self, name: str, model: torch.nn.Module) -> None:
        """Run all benchmarks on one model and save lm-eval's own results."""
        scores: dict[str, BenchmarkScore] = {}
        with counting_bars(self.context.console) as bars:
            for benchmark in self.benchmarks:
                bar = bars.add_task(f"{name}: {benchmark.name}", total=None)
                results, truncated = run_benchmark(benchmark, model, self.context, partial(bars.advance, bar))
                scores |= read_scores(benchmark, results, truncated)
                if self.context.folder is not None:
                    save_results(self.context.folder / "benchmarks" / name / f"{benchmark.name}.json", results)
        self.outputs[name] = scores

    def compare(self, rows: PairedMeasures) -> Study:
        """Return the scores of both models with paired intervals over the questions."""
        base, tuned = self.outputs.get("base", {}), self.outputs["tuned"]
        before, after = (
            {name: score.measure for name, score in scores.items() if score.measure} for scores in (base, tuned)
        )
        same = {name: one for name, one in after.items() if name in before and before[name].at == one.at}
        return Study(
            title="",
            base={name: score.value for name, score in base.items()},
            tuned={name: score.value for name, score in tuned.items()},
            difference=PairedMeasures(before, same).differences(self.context.recipe.seed),
            meanings={name: MEANINGS.get(score.metric, "as lm-eval computes it") for name, score in tuned.items()},
            better={name: score.better for name, score in tuned.items()},
            signatures={name: score.signature for name, score in tuned.items()},
            limits=LIMITS,
        )


# Running


def run_benchmark(
    benchmark: Benchmark, model: torch.nn.Module, context: EvalContext, advance: Advance
) -> tuple[EvalResults, int]:
    """Run a benchmark; return lm-eval's results and how many requests were truncated on the left."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from llmtune.evaluate.suites.lm_eval_model import BatchedLM

    section = benchmark.section
    with quietly(), explain_errors(section, RUN_ERRORS):
        lm = BatchedLM(model, context, advance)
        results: EvalResults | None = simple_evaluate(
            model=lm,
            tasks=[*benchmark.run.values()],
            num_fewshot=section.num_fewshot,
            limit=section.limit,
            apply_chat_template=section.apply_chat_template,
            fewshot_as_multiturn=section.apply_chat_template,  # as its command line does
            bootstrap_iters=0,  # paired intervals replace its standard errors
            task_manager=TaskManager(include_defaults=False),
        )
    return of_first_process(results), lm.truncated  # lm-eval returns None on the other processes


# Reading the results


def read_scores(benchmark: Benchmark, results: EvalResults, truncated: int) -> dict[str, BenchmarkScore]:
    """Return a benchmark's scores by gate name: `task.metric` or `task.metric.filter`."""
    scores: dict[str, BenchmarkScore] = {}
    measures: dict[tuple[str, str, str], Measure | None] = {}
    for name in (*benchmark.tasks, *benchmark.groups):
        for metric, filter_name, value in list_numbers(results["results"].get(name, {})):
            if name in benchmark.tasks:
                samples = [one for one in results["samples"][name] if one["filter"] == filter_name and metric in one]
                measure = measure_task(metric, value, samples)
            else:
                keys = [(task.task_name, metric, filter_name) for task in benchmark.groups[name].get_all_tasks()]
                parts = [measures[key] for key in keys if key in measures]
                measure = measure_group(benchmark.groups[name], metric, value, parts)
            measures[name, metric, filter_name] = measure
            higher = results["higher_is_better"].get(name, {}).get(metric)
            better = 0 if higher is None else 1 if higher else -1
            signature = describe_score(benchmark, name, results, truncated, measure is not None)
            parts_of_name = [benchmark.plain(name), plain_name(metric)]
            parts_of_name += [] if filter_name == NO_FILTER else [plain_name(filter_name)]
            scores[".".join(parts_of_name)] = BenchmarkScore(metric, value, better, measure, signature)
    return scores


def list_numbers(result: Mapping[str, object]) -> list[tuple[str, str, float]]:
    """Return (metric, filter, score) of lm-eval's `metric,filter: score`."""
    named = {key.rpartition(",")[::2]: value for key, value in result.items() if "," in key}
    return [(*name, float(value)) for name, value in named.items() if is_numeric(value)]


def is_numeric(value: object) -> TypeGuard[float]:
    """Whether a value is a number or a boolean."""
    return isinstance(value, bool | int | float | np.number | np.bool_)


def measure_task(metric: str, value: float, samples: Sequence[Mapping[str, object]]) -> Measure | None:
    """Build a metric from each question's contribution; None if no such sum reproduces lm-eval's value."""
    parts = [one[metric] for one in samples]
    at = tuple(int(str(one["doc_id"])) for one in samples)
    numbers = [float(part) for part in parts if is_numeric(part)]
    pairs = [part for part in parts if isinstance(part, tuple | list) and len(part) == 2 and all(map(is_numeric, part))]
    if parts and len(numbers) == len(parts):
        right = set(numbers) <= {0.0, 1.0}
        sums = columns(np.array(numbers), np.ones(len(numbers)))
        mean = Measure(metric, sums, ratio, right, at=at, bounds=share_bounds if right else None)
        return first_equal(value, mean, replace(mean, formula=exponent, right_wrong=False, bounds=None))
    if parts and len(pairs) == len(parts):
        sums = np.array(pairs, dtype=np.float64)
        return first_equal(value, *(Measure(metric, sums, formula, at=at) for formula in (exponent, bits)))
    return None


def measure_group(group: Group, metric: str, value: float, parts: Sequence[Measure | None]) -> Measure | None:
    """Build a group's mean over its questions or over its tasks; None if neither reproduces lm-eval's value."""
    means = [one for one in parts if one is not None and one.formula is ratio]
    if not means or len(means) < len(parts):
        return None
    at, right = tuple(row for one in means for row in one.at), all(one.right_wrong for one in means)
    by_size = {one.weight_by_size for one in group.aggregate_metric_list or () if one.metric == metric}
    if by_size == {True} or len(means) == 1:
        return first_equal(value, Measure(metric, np.concatenate([one.sums_NK for one in means]), ratio, right, at=at))
    by_task = [np.pad(one.sums_NK, ((0, 0), (2 * g, 2 * (len(means) - g - 1)))) for g, one in enumerate(means)]
    bounds = mean_share_bounds if right else None
    return first_equal(value, Measure(metric, np.concatenate(by_task), mean_of_ratios, at=at, bounds=bounds))


def first_equal(value: float, *measures: Measure) -> Measure | None:
    """Return the first measure whose value equals lm-eval's, or None."""
    return next((one for one in measures if math.isclose(one.value, value, rel_tol=CLOSE, abs_tol=CLOSE)), None)


def exponent(sums: Floats) -> Floats:
    """[..., (nats, weight)] -> [...] perplexity."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(-ratio(sums)), dtype=np.float64)


def bits(sums: Floats) -> Floats:
    """[..., (nats, bytes)] -> [...] bits per byte."""
    return np.asarray(-ratio(sums) / math.log(2), dtype=np.float64)


def mean_of_ratios(sums: Floats) -> Floats:
    """[..., 2 G] -> [...]: the mean of G task means."""
    by_task = sums.reshape(*sums.shape[:-1], -1, 2)
    return np.asarray(ratio(by_task).mean(-1), dtype=np.float64)


def describe_score(benchmark: Benchmark, task: str, results: EvalResults, truncated: int, adds_up: bool) -> str:
    """Describe how a score was computed."""
    parts = [f"lm-eval {version('lm-eval')}"]
    if (named := results["versions"].get(task)) not in NO_VERSION:
        parts.append(f"version {named} of the task")
    if (shots := results["n-shot"].get(task)) is not None:
        parts.append(f"{shots} examples before each question")
    if (counted := results["n-samples"].get(task)) is not None:
        parts.append(f"{counted['effective']} of {counted['original']} questions")
    elif task in benchmark.groups:
        tasks = len(benchmark.groups[task].get_all_tasks())
        parts.append(f"mean over {tasks} task{'s' * (tasks > 1)}")
    parts += ["chat template"] if benchmark.section.apply_chat_template else []
    parts += [f"{truncated} requests truncated on the left to fit the context"] if truncated else []
    parts += [] if adds_up else ["no interval: not a sum over questions"]
    return ", ".join(parts)


def save_results(path: Path, results: EvalResults) -> None:
    """Write one model's benchmark results in the format of lm-eval's command line."""
    from lm_eval.utils import handle_non_serializable

    path.parent.mkdir(parents=True, exist_ok=True)
    kept = hide_environment({key: value for key, value in results.items() if key != "samples"})
    write_text(path, json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
