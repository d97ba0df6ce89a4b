"""The sections that say which model is tuned and how: `model`, `adapter`, `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from llmtune.recipe.base_section import Many, Section, by_kind, one_or_more

Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "paged_ademamix_32bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "adafactor",
    "adagrad",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "sgd",
]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]
Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(one_or_more, json_schema_input_type=Tracker | list[Tracker])]
Texts = Annotated[
    Annotated[str, Tag("text")] | Annotated[Many[str], Tag("items")],
    by_kind({str: "text"}, "items"),
]
Layers = Annotated[
    Annotated[int, Field(ge=0), Tag("number")] | Annotated[Many[Annotated[int, Field(ge=0)]], Tag("items")],
    by_kind({int: "number", float: "number"}, "items"),
]
InitWeights = Annotated[
    Annotated[bool, Tag("switch")]
    | Annotated[str, Field(pattern=r"^(gaussian|olora|pissa|pissa_niter_[1-9][0-9]{0,3})$"), Tag("text")],
    by_kind({bool: "switch"}, "text"),
]
Checkpointing = Annotated[
    Annotated[bool, Tag("switch")] | Annotated[Literal["auto"], Tag("text")],
    Discriminator(lambda value: "text" if value == "auto" else "switch"),
]
Attention = Annotated[
    Annotated[Literal["auto", "eager", "sdpa"], Tag("switch")]
    | Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?$"), Tag("text")],
    Discriminator(lambda value: "text" if isinstance(value, str) and "/" in value else "switch"),
]


class ModelSection(Section):
    """The model to start from: one by name, or candidates among which the best for the rows is chosen."""

    name: str | None = Field(
        default=None,
        min_length=1,
        description="A folder, a name on the hub (`owner/model`), or `builtin:NAME` for a packaged model. Required "
        "unless `candidates` is given; no default, because the model is the first decision of a recipe.",
    )
    candidates: Many[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None,
        min_length=1,
        description="Models to choose from, in place of `name`: those that cannot do the task or do not fit are "
        "left out, the rest are ranked by bits per byte on a sample of the rows. Default none: ranking "
        "loads every candidate.",
    )
    revision: str = Field(
        default="main",
        min_length=1,
        description="Branch, tag or commit on the hub. Default `main`; the lock file pins the commit it stood for.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the weights and the computation. Default `auto`: bfloat16 where the device "
        "computes in it, else float32, because float16 needs loss scaling.",
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="File with a Jinja chat template that replaces the model's own. Default none: the template that"
        " the model was trained with is the right one for it.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={},
        description="Values handed to the chat template, e.g. `enable_thinking: false`; the same in training, "
        "evaluation and chat. Default none: what a template does by itself.",
    )
    add_tokens: Many[Annotated[str, Field(min_length=1)]] = Field(
        default=(),
        description="Tokens to add to the vocabulary; their embeddings are trained with the adapter. Default none: "
        "new embeddings start from nothing and make the adapter larger.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model. Default false: that code can do anything on the "
        "machine.",
    )
    use_safetensors: bool = Field(
        default=True,
        description="Load weights in the safetensors format only; false admits pickled weights. Default true: a "
        "pickle runs code when it is loaded.",
    )
    attn_implementation: Attention = Field(
        default="auto",
        description="How attention is computed: `eager`, `sdpa`, or a kernel on the hub (`kernels-community/NAME`, "
        "which needs the package `kernels` and the network). Default `auto`: exact packed attention in training, the "
        "fastest that the model offers elsewhere.",
    )
    check_memory: bool = Field(
        default=True,
        description="Refuse a model whose lower bound of memory exceeds the device. Default true; false overrules a"
        " plan that is known to be wrong.",
    )


class AdapterSection(Section):
    """What is trained: low-rank adapters by PEFT's own option names, or all weights."""

    method: Literal["lora", "qlora", "full"] = Field(
        default="lora",
        description="`lora` trains low-rank matrices beside frozen weights, `qlora` the same on a base in 4 bits, "
        "`full` trains every weight. Default `lora`: near the quality of `full` at a fraction of the "
        "memory.",
    )
    r: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="Rank of the low-rank matrices. Default 16: enough for most tasks of one domain.",
    )
    lora_alpha: int = Field(
        default=32,
        ge=1,
        description="Scale of the adapter: its output counts `lora_alpha / r` times. Default 32: twice the default "
        "rank, so that a usual learning rate fits.",
    )
    lora_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of adapter inputs set to zero in training. Default 0: early stopping guards better "
        "against over-fitting, and dropout costs speed.",
    )
    target_modules: Texts = Field(
        default="all-linear",
        description="Modules that get an adapter: `all-linear`, a list of name endings, or a regular expression "
        "over whole names. Default `all-linear`: adapters everywhere learn better than on attention "
        "alone.",
    )
    exclude_modules: Texts | None = Field(
        default=None,
        description="Modules that get none though they match: name endings or a regular expression. Default none.",
    )
    modules_to_save: Many[str] | None = Field(
        default=None,
        description="Modules that are trained whole and saved with the adapter. Default none: each costs its full "
        "size.",
    )
    layers_to_transform: Layers | None = Field(
        default=None,
        description="Numbers of the layers that get an adapter, counted from 0. Default none: all layers.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none",
        description="Which biases are trained. Default `none`: with trained biases a model changes even when its "
        "adapter is switched off.",
    )
    use_dora: bool = Field(
        default=False,
        description="Split weights into magnitude and direction (DoRA). Default false: better at low rank, but slower.",
    )
    use_rslora: bool = Field(
        default=False,
        description="Scale by `lora_alpha / sqrt(r)` (rsLoRA), which keeps high ranks stable. Default false, as in "
        "PEFT.",
    )
    init_lora_weights: InitWeights = Field(
        default=True,
        description="How the matrices start: true (B is zero, so the start is the base model), false (random, for "
        "tests of loading), `gaussian`, `pissa`, `pissa_niter_N` or `olora`. Default true: costs "
        "nothing and starts from the base.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="Another rank for modules whose name matches the key. Default none: one rank for all."
    )
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={},
        description="Another `lora_alpha` for modules whose name matches the key. Default none: one scale for all.",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4",
        description="4-bit number format of the base with `qlora`. Default `nf4`: made for weights that are "
        "normally distributed, and closer to them than `fp4`.",
    )
    bnb_4bit_use_double_quant: bool = Field(
        default=True,
        description="With `qlora`, quantise the scales of the 4-bit blocks too. Default true: saves 0.4 bits a "
        "weight at no measured loss.",
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="A run folder or PEFT folder whose adapter training goes on from. Default none: a new adapter.",
    )


class TrainSection(Section):
    """How the training loop runs, by the names of `TrainingArguments` where the meaning is the same."""

    learning_rate: float = Field(
        default=2e-4,
        gt=0,
        le=10,
        description="Highest learning rate of the schedule. Default 2e-4: usual for LoRA; full fine-tuning wants "
        "about a tenth.",
    )
    num_train_epochs: float = Field(
        default=1.0,
        gt=0,
        le=100_000,
        description="How often the training rows are gone through. Default 1: look at the validation loss before more.",
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimiser steps in all, in place of `num_train_epochs`. Default none: epochs decide.",
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        description="Rows in one optimiser step over all processes, packed or not. Default 16: a steady gradient "
        "for most sets of a thousand rows or more. Memory does not depend on it.",
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens in one optimiser step over all processes, in place of `batch_size`. Default none: rows "
        "are easier to reason about.",
    )
    optim: Optimizer = Field(
        default="adamw_torch",
        description="Optimiser, by its name in transformers. Default `adamw_torch`: runs everywhere; `adamw_8bit` "
        "and `paged_adamw_8bit` save memory on a GPU.",
    )
    loraplus_lr_ratio: float | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="How many times faster than `learning_rate` the B matrices of the adapter, and biases with them, "
        "learn (LoRA+), e.g. 16. Default none: one rate for all, at which `learning_rate` is usually stated.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Decoupled weight decay, as a share per learning rate. Default 0: an adapter is small and "
        "starts at zero.",
    )
    adam_beta1: float = Field(
        default=0.9, ge=0, lt=1, description="Decay of the gradient's running mean. Default 0.9, as in the Adam paper."
    )
    adam_beta2: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="Decay of the squared gradient's running mean. Default 0.999, as in the Adam paper.",
    )
    adam_epsilon: float = Field(
        default=1e-8, gt=0, le=1, description="Added to Adam's denominator. Default 1e-8, as in the Adam paper."
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Gradients longer than this are scaled down to it; 0 switches that off. Default 1.0: guards "
        "against a single bad step.",
    )
    lr_scheduler_type: Schedule = Field(
        default="linear",
        description="Course of the learning rate, by its name in transformers. Default `linear`: down to zero at "
        "the end, with nothing to choose.",
    )
    lr_scheduler_kwargs: dict[str, float] = Field(
        default={},
        description="The schedule's own options, e.g. `num_cycles` or `min_lr_rate`. Default none: the library's "
        "values.",
    )
    warmup_steps: float = Field(
        default=0.03,
        ge=0,
        le=1_000_000_000,
        description="Steps over which the learning rate rises from zero; below 1 a share of all steps. Default "
        "0.03: Adam's first steps are its least certain.",
    )
    gradient_checkpointing: Checkpointing = Field(
        default="auto",
        description="Compute activations again in the backward pass to save memory; a fifth to a third slower, with "
        "the same result. Default `auto`: only where the memory plan does not fit without it, and the run says so.",
    )
    logging_steps: int = Field(
        default=10, ge=1, description="Optimiser steps between two lines of metrics. Default 10: smooth enough to read."
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimiser steps between two validations. Default none: at the end of each epoch.",
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps between two checkpoints. Default none: with each validation."
    )
    save_total_limit: int = Field(
        default=2,
        ge=1,
        description="Checkpoints that are kept, the best one apart. Default 2: one could be damaged by a bad disk.",
    )
    load_best_model_at_end: bool = Field(
        default=True,
        description="Take the checkpoint with the lowest validation loss as the result. Default true: the last step"
        " is often not the best.",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many validations without a better loss. Default none: run to the end.",
    )
    early_stopping_threshold: float = Field(
        default=0.0,
        ge=0,
        description="How much lower a loss must be to count as better, in nats. Default 0: any gain counts.",
    )
    report_to: Trackers = Field(
        default=(),
        description="Trackers that metrics are sent to. Default none: nothing leaves the machine unless it is asked"
        " to.",
    )
    torch_compile: bool = Field(
        default=False,
        description="Compile the model's layers before training, for rows of any length; needs a C++ compiler on a CPU "
        "and Triton on a GPU. Default false: it takes seconds to minutes before step 1, and numbers differ in the last "
        "digits.",
    )
    use_liger_kernel: bool = Field(
        default=False,
        description="Use Liger's kernels for norms, rotary positions and gated layers in training, on a CUDA GPU with "
        "the package `liger-kernel`; the loss stays llmtune's own. Default false: not every model type has them.",
    )
    seeds: Many[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        default=(),
        description="Further seeds: the run trains once more with each, on the same rows, into `seeds/SEED/` of its "
        "folder, and the report says how far the scores lie apart. Default none: each takes as long as the run itself.",
    )
