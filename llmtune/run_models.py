"""The models of a run: with a new adapter to train, and base and tuned model to use, each loaded as its user would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from sys import maxsize

import torch
from transformers import PreTrainedModel

from llmtune.adapter.data_init import sample_rows
from llmtune.adapter.injection import adapter_settings, inject
from llmtune.adapter.load import find_adapter
from llmtune.adapter.saving import load_adapter
from llmtune.data.examples import ExampleReader
from llmtune.display.console import spinner
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.evaluate.cache_keys import base_inputs, simple_inputs
from llmtune.evaluate.champion import face_champion
from llmtune.evaluate.champion_answers import ChampionModel, ask_champion, ask_classes
from llmtune.evaluate.controls import control_inputs
from llmtune.evaluate.eval_inputs import EvalContext, calibration_inputs, make_inputs
from llmtune.evaluate.evaluator import ModelLoaders, Scored
from llmtune.evaluate.label_check import check_labels
from llmtune.evaluate.results import SIMPLE, TUNED, load_base
from llmtune.evaluate.scoring import ScoreRequest, score_run
from llmtune.evaluate.simple_baseline import score_simple_baseline
from llmtune.evaluate.suites.label_errors import save_suspects
from llmtune.model.causal_lm_loss import move_to
from llmtune.model.config import find_class, keeps_float32, read_model_config, why_headless
from llmtune.model.device import compute_context, loading_device, pick_device, release_memory, resolve_dtype
from llmtune.model.loading import load_model
from llmtune.model.memory_plan import check_context
from llmtune.model.processor import load_processor
from llmtune.model.teacher_loss import Recorder
from llmtune.plan import RunContext, find_variant, open_finished
from llmtune.recipe.adapter_section import DATA_STARTS, AdapterSection
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel, ModelRef, Row, SelectedModel
from llmtune.store.atomic_files import hash_folder
from llmtune.store.processes import rank, world_size
from llmtune.train.distributed import join_processes, wait_for_processes
from llmtune.train.preflight import check_examples
from llmtune.train.sharding import Made, shard_model, share_model
from llmtune.train.teacher_cache import (
    FOLDER,
    KEY,
    LEARNED,
    Records,
    begin_recording,
    check_tokenizers,
    find_teacher,
    is_run,
    plan_bytes,
    record_teacher,
    recorded_facts,
    to_records,
)

SHOWN_LABELS = 10


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
        selected = load_model(
            plan.model_ref,
            recipe,
            plan.task,
            plan.processor,
            device=device,
            training=True,
            masters=not context.shards,
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
        """Make a model, each process its shard if the run is sharded."""
        made = _make(self.context, make, training=False)
        self.packs = made.packs if isinstance(made, SelectedModel) else made.selected.packs
        if self.context.shards:
            shard_model(made.model, torch.device(pick_device()))
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


def score_models(context: RunContext, folder: Path | None, base_folder: Path | None) -> Scored:
    """Evaluate both models in all processes; rank 0 writes to `folder`. `base_folder` may have earlier base answers."""
    plan, rows, examples = context.plan, context.rows, context.examples
    recipe, task, processor = plan.recipe, plan.task, plan.processor
    join_processes(plan.device)
    inputs = make_inputs(rows, examples, task, processor, recipe) if examples.counts.get("test") else None
    validation = calibration_inputs(rows, examples, task, processor, recipe, inputs)
    controls = control_inputs(rows, inputs, task, processor, recipe, context.console)
    eval_context = EvalContext(
        recipe, task, processor, inputs, plan.device, context.console, folder, validation, controls
    )
    base = base_inputs(recipe, adapter_settings(recipe), plan.model_ref, rows, examples, plan.device)
    simple = load_base(base_folder, simple_inputs(recipe, rows, examples), SIMPLE)
    ask = partial(ask_champion, partial(load_champion, context), eval_context, rows, context.folder.path)
    request = ScoreRequest(
        Models(context).loaders,
        eval_context,
        rows,
        headless=why_headless(plan.model_ref, recipe, task),
        base=load_base(base_folder, base),
        tuned=load_base(base_folder, base + hash_folder(context.trained_folder), TUNED),
        score_simply=partial(score_simple_baseline, eval_context, rows, examples, simple),
        challenge=partial(face_champion, plan.stated, context.folder, rows, ask),
        trained=context.trained_folder,
    )
    return score_run(request)


def save_label_errors(context: RunContext, folder: Path | None) -> None:
    """Look for labels that are likely wrong, if the recipe asks for them, in all processes; rank 0 has a folder."""
    plan, console = context.plan, context.console
    eval_context = EvalContext(plan.recipe, plan.task, plan.processor, None, plan.device, console, folder)
    save_suspects(Models(context).tuned, eval_context, context.rows, context.examples)


# A teacher


def record_step(context: RunContext) -> None:
    """Record the teacher's predictions that training needs, in all processes, and free its memory."""
    plan, folder = context.plan, context.folder
    inputs, section = plan.inputs.get("teach"), plan.recipe.distil
    if inputs is None or section is None or context.once(lambda: folder.is_valid("train", plan.inputs["train"])):
        return
    target, name = folder.path / "data" / FOLDER, f"data/{FOLDER}"
    is_damaged = context.once(lambda: folder.is_done("teach"))  # if it has to be done again
    with context.step("teach", inputs, [name]) as step:
        if step.skipped:
            return
        join_processes(plan.device)
        needed = plan_bytes(plan.task, plan.recipe, context.examples)
        context.once(lambda: begin_recording(target, inputs, needed, restart=is_damaged))
        with open_teacher(context) as (model, packs):
            _record(context, model, packs, target)
        release_memory()
        wait_for_processes()
        step.facts.update(recorded_facts(target, section, context.examples))


@contextmanager
def open_teacher(context: RunContext) -> Iterator[tuple[torch.nn.Module, bool]]:
    """Yield the teacher of a run, which must be able to predict for its student, and whether it reads packed rows.

    Raises:
        RecipeError: it does another task, or has another tokenizer or other classes.
        DataError: a row is longer than its context.
    """
    plan, task = context.plan, context.plan.task
    section = plan.recipe.distil
    assert section is not None, "the recipe has a teacher"
    trained, offline = is_run(section.teacher), context.request.offline
    teacher = open_finished(Path(section.teacher), context.console, offline) if trained else _plain_teacher(context)
    there, name = teacher.plan, section.teacher
    if type(there.task) is not type(task):
        what = f"{name} is a model for task {there.recipe.task} ({there.task.model_kind.auto_class})"
        raise RecipeError.of(f"{what}, but the student is for {plan.recipe.task}", KEY, "Name one for the same task.")
    kinds = [one.task.output_kind(one.recipe) for one in (there, plan)]
    labels = [one.task.output_labels(one.recipe) for one in (there, plan)]
    if kinds[0] != kinds[1] or "number" in kinds:
        what = f"{name} predicts another kind of label" if kinds[0] != kinds[1] else "numbers have no distribution"
        raise RecipeError.of(f"{what}, so the student cannot learn it", KEY, "Remove distil, or name another teacher.")
    if labels[0] != labels[1]:
        shown = " and ".join(", ".join(one[:SHOWN_LABELS]) for one in labels)
        what = f"{name} has other classes, or another order: the teacher's and the student's are {shown}"
        raise RecipeError.of(
            what, KEY, "List the student's in the same order, or train the teacher on the same classes."
        )
    if not trained and (headless := why_headless(there.model_ref, there.recipe, task)):
        raise RecipeError.of(f"{name} cannot teach: {headless}", KEY, "Name a trained run.")
    check_tokenizers(plan.processor, there.processor, context.rows, name)
    check_context(there.model_ref, there.recipe, task, max(context.examples.reach.values()))
    models = Models(teacher)
    with ExitStack() as stack:
        with spinner(context.console, "loading the teacher"):
            model = stack.enter_context(models.tuned() if trained else models.base())
        yield model.eval(), bool(models.packs)


def _plain_teacher(context: RunContext) -> RunContext:
    """Return a context in which the base model is the teacher, read by the student's recipe without its adapter."""
    plan, section = context.plan, context.plan.recipe.distil
    model_ref = find_teacher(plan.recipe, context.console, context.request.offline)
    assert section is not None
    assert model_ref is not None
    model = plan.recipe.model.model_copy(update={"name": section.teacher, "revision": "main"})
    recipe = plan.recipe.model_copy(update={"model": model, "adapter": AdapterSection()})
    processor = cache(partial(load_processor, model_ref, model, recipe.data.system_prompt))
    task = find_variant(recipe, model_ref)
    return replace(
        context, resolved=replace(plan, recipe=recipe, task=task, model_ref=model_ref, open_processor=processor)
    )


def _record(context: RunContext, model: torch.nn.Module, packs: bool, folder: Path) -> None:
    plan, task, section = context.plan, context.plan.task, context.plan.recipe.distil
    assert section is not None
    config = read_model_config(plan.model_ref, plan.recipe.model).get_text_config()
    vocabulary = max(config.vocab_size, len(plan.processor)) if task.predicts_tokens else maxsize
    top_k = section.top_k if task.predicts_tokens else maxsize  # all classes
    collate = task.collator(plan.processor, plan.recipe, packs)
    dtype = resolve_dtype(plan.recipe.model.dtype, plan.device)

    def record(reader: ExampleReader, rows: Sequence[int]) -> Records:
        recorder = Recorder(top_k, section.temperature, vocabulary)
        batch = move_to(plan.device, collate([reader[row] for row in rows], 0))
        with torch.no_grad(), compute_context(dtype, plan.device):
            task.loss(model, {**batch, "teacher": recorder})
        return to_records(torch.cat(recorder.ids), torch.cat(recorder.logs))

    splits = [split for split in LEARNED if context.examples.counts.get(split)]
    readers = {split: ExampleReader(context.examples, split, task.example_type) for split in splits}
    share = (0, 1) if context.shards else (rank(), world_size())
    writes = rank() == share[0]
    record_teacher(
        readers, record, folder, context.console, device=plan.device, packed=packs, share=share, writes=writes
    )
