"""Step 5 at work: base and tuned model scored, and further rows answered by the champion's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from llmtune.adapter.injection import adapter_settings
from llmtune.data.contamination import find_overlap
from llmtune.data.examples import ExampleReader, encode_rows
from llmtune.data.row_store import iterate_rows, load_rows, pick_rows
from llmtune.errors import DataError
from llmtune.evaluate.cache_keys import base_inputs
from llmtune.evaluate.champion import make_challenge
from llmtune.evaluate.eval_inputs import SPLIT, EvalContext, make_inputs, resolve_choices
from llmtune.evaluate.evaluation_file import save_evaluation
from llmtune.evaluate.evaluator import evaluate
from llmtune.evaluate.inference import compute_metrics, predict
from llmtune.evaluate.metric import Measure
from llmtune.evaluate.per_row_scores import PerRowScores, name_test_rows
from llmtune.evaluate.results import load_base
from llmtune.model.config import head_is_new
from llmtune.model.device import release_memory
from llmtune.recipe.evaluate_section import EvaluateSection
from llmtune.records import Examples, Rows
from llmtune.session import Models, RunContext, open_finished
from llmtune.train.distributed import join_processes


def score_models(context: RunContext, folder: Path | None, base_folder: Path | None) -> None:
    """Evaluate both models, all processes together; rank 0 has a `folder`, and leaves the evaluation there.

    `base_folder` may hold what the base answered before.
    """
    plan, rows, examples = context.plan, context.rows, context.examples
    recipe, model_ref = plan.recipe, plan.model_ref
    join_processes(plan.device)
    models = Models(context)
    base = base_inputs(recipe, adapter_settings(recipe), model_ref, rows, examples, plan.device)
    evaluation = evaluate(
        {"base": models.before, "tuned": models.tuned},
        plan.processor,
        rows,
        examples,
        plan.task,
        recipe,
        context.console,
        device=plan.device,
        folder=folder,
        headless=head_is_new(model_ref, recipe, plan.task),
        packs=lambda: models.packs,
        known=load_base(base_folder, base),
        challenge=make_challenge(context.folder, partial(ask_champion, context, rows, examples)),
    )
    if folder is not None:
        save_evaluation(evaluation, folder)


def ask_champion(context: RunContext, rows: Rows, examples: Examples, run: Path, places: Sequence[int]) -> PerRowScores:
    """Let the champion's model answer test rows of this run, and measure its answers as its own evaluation did.

    Rows that are nearly equal to one of its training rows are left out, as `data.deduplicate: near` would leave them
    out; so are rows that its recipe cannot encode. `places` are places among the test rows that have an example.
    """
    numbers = sorted({int(row) for row in ExampleReader(examples, SPLIT).rows})
    names = name_test_rows(rows, numbers)
    with TemporaryDirectory(dir=context.folder.path, prefix=".champion-") as name:
        scratch = Path(name)
        known, picked = (
            load_rows(run / "data" / "rows"),
            pick_rows(rows, SPLIT, [numbers[at] for at in places], scratch),
        )
        files, counts = known.files | picked.files, known.counts | picked.counts
        found = find_overlap(replace(picked, files=files, counts=counts), near=True)
        places = [at for place, at in enumerate(places) if place not in {*found.equal, *found.near}]
        if not places:
            return PerRowScores()
        picked = pick_rows(rows, SPLIT, [numbers[at] for at in places], scratch)
        context.console.print(f"champion: its model answers {len(places)} further test rows", highlight=False)
        try:
            measured, kept = measure_champion(context, run, known, picked, scratch / "examples")
        except DataError as error:
            context.console.print(f"champion: it could not answer them: {error}", style="yellow", highlight=False)
            return PerRowScores()
    return PerRowScores({}, measured, tuple(names[places[number]] for number in kept))


def measure_champion(
    context: RunContext, run: Path, known: Rows, picked: Rows, folder: Path
) -> tuple[dict[str, Measure], tuple[int, ...]]:
    """Return the metrics of the model in `run` on `picked` rows, and the numbers of those that could be encoded.

    Raises DataError where none can be.
    """
    other = open_finished(run, context.console, context.request.offline)
    plan, processor, task = other.plan, other.plan.processor, other.plan.task
    references = [task.split_answer(row)[1] for _, row in iterate_rows(known, SPLIT)]
    choices = resolve_choices(known, task, plan.recipe, references, SPLIT)
    answers = {task.split_answer(row)[1] for _, row in iterate_rows(picked, SPLIT)}
    asked = EvaluateSection(metrics=plan.recipe.evaluate.metrics, choices=choices if answers & {*choices} else None)
    data = plan.recipe.data.model_copy(update={"max_dropped": 1.0})
    recipe = plan.recipe.model_copy(update={"evaluate": asked, "data": data})
    encoded = encode_rows(picked, task, processor, recipe, folder, Console(quiet=True))
    inputs = make_inputs(picked, encoded, task, processor, recipe)
    evaluation = EvalContext(recipe, task, processor, inputs, context.plan.device, context.console)
    models = Models(other)
    with models.tuned() as model:
        answered = predict(model, "champion", evaluation, models.packs)
    del model
    release_memory()
    return compute_metrics(evaluation, answered, answered), inputs.rows
