"""The section `train`: how the training loop runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from llmtune.errors import nearest
from llmtune.recipe.adapter_section import AdapterSection
from llmtune.recipe.data_section import DataSection
from llmtune.recipe.section import Many, NonEmpty, Positive, RecipeSection, Seed, one_or_more
from llmtune.recipe.source_map import Diagnostics
from llmtune.recipe.task_facts import NEAREST_TO_ONE
from llmtune.recipe.task_variant import TaskVariant, at_ten

AdamW = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit"]
PagedAdamW = Literal["paged_adamw_8bit", "paged_adamw_32bit"]
AdEMAMix = Literal["ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"]
Lion = Literal["lion_32bit", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit"]
OtherOptimizer = Literal["adafactor", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "sgd"]
ScheduleFree = Literal["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"]
LowRankState = Literal["apollo_adamw", "galore_adamw", "galore_adafactor"]
Optimizer = Literal[AdamW, PagedAdamW, AdEMAMix, Lion, OtherOptimizer, "muon", ScheduleFree, LowRankState]
Cosine = Literal["cosine", "cosine_with_restarts", "cosine_with_min_lr"]
Constant = Literal["constant", "constant_with_warmup"]
Schedule = Literal["linear", Cosine, "polynomial", Constant, "inverse_sqrt", "warmup_stable_decay"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(one_or_more, json_schema_input_type=Tracker | list[Tracker])]
CheckpointingSwitch = Annotated[
    Annotated[bool, Tag("switch")] | Annotated[Literal["auto"], Tag("text")],
    Discriminator(lambda value: "text" if value == "auto" else "switch"),
]
SCHEDULE_OPTIONS = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": ("num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles"),
}
"""Numeric options of each transformers schedule that the training loop does not set itself."""

EPSILON = (
    *("adamw", "paged_adamw", "ademamix", "paged_ademamix", "muon"),
    *("schedule_free_adamw", "schedule_free_radam", "apollo_adamw"),
)
BETAS = (*EPSILON, "lion", "paged_lion")
"""Name prefixes of the optimisers that read `adam_beta1` and `adam_beta2`."""
_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
_PROJECTION = ("rank", "update_proj_gap", "scale", "proj_type")
OPTIM_ARGS = {
    "ademamix": _ADEMAMIX,
    "paged_ademamix": _ADEMAMIX,
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop_bnb": (),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "schedule_free": ("weight_lr_power", "r"),
    "apollo": (*_PROJECTION, "proj", "scale_type"),
    "galore": _PROJECTION,
}
"""Keys of `optim_args` that optimisers read, by name prefix; transformers ignores all others."""
CHOSEN_KEYS = ("learning_rate", "num_train_epochs", "batch_size")
"""Keys that `llmtune.recipe.training_rule` chooses by rows and model unless the recipe sets them."""


class TrainSection(RecipeSection):
    """Settings of the training loop, named as in `TrainingArguments` if the meaning is the same."""

    learning_rate: float = Field(default=2e-4, gt=0, le=10)
    """Peak learning rate of the schedule. Default: chosen by the method and the model's width, at most 1e-3 for LoRA
    and a tenth of that for full tuning; 2e-4 until the model is known."""
    num_train_epochs: float = Field(default=1.0, gt=0, le=100_000)
    """Passes over the training rows. Default: chosen for about 100 steps within 1 to 4 epochs; with a new head about
    300 steps within 1 to 20 epochs; 1 until the rows are known."""
    max_steps: Positive | None = None
    """Total optimiser steps, instead of `num_train_epochs`. Default none: epochs decide."""
    batch_size: Positive = 16
    """Rows per optimiser step over all processes, packed or not. Memory does not depend on it. Default: chosen by the
    number of training rows: 4, from 400 rows 8, from 1,600 rows 16; small data sets then get enough steps. With a new
    head, or until the rows are known, 16."""
    batch_tokens: Positive | None = None
    """Tokens per optimiser step over all processes, instead of `batch_size`. Default none: rows are easier to reason
    about."""
    optim: Optimizer = "adamw_torch"
    """Optimiser, by its name in transformers, or torch's `muon`. `schedule_free_*`, `apollo_*` and `galore_*` need
    `llmtune-cli[optimizers]`. Default `adamw_torch`: runs everywhere; 8-bit optimisers save memory on a GPU."""
    optim_args: dict[str, float | str] = Field(default={})
    """Options of the optimiser, by their names in transformers, e.g. `rank` and `update_proj_gap` of GaLore. Default
    none: the library's defaults."""
    loss_type: Literal["nll", "dft"] = "nll"
    """`nll` is cross-entropy. `dft` multiplies the loss of each token by its probability (dynamic fine-tuning), in
    training only. Default `nll`: the usual loss of language models."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0, le=1000)
    """Strength of random noise on the embeddings in training (NEFTune), e.g. 5; rows are then padded. Default none:
    noise helps open-ended answers and harms exact ones."""
    loraplus_lr_ratio: float | None = Field(default=None, ge=1, le=1000)
    """Learning rate of the adapter's B matrices and biases as a multiple of `learning_rate` (LoRA+), e.g. 16. Default
    none: one rate for all, as published learning rates assume."""
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """Decoupled weight decay; each step shrinks weights by this times the learning rate. Default 0: an adapter is
    small and starts at zero."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean. Default 0.9, as in the Adam paper."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the squared gradient's running mean. Default 0.999, as in the Adam paper."""
    adam_epsilon: float = Field(default=1e-8, gt=0, le=1)
    """Added to Adam's denominator. Default 1e-8, as in the Adam paper."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Maximum gradient norm; larger gradients are scaled down to it. 0 disables clipping. Default 1.0: protects
    against a single bad step."""
    lr_scheduler_type: Schedule = "linear"
    """Learning rate schedule, by its name in transformers. Default `linear`: decays to zero and needs no options."""
    lr_scheduler_kwargs: dict[str, float] = Field(default={})
    """Options of the schedule, e.g. `num_cycles` or `min_lr_rate`. Default none: the library's defaults."""
    warmup_steps: float = Field(default=0.03, ge=0, le=1_000_000_000)
    """Warm-up steps; the last one reaches the peak learning rate. Below 1, a share of all steps. Unlike in
    transformers, the first step has a rate above zero. Default 0.03: Adam's first steps are the least reliable."""
    gradient_checkpointing: CheckpointingSwitch = "auto"
    """Recompute activations in the backward pass to save memory: 20 to 33 % slower, same result. Default `auto`: only
    if the memory plan does not fit otherwise, and the run says so."""
    logging_steps: Positive = 10
    """Optimiser steps between two logged lines of metrics. Default 10: smooth enough to read."""
    eval_steps: Positive | None = None
    """Optimiser steps between two validations. Default none: at the end of each epoch."""
    eval_metrics: Many[str] = ()
    """Metrics of `evaluate.metrics` that each validation measures as well as the loss, such as `exact_match` of
    generated answers. Default none: generating answers takes longer than a loss."""
    metric_for_best_model: NonEmpty = "loss"
    """Metric for the best checkpoint and early stopping: `loss`, or one of `eval_metrics`. Default `loss`."""
    save_steps: Positive | None = None
    """Optimiser steps between two checkpoints. Default none: with each validation."""
    save_total_limit: Positive = 2
    """Checkpoints to keep in addition to the best one. Default 2: a bad disk could damage one."""
    load_best_model_at_end: bool = True
    """Use the checkpoint that is best by `metric_for_best_model` as the result. Default true: the last step is often
    not the best."""
    early_stopping_patience: Positive | None = None
    """Stop after this many validations without an improvement of `metric_for_best_model`. Default none: train to the
    end."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """Smallest change that counts as an improvement, in nats or in units of the metric. Default 0: any gain counts."""
    report_to: Trackers = ()
    """Experiment trackers to send metrics to. Default none: nothing leaves the machine unless you ask for it."""
    torch_compile: bool = False
    """Compile the model's layers before training, for rows of any length; needs a C++ compiler on a CPU and Triton on a
    GPU. Default false: compiling takes seconds to minutes, and results differ in the last digits."""
    use_liger_kernel: bool = False
    """Use Liger's kernels for norms, rotary positions and gated layers in training. Needs a CUDA GPU and the package
    `liger-kernel`; the loss stays llmtune's own. Default false: Liger does not support every model type."""
    seeds: Many[Seed] = ()
    """Additional seeds. The run trains again with each, on the same rows, into `seeds/SEED/` of its folder, and the
    report shows the spread of the scores. Default none: each takes as long as the run itself."""

    def check_task(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        """Report loss settings that the task ignores."""
        why = f"with task: {variant.task}"
        if variant.facts.takes_audio:
            diagnostics.no_effect("train.neftune_noise_alpha", why, "Remove it: recordings have no embeddings.", "task")
        if self.loss_type != "nll" and (variant.without_decoder or variant.loss):
            diagnostics.no_effect("train.loss_type", why, "Remove it: it applies to decoders only.", "task")

    def check(
        self, diagnostics: Diagnostics, data: DataSection, adapter: AdapterSection, seed: int, variant: TaskVariant
    ) -> None:
        """Report settings that others make ineffective, and seeds that would repeat a training."""
        if self.batch_tokens is not None:
            fix, because = "Keep one of them.", "train.batch_tokens"
            diagnostics.no_effect("train.batch_size", "with train.batch_tokens", fix, because)
        if self.max_steps is not None:
            fix, because = "Keep one of them.", "train.max_steps"
            diagnostics.no_effect("train.num_train_epochs", "with train.max_steps", fix, because)
        self._check_validation(diagnostics, data)
        self._check_metrics(diagnostics, variant)
        self._check_optimizer(diagnostics, adapter)
        self._check_schedule(diagnostics)
        key = "train.seeds"
        if repeated := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            diagnostics.add(key, f"'{key}' names a seed twice: {', '.join(map(str, repeated))}", "Name each once.")
        if seed in self.seeds:
            fix = f"Remove it: the run already trains with 'seed' ({seed})."
            diagnostics.add(key, f"'{key}' names the recipe's own seed, {seed}, again", fix, "seed")
        diagnostics.repeated("train.report_to", self.report_to, "a tracker")

    def _check_validation(self, diagnostics: Diagnostics, data: DataSection) -> None:
        if not data.validation:
            fix = "Give data.validation a share of the rows or sources, or remove it."
            names = ["eval_steps", "early_stopping_patience", "early_stopping_threshold"]
            names += ["load_best_model_at_end"] if self.load_best_model_at_end else []
            names += ["eval_metrics", "metric_for_best_model"]
            diagnostics.none_has_effect(self, "train", names, "without validation rows", fix, "data.validation")
        elif self.early_stopping_patience is None:
            fix = "Set train.early_stopping_patience too, or remove it."
            key, because = "train.early_stopping_threshold", "train.early_stopping_patience"
            diagnostics.no_effect(key, "without a patience", fix, because)

        if not self.load_best_model_at_end and self.early_stopping_patience is None:
            fix = "Set train.load_best_model_at_end or train.early_stopping_patience, or remove it."
            key = "train.metric_for_best_model"
            diagnostics.no_effect(key, "if nothing uses the best checkpoint", fix, "train.load_best_model_at_end")

    def _check_metrics(self, diagnostics: Diagnostics, variant: TaskVariant) -> None:
        key, allowed = "train.eval_metrics", variant.eval_metrics
        diagnostics.repeated(key, self.eval_metrics, "a metric")
        for i, metric in enumerate(self.eval_metrics):
            if at_ten(metric) not in allowed:
                lacking = "is measured anyway" if metric == "loss" else "cannot be measured while training"
                fix = f"{nearest(metric, allowed)} Allowed: {', '.join(allowed)}.".strip()
                diagnostics.add(f"{key}.{i}", f"'{metric}' {lacking}", fix, "task")
        chosen = self.metric_for_best_model
        if chosen in NEAREST_TO_ONE:
            fix = "Choose another of train.eval_metrics, or loss."
            diagnostics.add("train.metric_for_best_model", f"neither more nor less {chosen} is better", fix)
        elif chosen not in ("loss", *self.eval_metrics):
            fix = (
                f"Add {chosen} to {key}."
                if at_ten(chosen) in allowed
                else f"{nearest(chosen, allowed)} Or use loss.".strip()
            )
            what = f"'train.metric_for_best_model' is {chosen!r}, which is not measured while training"
            diagnostics.add("train.metric_for_best_model", what, fix, key)

    def _check_optimizer(self, diagnostics: Diagnostics, adapter: AdapterSection) -> None:
        if not adapter.is_lora and self.loraplus_lr_ratio is not None:
            why, fix = f"with adapter.method: {adapter.method}", "Remove it, or use lora or qlora."
            diagnostics.no_effect("train.loraplus_lr_ratio", why, fix, "adapter.method")
        if self.optim.startswith(("apollo", "galore")) and adapter.method != "full":
            what = f"'train.optim' is {self.optim}, which saves memory in full tuning only, and this trains an adapter"
            diagnostics.add("train.optim", what, "Use adapter.method: full, or adamw_torch.", "adapter.method")
        if self.optim.startswith("schedule_free") and not self.lr_scheduler_type.startswith("constant"):
            what = f"'train.optim' is {self.optim}, which allows no learning rate schedule except a warm-up"
            fix = "Set train.lr_scheduler_type: constant_with_warmup."
            diagnostics.add("train.lr_scheduler_type", what, fix, "train.optim")
        allowed = next((names for name, names in OPTIM_ARGS.items() if self.optim.startswith(name)), ())
        for name in [name for name in self.optim_args if allowed and name not in allowed]:
            what = f"'train.optim_args.{name}' has no effect with train.optim: {self.optim}"
            fix = f"{nearest(name, allowed)} Allowed: {', '.join(allowed)}.".strip()
            diagnostics.add(f"train.optim_args.{name}", what, fix, "train.optim")
        readers = {"adam_beta1": BETAS, "adam_beta2": BETAS, "adam_epsilon": EPSILON}
        readers["optim_args"] = (self.optim,) if allowed else ()
        for name, beginnings in readers.items():
            if not self.optim.startswith(beginnings):
                why, fix = f"with train.optim: {self.optim}", "Remove it, or use another optimiser."
                diagnostics.no_effect(f"train.{name}", why, fix, "train.optim")

    def _check_schedule(self, diagnostics: Diagnostics) -> None:
        schedule, options = self.lr_scheduler_type, self.lr_scheduler_kwargs
        allowed = SCHEDULE_OPTIONS[schedule]
        key, because = "train.lr_scheduler_kwargs", "train.lr_scheduler_type"
        for name in options:
            if name not in allowed:
                fix = f"{nearest(name, allowed)} Options of {schedule}: {', '.join(allowed) or 'none'}.".strip()
                what = f"'{key}.{name}' has no effect with {because}: {schedule}"
                diagnostics.add(f"{key}.{name}", what, fix, because)
        if schedule == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & set(options)) != 1:
            fix = "Give one of them, e.g. lr_scheduler_kwargs: {min_lr_rate: 0.1}."
            diagnostics.add(key, f"{schedule} needs either min_lr or min_lr_rate", fix, because)
        if schedule == "warmup_stable_decay" and "num_decay_steps" not in options:
            fix = "Write e.g. lr_scheduler_kwargs: {num_decay_steps: 100}."
            diagnostics.add(key, f"{schedule} needs num_decay_steps", fix, because)
        if schedule == "constant" and self.warmup_steps:
            fix = "Use constant_with_warmup, or remove it."
            diagnostics.no_effect("train.warmup_steps", f"with {because}: constant", fix, because)
        if self.warmup_steps >= 1 and not self.warmup_steps.is_integer():
            fix = "Use a share of all steps below 1, or an integer number of steps."
            diagnostics.add("train.warmup_steps", f"'train.warmup_steps' is {self.warmup_steps:g}", fix)
