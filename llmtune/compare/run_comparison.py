"""`llmtune compare RUN RUN...`: runs that exist, held against one another on the rows that all of them answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from llmtune.compare.compare_page import make_page
from llmtune.compare.compare_plot import draw_comparison
from llmtune.compare.comparison import Comparison, describe
from llmtune.compare.run_pairs import check_alike
from llmtune.compare.run_scores import open_runs
from llmtune.errors import RecipeError
from llmtune.records import Json
from llmtune.report.redaction import redact_all
from llmtune.report.render_html import write_page
from llmtune.report.render_markdown import to_markdown
from llmtune.report.render_terminal import print_page
from llmtune.report.text_files import as_json, replace_file, to_json
from llmtune.store.atomic_files import explained, hash_value


def compare_runs(paths: Sequence[Path], out: Path | None, console: Console) -> Json:
    """Compare runs, write the comparison into `out` (default: `runs/compare-<hash>`) and return it as JSON.

    Raises:
        RecipeError: fewer than two runs, one that is none or has no scores, other tasks or settings of measurement.
        DataError: they were not measured on the same rows.
        EnvironmentProblem: scores are damaged, or `out` cannot be written.
    """
    if len(paths) < 2:
        fix = "Name two run folders or more; or a recipe with --methods full,lora,qlora."
        raise RecipeError.of("one run alone cannot be compared", str(paths[0]) if paths else None, fix)
    runs = open_runs(paths)
    check_alike(runs)
    comparison = describe(runs, "runs", " and ".join(run.name for run in runs))
    target = out or Path("runs") / f"compare-{hash_value([str(path.absolute()) for path in paths])[:8]}"
    return finish(comparison, target, console)


def finish(comparison: Comparison, out: Path, console: Console) -> Json:
    """Print a comparison, write its files and return it as JSON, with the folder that they are in."""
    comparison = redact_all(replace(comparison, folder=str(out)))
    print_page(make_page(comparison), console)
    with explained(out):
        write_comparison(comparison, out)
    console.print(f"comparison: {escape(str(out / 'compare.html'))}")
    return comparison_json(comparison)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write compare.json, .md, .html, .svg and .png into `folder`."""
    page = make_page(comparison)
    write_page(folder / "compare.html", page)
    replace_file(folder / "compare.md", to_markdown(page))
    replace_file(folder / "compare.json", to_json(comparison_json(comparison)))
    draw_comparison(folder / "compare", comparison.runs)


def comparison_json(comparison: Comparison) -> Json:
    """Return what compare.json holds; only where methods are compared runs have rates and gates."""
    values: Json = as_json(comparison)
    for run in values["runs"]:
        for key in [key for key in ("rate", "gates") if run[key] is None]:
            del run[key]
    return values
