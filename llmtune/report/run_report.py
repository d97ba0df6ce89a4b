"""Assemble the report of a run from its folder."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from llmtune import __version__
from llmtune.evaluate.evaluation_file import load_evaluation, load_with_exports
from llmtune.evaluate.gates import READ, check_gates, list_power, suggest_step
from llmtune.evaluate.opened_runs import name_sources
from llmtune.evaluate.seed_spread import describe_spread
from llmtune.evaluate.source_labels import (
    DOUBTFUL,
    accept_labels,
    compare_sources,
    describe_disagreement,
    describe_outliers,
    gate_labels,
)
from llmtune.evaluate.verdict import WORSE, judge_run
from llmtune.recipe.schema import RELEASE, Recipe
from llmtune.recipe.secrets import redact_all, redact_yaml, secret_values
from llmtune.recipe.yaml_reader import read_recipe_text
from llmtune.report.report_page import find_explanations
from llmtune.store.atomic_files import read_json, read_json_lines
from llmtune.store.json_shapes import KEPT_START, read_curve
from llmtune.store.report_record import (
    LABELS_BY_SOURCE,
    SUSPECTS,
    UNCHECKED,
    Report,
    Seeds,
    SourceLabels,
    SuspectFacts,
    collect_facts,
)
from llmtune.store.run_folder import RunFolder
from llmtune.store.run_lock import hardware, package_versions
from llmtune.store.score_records import Evaluation
from llmtune.store.seed_runs import is_scored_alike, seed_folder

MOST_LISTED, LONGEST = 10, 400


def make_report(folder: RunFolder, recipe: Recipe, device: str) -> Report:
    """Assemble all findings of a run, without its secrets."""
    evaluation = load_with_exports(folder)
    seeds = collect_seeds(folder, recipe, evaluation)
    settings = recipe.model_dump(mode="json")
    curve = read_curve(folder.path)
    began = max((step["started"] for step in folder.manifest["steps"].values()), default=None)
    gates = check_gates(recipe.evaluate, evaluation) if evaluation else ()
    suspects = summarize_suspects(folder.path / "evaluation" / SUSPECTS)
    doubts = list_label_doubts(folder, recipe, suspects) if evaluation else []
    verdict = judge_run(evaluation, gates, recipe.evaluate.alpha, seeds, curve, doubts)
    if folder.done_facts().get("train", {}).get("best_step") == 0:
        verdict = replace(verdict, reason=f"{verdict.reason} {KEPT_START}")
    report = Report(
        llmtune=__version__,
        name=recipe.name,
        task=recipe.task,
        verdict=verdict,
        recipe=settings,
        recipe_yaml=redact_yaml(read_recipe_text(folder.path / "recipe.yaml")),
        fingerprint=folder.manifest["fingerprint"],
        hardware={**hardware(), "device": device, "packages": package_versions()},
        steps=folder.timings(),
        evaluation=evaluation,
        seeds=seeds,
        gates=(*gates, *gate_labels(doubts, recipe)),
        doubts=doubts,
        release=folder.findings.get("release") if RELEASE in recipe.deploy.products else None,
        look=folder.findings.get("look") if recipe.evaluate.looks else None,
        power=list_power(recipe.evaluate, evaluation) if evaluation else (),
        suspects=suspects,
        explanations=find_explanations(folder.path),
        **collect_facts(folder.done_facts(), began, curve, folder.facts("deploy")),
    )
    return redact_all(report, [*secret_values(settings)])


def list_remedies(report: Report, recipe: Recipe, run: Path) -> list[str]:
    """Return what would help a model that did not pass its gates or is worse; empty for all others."""
    remedies = dict.fromkeys(suggest_step(gate) for gate in report.gates if not gate.passed)
    if any(gate.name == DOUBTFUL for gate in report.gates):
        name = shlex.quote(str(run))
        line = f"llmtune evaluate {name} --set {accept_labels(recipe)}"
        line += f" && llmtune release {name}" if RELEASE in recipe.deploy.products else ""
        remedies[f"If the labels are right: {line}"] = None
    if report.verdict.word == WORSE and not remedies:
        remedies[f"{READ} Then correct the rows or lower train.learning_rate."] = None
    return list(remedies)


def summarize_suspects(path: Path) -> SuspectFacts | None:
    """Count the labels that are likely wrong, and shorten the first of them; None if the run did not look for any."""
    if not path.is_file():
        return None
    lines: list[Any] = read_json_lines(path)
    listed = [{**line, "file": Path(line["file"]).name, "text": line["text"][:LONGEST]} for line in lines[:MOST_LISTED]]
    split_counts, unchecked = dict(Counter(line["split"] for line in lines)), read_json(path.with_name(UNCHECKED)) or {}
    counts: dict[str, int] = read_json(path.with_name(LABELS_BY_SOURCE)) or {}
    names = dict(zip(counts, name_sources(counts), strict=True))
    doubtful = Counter(
        names.get(file, file)
        for file, *_ in {(one["file"], one["line"], one.get("row"), one["position"]) for one in lines}
    )
    sources = compare_sources({names[file]: number for file, number in counts.items()}, doubtful)
    return cast(SuspectFacts, {"found": split_counts, "listed": listed, "unchecked": unchecked, "sources": sources})


def list_label_doubts(run: RunFolder, recipe: Recipe, suspects: SuspectFacts | None) -> list[str]:
    """Return sentences on source files whose labels stand out among the suspects, or against the champion.

    Empty if the recipe accepts all labels (`evaluate.max_disagreement: 1`).
    """
    if recipe.evaluate.max_disagreement == 1:
        return []
    check, texts = run.findings.get("label_check"), [describe_outliers(suspects["sources"])] if suspects else []
    if check:
        sources = [SourceLabels(**one) for one in check["sources"]]
        texts.append(describe_disagreement(sources, check["reference"], check["unknown"], every=False))
    return [text for text in texts if text]


def collect_seeds(run: RunFolder, recipe: Recipe, run_evaluation: Evaluation | None) -> Seeds | None:
    """Return the combined scores of all seeds; None without further seeds or without the run's own scores."""
    if not recipe.train.seeds or run_evaluation is None or not run_evaluation.tuned:
        return None
    scored = {recipe.seed: run_evaluation}
    for seed in recipe.train.seeds:
        folder = seed_folder(run.path, seed)
        evaluation = load_evaluation(folder / "evaluation") if is_scored_alike(run, folder) else None
        if evaluation is not None:
            scored[seed] = evaluation
    return describe_spread(scored, [seed for seed in recipe.train.seeds if seed not in scored])
