"""Builds the report page of a run and writes its files: HTML, Markdown for CI, JSON, JUnit XML."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmtune.display.blocks import TONES, Compared, Links, Page, Section, Text, Tone, VerdictCard
from llmtune.display.number_format import DASH, count
from llmtune.evaluate.control_run_verdict import judge_control_run
from llmtune.evaluate.control_verdict import find_reliance
from llmtune.evaluate.metric_info import better_side, list_sides, rank_metrics
from llmtune.evaluate.significance import CHANCE, INCONCLUSIVE, MetricChanges, find_changes
from llmtune.evaluate.verdict import BETTER, MIXED, WITHIN, WORSE, judged_differences, list_gained, simple_title
from llmtune.recipe.gate_grammar import Opponent
from llmtune.recipe.task_facts import CONTROLS, TASK_FACTS
from llmtune.records import Json
from llmtune.report.evaluation_sections import count_gates, gate_section, power_section, score_sections
from llmtune.report.junit import list_scores, to_junit
from llmtune.report.render_html import render_html_section, to_html
from llmtune.report.render_markdown import to_markdown
from llmtune.report.row_sections import NO_PICTURES, Thumbnails, suspect_section
from llmtune.report.run_sections import (
    adapter_section,
    data_section,
    export_section,
    method_section,
    model_section,
    recipe_section,
    step_section,
    training_section,
)
from llmtune.report.score_sections import against_champion, compare_metric
from llmtune.store.atomic_files import plain, read_json, write_json, write_text
from llmtune.store.report_record import Report
from llmtune.store.run_folder import REPORTS, THUMBNAILS, updating_reports
from llmtune.store.score_records import Evaluation, GateResult

TITLES: dict[str, tuple[str, Tone]] = {
    BETTER: ("Better than {opponent}", "better"),
    WORSE: ("Worse than {opponent}", "worse"),
    MIXED: ("Partly better, partly worse than {opponent}", "mixed"),
    WITHIN: ("Within the margin of {opponent}", "better"),
    INCONCLUSIVE: ("No clear difference from {opponent}", "unsure"),
}

INSIDE = re.compile(r'<section class="card" id="inside">.*?</section>', re.DOTALL)
FOLDER = "explain"
"""In the run folder."""
MEANINGS = {
    "attention": ("Attention", "which words attend to which, by layer and head"),
    "generation": ("Generation", "how the model writes an answer, word by word"),
    "positions": ("Positions", "how the model knows the order of words"),
    "model": ("Architecture", "the parts of the model, their shapes and their cost"),
    "adapter": ("Adapter", "how much tuning changed each layer"),
}
"""By the first word of a page's name: title and description."""


def write_report(report: Report, folder: Path) -> Sequence[str]:
    """Write report.html, report.md, report.json and junit.xml to `folder`, each atomically; return these names.

    Numbers that JSON does not support become null. `make_report` has already redacted the report.
    """
    rows: Thumbnails = read_json(folder / "evaluation" / Path(THUMBNAILS).name) or {}
    page = make_report_page(report, read_json(folder / THUMBNAILS) or (), rows)
    write_text(folder / "report.html", to_html(page))
    write_text(folder / "report.md", to_markdown(page))
    write_json(folder / "report.json", report_json(report))
    write_text(folder / "junit.xml", to_junit(report))
    return REPORTS


def report_json(report: Report) -> Json:
    """Return the content of report.json: the fields of the report, with the seeds under `evaluation`.

    `evaluation.control_run.beaten` is yes, no, inconclusive or unknown. `properties` are those of junit.xml.
    """
    values: Json = plain(report)
    seeds, verdict = values.pop("seeds"), values.pop("verdict")
    if values["evaluation"]:
        values["evaluation"]["seeds"] = seeds
    if report.evaluation and (control := report.evaluation.control_run):
        values["evaluation"]["control_run"]["beaten"] = judge_control_run(control, report.gates)[0]
    return values | {"verdict": verdict, "properties": list_scores(report)}


def make_report_page(report: Report, thumbnails: Sequence[str] = (), rows: Thumbnails = NO_PICTURES) -> Page:
    """Return the page of a report; sections of steps not reached are empty.

    `thumbnails` are in THUMBNAILS, and those of test `rows` in the file of that name in `evaluation`.
    """
    evaluation, task = report.evaluation, report.task
    sections = [
        gate_section(report.gates, report.look),
        Section("Release", [Text(report.release["message"])] if report.release else []),
        *(score_sections(evaluation, task, report.seeds, thumbnails=rows) if evaluation else []),
        export_section(evaluation, report.deploy),
        power_section(report.power),
        explain_section(report.explanations, report.task if report.train is not None else None),
        training_section(report.train),
        suspect_section(report.suspects),
        data_section(report.data, task, thumbnails),
        model_section(report.model),
        adapter_section(report.adapter),
        step_section(report.steps, report.hardware),
        method_section(evaluation, task),
        recipe_section(report.recipe_yaml),
    ]
    footer = f"Made by llmtune {report.llmtune}. `report.html` is self-contained and loads nothing from the network."
    return Page(report.name, sections, chips(report), verdict=verdict_card(report), footer=footer)


def chips(report: Report) -> list[tuple[str, str]]:
    """Return the facts that identify the run."""
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
    """Return the verdict, the number of passed gates, and the most informative score."""
    gates, evaluation = report.gates, report.evaluation
    failed, unsure = (any(gate.passed is outcome for gate in gates) for outcome in (False, None))
    opponent = "the champion" if evaluation and evaluation.champion else "the base model"
    if evaluation and evaluation.baseline and not evaluation.champion:
        opponent = "the baseline"
    title, tone = TITLES[report.verdict.word]
    if evaluation and (simple := simple_title(report.verdict.word, evaluation)):
        title, opponent = TITLES[simple[0]][0], simple[1]
    evaluate = report.recipe.get("evaluate")
    reliance = find_reliance(evaluation)
    if reliance and reliance.lacking and report.verdict.word == INCONCLUSIVE and list_gained(BETTER, evaluation, gates):
        opponent = f"the same model with {CONTROLS[reliance.lacking[0]]}"
    looks = (isinstance(evaluate, dict) and evaluation and evaluation.champion and evaluate.get("looks")) or 1
    return VerdictCard(
        word=report.verdict.word,
        title=title.format(opponent=opponent),
        tone=tone,
        reason=report.verdict.reason,
        gates=count_gates(gates),
        gates_tone=TONES[-1 if failed else 0 if unsure or not all(gate.applies for gate in gates) else 1],
        headline=headline(evaluation, report.verdict.word, gates, CHANCE / looks) if evaluation else None,
        baseline="the champion" if evaluation and evaluation.champion else (evaluation and evaluation.baseline) or "",
    )


def headline(
    evaluation: Evaluation, word: str, gates: Sequence[GateResult] = (), chance: float = CHANCE
) -> Compared | None:
    """Return the most informative score, preferably one that the verdict `word` is based on."""
    differences = judged_differences(evaluation)
    ranked = rank_metrics(differences)
    shown = against_champion(evaluation)
    sides = {name: better_side(name) for name in differences} | list_sides(shown.base, shown.tuned, evaluation.decided)
    opponent: Opponent = "champion" if evaluation.champion else "base"
    bearing = list_bearing(find_changes(differences, gates, opponent, chance, sides), word)
    metric = next((name for name in ranked if name in bearing), next(iter(ranked), None))
    if metric is None:
        return None
    return compare_metric(metric, shown, metric.replace("_", " "))


def list_bearing(findings: MetricChanges, word: str) -> Sequence[str]:
    """Return the metrics that a verdict is based on."""
    if findings.failed:
        return findings.failed
    chosen = {BETTER: findings.better, WORSE: findings.worse, WITHIN: findings.within}
    return chosen.get(word, [*findings.better, *findings.worse] if word == MIXED else ())


# Pages of `llmtune explain`, written after the run


def find_explanations(run: Path) -> list[str]:
    """Return the names of explain pages in a run folder, without `.html`, in the order of MEANINGS."""
    order = list(MEANINGS)
    names = [path.stem for path in (run / FOLDER).glob("*.html") if not path.name.startswith(".")]
    return sorted(names, key=lambda name: (order.index(kind_of(name)) if kind_of(name) in order else len(order), name))


def explain_section(names: Sequence[str], task: str | None) -> Section:
    """Return links to the explain pages, or without pages the command to make one; empty if no `task` was trained."""
    facts = TASK_FACTS.get(task or "")
    page, given = ("generation", "--prompt TEXT") if facts and facts.generates else ("attention", "--text TEXT")
    page += f" RUN {'--audio FILE' if facts and facts.takes_audio else given}"
    text = f"Where do base and tuned model diverge, and what changed inside? Run `llmtune explain {page}` to make a "
    text += "page, with RUN this folder. `llmtune explain --help` lists the other pages."
    shown = [Links([explanation_link(name) for name in names])] if names else [Text(text)] if task else []
    return Section("Look inside", shown, anchor="inside", brief=False)


def explanation_link(name: str) -> tuple[str, str, str]:
    """Return address, title and description of a page."""
    kind = kind_of(name)
    title, meaning = MEANINGS.get(kind, (name, ""))
    rest = name.removeprefix(kind).strip("-").replace("-", " ")
    return f"{FOLDER}/{quote(name)}.html", f"{title}: {rest}" if rest else title, meaning


def kind_of(name: str) -> str:
    """Return the first word of a page's name."""
    return re.split(r"[^a-z]", name, maxsplit=1)[0]


def link_explanations(run: Path) -> bool:
    """Update the links from a run's report to its explain pages; leave everything else unchanged.

    Returns:
        False if the run has no readable report; then nothing is written.
    """
    try:
        report: Any = json.loads((run / "report.json").read_text("utf-8"))
        page = (run / "report.html").read_text("utf-8")
    except (OSError, ValueError):
        return False
    if not isinstance(report, dict):
        return False
    report["explanations"] = find_explanations(run)
    trained = report["task"] if report.get("train") else None
    section = render_html_section(explain_section(report["explanations"], trained))
    with updating_reports(run):
        write_text(run / "report.html", INSIDE.sub(lambda match: section, page, count=1))
        write_json(run / "report.json", report)
    return True
