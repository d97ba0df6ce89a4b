"""The section `evaluate`: what is measured on the test rows, and what must hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, Tag

from llmtune.errors import RecipeError, nearest
from llmtune.recipe.eval_suites_section import (
    BenchmarkSection,
    FairnessSection,
    ForgettingSection,
    check_benchmark_keys,
    check_suite_gate,
    fairness_without_effect,
)
from llmtune.recipe.gate_grammar import Gate, parse_gate
from llmtune.recipe.section import Many, NonEmpty, Positive, RecipeSection, absolute, by_type, sections_by
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import CUT_METRIC, PREDICTED, TaskVariant

NEED_TEST_ROWS = ("metrics", "gates", "champion", "limit", "choices", "samples", "slices")
GATE_KEYS = frozenset({"gates", "champion", "when_unsure", "looks"})
"""Keys that judge scores and do not change what the models answer."""
CHOICE = "choice_accuracy"
ERROR = 0.05
"""Of a gate on an interval where nothing changed: how often it may claim a change, either way."""
WhenUnsure = Literal["fail", "pass", "report"]
Choices = Annotated[
    Annotated[Literal["auto"], Tag("text")] | Annotated[Many[NonEmpty], Field(min_length=2), Tag("items")],
    by_type({str: "text"}, "items"),
]
Benchmarks = Annotated[
    tuple[BenchmarkSection, ...],
    BeforeValidator(sections_by("task"), json_schema_input_type=str | BenchmarkSection | list[str | BenchmarkSection]),
]


class EvaluateSection(RecipeSection):
    """What is measured on the test rows, for the base model and the tuned one, and what must hold."""

    metrics: Many[str] = ()
    """Metrics to compute, of those that the task knows. Default none stated: the task's own choice of them."""
    gates: Many[str] = ()
    """Conditions such as `exact_match >= 0.8`, `rougeL > base` or `exact_match.low > base`; one that fails ends the run
    with exit code 6. Default none: a gate is a decision."""
    champion: NonEmpty | None = None
    """The model in production, as a run folder, a release file, or a folder of releases (the newest of the recipe's
    name): the tuned model is compared with it on test rows that neither was trained on, and gates may say
    `exact_match.low > champion - 0.01`. Default none: gates compare with the base model."""
    limit: Positive | None = None
    """Most test rows that answers are generated for. Default none: all; a limit saves time."""
    choices: Choices | None = "auto"
    """The possible answers, scored by likelihood as `choice_accuracy`: a list, `auto` (where the rows' answers are
    few), or null for never. Default `auto`: a gain in answer format alone is then not sold as a gain."""
    samples: int = Field(default=5, ge=0, le=1000)
    """Answers shown side by side in the report, and at most so many (but no more than 5) of the rows that flipped from
    wrong to right, or from right to wrong. Default 5: enough to see the manner."""
    slices: Many[str] = ()
    """Columns of the rows, used by the task or not: the scores are also given for each value of them, with their
    intervals. Numbers of many values are put into four ranges. Default none: a part of the rows is worth a look where
    somebody has a question about it."""
    forgetting: ForgettingSection | None = None
    """General text and questions, before and after tuning; `{}` takes its keys' defaults. Default none: it costs about
    a minute for each model."""
    fairness: FairnessSection | None = None
    """Swapped words and gaps between groups; `{}` takes its keys' defaults. Default none: what is fair is a question to
    be asked on purpose."""
    benchmarks: Benchmarks = ()
    """Public benchmarks by lm-evaluation-harness (extra `benchmarks`): names of its tasks or task files. Default none:
    most of them are large and come over the network."""

    when_unsure: WhenUnsure = "fail"
    """What a gate on the end of an interval counts as where it is inconclusive: `fail` (exit code 6), `pass`, or
    `report` (exit code 7). Default `fail`: what had to be shown was not shown."""
    looks: Annotated[int, Field(ge=2, le=10_000)] | None = None
    """How many models these test rows will judge, such as 52 for a run a week: gates on intervals share their error of
    5 % among them, and `releases.jsonl` beside the champion's release file counts. Default none: each run errs by
    itself."""

    paths: ClassVar = {"champion": absolute}

    @property
    def alpha(self) -> float:
        """The error of a gate on an interval, both ends together."""
        return ERROR / (self.looks or 1)

    @property
    def columns(self) -> dict[str, str]:
        """Columns that are kept with the test rows, each with the key that names it."""
        groups = self.fairness.groups if self.fairness else ()
        return dict.fromkeys(groups, "evaluate.fairness.groups") | dict.fromkeys(self.slices, "evaluate.slices")

    def check(self, diagnostics: Diagnostics, variant: TaskVariant, has_test: bool) -> None:
        """Report measurements that cannot be made and gates that cannot be held."""
        check_benchmark_keys(diagnostics, self.benchmarks, variant)
        if self.fairness:
            self.fairness.check(diagnostics, variant, has_test)
        if self.forgetting:
            self.forgetting.check(diagnostics, variant)
        self._check_unmeasured(diagnostics, variant)
        self._check_opponents(diagnostics)
        if has_test:
            diagnostics.repeated("evaluate.slices", self.slices, "a column")
            self._check_metrics(diagnostics, variant)
            self._check_choices(diagnostics, variant)
            self._check_gates(diagnostics, variant)
            return
        gates = self._suite_gates()
        for key, gate in gates or ():
            self._check_suite_gate(diagnostics, key, gate, variant, has_test)
        for name in NEED_TEST_ROWS:
            if getattr(self, name) not in (None, ()) and not (name == "gates" and gates is not None):
                fix = "Give data.test a share of the rows or sources, or remove it."
                diagnostics.no_effect(f"evaluate.{name}", "without test rows", fix, "data.test")

    def chosen_metrics(self, variant: TaskVariant) -> tuple[str, ...]:
        """Return the metrics that are stated, else the task's own choice of them."""
        return self.metrics or variant.default_metrics

    def _check_unmeasured(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        for i, metric in enumerate(self.metrics):
            if metric in variant.facts.metrics and metric not in variant.metrics:
                key = "completion.objective" if variant.is_masked else "preference.loss"
                why = " with completion.objective: masked" if variant.is_masked else f": {variant.unmeasured[metric]}"
                fix = f"Remove it. What can be: {', '.join(variant.metrics)}."
                diagnostics.add(f"evaluate.metrics.{i}", f"'{metric}' cannot be measured{why}", fix, key)

    def _check_metrics(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        key, known = "evaluate.metrics", variant.facts.metrics
        if not self.metrics and diagnostics.stated(key):
            diagnostics.add(key, f"'{key}' is empty", "Name a metric, or omit the key for the task's own choice.")
        for i, metric in enumerate(self.metrics):
            if metric not in known:
                fix = f"{nearest(metric, known)} Metrics of task: {variant.task}: {', '.join(known)}.".strip()
                diagnostics.add(f"{key}.{i}", f"unknown metric '{metric}'", fix, "task")
        diagnostics.repeated(key, self.metrics, "a metric")

    def _check_choices(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        key, metrics = "evaluate.metrics", self.chosen_metrics(variant)
        if self.choices is not None and CHOICE not in metrics:
            diagnostics.no_effect("evaluate.choices", f"without the metric {CHOICE}", f"Add {CHOICE} to {key}.", key)
        if self.choices is None and CHOICE in self.metrics:
            what = f"{CHOICE} needs choices, and evaluate.choices is null"
            diagnostics.add(key, what, "Set it to auto.", "evaluate.choices")
        if isinstance(self.choices, tuple):
            diagnostics.repeated("evaluate.choices", self.choices, "an answer")
        if self.limit is not None and not (variant.facts.generates and PREDICTED & set(metrics)):
            fix = "Add one, such as exact_match, or remove it."
            diagnostics.no_effect("evaluate.limit", "without a metric on generated answers", fix, key)

    def _check_gates(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        metrics, known = self.chosen_metrics(variant), variant.facts.metrics
        if CUT_METRIC in known and variant.generates and PREDICTED & set(metrics):
            metrics = tuple(dict.fromkeys((*metrics, CUT_METRIC)))
        for i, text in enumerate(self.gates):
            key = f"evaluate.gates.{i}"
            try:
                gate = parse_gate(text)
            except RecipeError as error:
                (problem,) = error.problems
                diagnostics.add(key, problem.what, problem.fix or "")
                continue
            if gate.metric in metrics:
                continue
            if "." in gate.metric:
                self._check_suite_gate(diagnostics, key, gate, variant, has_test=True)
            elif gate.metric in known:
                lacking = variant.unmeasured.get(gate.metric)
                fix = f"Remove it: {lacking}." if lacking else f"Add {gate.metric} to evaluate.metrics."
                what = f"the gate {text!r} is about a metric that is not computed"
                diagnostics.add(key, what, fix, "evaluate.metrics")
            else:
                fix = f"{nearest(gate.metric, known)} Metrics that are computed: {', '.join(metrics)}.".strip()
                diagnostics.add(key, f"the gate {text!r} is about an unknown metric", fix, "evaluate.metrics", "task")

    def _check_opponents(self, diagnostics: Diagnostics) -> None:
        for key, gate in self._parsed_gates():
            if gate.against == "champion" and "." in gate.metric:
                fix = "Compare with `base`: of a champion only scores of the test rows are known."
                diagnostics.add(key, f"the gate {gate.text!r} compares a study with a champion", fix)
            elif gate.against == "champion" and self.champion is None:
                fix = "Set evaluate.champion to a run folder or a release file, or compare with `base`."
                what = f"the gate {gate.text!r} names a champion, and there is none"
                diagnostics.add(key, what, fix, "evaluate.champion")

        if not any(gate.part for _, gate in self._parsed_gates()):
            fix = "Write one such as `exact_match.low > base`, or remove it."
            for key in ("evaluate.when_unsure", "evaluate.looks"):
                diagnostics.no_effect(key, "without a gate on the end of an interval", fix, "evaluate.gates")
        elif self.champion is None:
            fix = "Set evaluate.champion to a release file: looks are counted beside it."
            diagnostics.no_effect("evaluate.looks", "without a champion", fix, "evaluate.champion")

    def _parsed_gates(self) -> Iterator[tuple[str, Gate]]:
        for i, text in enumerate(self.gates):
            with suppress(RecipeError):
                yield f"evaluate.gates.{i}", parse_gate(text)

    def _suite_gates(self) -> list[tuple[str, Gate]] | None:
        """Return the gates, each with its key, where all are about suites, which need no test rows; else None."""
        gates = list(self._parsed_gates())
        return gates if len(gates) == len(self.gates) and all("." in gate.metric for _, gate in gates) else None

    def _check_suite_gate(
        self, diagnostics: Diagnostics, key: str, gate: Gate, variant: TaskVariant, has_test: bool
    ) -> None:
        suites = {"forgetting": self.forgetting, "fairness": self.fairness, "benchmarks": self.benchmarks}
        check_suite_gate(diagnostics, key, gate, suites, fairness_without_effect(variant, has_test))
