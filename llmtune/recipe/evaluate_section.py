"""The section `evaluate`: the metrics on the test rows, and the gates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, Tag

from llmtune.errors import RecipeError, nearest
from llmtune.recipe.class_names import show_name, similar_names, tidy_name
from llmtune.recipe.decision_section import DecideSection, PredictionSets, Share, check_decisions, key_of_decision
from llmtune.recipe.eval_suites_section import (
    BenchmarkSection,
    FairnessSection,
    ForgettingSection,
    JudgeSection,
    check_benchmark_keys,
    check_controls,
    check_export_gate,
    check_suite_gate,
    fairness_without_effect,
)
from llmtune.recipe.gate_grammar import NAME, RESERVED, Gate, find_baseline_problem, find_reversed_problem, parse_gate
from llmtune.recipe.section import (
    Many,
    NonEmpty,
    Positive,
    RecipeSection,
    absolute,
    absolute_or_address,
    by_type,
    sections_by,
)
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import (
    CALIBRATION,
    CHOICE_METRICS,
    CUT_METRIC,
    DECISIONS,
    PREDICTED,
    TASK_FACTS,
)
from llmtune.recipe.task_variant import TaskVariant, at_ten, samples_needed

NEED_TEST_ROWS = ("metrics", "gates", "champion", "limit", "choices", "samples", "slices", "judge", "controls")
GATE_KEYS = frozenset({"gates", "champion", "when_unsure", "looks", "max_disagreement"})
"""Keys that judge scores and do not change the models' answers."""
OWN_METRIC_KEYS = ("metric_seconds", "metric_network")
EXTRA_KEYS = frozenset({*OWN_METRIC_KEYS, "suspects"})
"""Keys of results that are computed from the answers, or independently of them."""
CHOICE = "choice_accuracy"
ERROR = 0.05
"""Two-sided false-positive rate of a gate on an interval."""
WhenUnsure = Literal["fail", "pass", "report"]
Choices = Annotated[
    Annotated[Literal["auto"], Tag("text")] | Annotated[Many[NonEmpty], Field(min_length=2), Tag("items")],
    by_type({str: "text"}, "items"),
]
Controls = Many[Literal["blind", "swapped"]]
Benchmarks = Annotated[
    tuple[BenchmarkSection, ...],
    BeforeValidator(sections_by("task"), json_schema_input_type=str | BenchmarkSection | list[str | BenchmarkSection]),
]


def is_own_metric(metric: str) -> bool:
    """Return whether an item of `evaluate.metrics` is the user's own, `FILE.py:FUNCTION`."""
    return metric.rpartition(":")[0].endswith(".py")


def metric_name(metric: str) -> str:
    """Return the name that gates and reports use: the function's name for a metric of the user's own."""
    return metric.rpartition(":")[2] if is_own_metric(metric) else metric


def absolute_metric(metric: str, folder: Path) -> str:
    """Make the file of a user's own metric absolute; return other metrics unchanged."""
    file, _, function = metric.rpartition(":")
    return f"{absolute(file, folder)}:{function}" if is_own_metric(metric) else metric


class EvaluateSection(RecipeSection):
    """Metrics of the base and tuned model on the test rows, and the gates to pass."""

    metrics: Many[str] = ()
    """Metrics to compute: those of the task, and your own as `FILE.py:FUNCTION`, relative to the recipe. Default none:
    the task's default metrics."""
    metric_seconds: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """Longest time that one of your own metrics or rewards may take for all answers of a model, or of a round, in
    seconds. Default 300: an endless loop ends, and slow libraries have time to load."""
    metric_network: bool = False
    """Let your own metrics and rewards use the network. Default false: scores should not depend on a server."""
    gates: Many[str] = ()
    """Conditions such as `exact_match >= 0.8`, `rougeL > base` or `exact_match.low > base`. A baseline without a
    language model has a name: `accuracy.low > tfidf`, `ndcg@10.low > bm25`; so has each of `controls`:
    `exact_match.low > blind`; and a control run: `loss.high < sft`. A failed gate ends the run with exit code 6.
    Default none: a gate is your decision."""
    champion: NonEmpty | None = None
    """The model in production: `release:NAME` (the current release), `release:NAME@HASH`, a run (its folder, `NAME` or
    `NAME@HASH`), a release file, or a folder of release files (uses the newest with the recipe's name). The tuned
    model is compared with it on test rows that neither was trained on. Gates may use it:
    `exact_match.low > champion - 0.01`. They pass, and say so, as long as NAME has no release. Default none: gates
    compare with the base model."""
    limit: Positive | None = None
    """Maximum number of test rows to generate answers for. Default none: all; a limit saves time."""
    choices: Choices | None = "auto"
    """Possible answers, scored by likelihood as `choice_accuracy`: a list, `auto` (if the rows have few different
    answers), or null to disable. Default `auto`: shows whether a gain is more than a better answer format."""
    calibrate: bool = True
    """Whether to fit a temperature for the probabilities of a task with a fixed set of labels (classify,
    token-classify; chat and completion with `choices`), on the validation rows alone. Default true: it costs one pass
    over these rows."""
    decide: DecideSection | None = None
    """Abstention with a guarantee, for a task with a fixed set of labels: `{risk: 0.05}` finds the confidence from
    which at most 5 % of the answers are wrong. Default none: the risk is your decision."""
    sets: PredictionSets | None = None
    """Prediction sets with a guarantee: `0.9` is the coverage. Default none: a single answer is easier to use."""
    out_of_scope: Share | None = None
    """Share of rows like yours that may be called out of scope, such as 0.05. Detection has no guarantee. Default
    none: each false alarm costs an answer."""
    samples: int = Field(default=5, ge=0, le=1000)
    """Answers shown side by side in the report. Also the maximum number of rows shown (but at most 5) that flipped
    from wrong to right, or from right to wrong. Default 5: enough to see the style."""
    controls: Controls = ("blind", "swapped")
    """Test rows with pictures that both models answer again with other pictures: `blind` (grey ones of the same size)
    and `swapped` (those of other rows). Without a difference, answers do not depend on the picture. Default both: a
    gain in scores does not show that the model looks; `[]` saves the time."""
    slices: Many[str] = ()
    """Columns of the rows by which to break down the scores, with intervals. The task need not use them. Numeric
    columns with many values are split into four ranges. Default none: which slices matter depends on your question."""
    suspects: bool = False
    """List rows whose label is likely wrong, for classes and tags (extra `labels`). Default false: takes a pass of the
    tuned model over all rows."""
    forgetting: ForgettingSection | None = None
    """Forgetting: general text and questions, before and after tuning; `{}` uses the defaults. Default none: takes
    about a minute per model."""
    fairness: FairnessSection | None = None
    """Fairness: swapped words and gaps between groups; `{}` uses the defaults. Default none: fairness needs a
    deliberate question."""
    benchmarks: Benchmarks = ()
    """Public benchmarks of lm-evaluation-harness (extra `benchmarks`): names of its tasks, or task files. Default none:
    most are large downloads."""
    judge: JudgeSection | None = None
    """A language model behind an endpoint that compares the answers of base and tuned model, pair by pair. Default
    none: it costs tokens and sends your test rows to the endpoint."""

    when_unsure: WhenUnsure = "fail"
    """Result of an inconclusive gate on the end of an interval: `fail` (exit code 6), `pass`, or `report` (exit code
    7). Default `fail`: the rows did not prove the condition."""
    looks: Annotated[int, Field(ge=2, le=10_000)] | None = None
    """Number of models that will be compared on these test rows, such as 52 for weekly runs. Gates on intervals divide
    their 5 % false-positive budget by it. `releases.jsonl` next to the champion's release file keeps count. Default
    none: each run has 5 % of its own."""

    max_disagreement: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of a source file's labels that may differ from the champion's predictions, such as 0.6; more is an error
    before training (exit code 3); 1 accepts all. Compares at most 200 rows of a file that the champion never saw, of
    known classes. Default none: trains, but a file that differs far more than usual is inconclusive (exit code 7)."""

    paths: ClassVar = {"champion": absolute_or_address, "metrics": absolute_metric}

    @property
    def alpha(self) -> float:
        """Return the two-sided false-positive rate of a gate on an interval."""
        return ERROR / (self.looks or 1)

    @property
    def own_metrics(self) -> dict[str, str]:
        """Return the user's own metrics: `FILE.py:FUNCTION` by name."""
        return {metric_name(metric): metric for metric in self.metrics if is_own_metric(metric)}

    @property
    def predicted(self) -> frozenset[str]:
        """Return the names of all metrics of generated answers, the user's own included."""
        return PREDICTED | self.own_metrics.keys()

    @property
    def columns(self) -> dict[str, str]:
        """Return the columns to keep with the test rows, each with the recipe key that names it."""
        groups = self.fairness.groups if self.fairness else ()
        return dict.fromkeys(groups, "evaluate.fairness.groups") | dict.fromkeys(self.slices, "evaluate.slices")

    @property
    def decisions(self) -> list[str]:
        """Return the keys of decisions that have a value."""
        return [key for key in DECISIONS if getattr(self, key) is not None]

    def check(
        self,
        diagnostics: Diagnostics,
        variant: TaskVariant,
        has_test: bool,
        exports: Sequence[str] = (),
        has_validation: bool = True,
    ) -> None:
        """Report impossible measurements and gates; `exports` are those of the recipe's `deploy`."""
        diagnostics.check_release("evaluate.champion", self.champion)
        self._check_calibrate(diagnostics, variant, has_validation)
        chooses = self.chooses(variant) and self.choices is not None
        check_decisions(diagnostics, self.decisions, variant, has_validation=has_validation, chooses=chooses)
        check_benchmark_keys(diagnostics, self.benchmarks, variant)
        if self.fairness:
            self.fairness.check(diagnostics, variant, has_test)
        if self.forgetting:
            self.forgetting.check(diagnostics, variant)
        if self.judge:
            self.judge.check(diagnostics, variant)
        if self.suspects and variant.facts.answer_kind not in ("labels", "tags"):
            why, fix = f"with task: {variant.task}", "Remove it: it is for classes and tags."
            diagnostics.no_effect("evaluate.suspects", why, fix, "task")
        self._check_unmeasured(diagnostics, variant)
        self._check_opponents(diagnostics)
        check_controls(diagnostics, self.controls, self.parsed_gates(), variant)
        self._check_simple_baselines(diagnostics, variant)
        self._check_disagreement(diagnostics, variant)
        if has_test:
            diagnostics.repeated("evaluate.slices", self.slices, "a column")
            self._check_metrics(diagnostics, variant)
            self._check_choices(diagnostics, variant)
            self._check_gates(diagnostics, variant, exports)
            return
        gates = self._suite_gates()
        for key, gate in gates or ():
            self._check_suite_gate(diagnostics, key, gate, variant, has_test)
        for name in NEED_TEST_ROWS:
            if getattr(self, name) not in (None, ()) and not (name == "gates" and gates is not None):
                fix = "Give data.test a share of the rows or sources, or remove it."
                diagnostics.no_effect(f"evaluate.{name}", "without test rows", fix, "data.test")

    def chosen_metrics(self, variant: TaskVariant) -> tuple[str, ...]:
        """Return the names of the recipe's metrics, or of the task's default metrics if it has none."""
        return tuple(map(metric_name, self.metrics)) or variant.default_metrics

    def chooses(self, variant: TaskVariant) -> bool:
        """Return whether a task that generates answers also chooses among a few of them."""
        return variant.facts.generates and not set(CHOICE_METRICS).isdisjoint(self.chosen_metrics(variant))

    def _check_calibrate(self, diagnostics: Diagnostics, variant: TaskVariant, has_validation: bool) -> None:
        key = "evaluate.calibrate"
        if not has_validation:
            diagnostics.no_effect(
                key, "without validation rows", "Set data.validation, or remove it.", "data.validation"
            )
        elif not set(CALIBRATION) & set(variant.metrics):
            diagnostics.no_effect(key, f"in task {variant.task}: its model does not choose", "Remove it.", "task")
        elif variant.facts.generates and not self.chooses(variant):
            diagnostics.no_effect(key, f"without the metric {CHOICE}", f"Add {CHOICE} to evaluate.metrics.", "task")

    def _check_unmeasured(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        for i, metric in enumerate(self.metrics):
            if metric in variant.facts.metrics and metric not in variant.metrics:
                keys = {bool(variant.loss): "preference.loss", "@" in metric: "reinforce.samples"}
                key = "completion.objective" if variant.is_masked else keys.get(True, "adapter.method")
                why = " with completion.objective: masked" if variant.is_masked else f": {variant.unmeasured[metric]}"
                fix = f"Remove it. Allowed: {', '.join(variant.metrics)}."
                diagnostics.add(f"evaluate.metrics.{i}", f"'{metric}' cannot be measured{why}", fix, key)
            elif (needed := samples_needed(metric)) > variant.samples > 0:
                what, fix = f"'{metric}' needs {needed} samples", f"Set reinforce.samples to {needed}, or a smaller k."
                diagnostics.add(f"evaluate.metrics.{i}", what, fix, "reinforce.samples")

    def _check_metrics(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        key, allowed = "evaluate.metrics", variant.facts.metrics
        if not self.metrics and diagnostics.stated(key):
            diagnostics.add(key, f"'{key}' is empty", "Name a metric, or remove the key to use the task's metrics.")
        for i, metric in enumerate(self.metrics):
            if is_own_metric(metric):
                self._check_own_metric(diagnostics, f"{key}.{i}", metric, variant)
            elif at_ten(metric) not in allowed:
                fix = f"{nearest(metric, allowed)} Metrics of task: {variant.task}: {', '.join(allowed)}."
                fix = "Name a function in it: FILE.py:FUNCTION." if metric.endswith(".py") else fix.strip()
                diagnostics.add(f"{key}.{i}", f"unknown metric '{metric}'", fix, "task")
        diagnostics.repeated(key, tuple(map(metric_name, self.metrics)), "a metric")
        for name in () if any(map(is_own_metric, (*self.metrics, *variant.rewards))) else OWN_METRIC_KEYS:
            fix = "Add one as FILE.py:FUNCTION, or remove it."
            diagnostics.no_effect(f"evaluate.{name}", "without a metric or reward of your own", fix, key)

    def _check_own_metric(self, diagnostics: Diagnostics, key: str, metric: str, variant: TaskVariant) -> None:
        name, taken = metric_name(metric), {one for facts in TASK_FACTS.values() for one in facts.metrics}
        if variant.is_masked:
            what = f"'{metric}' needs answers, and with completion.objective: masked a model gives none"
            diagnostics.add(key, what, "Remove it.", "completion.objective")
        elif not re.fullmatch(NAME, name, re.ASCII) or "-" in name:
            fix = "Use a function whose name starts with an ASCII letter, then letters, digits and _."
            diagnostics.add(key, f"'{name}' cannot be the name of a metric", fix)
        elif name in taken | RESERVED:
            what, others = f"'{name}' is the name of one of llmtune's metrics or notes", ", ".join(sorted(RESERVED))
            diagnostics.add(key, what, f"Rename the function. Also reserved: {others}.")

    def _check_choices(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        key, metrics = "evaluate.metrics", self.chosen_metrics(variant)
        if self.choices is not None and not self.chooses(variant):
            diagnostics.no_effect("evaluate.choices", f"without the metric {CHOICE}", f"Add {CHOICE} to {key}.", key)
        needing = [metric for metric in self.metrics if metric in CHOICE_METRICS] if variant.facts.generates else []
        if self.choices is None and needing:
            what = f"{needing[0]} needs choices, but evaluate.choices is null"
            diagnostics.add(key, what, "Set evaluate.choices to auto.", "evaluate.choices")
        if isinstance(self.choices, tuple):
            diagnostics.repeated("evaluate.choices", [*map(tidy_name, self.choices)], "an answer")
            for names in similar_names(self.choices):
                what = f"'evaluate.choices' differ only by case or width: {', '.join(map(show_name, names))}"
                diagnostics.add("evaluate.choices", what, "Write the answer one way, in the rows too.")
        if self.limit is not None and not (variant.facts.generates and (self.judge or self.predicted & set(metrics))):
            fix = "Add one, such as exact_match, or remove it."
            diagnostics.no_effect("evaluate.limit", "without a metric on generated answers", fix, key)

    def _check_gates(self, diagnostics: Diagnostics, variant: TaskVariant, exports: Sequence[str]) -> None:
        metrics = (*self.chosen_metrics(variant), *variant.study_metrics)
        allowed = (*variant.facts.metrics, *variant.study_metrics)
        if CUT_METRIC in allowed and variant.generates and self.predicted & set(metrics):
            metrics = tuple(dict.fromkeys((*metrics, CUT_METRIC)))
        decided = [metric for key in self.decisions for metric in DECISIONS[key]]
        for i, text in enumerate(self.gates):
            key = f"evaluate.gates.{i}"
            try:
                gate = parse_gate(text)
            except RecipeError as error:
                (problem,) = error.problems
                diagnostics.add(key, problem.what, problem.fix or "")
                continue
            if gate.metric in (*metrics, *decided):
                continue
            if gate.on_export:
                check_export_gate(diagnostics, key, gate, metrics, exports)
            elif "." in gate.metric and not (variant.rewards and gate.metric.startswith("rewards.")):
                self._check_suite_gate(diagnostics, key, gate, variant, has_test=True)
            elif adding := key_of_decision(gate.metric):
                what = f"the gate {text!r} uses a metric that is not computed"
                diagnostics.add(key, what, f"Set evaluate.{adding}.", f"evaluate.{adding}")
            elif at_ten(gate.metric) in allowed:
                lacking = variant.unmeasured.get(gate.metric)
                fix = f"Remove it: {lacking}." if lacking else f"Add {gate.metric} to evaluate.metrics."
                what = f"the gate {text!r} uses a metric that is not computed"
                diagnostics.add(key, what, fix, "evaluate.metrics")
            else:
                fix = f"{nearest(gate.metric, allowed)} Computed metrics: {', '.join(metrics)}.".strip()
                diagnostics.add(key, f"the gate {text!r} uses an unknown metric", fix, "evaluate.metrics", "task")

    def _check_opponents(self, diagnostics: Diagnostics) -> None:
        for key, gate in self.parsed_gates():
            if gate.against and (gate.against == "tuned") != gate.on_export:
                fix = "Compare an export with `tuned`, and the tuned model with another model."
                diagnostics.add(key, f"the gate {gate.text!r} compares with the wrong model", fix)
            elif gate.against == "base" and key_of_decision(gate.metric):
                fix = f"Compare with a number, such as `{gate.metric} {gate.op} 0.5`, or with `champion`."
                diagnostics.add(key, f"the gate {gate.text!r} compares with the base, which decides nothing", fix)
            elif gate.against == "champion" and "." in gate.metric:
                fix = "Compare with `base`: a champion has scores on test rows only."
                diagnostics.add(key, f"the gate {gate.text!r} compares a study with a champion", fix)
            elif gate.against == "champion" and self.champion is None:
                fix = "Set evaluate.champion to release:NAME, a run folder or a release file, or compare with `base`."
                what = f"the gate {gate.text!r} uses the champion, but evaluate.champion is not set"
                diagnostics.add(key, what, fix, "evaluate.champion")

        if not any(gate.part for _, gate in self.parsed_gates()):
            fix = "Write one such as `exact_match.low > base`, or remove it."
            for key in ("evaluate.when_unsure", "evaluate.looks"):
                diagnostics.no_effect(key, "without a gate on the end of an interval", fix, "evaluate.gates")
        elif self.champion is None:
            fix = "Set evaluate.champion to release:NAME or a release file: looks are counted next to it."
            diagnostics.no_effect("evaluate.looks", "without a champion", fix, "evaluate.champion")

    def _check_simple_baselines(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        without_choices = variant.facts.generates and self.choices is None
        metrics = [] if without_choices and CHOICE in variant.facts.baseline_metrics else self.chosen_metrics(variant)
        for key, gate in self.parsed_gates():
            if problem := find_baseline_problem(gate, variant.facts, metrics):
                diagnostics.add(key, *problem, "task")
            if problem := find_reversed_problem(gate, variant.facts):
                diagnostics.add(key, *problem)

    def _check_disagreement(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        key = "evaluate.max_disagreement"
        if variant.facts.answer_kind not in ("labels", "tags"):
            diagnostics.no_effect(key, f"with task: {variant.task}", "Remove it: it is for classes and tags.", "task")
        elif self.champion is None:
            fix = "Set evaluate.champion to the model in production."
            diagnostics.no_effect(key, "without a champion", fix, "evaluate.champion")

    def parsed_gates(self) -> Iterator[tuple[str, Gate]]:
        """Yield the valid gates, each with its key."""
        for i, text in enumerate(self.gates):
            with suppress(RecipeError):
                yield f"evaluate.gates.{i}", parse_gate(text)

    def _suite_gates(self) -> list[tuple[str, Gate]] | None:
        """Return the gates with their keys if all use suites and so need no test rows; else None."""
        gates = list(self.parsed_gates())
        alone = all("." in gate.metric and not gate.on_export for _, gate in gates)
        return gates if len(gates) == len(self.gates) and alone else None

    def _check_suite_gate(
        self, diagnostics: Diagnostics, key: str, gate: Gate, variant: TaskVariant, has_test: bool
    ) -> None:
        suites = {name: getattr(self, name) for name in ("forgetting", "fairness", "benchmarks", "judge")}
        check_suite_gate(diagnostics, key, gate, suites, fairness_without_effect(variant, has_test))
