"""Weights into memory: number format, quantisation, attention, added tokens; always the same for the same recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from rich.console import Console
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.data.task_interface import TaskInterface
from llmtune.errors import EnvironmentProblem
from llmtune.model.causal_lm_loss import take_loss_at_head
from llmtune.model.config import (
    OTHER_CLASSES,
    OTHER_ORDER,
    build_skeleton,
    find_class,
    first_line,
    head_names,
    in_heads,
    is_encoder,
)
from llmtune.model.device import is_out_of_memory, resolve_dtype
from llmtune.model.fused_norms import fuse_norms
from llmtune.model.kernels import apply_liger
from llmtune.model.library_logging import unreported
from llmtune.model.memory_plan import plan_memory
from llmtune.model.oom import enough_memory
from llmtune.model.packed_attention import PACKED, choose_attention, install_packed
from llmtune.model.packed_pooling import pool_documents
from llmtune.model.packing_check import prove_isolation, reads_apart
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.records import MemoryPlan, ModelRef, SelectedModel

if TYPE_CHECKING:
    from llmtune.recipe import Recipe

CAUSAL, CLASSES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


def load_model(
    place: ModelRef,
    recipe: Recipe,
    task: TaskInterface,
    processor: PreTrainedTokenizerBase,
    *,
    device: str,
    training: bool,
    plan: MemoryPlan | None = None,
    console: Console | None = None,
) -> SelectedModel:
    """Load the weights onto `device`, in eval mode, quantised to 4 bits if `adapter.method` is qlora.

    With `training` and `method: full` weights are float32 (masters, computed with under autocast); otherwise they are
    in the resolved format. The embedding grows to the tokens of `processor`.

    Raises:
        EnvironmentProblem: the weights cannot be loaded, some are missing, or memory runs out.
        RecipeError: the model does not do this task, or cannot keep packed rows apart.
    """
    with enough_memory(f"loading {place.name}", device):
        return _load(place, recipe, task, processor, device, training, plan, console)


def _load(
    place: ModelRef,
    recipe: Recipe,
    task: TaskInterface,
    processor: PreTrainedTokenizerBase,
    device: str,
    training: bool,
    plan: MemoryPlan | None,
    console: Console | None,
) -> SelectedModel:
    model_class, config = find_class(place, recipe, task)
    packs, decodes = task.packs and recipe.data.packing, task.auto_class == CAUSAL
    attention, reason = choose_packing(model_class, config, recipe, task)
    if reason and decodes and console is not None:
        console.print(f"Attention: {attention or 'own'}, with a mask over packed rows, because {reason}.")
    compute_dtype = dtype = resolve_dtype(recipe.model.dtype, device)
    if recipe.adapter.method == "full" and training:
        dtype = torch.float32
    quantization = _quantization(recipe, task, model_class, config, dtype) if recipe.adapter.method == "qlora" else None
    model, new = _load_weights(place, recipe, task, model_class, config, attention, dtype, quantization, device)
    if quantization is not None:
        _keep_quantized_format(model)
    if recipe.train.use_liger_kernel and device.startswith("cuda"):
        apply_liger(model)
    if attention == PACKED:
        install_packed(model)
        if task.auto_class == CLASSES:
            pool_documents(model)
    _grow_embedding(model, processor, recipe)
    _hand_whole_rows_to_head(model)
    _settle_generation(model, processor)
    _keep_every_layer(model)
    model.config.use_cache = not training
    if training:
        fuse_norms(model)
    model.eval()
    if decodes and not take_loss_at_head(model, compute_dtype) and console is not None:
        console.print("Loss: from whole logits, because the model's head is not a linear layer on top of its backbone.")
    if packs and decodes:
        prove_isolation(model, compute_dtype, place.name)
    elif packs and attention == PACKED and not reads_apart(model, compute_dtype):
        reason = f"{type(model).__name__} reads rows that stand in one line otherwise than each alone"
    packs = packs and (decodes or reason is None)
    if reason and not decodes and console is not None:
        console.print(f"Rows are padded, those of like length together, because {reason}.", highlight=False)
    plan = plan or plan_memory(place, recipe, task, recipe.data.max_length, device)
    task.check_model(model, processor, recipe)
    return SelectedModel(
        place,
        model,
        processor,
        plan,
        quantization is not None,
        trains_head=task.trains_head,
        peft_task_type=task.peft_task_type,
        needs_reference_model=task.needs_reference_model(recipe),
        new_weights=new,
        packs=packs,
    )


def choose_packing(model_class: Any, config: Any, recipe: Recipe, task: TaskInterface) -> tuple[str | None, str | None]:
    """Return the attention to install (None: the model's own choice), and why rows are not packed by it.

    Without it those of a decoder stand in one line with a mask over them, and those of other models are padded.
    """
    wanted = recipe.model.attn_implementation
    if task.auto_class == CAUSAL:
        return choose_attention(model_class, config, wanted, task.packs)
    attention, reason = choose_attention(model_class, config, wanted, task.packs and recipe.data.packing, True)
    if attention == PACKED and not is_encoder(config):
        return None, "the class of a text is read at its last token, with a decoder"
    if getattr(config, "is_encoder_decoder", False) and recipe.data.packing and TASK_FACTS[recipe.task].packs:
        return attention, "the model has an encoder and a decoder"
    return attention, reason


def _quantization(
    recipe: Recipe, task: TaskInterface, model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """Say which parts stay as they are: heads, and a pooling layer, which is made new where the files have none."""
    skeleton = build_skeleton(model_class, config, recipe)
    heads = head_names(skeleton)
    names = [name for name, _ in skeleton.named_modules()]
    new = [name for name in names if task.trains_head and is_new_part(name, heads) and not in_heads(name, heads)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.adapter.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=recipe.adapter.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*heads, *new],
    )


def _keep_quantized_format(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking weights for inference at the first forward pass in eval mode on AVX512-BF16.

    It cannot be undone, its kernel has no gradient (training after a validation would go wrong in silence), and it
    rounds otherwise than the one trained with.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _load_weights(
    place: ModelRef,
    recipe: Recipe,
    task: TaskInterface,
    model_class: Any,
    config: Any,
    attention: str | None,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    device: str,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model, and the names of its parameters that the files do not hold."""
    torch.manual_seed(recipe.seed)  # for a head that has no weights yet
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if device.startswith("cuda"):
        options["device_map"] = {"": torch.cuda.current_device()}
    elif quantization is not None:
        options["device_map"] = {"": device}
    if quantization is not None:
        options["quantization_config"] = quantization
    if hasattr(model_class, "from_config"):
        options["trust_remote_code"] = recipe.model.trust_remote_code
    transformers.utils.logging.disable_progress_bar()
    try:
        with unreported():
            model, info = model_class.from_pretrained(
                str(place.path),
                config=config,
                dtype=dtype,
                use_safetensors=recipe.model.use_safetensors,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=task.trains_head,  # a head for other classes
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        if attention is not None and "/" in attention:
            raise EnvironmentProblem.of(
                f"the model cannot be loaded with the attention of {attention}: {first_line(error)}",
                "model.attn_implementation",
                "It must be on the hub for this device and this version of torch; or set it to auto.",
            ) from error
        raise EnvironmentProblem.of(
            f"the weights cannot be loaded: {first_line(error)}",
            str(place.path),
            "Get the model again from where it comes from; `llmtune doctor` shows what this machine has.",
        ) from error
    new = _account_for(model, info, config, task, place)
    placed = model if "device_map" in options else model.to(device)
    return cast(PreTrainedModel, placed), tuple(sorted(new))


def _account_for(
    model: PreTrainedModel, info: dict[str, Any], config: Any, task: TaskInterface, place: ModelRef
) -> set[str]:
    """Return the names of a new head's weights, and put a trained head's outputs in the recipe's order, in place.

    Raises EnvironmentProblem where other weights are missing in the files.
    """
    other_size = {str(entry[0]) for entry in info.get("mismatched_keys", ())}
    absent = set(info["missing_keys"]) | other_size
    heads = head_names(model)
    new = {name for name in absent if task.trains_head and is_new_part(name, heads)}
    if getattr(config, OTHER_CLASSES, False) and not new & {
        n for n, _ in model.named_parameters() if in_heads(n, heads)
    }:
        new |= draw_anew(model, heads)
    if order := getattr(config, OTHER_ORDER, None):
        put_in_order(model, heads, order)
    missing = sorted(absent - new)
    if missing:
        raise EnvironmentProblem.of(
            f"{len(missing)} weights are missing in the files, {missing[0]} for one: they would start at random",
            str(place.path),
            "The folder is not whole, or it holds another kind of model than config.json says.",
        )
    return new


def put_in_order(model: PreTrainedModel, heads: Sequence[str], order: Sequence[int]) -> None:
    """Move the outputs of a trained head to the recipe's order of the same classes, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if in_heads(name, heads) and parameter.shape[0] == len(order):
                parameter.copy_(parameter[list(order)].clone())
    setattr(model.config, OTHER_ORDER, None)


def draw_anew(model: PreTrainedModel, heads: Sequence[str]) -> set[str]:
    """Give a head that was trained for other classes new weights at random, in place; return their names."""
    spread = float(getattr(model.config.get_text_config(), "initializer_range", 0.02))
    names = {name for name, _ in model.named_parameters() if in_heads(name, heads)}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(names):
            parameter = parameters[name]
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32) * spread)
            else:
                parameter.fill_(float("norm" in name.lower() and name.endswith("weight")))
    return names


def _keep_every_layer(model: PreTrainedModel) -> None:
    """Switch layerdrop off, in place: a layer that is left out at random has no gradient, and DDP stops on that."""
    for module in model.modules():
        if isinstance(getattr(module, "layerdrop", None), float):
            module.layerdrop = 0.0
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(model.config, name, None):
            setattr(model.config, name, 0.0)


def is_new_part(name: str, heads: Sequence[str]) -> bool:
    """Whether a parameter that the files do not hold may start at random: a head, or the pooling layer before it."""
    return in_heads(name, heads) or "pooler" in name.split(".")


def _grow_embedding(model: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Make room for the tokens that the recipe adds; a new row starts as the mean of the others."""
    if model.main_input_name == "input_values":  # it reads waves
        return
    rows = model.get_input_embeddings().weight.shape[0]
    if recipe.model.add_tokens and len(processor) > rows:
        torch.manual_seed(recipe.seed)
        model.resize_token_embeddings(len(processor), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    layer.weight[rows:] = layer.weight[:rows].float().mean(dim=0).to(layer.weight.dtype)
    elif len(processor) > rows:
        raise EnvironmentProblem.of(
            f"the tokenizer has {len(processor):,} tokens and the model has room for {rows:,}",
            str(recipe.model.name),
            "They do not belong together: get the tokenizer that comes with the model.",
        )


def _hand_whole_rows_to_head(model: PreTrainedModel) -> None:
    """Make what generation hands to the output head contiguous; changes `model` in place, by a hook.

    It is the last position of each row, a slice. Without gradients torch.matmul does not fold a slice into one product
    but copies the head's weights once a row: 57 MB each for SmolLM2.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))


def _settle_generation(model: PreTrainedModel, processor: PreTrainedTokenizerBase) -> None:
    """Let the model's generation settings name the tokenizer's tokens, and hold nothing that contradicts itself."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    settings.pad_token_id = processor.pad_token_id
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    settings.eos_token_id = sorted({end for end in (*ends, processor.eos_token_id) if end is not None})
    if not settings.do_sample:
        settings.temperature = settings.top_p = settings.top_k = settings.min_p = settings.typical_p = None
