"""How a run ends: its report is put together and written, its verdict printed and sent to trackers, its gates held."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from llmtune import __version__
from llmtune.evaluate.evaluation_file import load_evaluation
from llmtune.evaluate.gates import check_gates, require_gates
from llmtune.recipe import Recipe
from llmtune.records import Evaluation, Json
from llmtune.report.redaction import redact_all
from llmtune.report.render_terminal import print_blocks
from llmtune.report.report_page import find_explanations
from llmtune.report.report_record import Report, Seeds, collect_facts
from llmtune.report.score_sections import seed_table
from llmtune.report.seed_variance import describe_spread
from llmtune.report.verdict import verdict
from llmtune.report.write import report_json, write_report
from llmtune.session import RunContext
from llmtune.store.atomic_files import read_json_lines
from llmtune.store.process_environment import LOCAL_TRACKERS
from llmtune.store.run_lock import hardware, package_versions
from llmtune.store.seed_runs import is_done, seed_folder
from llmtune.tasks.base import next_steps
from llmtune.train.trackers import log_results


def conclude(context: RunContext, *, gated: bool) -> Json:
    """Write the report and return it; a gate that failed is raised after that."""
    path = context.folder.path
    report = redact_all(make_report(context))
    write_report(report, path)
    if report.seeds:
        print_blocks([seed_table(report.seeds)], context.console)
        context.console.print(report.seeds.told, highlight=False)
    if gated:
        _send_results(context, report)
        context.console.print(f"[bold]{report.verdict.word}[/]: {escape(report.verdict.reason)}", highlight=False)
        context.folder.note(next_steps=next_steps(path, context.task))
        context.console.print(context.folder.findings["next_steps"], highlight=False, markup=False, soft_wrap=True)
        require_gates(report.gates)
    return report_json(report)


def _send_results(context: RunContext, report: Report) -> None:
    """Send new scores, the verdict and the run folder to the trackers; with --offline to those on this machine."""
    trackers = [name for name in context.recipe.train.report_to if name in LOCAL_TRACKERS or not context.offline]
    if not trackers or context.skipped.get("evaluate", True) or report.evaluation is None:
        return
    values: dict[str, str | float] = {
        f"evaluation/{model}/{metric}": score
        for model in ("base", "tuned")
        for metric, score in report.evaluation.by_name(model).items()
    }
    values |= {f"evaluation/difference/{name}": one.value for name, one in report.evaluation.differences().items()}
    values |= {"verdict": f"{report.verdict.word}: {report.verdict.reason}", "run_folder": str(context.folder.path)}
    steps = context.folder.facts("train")["steps"]
    log_results(trackers, context.recipe.name, context.folder.path, context.device, values, steps)


def make_report(context: RunContext) -> Report:
    """Put together everything that a run found out."""
    folder, recipe = context.folder, context.recipe
    evaluation = load_evaluation(folder.path / "evaluation") if folder.is_done("evaluate") else None
    seeds = collect_seeds(folder.path, recipe, evaluation)
    curve = read_json_lines(folder.path / "metrics.jsonl")
    return Report(
        llmtune=__version__,
        name=recipe.name,
        task=recipe.task,
        verdict=verdict(evaluation, seeds, curve),
        recipe=recipe.model_dump(mode="json"),
        recipe_yaml=(folder.path / "recipe.yaml").read_text(encoding="utf-8"),
        fingerprint=folder.manifest["fingerprint"],
        hardware={**hardware(), "device": context.device, "packages": package_versions()},
        steps=folder.timings(context.skipped),
        evaluation=evaluation,
        seeds=seeds,
        gates=check_gates(recipe.evaluate.gates, evaluation) if evaluation else (),
        explanations=find_explanations(folder.path),
        **collect_facts(folder.manifest, curve),
    )


def collect_seeds(run: Path, recipe: Recipe, own: Evaluation | None) -> Seeds | None:
    """Return what the scores of all seeds come to; None without further seeds or without scores of the run's own."""
    if not recipe.train.seeds or own is None or not own.tuned:
        return None
    scored = {recipe.seed: own}
    for seed in recipe.train.seeds:
        folder = seed_folder(run, seed)
        evaluation = load_evaluation(folder / "evaluation") if is_done(folder, "evaluate") else None
        if evaluation is not None:
            scored[seed] = evaluation
    return describe_spread(scored, [seed for seed in recipe.train.seeds if seed not in scored])
