"""The sections of `evaluate` that measure more of base and tuned model than the test rows do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import ClassVar

from pydantic import Field

from llmtune.errors import nearest
from llmtune.recipe.gate_grammar import Gate
from llmtune.recipe.retired import RETIRED, retired_problem
from llmtune.recipe.section import REMOTE, Many, NonEmpty, Positive, RecipeSection, absolute
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import TaskVariant

OWN = "own"
"""What llmtune brings along, in place of a file."""
TASK_FILES = (".yaml", ".yml")
"""Endings of a benchmark's task file."""
SUITE_KEYS = {
    "forgetting": {
        "perplexity": "texts",
        "bits_per_byte": "texts",
        "accuracy": "questions",
        "accuracy_norm": "questions",
    },
    "fairness": {
        "gap": "groups",
        "swap_changes": "swaps",
    },
}
"""By suite: its metrics as gates name them after the suite, and the key of each."""


def absolute_file(name: str, folder: Path) -> str:
    """Make a file absolute; `own` and names on the hub stay."""
    return name if name == OWN or name.startswith(REMOTE) else absolute(name, folder)


def absolute_task(name: str, folder: Path) -> str:
    """Make a benchmark's task file absolute; the name of a task of lm-eval stays."""
    return absolute(name, folder) if is_task_file(name) else name


def is_task_file(task: str) -> bool:
    """Whether a benchmark is a task file rather than the name of a task."""
    return task.endswith(TASK_FILES)


class ForgettingSection(RecipeSection):
    """What the base model could do and the tuned one cannot: general text and general questions."""

    texts: Many[NonEmpty] = (OWN,)
    """General text whose perplexity is taken before and after: `own` (public domain, comes with llmtune), or text
    files. Default `own`: any text that the tuning is not about tells of forgetting."""
    questions: Many[NonEmpty] = (OWN,)
    """Questions with a few answers to choose from, answered by likelihood: `own`, or JSON lines files of `question`,
    `choices` and `answer`. Default `own`: common knowledge in plain words."""

    paths: ClassVar = {"texts": absolute_file, "questions": absolute_file}

    def check(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report a suite that cannot be run with this task's models, measures nothing, or names something twice."""
        key = "evaluate.forgetting"
        if variant.without_decoder:
            why, because = variant.without_decoder
            what = f"'{key}' takes the likelihood of text, and {why}"
            diagnostics.add(key, what, "Remove it; it is for decoder language models.", because)
            return
        if not self.texts and not self.questions:
            diagnostics.add(key, f"'{key}' measures nothing", "Give it texts or questions, or remove it.")
        for name, files in (("texts", self.texts), ("questions", self.questions)):
            diagnostics.repeated(f"{key}.{name}", files, "something")
            for file in files:
                if file.startswith(REMOTE):
                    diagnostics.add(f"{key}.{name}", f"'{file}' is not a file", "Give `own`, or files.")


class FairnessSection(RecipeSection):
    """Whether groups of people are spoken of, or served, differently; base against tuned."""

    swaps: Many[NonEmpty] = (OWN,)
    """Pairs of words for groups, such as woman and man, that are swapped in the prompts of the test rows: `own`, or CSV
    files of two columns without a head. Default `own`: English words for women and men."""
    groups: Many[NonEmpty] = ()
    """Columns that say which group a test row is about: the gap of every metric between their values is measured.
    Default none: rows seldom say so."""

    paths: ClassVar = {"swaps": absolute_file}

    def check(self, diagnostics: Diagnostics, variant: TaskVariant, has_test: bool) -> None:
        """Report keys of the section that would have no effect, and what is named twice."""
        key = "evaluate.fairness"
        if not (self.swaps or self.groups):
            diagnostics.add(key, f"'{key}' measures nothing", "Give it swaps or groups, or remove it.")
        for name in ("swaps", "groups"):
            diagnostics.repeated(f"{key}.{name}", getattr(self, name), "something")
        for name, (why, fix) in fairness_without_effect(variant, has_test).items():
            if getattr(self, name):
                diagnostics.no_effect(f"{key}.{name}", why, fix, "task" if name != "groups" else "data.test")
        for file in self.swaps:
            if file.startswith(REMOTE):
                diagnostics.add(f"{key}.swaps", f"'{file}' is not a file", "Give `own`, or a CSV file of two columns.")


def fairness_without_effect(variant: TaskVariant, has_test: bool) -> dict[str, tuple[str, str]]:
    """Return the keys of `fairness` that this task and these rows do not read: why, and what to do."""
    if not has_test:
        fix = "Give data.test a share of the rows or sources, or remove it."
        return dict.fromkeys(("swaps", "groups"), ("without test rows", fix))
    unswapped = variant.facts.unswapped
    return {"swaps": (f"with task: {variant.task}: {unswapped}", "Remove it.")} if unswapped else {}


class BenchmarkSection(RecipeSection):
    """One benchmark of lm-evaluation-harness. A plain text stands for its `task`."""

    task: NonEmpty
    """Name of a task, group or tag of lm-eval, or a task file (YAML) with rows of your own. Required."""
    num_fewshot: int | None = Field(default=None, ge=0, le=100)
    """Examples before each question. Default none: as the task says."""
    limit: Positive | None = None
    """Most questions. Default none: all; a limit saves time."""
    apply_chat_template: bool = False
    """Put each question as a chat message. Default false, as in lm-eval, so that numbers are those of its own command
    line."""

    network: bool | None = None
    """Whether its rows, or the tasks of a group, come over the network, unless they are in the cache. Default true for
    the name of a task, false for a task file."""

    paths: ClassVar = {"task": absolute_task}

    @property
    def needs_network(self) -> bool:
        """Whether its rows, or its tasks, may come over the network."""
        return not is_task_file(self.task) if self.network is None else self.network


def check_benchmark_keys(
    diagnostics: Diagnostics, benchmarks: tuple[BenchmarkSection, ...], variant: TaskVariant
) -> None:
    """Report benchmarks that this task's models cannot answer, and two with the same name in the report."""
    key = "evaluate.benchmarks"
    if benchmarks and variant.without_decoder:
        why, because = variant.without_decoder
        diagnostics.add(key, f"'{key}' runs on decoder language models, and {why}", "Remove it.", because)
        return
    names = [suite_name(benchmark.task) for benchmark in benchmarks]
    for i, name in enumerate(names):
        if name in names[:i]:
            fix = "Name each once; for another number of examples, write a task file of another name that includes it."
            diagnostics.add(f"{key}.{i}", f"the scores of two benchmarks would both be called {name}", fix)


def check_suite_gate(
    diagnostics: Diagnostics,
    key: str,
    gate: Gate,
    suites: Mapping[str, RecipeSection | tuple[BenchmarkSection, ...] | None],
    unused: dict[str, tuple[str, str]],
) -> None:
    """Report a gate about a suite that is not run, or about a metric that the suite does not measure here.

    `suites` has every suite by name, `unused` the keys of `fairness` without effect.
    """
    name, _, metric = gate.metric.partition(".")
    about = f"the gate {gate.text!r} is about"
    suite, known = suites.get(name), SUITE_KEYS.get(name, {})
    if gate.metric in RETIRED:
        problem = retired_problem(gate.metric, None)
        diagnostics.add(key, problem.what, problem.fix or "")
    elif name not in suites:
        fix = f"{nearest(name, [*suites])} Studies: {', '.join(suites)}.".strip()
        diagnostics.add(key, f"{about} an unknown study", fix)
    elif not suite:
        fix = f"State evaluate.{name}, or remove the gate."
        diagnostics.add(key, f"{about} a study that is not made", fix, f"evaluate.{name}")
    elif name == "benchmarks":
        if "." not in metric:  # which tasks and metrics there are is known once lm-eval has read the tasks
            fix = "Write benchmarks.TASK.METRIC, such as benchmarks.arc_easy.acc."
            diagnostics.add(key, f"the gate {gate.text!r} names a task without a metric", fix)
    elif metric not in known:
        fix = f"{nearest(metric, [*known])} Metrics of evaluate.{name}: {', '.join(known)}.".strip()
        diagnostics.add(key, f"{about} an unknown metric", fix)
    else:
        source = f"evaluate.{name}.{known[metric]}"
        files = getattr(suite, known[metric])
        if name == "fairness" and known[metric] in unused:
            diagnostics.add(key, f"{about} a metric that is not measured here", "Remove it.", source)
        elif not files:
            fix = f"Give {source} something to measure, or remove the gate."
            diagnostics.add(key, f"{about} a metric that is not measured", fix, source)


def suite_name(task: str) -> str:
    """Return what the scores of a benchmark are called by: the task's name, of a task file its stem, made plain."""
    return plain_name(PurePath(task).stem if is_task_file(task) else task)


def plain_name(name: str) -> str:
    """Return a name of lm-eval's as a gate can call it: letters, digits, single dashes, underscores; a letter first."""
    plain = re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9_-]+", "_", name)).strip("-")
    return plain if plain[:1].isalpha() and plain not in ("low", "high") else f"n{plain}"
