"""Rules of the section `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator

from llmtune.errors import RecipeError, nearest
from llmtune.recipe.eval_suites_section import STUDY_METRICS
from llmtune.recipe.finding import Finding, idle
from llmtune.recipe.gate_grammar import Gate, parse_gate
from llmtune.recipe.rules_benchmarks import benchmark_findings, benchmark_gate_findings
from llmtune.recipe.rules_data import has_rows
from llmtune.recipe.rules_fairness import fairness_findings, fairness_gate_findings
from llmtune.recipe.rules_forgetting import forgetting_findings, forgetting_gate_findings
from llmtune.recipe.rules_tasks import default_metrics, unmeasured
from llmtune.recipe.schema import Recipe
from llmtune.recipe.source_map import Places
from llmtune.recipe.task_facts import PREDICTED, TASK_FACTS

MEASURING = ("metrics", "gates", "limit", "choices", "samples", "slices")
CHOICE = "choice_accuracy"


def evaluate_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield measurements that cannot be made, gates that cannot be held, and features still to come."""
    evaluate = recipe.evaluate
    yield from benchmark_findings(recipe)
    yield from fairness_findings(recipe, places)
    yield from forgetting_findings(recipe)
    if not has_rows(recipe.data.test):
        of_studies = study_gates(recipe)
        for key, gate in of_studies or ():
            yield from study_gate_findings(recipe, key, gate)
        for name in MEASURING if of_studies is None else (name for name in MEASURING if name != "gates"):
            key = f"evaluate.{name}"
            if places.stated(key) and getattr(evaluate, name) not in (None, ()):
                fix = "Give data.test a share of the rows or sources, or remove it."
                yield idle(key, "without test rows", fix, "data.test")
        return
    if len(set(evaluate.slices)) < len(evaluate.slices):
        yield Finding("evaluate.slices", "'evaluate.slices' names a column twice", "Name each once.")
    yield from metric_findings(recipe, places)
    yield from gate_findings(recipe)


def chosen_metrics(recipe: Recipe) -> tuple[str, ...]:
    """Return the metrics that are stated, else the task's own choice of them."""
    return recipe.evaluate.metrics or default_metrics(recipe)


def metric_findings(recipe: Recipe, places: Places) -> Iterator[Finding]:
    """Yield metrics that the task does not know, and settings that no chosen metric reads."""
    evaluate, known = recipe.evaluate, TASK_FACTS[recipe.task].metrics
    key = "evaluate.metrics"
    if places.stated(key) and not evaluate.metrics:
        yield Finding(
            key, f"'{key}' is empty", "Name a metric, or leave the key out for the task's own choice of them."
        )
    for i, metric in enumerate(evaluate.metrics):
        if metric not in known:
            fix = f"{nearest(metric, known)} Metrics of task: {recipe.task}: {', '.join(known)}.".strip()
            yield Finding(f"{key}.{i}", f"unknown metric '{metric}'", fix, ("task",))
    if len(set(evaluate.metrics)) < len(evaluate.metrics):
        yield Finding(key, f"'{key}' names a metric twice", "Name each once.")
    metrics = chosen_metrics(recipe)
    if evaluate.choices is not None and CHOICE not in metrics and places.stated("evaluate.choices"):
        yield idle("evaluate.choices", f"without the metric {CHOICE}", f"Add {CHOICE} to {key}.", key)
    if evaluate.choices is None and CHOICE in evaluate.metrics:
        yield Finding(
            key, f"{CHOICE} needs choices, and evaluate.choices is null", "Set it to auto.", ("evaluate.choices",)
        )
    if isinstance(evaluate.choices, tuple) and len(set(evaluate.choices)) < len(evaluate.choices):
        yield Finding("evaluate.choices", "'evaluate.choices' names an answer twice", "Name each once.")
    limited = TASK_FACTS[recipe.task].generates and PREDICTED & set(metrics)
    if evaluate.limit is not None and not limited and places.stated("evaluate.limit"):
        fix = "Add one, such as exact_match, or remove it."
        yield idle("evaluate.limit", "without a metric on generated answers", fix, key)


def gate_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield gates that cannot be read, or that are about a metric that is not computed."""
    metrics, known = chosen_metrics(recipe), TASK_FACTS[recipe.task].metrics
    for i, text in enumerate(recipe.evaluate.gates):
        key = f"evaluate.gates.{i}"
        try:
            gate = parse_gate(text)
        except RecipeError as error:
            (problem,) = error.problems
            yield Finding(key, problem.what, problem.fix or "")
            continue
        if gate.metric in metrics:
            continue
        if "." in gate.metric:
            yield from study_gate_findings(recipe, key, gate)
            continue
        if gate.metric in known:
            lacking = unmeasured(recipe).get(gate.metric)
            fix = f"Remove it: {lacking}." if lacking else f"Add {gate.metric} to evaluate.metrics."
            yield Finding(key, f"the gate {text!r} is about a metric that is not computed", fix, ("evaluate.metrics",))
        else:
            fix = f"{nearest(gate.metric, known)} Metrics that are computed: {', '.join(metrics)}.".strip()
            yield Finding(key, f"the gate {text!r} is about an unknown metric", fix, ("evaluate.metrics", "task"))


def study_gates(recipe: Recipe) -> list[tuple[str, Gate]] | None:
    """Return the gates, each with its key, where all of them are about studies, which need no test rows; else None."""
    gates = []
    for i, text in enumerate(recipe.evaluate.gates):
        try:
            gates.append((f"evaluate.gates.{i}", parse_gate(text)))
        except RecipeError:
            return None
    return gates if all("." in gate.metric for _, gate in gates) else None


def study_gate_findings(recipe: Recipe, key: str, gate: Gate) -> Iterator[Finding]:
    """Yield a gate about a study that is not made, or about a metric that the study does not have."""
    name, _, metric = gate.metric.partition(".")
    studies = (*STUDY_METRICS, "benchmarks")
    if name not in studies:
        fix = f"{nearest(name, studies)} Studies: {', '.join(studies)}.".strip()
        yield Finding(key, f"the gate {gate.text!r} is about an unknown study", fix)
    elif not getattr(recipe.evaluate, name):
        fix = f"State evaluate.{name}, or remove the gate."
        yield Finding(key, f"the gate {gate.text!r} is about a study that is not made", fix, (f"evaluate.{name}",))
    elif name == "benchmarks":
        yield from benchmark_gate_findings(key, gate, metric)
    elif metric not in STUDY_METRICS[name]:
        known = STUDY_METRICS[name]
        fix = f"{nearest(metric, known)} Metrics of evaluate.{name}: {', '.join(known)}.".strip()
        yield Finding(key, f"the gate {gate.text!r} is about an unknown metric", fix)
    elif name == "fairness":
        yield from fairness_gate_findings(recipe, key, gate, metric)
    elif name == "forgetting":
        yield from forgetting_gate_findings(recipe, key, gate, metric)
