"""Load weights: dtype, quantisation, attention, added tokens; the same recipe always gives the same model."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import cast

import torch
import transformers
from rich.console import Console
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.task_interface import TaskInterface
from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.model.config import (
    OTHER_CLASSES,
    OTHER_ORDER,
    architecture_class,
    as_list,
    build_skeleton,
    find_class,
    head_names,
    in_heads,
    predicts_in_float32,
    put_in_order,
    readable,
    trains_in_float32,
)
from llmtune.model.device import explain_oom, resolve_dtype
from llmtune.model.experts import quantize_experts
from llmtune.model.kernels import apply_liger, compute_numbers_in_float32, fuse_norms
from llmtune.model.library_logging import unreported
from llmtune.model.mean_layer import initialize_mean_layer, name_mean_layer
from llmtune.model.memory_plan import plan_memory
from llmtune.model.packed_attention import PACKED, choose_attention, install_packed, pool_documents
from llmtune.model.processor import count_ids
from llmtune.model.quantized_base import is_quantized, keep_quantized_format, kept_quantization
from llmtune.model.self_checks import (
    explain_unreadable,
    isolates_documents,
    positions_depend_on_neighbours,
    take_loss_at_head,
    try_shared_prefixes,
)
from llmtune.model.towers import drop_towers, find_towers, freeze_towers, patch_text_forward
from llmtune.recipe.model_section import ModelSection
from llmtune.recipe.schema import Recipe
from llmtune.records import MemoryPlan, ModelRef, SelectedModel

NOT_LOADED = "the weights cannot be loaded"
AGAIN = "Download the model again; `llmtune doctor` shows this machine's packages and hardware."


def load_model(
    model_ref: ModelRef,
    recipe: Recipe,
    task: TaskInterface,
    processor: PreTrainedTokenizerBase,
    *,
    device: str,
    training: bool,
    masters: bool = True,
    plan: MemoryPlan | None = None,
    console: Console | None = None,
) -> SelectedModel:
    """Load the weights onto `device`, in eval mode, quantised to 4 bits if `adapter.method` is qlora, else unchanged.

    Some weights are float32 (`trains_in_float32`, `predicts_in_float32`); in training with `method: full`, without
    `masters`, only if some may be new. The embedding grows for the tokens of `processor`.

    Raises:
        EnvironmentProblem: the weights cannot be loaded, some are missing, or memory runs out.
        RecipeError: the model does not support this task, or cannot isolate packed rows.
    """
    console = console or Console(quiet=True)
    with explain_oom(f"loading {model_ref.name}", device):
        model_class, config = find_class(model_ref, recipe, task)
        attention, reason = choose_attention(model_class, config, recipe, task)
        if reason and task.model_kind.decodes:
            console.print(f"Attention: {attention or 'own'}, with a mask over packed rows, because {reason}.")
        exact = trains_in_float32(recipe, task, config) if training else predicts_in_float32(recipe, task, config)
        if training and recipe.adapter.method == "full":
            exact = exact and (masters or task.model_kind.has_head or bool(recipe.model.add_tokens))
        model, new = _load_weights(model_ref, recipe, task, model_class, config, attention, exact, device)
        _install_kernels(model, recipe, task, attention, device)
        _grow_embedding(model, processor, recipe)
        _make_head_inputs_contiguous(model)
        compute_numbers_in_float32(model, recipe, task)
        _align_generation_config(model, processor)
        _disable_layerdrop(model)
        model.config.use_cache = not training
        if training:
            fuse_norms(model)
        task.check_model(model.eval(), processor, recipe)
        if training and not task.model_kind.takes_audio:
            _check_readable(model, model_ref, recipe, task, processor)
        _check_positions(model, model_ref, recipe)
        packs = _check_packing(model, model_ref, recipe, task, attention, reason, console)
        plan = plan or plan_memory(model_ref, recipe, task, recipe.data.max_length, device)
    kept = None if recipe.adapter.method == "qlora" else kept_quantization(model.config)
    return SelectedModel(
        model_ref,
        model,
        processor,
        plan,
        quantized=recipe.adapter.method == "qlora" or kept is not None,
        base_quantization=kept.method if kept else None,
        trains_head=task.model_kind.has_head,
        peft_task_type=task.model_kind.peft_task_type,
        needs_reference_model=task.needs_reference_model(recipe),
        new_weights=new,
        packs=packs,
    )


def _install_kernels(
    model: PreTrainedModel, recipe: Recipe, task: TaskInterface, attention: str | None, device: str
) -> None:
    if recipe.train.use_liger_kernel and device.startswith("cuda"):
        apply_liger(model)
    if attention == PACKED:
        install_packed(model)
        if task.model_kind.reads_class_at_token:
            pool_documents(model)


def _check_readable(
    model: PreTrainedModel, model_ref: ModelRef, recipe: Recipe, task: TaskInterface, processor: PreTrainedTokenizerBase
) -> None:
    """Raise RecipeError for a model that cannot read text, sees padding, or sees the tokens it should predict."""
    dtype = resolve_dtype(recipe.model.dtype, model.device.type)
    writes = task.model_kind.decodes or model.config.is_encoder_decoder
    reason = explain_unreadable(model, dtype, processor.pad_token_id or 0, writes)
    if reason is not None:
        what = f"{model_ref.name} is a {type(model).__name__}, which {reason}"
        raise RecipeError.of(what, "model.name", "Use another model.")


def _check_positions(model: PreTrainedModel, model_ref: ModelRef, recipe: Recipe) -> None:
    """Raise RecipeError if rows of the maximum length change the positions of other rows in the batch."""
    longest = recipe.data.max_length
    if positions_depend_on_neighbours(model, longest):
        first = bisect_left(range(longest), True, key=lambda length: positions_depend_on_neighbours(model, length))
        raise RecipeError.of(
            f"in {model_ref.name} a row's rotary positions depend on the length of the other rows once one has "
            f"more than {first - 1:,} tokens, but data.max_length is {longest:,}",
            "data.max_length",
            f"Set data.max_length to {first - 1} or less.",
        )


def _check_packing(
    model: PreTrainedModel,
    model_ref: ModelRef,
    recipe: Recipe,
    task: TaskInterface,
    attention: str | None,
    reason: str | None,
    console: Console,
) -> bool:
    """Return whether rows are packed, after a check that this model isolates them; `reason` is why they are not.

    Raises RecipeError for a decoder that fails: a recurrent state or its own mask carries one row into the next.
    """
    dtype = resolve_dtype(recipe.model.dtype, model.device.type)
    packs, decodes = task.packs and recipe.data.packing, task.model_kind.decodes
    if packs and (apart := recipe.needs_rows_apart):
        packs, reason = False, apart
    if decodes and recipe.adapter.is_prompt:  # the loss at the head does not count virtual tokens
        console.print(f"Rows are padded, in batches of similar length, because {reason}.", highlight=False)
        return packs
    if decodes:
        at_head = take_loss_at_head(model, dtype)
        if not at_head:
            console.print(
                "Loss: from full logits, because the model's head is not a linear layer on top of its backbone."
            )
        if packs and not isolates_documents(model, dtype, decodes):
            raise RecipeError.of(
                f"in {model_ref.name} packed rows see one another: its architecture does not isolate them",
                "data.packing",
                "Set data.packing: false.",
            )
        if packs and at_head:
            try_shared_prefixes(model, dtype)
        return packs
    if packs and attention == PACKED and not isolates_documents(model, dtype, decodes):
        reason = f"{type(model).__name__} reads packed rows differently from single rows"
    if reason:
        console.print(f"Rows are padded, in batches of similar length, because {reason}.", highlight=False)
    return packs and reason is None


def load_plain(
    model_ref: ModelRef, config: PreTrainedConfig, section: ModelSection, *, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Load a model as stored, without a recipe, for inspection: with eager attention and towers, in eval mode.

    Raises:
        EnvironmentProblem: the weights cannot be loaded, or memory runs out.
    """
    transformers.utils.logging.disable_progress_bar()
    kept = kept_quantization(config)
    readable_weights = readable(NOT_LOADED, str(model_ref.path), AGAIN)
    with explain_oom(f"loading {model_ref.name}", device), unreported(), readable_weights:
        model = architecture_class(config, section.trust_remote_code).from_pretrained(
            str(model_ref.path),
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=section.use_safetensors,
            local_files_only=True,
            **({"trust_remote_code": True} if section.trust_remote_code else {}),
            **({"device_map": {"": device}} if kept else {}),
        )
    model = cast(PreTrainedModel, (model if kept else model.to(device)).eval())
    patch_text_forward(model)
    return model


def _load_weights(
    model_ref: ModelRef,
    recipe: Recipe,
    task: TaskInterface,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    attention: str | None,
    exact: bool,
    device: str,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model, in float32 if it is to be `exact`, and the names of parameters missing in the files."""
    dtype = torch.float32 if exact else resolve_dtype(recipe.model.dtype, device)
    options: dict[str, object] = {} if attention is None else {"attn_implementation": attention}
    if recipe.adapter.method == "qlora":
        options["quantization_config"] = _quantization(recipe, task, model_class, config, dtype)
        options["device_map"] = {"": device}
    elif kept := kept_quantization(config):
        options["device_map"] = {"": device}
        if kept.method == "bitsandbytes":
            config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    if device.startswith("cuda"):
        options["device_map"] = {"": torch.cuda.current_device()}
    if hasattr(model_class, "from_config"):
        options["trust_remote_code"] = recipe.model.trust_remote_code
    torch.manual_seed(recipe.seed)  # for a head without weights
    transformers.utils.logging.disable_progress_bar()
    what, where, fix = NOT_LOADED, str(model_ref.path), AGAIN
    if attention is not None and "/" in attention:
        what, where = f"the model cannot be loaded with attention {attention}", "model.attn_implementation"
        fix = "Use one that the hub has for this device and this version of torch, or set it to auto."
    with readable(what, where, fix), unreported():
        model, info = model_class.from_pretrained(
            str(model_ref.path),
            config=config,
            dtype=dtype,
            use_safetensors=recipe.model.use_safetensors,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=task.model_kind.has_head,  # a head for other classes
            **options,
        )
    keep_quantized_format(model)
    patch_text_forward(model)
    absent = {*info["missing_keys"], *(str(entry[0]) for entry in info.get("mismatched_keys", ()))}
    new = _initialize_head(model, absent, config, task)
    if missing := sorted(absent - new):
        raise EnvironmentProblem.of(
            f"{len(missing)} weights are missing in the files, such as {missing[0]}: they would be random",
            str(model_ref.path),
            "The folder is incomplete, or contains another kind of model than config.json says.",
        )
    _check_finite(model, model_ref)
    (freeze_towers if task.model_kind.takes_images else drop_towers)(model.eval())
    if recipe.adapter.method == "qlora":
        quantize_experts(model, recipe.adapter)
    return model if "device_map" in options else model.to(device), tuple(sorted(new))


@torch.no_grad()
def _check_finite(model: PreTrainedModel, model_ref: ModelRef) -> None:
    """Raise EnvironmentProblem if weights are NaN or infinite, which spoils every result."""
    packed = tuple(f"{name}." for name, module in model.named_modules() if is_quantized(module))
    floats = [one for one in model.named_parameters() if one[1].is_floating_point() and not one[0].startswith(packed)]
    wrong = [name for name, weight in floats if not weight.sum(dtype=torch.float32).isfinite()]
    wrong = [name for name, weight in floats if name in wrong and not weight.isfinite().all()]  # a sum may overflow
    if wrong:
        what = f"{len(wrong)} weights are NaN or infinite, such as {wrong[0]}"
        raise EnvironmentProblem.of(what, str(model_ref.path), AGAIN)


def _quantization(
    recipe: Recipe,
    task: TaskInterface,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
) -> BitsAndBytesConfig:
    """Return settings that do not quantise heads, nor a pooling layer that is new if the files have none."""
    skeleton = build_skeleton(model_class, config, recipe, towers=True)
    heads = head_names(skeleton)
    inner = [name for name, _ in skeleton.named_modules() if not in_heads(name, heads)]
    new = [name for name in inner if task.model_kind.may_miss_weights and is_new_part(name, heads)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.adapter.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=recipe.adapter.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*heads, *new, *find_towers(skeleton)],
    )


def _initialize_head(
    model: PreTrainedModel, absent: set[str], config: PreTrainedConfig, task: TaskInterface
) -> set[str]:
    """Return the names of a head's random weights; put a trained head's outputs in order, in place.

    `absent` are the weights that are missing in the files. A head that was trained for other classes is reinitialized;
    one for the same classes gets the recipe's order.
    """
    heads = head_names(model)
    in_head = {name: p for name, p in model.named_parameters() if in_heads(name, heads)}
    new = {name for name in absent if task.model_kind.may_miss_weights and is_new_part(name, heads)}
    with torch.no_grad():
        if getattr(config, OTHER_CLASSES, False) and not new & in_head.keys():
            spread = float(getattr(config.get_text_config(), "initializer_range", 0.02))
            for name, parameter in sorted(in_head.items()):
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32) * spread)
                else:
                    parameter.fill_(float("norm" in name.lower() and name.endswith("weight")))
            new |= in_head.keys()
    if name_mean_layer(model) and new:
        initialize_mean_layer(model)
    if order := getattr(config, OTHER_ORDER, None):
        put_in_order(model, heads, order)
    return new


def is_new_part(name: str, heads: Sequence[str]) -> bool:
    """Whether a parameter missing in the files may start at random: a head, or the pooling layer before it."""
    return in_heads(name, heads) or "pooler" in name.split(".")


def _disable_layerdrop(model: PreTrainedModel) -> None:
    """Switch layerdrop off, in place: a randomly skipped layer has no gradient, which stops DDP."""
    for module in model.modules():
        if isinstance(getattr(module, "layerdrop", None), float):
            module.layerdrop = 0.0
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(model.config, name, None):
            setattr(model.config, name, 0.0)


def _grow_embedding(model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Add embedding rows for the tokens that the recipe adds; a new row starts as the mean of the others."""
    if model.main_input_name == "input_values":  # it reads audio
        return
    rows, needed = model.get_input_embeddings().weight.shape[0], count_ids(processor)
    if recipe.model.add_tokens and needed > rows:
        torch.manual_seed(recipe.seed)
        model.resize_token_embeddings(needed, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    layer.weight[rows:] = layer.weight[:rows].float().mean(dim=0).to(layer.weight.dtype)
    elif needed > rows:
        ids = "" if needed == len(processor) else f", with ids up to {needed - 1:,},"
        raise EnvironmentProblem.of(
            f"the tokenizer has {len(processor):,} tokens{ids} but the model has room for {rows:,}",
            str(recipe.model.name),
            "Use the tokenizer that belongs to the model.",
        )


def _make_head_inputs_contiguous(model: PreTrainedModel) -> None:
    """Make the output head's input contiguous during generation; changes `model` in place, by a hook.

    It is a slice, the last position of each row. Without gradients torch.matmul does not fold a slice into one product
    but copies the head's weights once per row: 57 MB each for SmolLM2.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))


def _align_generation_config(model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> None:
    """Make the model's generation settings use the tokenizer's tokens, without contradictions."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    stated = as_list(settings.eos_token_id)
    if any(type(end) is not int for end in stated):
        where = os.path.join(str(model.name_or_path), "generation_config.json")
        raise EnvironmentProblem.of(f"eos_token_id is {settings.eos_token_id!r}, but must be numbers", where, AGAIN)
    settings.pad_token_id = processor.pad_token_id
    settings.eos_token_id = sorted({*stated, *as_list(processor.eos_token_id)})
    if not getattr(settings, "do_sample", True):  # a diffusion model's settings have none
        settings.temperature = settings.top_p = settings.top_k = settings.min_p = settings.typical_p = None
