"""`llmtune rows`: rows of a finished run that deserve a look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.options import AsJson, Offline, RunArgument, Threads
from llmtune.cli.output_streams import handled, print_json, stderr_console
from llmtune.errors import DataError, RecipeError
from llmtune.store.process_environment import gc_paused, prepare_environment

if TYPE_CHECKING:
    from llmtune.recipe.data_section import DataSection


@handled
def rows_command(
    run: RunArgument,
    suspects: Annotated[
        Path,
        typer.Option("--suspects", metavar="FILE", help="Write rows that are likely labelled wrongly: .jsonl, .csv."),
    ],
    threads: Threads = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Write the rows of a run whose labels are likely wrong (classify and token-classify)."""
    from llmtune.store.run_folder import read_run

    read_run(run).require_trained()
    if suspects.suffix not in (".jsonl", ".csv"):
        raise RecipeError.of("the list is JSON Lines or CSV", str(suspects), "End the name with .jsonl or .csv.")
    if not suspects.absolute().parent.is_dir():
        raise RecipeError.of("folder not found", str(suspects.absolute().parent), "Create it, or choose another file.")
    prepare_environment(network=False, threads=threads)
    with gc_paused():
        from llmtune.evaluate.eval_inputs import EvalContext
        from llmtune.evaluate.suites.label_errors import find_suspects, require_labels, write_suspects
        from llmtune.plan import open_finished
        from llmtune.run_models import Models

    context = open_finished(run, stderr_console(), offline)
    plan = context.plan
    require_labels(plan.recipe)
    evaluated = EvalContext(plan.recipe, plan.task, plan.processor, None, plan.device, context.console)
    wrong_labels, unchecked = find_suspects(Models(context).tuned, evaluated, context.rows, context.examples)
    texts = [one.text for one in wrong_labels]
    write_suspects(wrong_labels, suspects, choose_delimiter(plan.recipe.data, texts))
    if as_json:
        print_json({"file": str(suspects), "found": len(wrong_labels), "unchecked": unchecked})
    else:
        typer.echo(f"{len(wrong_labels)} labels are likely wrong; written to {suspects}")


def choose_delimiter(data: DataSection, texts: Sequence[str]) -> str:
    """Return the delimiter of the first CSV file of the rows; without one, that of spreadsheets in their language."""
    from llmtune.data.file_readers import read_delimiter
    from llmtune.data.language_guess import DECIMAL_POINTS, guess_language
    from llmtune.data.sources import open_sources

    with suppress(DataError, OSError):  # files that are gone
        for one in open_sources(data.train, "data.train"):
            if one.container == "csv" and one.path is not None:
                return read_delimiter(one.path)
    return "," if guess_language(texts) in DECIMAL_POINTS else ";"


COMMANDS: dict[str, Callable[..., None]] = {"rows": rows_command}
