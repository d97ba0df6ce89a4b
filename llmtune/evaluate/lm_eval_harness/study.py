"""`evaluate.benchmarks`: tasks of lm-eval put to base and tuned model, and what the difference is worth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from llmtune.evaluate.inference import progress
from llmtune.evaluate.lm_eval_harness.quiet import quietly, replaced
from llmtune.evaluate.lm_eval_harness.scores import Score, read_scores, score_name
from llmtune.evaluate.lm_eval_harness.tasks import ASKED_ERRORS, STUDY, Benchmark, explained, load_benchmarks
from llmtune.evaluate.metric import compare
from llmtune.evaluate.suite_runner import Inquiry, Scored, Setting
from llmtune.model import resolve_dtype
from llmtune.recipe.eval_suites_section import suite_name
from llmtune.records import Difference, Study
from llmtune.store.atomic_files import write_text

if TYPE_CHECKING:
    import torch

    from llmtune.recipe import Recipe

FOLDER = "benchmarks"
TITLE = "Benchmarks"
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


@dataclass(frozen=True)
class Outcome:
    """One benchmark asked of one model."""

    results: dict[str, Any]
    """As lm-eval has them, samples among them."""
    cut: int
    """Requests whose beginning was left out, since they are longer than the model's context."""


@dataclass(frozen=True)
class Said:
    """What one model scored, by the name that a gate calls it."""

    scores: dict[str, Score]
    signatures: dict[str, str]


def make_benchmarks(setting: Setting) -> Inquiry:
    """Return the study that asks the tasks of `evaluate.benchmarks`, which are read first.

    Raises what `load_benchmarks` does.
    """
    benchmarks = load_benchmarks(setting.recipe, setting.console)

    def ask(name: str, model: torch.nn.Module) -> Said:
        found = []
        with progress(setting.console) as bars:
            for benchmark in benchmarks:
                found.append(ask_benchmark(benchmark, name, model, setting, bars))
        if setting.folder is not None:
            save_results(setting.folder / FOLDER / f"{name}.json", benchmarks, [one.results for one in found])
        return collect(benchmarks, found)

    def compare_said(base: Said | None, tuned: Said, scored: Scored) -> Study:
        return compare_models(base, tuned, setting.recipe.seed)

    return Inquiry(STUDY, ask, compare_said)


def ask_benchmark(benchmark: Benchmark, name: str, model: torch.nn.Module, setting: Setting, bars: Progress) -> Outcome:
    """Put a benchmark to a model that is loaded."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from llmtune.evaluate.lm_eval_harness.model import Subject

    section, recipe = benchmark.section, setting.recipe
    bar = bars.add_task(f"{name}: {benchmark.name}", total=None)
    told = {"expected": 0}

    def expect(requests: int) -> None:
        told["expected"] += requests
        bars.update(bar, total=told["expected"])

    dtype = resolve_dtype(recipe.model.dtype, setting.device)
    with quietly(), explained(section.task, ASKED_ERRORS), unlooked(evaluator):
        subject = Subject(model, setting.processor, dtype, setting.device, expect, lambda done: bars.advance(bar, done))
        results: dict[str, Any] = evaluator.simple_evaluate(
            model=subject,
            tasks=list(benchmark.asked),
            num_fewshot=section.num_fewshot,
            limit=section.limit,
            apply_chat_template=section.apply_chat_template,
            fewshot_as_multiturn=section.apply_chat_template,  # as its command line does
            task_manager=TaskManager(include_defaults=False),
        )
    results["config"] |= {"model": "hf", "model_args": place(recipe, name), "device": setting.device}
    return Outcome(results, subject.cut)


@contextmanager
def unlooked(evaluator: Any) -> Iterator[None]:
    """Keep lm-eval from asking git and the machine about themselves: it takes seconds, and the lock has it already."""

    def note_versions(results: dict[str, Any]) -> None:
        results |= {"transformers_version": version("transformers"), "lm_eval_version": version("lm-eval")}

    with replaced(evaluator, "get_git_commit_hash", lambda: None), replaced(evaluator, "add_env_info", note_versions):
        yield


def place(recipe: Recipe, name: str) -> dict[str, str | None]:
    """Return where the command line of lm-eval would find a model, seen from the run folder."""
    if name == "tuned" and recipe.adapter.method == "full":
        return {"pretrained": "weights"}
    return {"pretrained": recipe.model.name} | ({"peft": "adapter"} if name == "tuned" else {})


def collect(benchmarks: Sequence[Benchmark], found: Sequence[Outcome]) -> Said:
    """Bring the results of all benchmarks under the names that gates use."""
    scores: dict[str, Score] = {}
    signatures: dict[str, str] = {}
    for benchmark, outcome in zip(benchmarks, found, strict=True):
        for score in read_scores(benchmark, outcome.results):
            name = score_name(benchmark, score)
            scores[name] = score
            signatures[name] = sign(benchmark, score, outcome)
    return Said(scores, signatures)


def sign(benchmark: Benchmark, score: Score, outcome: Outcome) -> str:
    """Say how a score was computed."""
    results = outcome.results
    parts = [f"lm-eval {version('lm-eval')}"]
    if (named := results["versions"].get(score.task)) not in NO_VERSION:
        parts.append(f"version {named} of the task")
    if (shots := results["n-shot"].get(score.task)) is not None:
        parts.append(f"{shots} examples before each question")
    if (counted := results["n-samples"].get(score.task)) is not None:
        parts.append(f"{counted['effective']} of {counted['original']} questions")
    elif score.task in benchmark.groups:
        tasks = len(benchmark.groups[score.task].get_all_tasks())
        parts.append(f"mean over {tasks} task{'s' * (tasks > 1)}")
    parts += ["chat template"] if benchmark.section.apply_chat_template else []
    parts += [f"{outcome.cut} requests without their beginning, to fit the context"] if outcome.cut else []
    parts += [] if score.measure is not None else ["no interval: it does not add up question by question"]
    return ", ".join(parts)


def compare_models(base: Said | None, tuned: Said, seed: int) -> Study:
    """Return the scores of both models with paired intervals over the questions."""
    difference = {}
    for name, score in tuned.scores.items():
        other = base.scores.get(name) if base is not None else None
        if other is not None and (found := compare_scores(other, score, seed)) is not None:
            difference[name] = found
    return Study(
        title=TITLE,
        base={} if base is None else {name: score.value for name, score in base.scores.items()},
        tuned={name: score.value for name, score in tuned.scores.items()},
        difference=difference,
        meanings={name: MEANINGS.get(score.metric, "as lm-eval computes it") for name, score in tuned.scores.items()},
        better={name: score.better for name, score in tuned.scores.items()},
        signatures=tuned.signatures,
        limits=LIMITS,
    )


def compare_scores(base: Score, tuned: Score, seed: int) -> Difference | None:
    """Return tuned minus base on the same questions; None where the score is no sum over them."""
    if base.measure is None or tuned.measure is None or base.questions != tuned.questions:
        return None
    return compare(base.measure, tuned.measure, seed)


def save_results(path: Path, benchmarks: Sequence[Benchmark], found: Sequence[Mapping[str, Any]]) -> None:
    """Write one model's results as lm-eval's own command line does, those of all benchmarks in one file."""
    from lm_eval.utils import handle_non_serializable

    path.parent.mkdir(parents=True, exist_ok=True)
    merged = merge([suite_name(one.section.task) for one in benchmarks], found)
    write_text(path, json.dumps(merged, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")


def merge(names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join lm-eval's results: what is by task stands side by side; what is not is by benchmark where it differs."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for results in found for key in results):
        values = [results.get(key) for results in found]
        if key == "samples":
            continue
        if key == "config":
            configs: list[dict[str, Any]] = [results[key] for results in found]
            settings = dict.fromkeys(name for config in configs for name in config)
            merged[key] = {name: same_or_each(names, [one.get(name) for one in configs]) for name in settings}
        elif all(isinstance(value, dict | None) for value in values):
            merged[key] = {name: one for value in values for name, one in (value or {}).items()}
        else:
            merged[key] = values[0]
    return merged


def same_or_each(names: Sequence[str], values: Sequence[Any]) -> Any:
    """Return what all benchmarks have in common, or what each has."""
    return values[0] if all(value == values[0] for value in values) else dict(zip(names, values, strict=True))
