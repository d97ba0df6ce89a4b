"""The models of a run: with a new adapter to train, and base and tuned model to use, each loaded as its user would."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmtune.adapter.data_init import sample_rows
from llmtune.adapter.injection import adapter_settings, inject
from llmtune.adapter.load import find_adapter
from llmtune.adapter.saving import load_adapter
from llmtune.data.examples import examples_inputs
from llmtune.data.row_store import ANSWERED, has_pictures, load_rows
from llmtune.display.console import spinner
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.cache_keys import base_inputs, simple_inputs
from llmtune.evaluate.champion import face_champion
from llmtune.evaluate.champion_answers import ChampionModel, ask_champion, ask_classes
from llmtune.evaluate.control_runs import compare_control_run
from llmtune.evaluate.controls import control_inputs
from llmtune.evaluate.eval_inputs import EvalContext, calibration_inputs, make_inputs
from llmtune.evaluate.evaluator import ModelLoaders, Scored
from llmtune.evaluate.label_check import check_labels
from llmtune.evaluate.results import TUNED, load_first
from llmtune.evaluate.scoring import ScoreRequest, score_run
from llmtune.evaluate.simple_baseline import SimpleScorer, name_file
from llmtune.evaluate.suites.label_errors import save_suspects
from llmtune.evaluate.teacher import (
    ANSWERS,
    FOLDER,
    answer_rows,
    begin_blocks,
    begin_recording,
    check_teacher,
    count_predictions,
    longest_answered,
    record_predictions,
    write_answered,
)
from llmtune.model.config import find_class, keeps_float32, why_headless
from llmtune.model.device import loading_device, pick_device, release_memory
from llmtune.model.loading import load_model
from llmtune.model.processor import load_processor
from llmtune.model.teacher_files import find_teacher, plan_teacher, teacher_run
from llmtune.model.tensor_parallel import split_model, why_unsplit
from llmtune.plan import RunContext, find_variant, open_finished
from llmtune.recipe.adapter_section import DATA_STARTS
from llmtune.recipe.gate_grammar import SIMPLE_BASELINES
from llmtune.recipe.schema import Recipe
from llmtune.records import ALONE, AdaptedModel, ModelRef, Row, Rows, SelectedModel
from llmtune.store.atomic_files import hash_folder, hash_value, staged
from llmtune.train.distributed import join_processes, wait_for_processes
from llmtune.train.preflight import check_examples
from llmtune.train.sharding import Made, shard_model, share_model
from llmtune.vllm_models import VllmModels, describe_engine


def make_adapted(context: RunContext) -> AdaptedModel:
    """Load the model and add the adapter, seeded.

    If the model is to be sharded, only the first process loads it, into main memory.
    """
    return _make(context, partial(_make_adapted, context), training=True)


def _make(context: RunContext, make: Callable[[Recipe, str], Made], *, training: bool) -> Made:
    """Make a model with a recipe on a device: in the first process for all, if the model is to be sharded."""
    plan = context.plan
    if not context.shards:
        return make(plan.recipe, plan.device)
    join_processes(plan.device)
    # Import remote code before receiving a model that uses it.
    _, config = find_class(plan.model_ref, plan.recipe, plan.task)
    device, recipe = loading_device(plan.recipe, plan.device)
    exact = keeps_float32(plan.recipe, plan.task, config) and (training or plan.task.model_kind.predicts_in_float32)
    return share_model(partial(make, plan.recipe if exact else recipe, device))


def _make_adapted(context: RunContext, recipe: Recipe, device: str) -> AdaptedModel:
    plan, sample = context.plan, None
    with spinner(context.console, "loading the model"):
        masters = not context.shards
        selected = load_model(
            plan.model_ref, recipe, plan.task, plan.processor, device=device, training=True, masters=masters
        )
    check_examples(context.rows, context.examples, plan.task, selected, recipe)
    if recipe.adapter.init_lora_weights in DATA_STARTS:
        sample = sample_rows(context.examples, plan.task, selected, recipe)
    return inject(selected, recipe, context.console, sample)


@dataclass
class Models:
    """Base and tuned model of a run, each loaded from disk as its user would load it.

    Adapters share their base, unless the models are sharded.
    """

    context: RunContext
    packs: bool | None = None
    """Whether the model loaded last accepts packed rows; None before the first load."""

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        """The base model, on the same quantised weights if it was quantised."""
        yield self._selected.model
        if self.context.plan.recipe.adapter.method == "full" or self.context.shards:
            del self.__dict__["_selected"]  # one set of full weights in memory at a time

    @contextmanager
    def before(self) -> Iterator[torch.nn.Module]:
        """The base; with the `start_from` adapter if the task compares with the initial state of training."""
        plan = self.context.plan
        start = plan.recipe.adapter.start_from
        if start is None or not plan.task.needs_reference_model(plan.recipe):
            with self.base() as model:
                yield model
        else:
            adapter = find_adapter(Path(start))
            trained_from = self.context.folder.findings.get("start_from")
            if trained_from is not None and trained_from != hash_folder(adapter):
                what = "The adapter in adapter.start_from changed since training, so the base cannot be restored"
                raise EnvironmentProblem.of(what, str(adapter), "Put it back, or run the recipe again.")
            yield self._shard(partial(self._attach, plan.model_ref, adapter)).model

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        """The model with the adapter (or the tuned weights) read back from the run folder."""
        yield self.adapted.model

    @property
    def adapted(self) -> AdaptedModel:
        """The tuned model, read back from the run folder."""
        trained, plan = self.context.trained_folder, self.context.plan
        if plan.recipe.adapter.method == "full":
            return self._shard(partial(self._attach, replace(plan.model_ref, path=trained), trained))
        if self.context.shards:  # modules cannot be added to a sharded model
            return self._shard(partial(self._attach, plan.model_ref, trained))
        return load_adapter(self._selected, trained)

    @property
    def loaders(self) -> ModelLoaders:
        """The loaders of both models for the evaluation."""
        return ModelLoaders(self.before, self.tuned, lambda: self.packs)

    @cached_property
    def _selected(self) -> SelectedModel:
        return self._shard(partial(self._load, self.context.plan.model_ref))

    def _load(self, model_ref: ModelRef, recipe: Recipe, device: str) -> SelectedModel:
        return load_model(
            model_ref, recipe, self.context.plan.task, self.context.plan.processor, device=device, training=False
        )

    def _attach(self, model_ref: ModelRef, trained: Path, recipe: Recipe, device: str) -> AdaptedModel:
        """Load a model with the adapter or the tuned weights in `trained`."""
        selected = self._load(model_ref, recipe, device)
        if recipe.adapter.method == "full" and selected.new_weights:
            what = "the head in these weights has other classes than the rows have now"
            raise EnvironmentProblem.of(what, str(trained), "Run the recipe again to train a new head.")
        return load_adapter(selected, trained)

    def _shard(self, make: Callable[[Recipe, str], Made]) -> Made:
        """Make a model, each process a part if the run is sharded: slices of matrices, or shards of FSDP2."""
        made = _make(self.context, make, training=False)
        self.packs = made.packs if isinstance(made, SelectedModel) else made.selected.packs
        if self.context.shards:
            device = torch.device(pick_device())
            reason = why_unsplit(made.model)
            if reason is None and not split_model(made.model, device):
                reason = "its logits would change"
            if reason is not None:
                shard_model(made.model, device)
                if self.context.plan.task.model_kind.decodes:
                    slow = "Answers are slow: each process gathers every layer for each token"
                    fix = "Use --engine vllm or one process for many answers."
                    self.context.console.print(f"{slow}, because {reason}. {fix}", style="yellow", highlight=False)
        return made


def load_champion(context: RunContext, run: Path) -> ChampionModel:
    """Open a champion's run, to answer rows of this run with its model."""
    champion = open_finished(run, context.console, context.request.offline)
    plan = champion.plan
    return ChampionModel(plan.recipe, plan.task, plan.processor, plan.device, Models(champion).loaders)


def ask_champion_classes(context: RunContext, run: Path, rows: Sequence[Row]) -> list[list[str]]:
    """Return the classes that a champion's model answers, before training."""
    return ask_classes(partial(load_champion, context), context.console, context.plan.recipe.renames, run, rows)


def check_new_labels(context: RunContext) -> None:
    """Compare new labels with the champion's predictions, in all processes (`llmtune.evaluate.label_check`)."""
    check_labels(partial(load_champion, context), context.plan.stated, context.folder, context.rows, context.console)


def score_models(context: RunContext, folder: Path | None, base_folders: Sequence[Path | None]) -> Scored:
    """Evaluate both models in all processes; rank 0 writes to `folder`. `base_folders` may have base answers."""
    plan, rows, examples = context.plan, context.rows, context.examples
    recipe, task, processor = plan.recipe, plan.task, plan.processor
    join_processes(plan.device)
    inputs = make_inputs(rows, examples, task, processor, recipe) if examples.counts.get("test") else None
    validation = calibration_inputs(rows, examples, task, processor, recipe, inputs)
    controls = control_inputs(rows, inputs, task, processor, recipe, context.console)
    engine = describe_engine(context)
    eval_context = EvalContext(
        recipe, task, processor, inputs, plan.device, context.console, folder, validation, controls, engine=engine
    )
    base = base_inputs(recipe, adapter_settings(recipe), plan.model_ref, rows, examples, plan.device)
    base = hash_value([base, engine]) if engine else base
    learned = simple_inputs(recipe, rows, examples)
    keys = dict.fromkeys(SIMPLE_BASELINES, learned) | {"frozen": hash_value([learned, base])}
    caches = {name: load_first(base_folders, key, name_file(name)) for name, key in keys.items()}
    ask = partial(ask_champion, partial(load_champion, context), eval_context, rows, context.folder.path)
    taught = recipe.distil is not None and recipe.distil.weight > 0
    loaders = replace(Models(context).loaders, teacher=partial(open_teacher, context) if taught else None)
    if engine:
        turns = inputs.generation_prompts.values() if inputs else ()
        loaders = VllmModels(context, [*chain.from_iterable(turns)]).loaders
    request = ScoreRequest(
        loaders,
        eval_context,
        rows,
        headless=why_headless(plan.model_ref, recipe, task),
        base=load_first(base_folders, base),
        tuned=load_first(base_folders, base + hash_folder(context.trained_folder), TUNED),
        simple=SimpleScorer(eval_context, rows, examples, caches),
        challenge=partial(face_champion, plan.stated, context.folder, rows, ask),
        compare_control=partial(compare_control_run, recipe, context.folder),
        trained=context.trained_folder,
    )
    return score_run(request)


def save_label_errors(context: RunContext, folder: Path | None) -> None:
    """Look for labels that are likely wrong, if the recipe asks for them, in all processes; rank 0 has a folder."""
    plan, console = context.plan, context.console
    eval_context = EvalContext(plan.recipe, plan.task, plan.processor, None, plan.device, console, folder)
    save_suspects(Models(context).tuned, eval_context, context.rows, context.examples)


# A teacher


def answer_step(context: RunContext) -> None:
    """Let the teacher answer the rows of train and validation, in rank 0, if the recipe asks for it."""
    plan, recipe, data = context.plan, context.plan.recipe, context.folder.path / "data"
    if recipe.distil is None or not recipe.distil.answers:
        return
    rows, context = load_rows(data / "rows"), replace(context, resolved=replace(plan, layout=ALONE))
    if has_pictures(rows):
        what = "teachers do not answer questions about pictures yet"
        raise RecipeError.of(what, "distil.answers", "Remove it: the rows need answers.")
    teacher = find_teacher(recipe, context.console, context.request.offline, context.request.pins)
    assert teacher is not None, "the recipe has a teacher"
    inputs = hash_value(
        [
            examples_inputs(recipe, rows, plan.model_ref, plan.processor, plan.task.example_type),
            [teacher.content_hash, recipe.generation.max_new_tokens, recipe.model.dtype],
        ]
    )
    with context.step("answer", inputs, [f"data/{ANSWERED}"]) as step:
        if not step.skipped:
            begin_blocks(data / ANSWERS, inputs, restart=False)
            with open_teacher(context, rows, longest_answered(plan, rows)) as (model, _):
                answer_rows(plan, model, rows, data / ANSWERS, context.console)
            release_memory()
            with staged(data / ANSWERED) as folder:
                step.facts.update(write_answered(rows, data / ANSWERS, folder))
            shutil.rmtree(data / ANSWERS)
    facts = context.folder.facts("answer")
    if truncated := facts.get("truncated"):
        text = f"{truncated} of {facts['answered']} answers were truncated at generation.max_new_tokens: those that"
        text += " end in their thoughts are left out, and of the others the student learns to stop there. Raise it."
        context.console.print(text, style="yellow", highlight=False)


def drop_answers(folder: Path) -> None:
    """Remove a teacher's answers to rows that changed."""
    shutil.rmtree(folder / "data" / ANSWERED, ignore_errors=True)


def record_step(context: RunContext) -> None:
    """Record the teacher's predictions that training needs, in all processes, and free its memory."""
    plan, folder, inputs = context.plan, context.folder, context.plan.inputs.get("teach")
    if inputs is None or context.once(lambda: folder.is_valid("train", plan.inputs["train"])):
        return
    target, examples = folder.path / "data" / FOLDER, context.examples
    is_damaged = context.once(lambda: folder.is_done("teach"))  # if it has to be done again
    with context.step("teach", inputs, [f"data/{FOLDER}"]) as step:
        if not step.skipped:
            join_processes(plan.device)
            context.once(lambda: begin_recording(target, inputs, plan, examples, restart=is_damaged))
            with open_teacher(context) as (model, packs):
                record_predictions(plan, model, packs, examples, target, context.console)
            wait_for_processes()
            step.facts["predictions"] = count_predictions(examples)
    release_memory()


@contextmanager
def open_teacher(
    context: RunContext, rows: Rows | None = None, longest: int | None = None
) -> Iterator[tuple[torch.nn.Module, bool]]:
    """Yield the teacher of a run, and whether it reads packed rows. Raises as `check_teacher` does.

    `rows` and `longest`, the tokens of the longest one, are those of the run by default.
    """
    plan, offline = context.plan, context.request.offline
    run = teacher_run(plan.recipe)
    if run is not None:
        teacher = open_finished(run, context.console, offline)
    else:
        recipe, model_ref = plan_teacher(plan.recipe, context.console, offline)
        task, processor = find_variant(recipe, model_ref), cache(partial(load_processor, model_ref, recipe.model))
        there = replace(plan, recipe=recipe, task=task, model_ref=model_ref, open_processor=processor)
        teacher = replace(context, resolved=there)
    if not plan.layout.sharded:
        teacher = replace(teacher, resolved=replace(teacher.plan, layout=plan.layout))
    longest = max(context.examples.reach.values()) if longest is None else longest
    check_teacher(teacher.plan, plan, rows or context.rows, longest)
    models = Models(teacher)
    with models.tuned() if run else models.base() as model:
        yield model.eval(), bool(models.packs)
