"""The report as a page: the verdict first, then what was measured, then how the run went."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from llmtune.records import Evaluation, GateResult
from llmtune.report.blocks import TONES, Compared, Links, Page, Section, Text, Tone, VerdictCard
from llmtune.report.metric_info import better_side, rank_metrics
from llmtune.report.number_format import DASH, count
from llmtune.report.report_record import Report
from llmtune.report.run_sections import (
    adapter_section,
    data_section,
    method_section,
    model_section,
    recipe_section,
    step_section,
    training_section,
)
from llmtune.report.score_sections import compare_metric, count_gates, gate_section, power_section, score_sections
from llmtune.report.verdict import (
    BETTER,
    INCONCLUSIVE,
    MIXED,
    WITHIN,
    WORSE,
    MetricChanges,
    find_changes,
    judged_differences,
)

TITLES: dict[str, tuple[str, Tone]] = {
    BETTER: ("Better than {opponent}", "better"),
    WORSE: ("Worse than {opponent}", "worse"),
    MIXED: ("Better here, worse there than {opponent}", "mixed"),
    WITHIN: ("Within the margin of {opponent}", "better"),
    INCONCLUSIVE: ("No clear difference from {opponent}", "unsure"),
}

FOLDER = "explain"
"""In the run folder."""
MEANINGS = {
    "attention": ("Attention", "which words look at which, by layer and head"),
    "generation": ("Generation", "how an answer comes about, word by word"),
    "positions": ("Positions", "how the model knows the order of words"),
    "model": ("Architecture", "the parts of the model, their shapes and their cost"),
    "adapter": ("Adapter", "how far each layer moved: where the tuning went"),
}
"""By the first word of a page's name: its title, and what it shows."""


def make_report_page(report: Report) -> Page:
    """Return the page of a report; sections that the run has not reached are empty."""
    evaluation, task = report.evaluation, report.task
    sections = [
        gate_section(report.gates, report.look),
        *(score_sections(evaluation, task, report.seeds) if evaluation else []),
        power_section(report.power),
        explain_section(report.explanations, trained=report.train is not None),
        training_section(report.train),
        data_section(report.data, task),
        model_section(report.model),
        adapter_section(report.adapter, report.deploy),
        step_section(report.steps, report.hardware),
        method_section(evaluation, task),
        recipe_section(report.recipe_yaml),
    ]
    footer = f"Made by llmtune {report.llmtune}. `report.html` is complete in itself and needs no network."
    return Page(report.name, sections, chips(report), verdict=verdict_card(report), footer=footer)


def chips(report: Report) -> list[tuple[str, str]]:
    """The few facts that say which run this is."""
    facts = [
        ("run", report.fingerprint[:8]),
        ("date", report.date),
        ("task", report.task),
        ("model", report.model.get("name") if report.model else None),
        ("method", report.adapter.get("method") if report.adapter else None),
        ("test rows", count(report.evaluation.rows if report.evaluation else None)),
    ]
    return [(name, value) for name, value in facts if value and value != DASH]


def verdict_card(report: Report) -> VerdictCard:
    """Return the verdict, how many gates hold, and the one score that says most."""
    gates, evaluation = report.gates, report.evaluation
    failed, unsure = (any(gate.passed is outcome for gate in gates) for outcome in (False, None))
    opponent = "the champion" if evaluation and evaluation.champion else "the base model"
    if evaluation and evaluation.baseline and not evaluation.champion:
        opponent = "the baseline"
    title, tone = TITLES[report.verdict.word]
    return VerdictCard(
        word=report.verdict.word,
        title=title.format(opponent=opponent),
        tone=tone,
        reason=report.verdict.reason,
        gates=count_gates(gates),
        gates_tone=TONES[-1 if failed else 0 if unsure else 1],
        headline=headline(evaluation, report.verdict.word, gates) if evaluation else None,
        baseline="the champion" if evaluation and evaluation.champion else (evaluation and evaluation.baseline) or "",
    )


def headline(evaluation: Evaluation, word: str, gates: Sequence[GateResult] = ()) -> Compared | None:
    """Return the one score that says most: one that the verdict `word` rests on, if there is any."""
    champion, differences = evaluation.champion, judged_differences(evaluation)
    ranked = rank_metrics(differences)
    bearing = list_bearing(find_changes(differences, gates, "champion" if champion else "base"), word)
    metric = next((name for name in ranked if name in bearing), next(iter(ranked), None))
    if metric is None:
        return None
    name = metric.replace("_", " ")
    if champion is None:
        return compare_metric(metric, evaluation, name)
    scores = champion.scores.get(metric), champion.tuned.get(metric)
    return Compared(name, *scores, differences[metric], better_side(metric))


def list_bearing(findings: MetricChanges, word: str) -> Sequence[str]:
    """Return the metrics that a verdict rests on."""
    if findings.failed:
        return findings.failed
    chosen = {BETTER: findings.better, WORSE: findings.worse, WITHIN: findings.within}
    return chosen.get(word, [*findings.better, *findings.worse] if word == MIXED else ())


# Pages that look inside the model: they come after the run, if they come


def find_explanations(run: Path) -> list[str]:
    """Return the names of the pages in a run folder, without `.html`, in the order of MEANINGS."""
    order = list(MEANINGS)
    names = [path.stem for path in (run / FOLDER).glob("*.html") if not path.name.startswith(".")]
    return sorted(names, key=lambda name: (order.index(kind_of(name)) if kind_of(name) in order else len(order), name))


def explain_section(names: Sequence[str], *, trained: bool) -> Section:
    """Links to the pages, or where there are none the command to type; nothing before training."""
    text = "Where do base and tuned model part, and what changed inside? `llmtune explain generation RUN --prompt "
    text += "TEXT` makes a page of it, with RUN this folder; `llmtune explain --help` lists what else there is to see."
    shown = [Links([explanation_link(name) for name in names])] if names else [Text(text)] if trained else []
    return Section("Look inside", shown, anchor="inside", brief=False)


def explanation_link(name: str) -> tuple[str, str, str]:
    """Return address, title and meaning of a page."""
    kind = kind_of(name)
    title, meaning = MEANINGS.get(kind, (name, ""))
    rest = name.removeprefix(kind).strip("-").replace("-", " ")
    return f"{FOLDER}/{quote(name)}.html", f"{title}: {rest}" if rest else title, meaning


def kind_of(name: str) -> str:
    """Return the first word of a page's name."""
    return re.split(r"[^a-z]", name, maxsplit=1)[0]
