"""Make a release of a finished run: a folder with all that serves it and without texts of rows; and promote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

from rich.console import Console

from llmtune.data.inherited_rows import save_learned
from llmtune.data.row_store import iterate_rows
from llmtune.deploy.releases import make_record, sign
from llmtune.deploy.tuned_model import RULES
from llmtune.errors import LlmtuneError, RecipeError
from llmtune.evaluate.decision import copy_rules
from llmtune.evaluate.eval_inputs import resolve_choices
from llmtune.evaluate.evaluation_file import load_evaluation, save_evaluation
from llmtune.evaluate.opened_runs import open_run_scores
from llmtune.evaluate.per_row_scores import MEASURES
from llmtune.plan import RunContext, open_finished
from llmtune.recipe.schema import RELEASE, Recipe
from llmtune.recipe.section import RELEASE_PREFIX
from llmtune.records import Json
from llmtune.report.report_page import write_report
from llmtune.report.run_report import make_report
from llmtune.store.atomic_files import (
    explained,
    hash_file,
    hash_folder,
    hash_listing,
    hash_path,
    hash_value,
    list_folder,
    write_json,
    write_text,
)
from llmtune.store.json_shapes import METRICS
from llmtune.store.release_store import (
    RECORD_FILE,
    SERVED_RECIPE,
    TEMPLATE,
    is_stored,
    is_withdrawn,
    promote,
    read_current,
    release_address,
)
from llmtune.store.run_folder import (
    MANIFEST,
    REPORTS,
    Manifest,
    RunFolder,
    StepRecord,
    read_run,
    trained_name,
)
from llmtune.store.run_lock import LOCK
from llmtune.store.run_origin import is_own, mark_own
from llmtune.store.score_records import Evaluation, GateResult
from llmtune.store.seed_runs import kept_findings

SERVING_SECTIONS = ("task", "generation")
SERVING_DATA = ("system_prompt", "max_length", "on_overlong", "train_on")
SELECTING = ("name", "candidates", "trials", "licences", "scores", "check_memory")
"""Keys of the model section that decide which model it is; its content has a hash."""
KEPT_STEPS = ("prepare", "encode", "select", "adapt", "train", "evaluate", "deploy")
SHOWN_TEXTS: Json = {"example": [], "hardest_rows": []}
"""Facts of steps that show rows, with what a release has in their place."""
CHANGING = (RECORD_FILE, MANIFEST, ".origin", *REPORTS)
"""Files of a release that do not serve; `explain` and `verify` may change some."""


@dataclass(frozen=True)
class Promoted:
    """A release that is current now."""

    folder: Path
    before: str | None
    """Hash of the release that was current before; None for the first."""

    @property
    def address(self) -> str:
        """Its address, `release:NAME@HASH`."""
        return release_address(self.folder)

    @property
    def short(self) -> str:
        """The address of whatever release is current, `release:NAME`."""
        return self.address.partition("@")[0]


def promote_run(run: Path, console: Console, *, offline: bool, signing: str | None = None) -> Promoted:
    """Make a release of a run, and the current one of its name; gates are the caller's to check.

    A release that is stored already is only promoted.

    Raises:
        RecipeError: the run is a release itself, is not trained or not scored, or another release was promoted since
            the run was compared with the current one.
        EnvironmentProblem: its base model or scores are damaged, or the release cannot be written.
    """
    if is_stored(run):
        fix = f"Make it current: llmtune release rollback {run.absolute().parent.name} --to {run.name}"
        raise RecipeError.of("this is a release already", str(run), fix)
    scored = open_run_scores(run, run.name)
    context = open_finished(run, console, offline)
    require_exports(context)
    name, digest = scored.recipe.name, hash_served(context)
    before, replaces = read_current(name), find_compared(scored.recipe, run)
    released = {*context.folder.findings.get("released", ()), f"{RELEASE_PREFIX}{name}@{digest}"}
    folder = promote(
        name,
        digest,
        partial(fill_release, context, signing=signing),
        replaces if before != digest else False,
        on_stored=lambda: context.folder.note(released=sorted(released)),
    )
    return Promoted(folder, before)


def find_compared(recipe: Recipe, run: Path) -> str | Literal[False] | None:
    """Return the hash of the release that the gates of a run compare with the current one; False for other champions.

    None if its name had no release yet.
    """
    if recipe.evaluate.champion != f"{RELEASE_PREFIX}{recipe.name}":
        return False
    compared = load_evaluation(run / "evaluation")
    return Path(compared.champion.folder).name.rpartition("@")[2] if compared and compared.champion else None


def require_exports(context: RunContext) -> None:
    """Raise RecipeError unless all exports that the recipe names are made of the trained weights, and unchanged."""
    exports = context.plan.recipe.exports
    if exports and not context.folder.is_whole("deploy"):
        fix = "Run the recipe again: it makes and certifies them."
        raise RecipeError.of(f"the exports {', '.join(exports)} are not made yet", str(context.folder.path), fix)


def hash_served(context: RunContext) -> str:
    """Return 8 hex digits of the content that decides every answer: weights, base, settings and rules."""
    recipe, rules = context.plan.recipe, context.folder.path / "evaluation"
    settings = [
        recipe.model_dump(mode="json", include={*SERVING_SECTIONS}),
        recipe.data.model_dump(mode="json", include={*SERVING_DATA}),
        recipe.model.model_dump(mode="json", exclude={*SELECTING, "chat_template"}),
        recipe.task_section(),
    ]
    files = [*(rules / name for name in RULES), *([template] if (template := find_template(recipe)) else [])]
    contents = [hash_path(file) for file in files] + [context.plan.model_ref.content_hash]
    return hash_value([hash_folder(context.trained_folder), contents, settings])[:8]


def find_template(recipe: Recipe) -> Path | None:
    """Return the user's own file with the chat template; None for the model's or a shipped template."""
    stated = recipe.model.chat_template
    return Path(stated) if stated and not stated.startswith("builtin:") else None


def fill_release(context: RunContext, folder: Path, signing: str | None = None) -> None:
    """Fill an empty folder with a release of a run; the record comes last and lists the files that serve."""
    run, recipe = context.folder, context.plan.recipe
    with explained(folder):
        outputs = [trained_name(recipe), *(run.manifest["steps"]["deploy"]["outputs"] if recipe.exports else ())]
        for name in outputs:
            shutil.copytree(run.path / name, folder / name)
        for name in (LOCK, "recipe.yaml", METRICS):
            shutil.copyfile(run.path / name, folder / name)
        if is_own(run.path):
            mark_own(folder)
        if template := find_template(recipe):
            shutil.copyfile(template, folder / TEMPLATE)
        save_learned(run.path, recipe, folder)
        write_text(folder / SERVED_RECIPE, json.dumps(state_choices(context).model_dump(mode="json")))
        evaluation = load_evaluation(run.path / "evaluation")
        assert evaluation is not None, "the scores are open"
        (folder / "evaluation").mkdir()
        save_evaluation(without_texts(evaluation), folder / "evaluation")
        shutil.copyfile(run.path / "evaluation" / MEASURES, folder / "evaluation" / MEASURES)
        copy_rules(run, folder / "evaluation")
        manifest = make_manifest(run, folder, (*outputs, "evaluation"))
        made = RunFolder(folder, manifest)
        made.note_reports(write_report(make_report(made, context.plan.stated, context.device), folder))
        files = {name: sha256 for name, sha256 in list_folder(folder).items() if name not in CHANGING}
        write_json(folder / RECORD_FILE, {**make_record(run.path), "files": files})
        if signing:
            sign(folder / RECORD_FILE, signing)


def state_choices(context: RunContext) -> Recipe:
    """Return the resolved recipe, with the answers to choose from: without rows nobody can infer them."""
    recipe, task, rows = context.plan.recipe, context.plan.task, context.rows
    if recipe.evaluate.choices != "auto" or task.predicts:
        return recipe
    references = [task.split_answer(row)[1] for _, row in iterate_rows(rows, "test")]
    choices = resolve_choices(rows, task, recipe, references, "test") or None
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"choices": choices})})


def without_texts(evaluation: Evaluation) -> Evaluation:
    """Return scores without the texts of rows."""
    flips = {metric: replace(one, gained_rows=(), lost_rows=()) for metric, one in evaluation.flips.items()}
    studies = {name: replace(study, tables=()) for name, study in evaluation.studies.items()}
    overlap = evaluation.contamination and replace(evaluation.contamination, examples=())
    return replace(evaluation, samples=(), flips=flips, studies=studies, contamination=overlap, details={})


def make_manifest(run: RunFolder, folder: Path, outputs: Sequence[str]) -> Manifest:
    """Return a run's manifest for its release: without texts of rows, and with the hashes of the copied `outputs`."""
    steps = {}
    for name in KEPT_STEPS:
        if run.is_done(name):
            record = run.manifest["steps"][name]
            facts = {key: SHOWN_TEXTS.get(key, value) for key, value in record["facts"].items()}
            files = {output: list_folder(folder / output) for output in record["outputs"] if output in outputs}
            hashes = {output: hash_listing(listed) for output, listed in files.items()}
            steps[name] = cast(StepRecord, {**record, "facts": facts, "outputs": hashes, "files": files})
    findings = kept_findings(run) | {"released_from": str(run.path.absolute()), "look": run.findings.get("look")}
    manifest = Manifest(fingerprint=run.manifest["fingerprint"], steps=steps, findings=findings)
    return manifest | {"lock": hash_file(folder / LOCK), "llmtune": run.manifest.get("llmtune", "")}


# The product `release` of a recipe


def conclude_release(context: RunContext, gates: Sequence[GateResult]) -> None:
    """Promote a run whose recipe names `release`, if its gates passed; note what became of it for the report.

    Raises as `promote_run` does, after noting that the earlier release stays.
    """
    if RELEASE not in context.plan.recipe.deploy.products or context.request.until != "run":
        return
    name, run = context.plan.recipe.name, context.folder
    failed = [gate.name for gate in gates if gate.passed is not True]
    if not gates:
        text = f"release {name}: the recipe has no gates, so every model is promoted"
        context.console.print(text, style="yellow", highlight=False, markup=False)
    digest = hash_served(context)
    if failed:
        note_outcome(context, f"because of {', '.join(failed)}")
    elif is_withdrawn(name, digest):
        note_outcome(context, f"because {digest} was rolled back. To promote it again: llmtune release {run.path}")
    else:
        try:
            promoted = promote_run(run.path, context.console, offline=context.request.offline)
        except LlmtuneError as error:
            note_outcome(context, f"because {error.problems[0].what}")
            raise
        run.manifest = read_run(run.path).manifest
        changes = promoted.before not in (None, digest)
        message = f"release {name}: {digest}" + (f", before {promoted.before}" if changes else "")
        run.note(release={"name": name, "current": digest, "promoted": True, "message": message})
        context.console.print(message, highlight=False, markup=False)


def release_kept(make: Callable[[RunContext], None], context: RunContext) -> None:
    """Call a function; if it fails and the recipe names `release`, note first that the earlier release stays."""
    try:
        make(context)
    except LlmtuneError as error:
        if RELEASE in context.plan.recipe.deploy.products:
            note_outcome(context, f"because {error.problems[0].what}")
        raise


def note_outcome(context: RunContext, why: str) -> None:
    """Note and print that the current release stays."""
    name = context.plan.recipe.name
    current = read_current(name)
    message = f"release {name}: stays at {current}, {why}" if current else f"release {name}: none yet, {why}"
    context.folder.note(release={"name": name, "current": current, "promoted": False, "message": message})
    context.console.print(message, style="yellow", highlight=False, markup=False)
