"""Benchmarks: tasks of lm-eval on base and tuned model, its own scores, and each question's part in them.

Shapes: N questions, K sums a question, G tasks of a group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from rich.progress import Progress

from llmtune.evaluate.eval_inputs import EvalContext
from llmtune.evaluate.inference import progress_bars
from llmtune.evaluate.lm_eval import (
    RUN_ERRORS,
    Benchmark,
    explained,
    load_benchmarks,
    quietly,
    replaced,
)
from llmtune.evaluate.metric import Measure, PairedMeasures, columns, measure_means, measure_right, ratio
from llmtune.evaluate.paired_statistics import Floats, Formula
from llmtune.evaluate.suite import EvalSuite
from llmtune.model.device import resolve_dtype
from llmtune.recipe import Recipe
from llmtune.recipe.eval_suites_section import plain_name, suite_name
from llmtune.records import Study
from llmtune.store.atomic_files import write_text

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.result_schema import EvalResults

MEANINGS = {
    "acc": "share of questions whose right answer is the likeliest",
    "acc_norm": "share of questions whose right answer is the likeliest for its length",
    "acc_bytes": "share of questions whose right answer is the likeliest for its bytes",
    "exact_match": "share of answers that equal the reference",
    "perplexity": "how many tokens a choice is among",
    "word_perplexity": "perplexity a word",
    "byte_perplexity": "perplexity a byte",
    "bits_per_byte": "bits a byte of text",
    "bleu": "shared n-grams with the references",
    "chrf": "shared character n-grams with the references",
    "ter": "edits to the reference, a word",
    "f1": "harmonic mean of precision and recall",
    "mcc": "Matthews correlation",
}
LIMITS = (
    "A benchmark measures what its questions ask, in the form in which they are put, and nothing else. The models may "
    "have seen public questions in training. Of many scores, one in twenty has an interval that excludes zero by "
    "chance alone; a score without an interval does not add up question by question."
)
NO_VERSION = (None, "Yaml", "N/A")
"""What lm-eval calls the version of a task or group that states none."""
NO_FILTER = "none"
CLOSE = 1e-9
Questions = tuple[object, ...]
"""[N] which questions stand in a measure."""


@dataclass(frozen=True)
class Score:
    """One metric of one task or group."""

    task: str
    """lm-eval's name of the task or group."""
    metric: str
    filter: str
    value: float
    better: int
    """1 where more is better, -1 where less is, 0 where lm-eval does not know."""
    measure: Measure | None
    """None where the score does not add up question by question."""
    questions: Questions
    signature: str = ""


class BenchmarkSuite(EvalSuite):
    """Scores by the name that a gate calls them."""

    name = "benchmarks"

    def __init__(self, context: EvalContext) -> None:
        super().__init__(context)
        self.outputs: dict[str, dict[str, Score]] = {}
        self.benchmarks = load_benchmarks(context.recipe, context.console)

    def run(self, name: str, model: torch.nn.Module) -> None:
        """Run all benchmarks on one model, and keep lm-eval's own results."""
        scores: dict[str, Score] = {}
        results = []
        with progress_bars(self.context.console) as bars:
            for benchmark in self.benchmarks:
                found, truncated = run_benchmark(benchmark, name, model, self.context, bars)
                results.append(found)
                for score in read_scores(benchmark, found, truncated):
                    scores[score_name(benchmark, score)] = score
        if self.context.folder is not None:
            names = [suite_name(one.section.task) for one in self.benchmarks]
            save_results(self.context.folder / self.name / f"{name}.json", names, results)
        self.outputs[name] = scores

    def compare(self, measures: PairedMeasures) -> Study:
        """Return the scores of both models with paired intervals over the questions."""
        base, tuned = self.outputs.get("base", {}), self.outputs["tuned"]
        same = [name for name, score in tuned.items() if name in base and base[name].questions == score.questions]
        paired = PairedMeasures(
            *(
                {name: measure for name in same if (measure := scores[name].measure) is not None}
                for scores in (base, tuned)
            )
        )
        return Study(
            title="Benchmarks",
            base={name: score.value for name, score in base.items()},
            tuned={name: score.value for name, score in tuned.items()},
            difference=paired.differences(self.context.recipe.seed),
            meanings={name: MEANINGS.get(score.metric, "as lm-eval computes it") for name, score in tuned.items()},
            better={name: score.better for name, score in tuned.items()},
            signatures={name: score.signature for name, score in tuned.items()},
            limits=LIMITS,
        )


# Running


def run_benchmark(
    benchmark: Benchmark, name: str, model: torch.nn.Module, context: EvalContext, bars: Progress
) -> tuple[EvalResults, int]:
    """Run a benchmark; return lm-eval's results and how many requests lost their beginning to fit the context."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from llmtune.evaluate.lm_eval_model import BatchedLM

    section, recipe, device = benchmark.section, context.recipe, context.device
    bar = bars.add_task(f"{name}: {benchmark.name}", total=None)
    total = 0

    def expect(requests: int) -> None:
        nonlocal total
        total += requests
        bars.update(bar, total=total)

    dtype = resolve_dtype(recipe.model.dtype, device)
    with quietly(), explained(section.task, RUN_ERRORS), without_environment(evaluator):
        lm = BatchedLM(model, context.processor, dtype, device, expect, lambda done: bars.advance(bar, done))
        results: EvalResults = evaluator.simple_evaluate(
            model=lm,
            tasks=list(benchmark.run),
            num_fewshot=section.num_fewshot,
            limit=section.limit,
            apply_chat_template=section.apply_chat_template,
            fewshot_as_multiturn=section.apply_chat_template,  # as its command line does
            task_manager=TaskManager(include_defaults=False),
        )
    results["config"] |= {"model": "hf", "model_args": model_args(recipe, name), "device": device}
    return results, lm.truncated


@contextmanager
def without_environment(evaluator: ModuleType) -> Iterator[None]:
    """Keep lm-eval from looking git and the machine up: it takes seconds, and the lock has it already."""

    def note_versions(results: dict[str, object]) -> None:
        results |= {"transformers_version": version("transformers"), "lm_eval_version": version("lm-eval")}

    with replaced(evaluator, "get_git_commit_hash", lambda: None), replaced(evaluator, "add_env_info", note_versions):
        yield


def model_args(recipe: Recipe, name: str) -> dict[str, str | None]:
    """Return where the command line of lm-eval would find a model, seen from the run folder."""
    if name == "tuned" and recipe.adapter.method == "full":
        return {"pretrained": "weights"}
    return {"pretrained": recipe.model.name} | ({"peft": "adapter"} if name == "tuned" else {})


# Reading the results


def score_name(benchmark: Benchmark, score: Score) -> str:
    """Return what a gate calls a score: `task.metric`, and its filter where there is one."""
    parts = [benchmark.plain(score.task), plain_name(score.metric)]
    return ".".join(parts if score.filter == NO_FILTER else [*parts, plain_name(score.filter)])


def read_scores(benchmark: Benchmark, results: EvalResults, truncated: int) -> list[Score]:
    """Return the scores of a benchmark's groups and tasks, as lm-eval has put them into `results`."""
    scores: list[Score] = []

    def add(name: str, metric: str, filter_name: str, value: float, measure: Measure | None, rows: Questions) -> None:
        better = results["higher_is_better"].get(name, {}).get(metric)
        direction = 0 if better is None else 1 if better else -1
        agrees = measure is not None and math.isclose(measure.value, value, rel_tol=CLOSE, abs_tol=CLOSE)
        signature = describe_score(benchmark, name, results, truncated, agrees)
        kept = measure if agrees else None
        scores.append(Score(name, metric, filter_name, value, direction, kept, rows, signature))

    for name, task in benchmark.tasks.items():
        for metric, filter_name, value in read_numbers(results["results"][name]):
            samples = [one for one in results["samples"][name] if one["filter"] == filter_name and metric in one]
            questions = tuple(one["doc_id"] for one in samples)
            add(
                name,
                metric,
                filter_name,
                value,
                measure_task(task, metric, [one[metric] for one in samples]),
                questions,
            )
    for name, group in benchmark.groups.items():
        tasks = {one.task_name for one in group.get_all_tasks()}
        for metric, filter_name, value in read_numbers(results["results"].get(name, {})):
            parts = [one for one in scores if one.task in tasks and (one.metric, one.filter) == (metric, filter_name)]
            questions = tuple((one.task, question) for one in parts for question in one.questions)
            add(name, metric, filter_name, value, measure_group(group, metric, parts), questions)
    return scores


def read_numbers(result: Mapping[str, object]) -> list[tuple[str, str, float]]:
    """Return (metric, filter, score) of lm-eval's `metric,filter: score`; standard errors are left out."""
    split = ((*key.rpartition(",")[::2], value) for key, value in result.items() if "," in key)
    return [
        (metric, filter_name, float(value))
        for metric, filter_name, value in split
        if not metric.endswith("_stderr") and is_number(value)
    ]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number or a truth value."""
    return isinstance(value, bool | int | float | np.number | np.bool_)


def measure_task(task: Task, metric: str, values: Sequence[object]) -> Measure | None:
    """Return a metric from each question's part in it; None where it is more than a sum of parts."""
    kind = getattr(task.aggregation().get(metric), "__name__", "mean")
    numbers = [float(value) for value in values if is_number(value)]
    if kind in ("mean", "perplexity") and values and len(numbers) == len(values):
        if kind == "perplexity":
            return Measure(metric, columns(np.array(numbers), np.ones(len(numbers))), exponent, signature=kind)
        if set(numbers) <= {0.0, 1.0}:
            return measure_right([bool(number) for number in numbers], metric)
        return measure_means(metric, numbers, kind)
    pairs = [value for value in values if isinstance(value, tuple | list) and len(value) == 2]
    if kind in WEIGHTED and values and len(pairs) == len(values):
        return Measure(metric, np.array(pairs, dtype=np.float64), WEIGHTED[kind], signature=kind)
    return None


def exponent(sums: Floats) -> Floats:
    """[..., (nats, weight)] -> [...] perplexity."""
    return np.asarray(np.exp(-ratio(sums)), dtype=np.float64)


def bits(sums: Floats) -> Floats:
    """[..., (nats, bytes)] -> [...] bits per byte."""
    return np.asarray(-ratio(sums) / math.log(2), dtype=np.float64)


WEIGHTED: dict[str, Formula] = {"weighted_perplexity": exponent, "bits_per_byte": bits}
"""Scores of a sum over a sum, by lm-eval's name of how they are put together."""


def measure_group(group: Group, metric: str, parts: Sequence[Score]) -> Measure | None:
    """Return a group's mean over its tasks, weighed by their questions or all alike, from the questions' parts."""
    kinds = [one for one in group.aggregate_metric_list if one.metric == metric]
    means = [one.measure for one in parts if one.measure is not None and one.measure.formula is ratio]
    if len(kinds) != 1 or not means or len(means) < len(parts):
        return None
    if kinds[0].weight_by_size or len(means) == 1:
        right = all(one.right_wrong for one in means)
        return Measure(metric, np.concatenate([one.sums_NK for one in means]), ratio, right)
    sums_NK = np.zeros((sum(len(one.sums_NK) for one in means), 2 * len(means)))
    start = 0
    for g, one in enumerate(means):
        sums_NK[start : start + len(one.sums_NK), 2 * g : 2 * g + 2] = one.sums_NK
        start += len(one.sums_NK)
    return Measure(metric, sums_NK, mean_of_ratios)


def mean_of_ratios(sums: Floats) -> Floats:
    """[..., 2 G] -> [...]: the mean over G tasks, each a sum over its questions."""
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
    parts += [f"{truncated} requests without their beginning, to fit the context"] if truncated else []
    parts += [] if adds_up else ["no interval: it does not add up question by question"]
    return ", ".join(parts)


# lm-eval's own file


def save_results(path: Path, names: Sequence[str], results: Sequence[Mapping[str, object]]) -> None:
    """Write one model's results as lm-eval's own command line does, those of all benchmarks in one file."""
    from lm_eval.utils import handle_non_serializable

    path.parent.mkdir(parents=True, exist_ok=True)
    merged = merge(names, results)
    write_text(path, json.dumps(merged, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")


def merge(names: Sequence[str], results: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Join lm-eval's results: what is by task stands side by side; settings are by benchmark where they differ."""
    merged: dict[str, object] = {}
    for key in dict.fromkeys(key for one in results for key in one):
        values = [one.get(key) for one in results]
        mappings = [value or {} for value in values if isinstance(value, dict | None)]
        if key == "samples":
            continue
        if len(mappings) < len(values):
            merged[key] = values[0]
        elif key == "config":
            settings = dict.fromkeys(setting for one in mappings for setting in one)
            merged[key] = {name: same_or_each(names, [one.get(name) for one in mappings]) for name in settings}
        else:
            merged[key] = {name: one for mapping in mappings for name, one in mapping.items()}
    return merged


def same_or_each(names: Sequence[str], values: Sequence[object]) -> object:
    """Return what all benchmarks have in common, or what each has."""
    return values[0] if all(value == values[0] for value in values) else dict(zip(names, values, strict=True))
