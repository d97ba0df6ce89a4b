"""The parts of one training: model, optimiser, data and plan, made once before step 1."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from rich.console import Console
from torch.optim.lr_scheduler import LRScheduler
from transformers.integrations.neftune import activate_neftune

from llmtune import __version__
from llmtune.data.example import Collate
from llmtune.data.examples import ExampleReader
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.evaluate.regression import MOST_TEXTS
from llmtune.evaluate.rewards import hash_reward_files
from llmtune.evaluate.token_batches import cut_evenly
from llmtune.model.causal_lm_loss import DFT
from llmtune.model.device import compute_context, pick_device, resolve_dtype
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import AdaptedModel, Examples, Rows
from llmtune.store.atomic_files import hash_value
from llmtune.store.machine import resident_peak_bytes
from llmtune.train.batch_plan import PASS_TOKENS, StepPlan
from llmtune.train.distributed import SILENCE_SECONDS
from llmtune.train.metrics_log import start_trackers, tracker_folder
from llmtune.train.objective import StepObjective, TrainedTask
from llmtune.train.optimizer import build_optimizer, build_schedule, updates_elementwise
from llmtune.train.sharding import shard_model
from llmtune.train.teacher_objective import choose_objective
from llmtune.train.whole_updates import WholeUpdates

if TYPE_CHECKING:
    from llmtune.recipe.schema import Recipe


@dataclass(frozen=True)
class TrainContext:
    """The parts of one training. Only the model, `row_losses` and the objective's state change, in place."""

    adapted: AdaptedModel
    accelerator: Accelerator
    model: torch.nn.Module
    """As Accelerate prepared it: wrapped if there are several processes."""
    parameters: tuple[torch.nn.Parameter, ...]
    """The trainable ones."""
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    task: TrainedTask
    objective: StepObjective
    recipe: Recipe
    plan: StepPlan
    examples: ExampleReader
    validation: ExampleReader | None
    dtype: torch.dtype
    collate: Collate
    folder: Path
    inputs: str
    """Hash of everything that training depends on; checkpoints of other inputs are not resumed."""
    row_losses: npt.NDArray[np.float32]
    """Loss of each training example so far (`llmtune.train.row_losses.LossTable`)."""
    sharded: bool
    """Whether the model is sharded over the processes (FSDP2): each pass then needs all of them."""
    head_started: bool = False
    """Whether the head starts at a regression, so that the model may be best before step 1."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device(self.accelerator.device)

    @property
    def packed(self) -> bool:
        """Whether the rows of a micro-batch are concatenated."""
        return self.adapted.selected.packs

    @property
    def pass_tokens(self) -> int | None:
        """Cost of one more pass in tokens, if smaller micro-batches of padded rows can be faster; else None."""
        return PASS_TOKENS if self.device.type == "cpu" else None

    @property
    def longest(self) -> int:
        """Tokens of the longest example: no budget can be less."""
        held_out = 0 if self.validation is None else int(self.validation.lengths.max())
        return max(int(self.examples.lengths.max()), held_out)

    def compute(self) -> AbstractContextManager[object]:
        """Return the context (autocast) of the model's number format."""
        return compute_context(self.dtype, self.device.type)


def build_accelerator(recipe: Recipe, folder: Path, device: torch.device) -> Accelerator:
    """Make the Accelerator of the loop, without mixed precision: Accelerate's would cast all outputs to float32.

    Raises EnvironmentProblem for a tracker that is not installed.
    """
    trackers = list(recipe.train.report_to)
    available = {str(name) for name in get_available_trackers()}
    EnvironmentProblem.collect(
        Problem(f"the tracker {name} is not installed", "train.report_to", f"pip install {_PACKAGES.get(name, name)}")
        for name in trackers
        if name not in available
    )
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        log_with=trackers or None,
        project_config=tracker_folder(folder),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=SILENCE_SECONDS)),
        ],
    )
    if trackers:
        start_trackers(accelerator, trackers, recipe.name, folder, _settings(recipe))
    return accelerator


_PACKAGES = {"comet_ml": "comet-ml"}


def _settings(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """Return the settings that a tracker shows: numbers and names of the adapter and train sections."""
    sections = {"seed": recipe.seed, "model": recipe.model.name or "candidates"}
    for section in ("adapter", "train"):
        sections |= {f"{section}.{key}": value for key, value in getattr(recipe, section).model_dump().items()}
    return {key: value for key, value in sections.items() if isinstance(value, str | int | float | bool)}


def set_up(
    adapted: AdaptedModel,
    examples: Examples,
    task: TrainedTask,
    recipe: Recipe,
    folder: Path,
    console: Console,
    inputs: str,
    sharded: bool = False,
) -> TrainContext:
    """Build the parts of a training; `inputs` and `sharded` are those of `train`.

    Raises RecipeError or EnvironmentProblem for an invalid optimiser, schedule, tracker or `batch_tokens`.
    """
    train, reader = recipe.train, ExampleReader(examples, "train", task.example_type)
    validates = examples.counts.get("validation")
    held_out = ExampleReader(examples, "validation", task.example_type) if validates else None
    plan = StepPlan(
        reader.lengths, recipe.seed, train.batch_size, train.batch_tokens, train.num_train_epochs, train.max_steps
    )
    started = _start_head(adapted, reader, task, recipe, console, whole=not sharded)
    if train.torch_compile:
        _compile(adapted, console)
    _mark_loss(adapted, task, recipe)
    device = next(adapted.model.parameters()).device
    if sharded:
        device = torch.device(pick_device())
        param_dtype = resolve_dtype(recipe.model.dtype, device.type) if adapted.method == "full" else None
        # not by Accelerate, which shards on GPUs only
        shard_model(adapted.model, device, training=True, param_dtype=param_dtype)
    accelerator = build_accelerator(recipe, folder, device)
    built = build_optimizer(adapted.model, recipe, accelerator.device)
    gathers = sharded and not updates_elementwise(train.optim)
    optimizer = accelerator.prepare_optimizer(WholeUpdates(built) if gathers else built)
    with warnings.catch_warnings():
        # torch 2.13 renamed the argument; Accelerate does not use the new name yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        model = accelerator.prepare_model(adapted.model, device_placement=not sharded, evaluation_mode=sharded)
    return TrainContext(
        adapted=adapted,
        accelerator=accelerator,
        model=model,
        parameters=tuple(parameter for parameter in model.parameters() if parameter.requires_grad),
        optimizer=optimizer,
        schedule=build_schedule(optimizer.optimizer, recipe, plan.total_steps),
        task=task,
        objective=choose_objective(task, recipe, examples, {"train": reader, "validation": held_out}),
        recipe=recipe,
        plan=plan,
        examples=reader,
        validation=held_out,
        dtype=resolve_dtype(recipe.model.dtype, accelerator.device.type),
        collate=task.collator(adapted.selected.processor, recipe, adapted.selected.packs),
        folder=folder,
        inputs=inputs,
        head_started=started,
        row_losses=np.zeros((len(reader), 3), dtype=np.float32),
        sharded=sharded,
    )


def _start_head(
    adapted: AdaptedModel, reader: ExampleReader, task: TrainedTask, recipe: Recipe, console: Console, *, whole: bool
) -> bool:
    """Let the task initialise a new head from training rows, of many some; return whether it starts at a regression."""
    if recipe.adapter.start_from is not None:
        return False
    kept = [reader[i] for i in cut_evenly(len(reader), MOST_TEXTS)]
    started = task.start_head(adapted, kept, recipe, whole=whole)
    if started:
        console.print(f"head: starts at {started.note}", highlight=False, markup=False)
        if started.warning:
            console.print(started.warning, style="yellow", highlight=False, markup=False)
    return started is not None


def _compile(adapted: AdaptedModel, console: Console) -> None:
    from llmtune.train.torch_compile import compile_parts  # imports the compiler, which takes a second

    parts = compile_parts(adapted.model, adapted.selected.model)
    console.print(f"{parts} parts of the model's layers will be compiled at their first use, which takes a while.")


def _mark_loss(adapted: AdaptedModel, task: TrainedTask, recipe: Recipe) -> None:
    """Set up the model, in place, for the loss and the embedding noise that the recipe asks for.

    Raises RecipeError if this kind of model does not support the loss.
    """
    model = adapted.selected.model
    if recipe.train.loss_type == "dft":
        if not task.model_kind.decodes:
            what = f"the loss dft is for decoders, but {adapted.selected.model_ref.name} has an encoder"
            raise RecipeError.of(what, "train.loss_type", "Remove it.")
        setattr(model, DFT, True)
    if recipe.train.neftune_noise_alpha is not None:
        activate_neftune(model, recipe.train.neftune_noise_alpha)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes so far: of the GPU's allocator, or of the process (resident) without a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak_bytes()


@contextmanager
def deterministic() -> Iterator[None]:
    """Use torch's deterministic algorithms inside the block; an operation without one only warns."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    filled = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = False  # costs time and hides nothing: values are never read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = filled


def train_inputs(recipe: Recipe, rows: Rows, adapter: str, teacher: str | None = None) -> str:
    """Hash what training depends on: adapted model and teacher, by hashes of their inputs, the train section, rewards.

    The settings of the rewards are inputs of the adapted model, as those of every task; columns of the rows count
    where rewards read them.
    """
    settings = [{**recipe.train.model_dump(mode="json"), "seeds": []}, recipe.data.packing]
    settings += [teacher, recipe.distil.weight] if recipe.distil else []
    settings += [[*hash_reward_files(recipe.variant.rewards).values()]] if recipe.variant.rewards else []
    settings += [rows.columns_hash] if TASK_FACTS[recipe.task].rates_answers else []
    return hash_value([__version__, adapter, settings])
