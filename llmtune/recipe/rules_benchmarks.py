"""Rules of `evaluate.benchmarks`: what this task's models have no answer to, and scores that would have one name."""

from __future__ import annotations

from collections.abc import Iterator

from llmtune.recipe.eval_suites_section import study_name
from llmtune.recipe.finding import Finding
from llmtune.recipe.gate_grammar import Gate
from llmtune.recipe.rules_forgetting import no_decoder
from llmtune.recipe.schema import Recipe

KEY = "evaluate.benchmarks"


def benchmark_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield benchmarks that this task's models cannot be asked, and two whose scores could not be told apart."""
    named = recipe.evaluate.benchmarks
    if named and (found := no_decoder(recipe)):
        why, because = found
        what = f"'{KEY}' asks decoder language models, and {why}"
        yield Finding(KEY, what, "Remove it.", (because,))
        return
    seen: set[str] = set()
    for i, benchmark in enumerate(named):
        name = study_name(benchmark.task)
        if name in seen:
            fix = "Name each once; for another number of examples, write a task file of another name that includes it."
            yield Finding(f"{KEY}.{i}", f"the scores of two benchmarks would both be called {name}", fix)
        seen.add(name)


def benchmark_gate_findings(key: str, gate: Gate, metric: str) -> Iterator[Finding]:
    """Yield a gate that names no metric; which tasks and metrics there are is known once lm-eval has read the tasks."""
    if "." not in metric:
        fix = "Write benchmarks.TASK.METRIC, such as benchmarks.arc_easy.acc."
        yield Finding(key, f"the gate {gate.text!r} names a task without a metric", fix)
