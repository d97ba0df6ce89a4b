"""Step 3: give a model a new adapter, or one to continue from; seed it, and check that it is wired."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from rich.console import Console
from transformers import PreTrainedModel

from llmtune.adapter.data_init import RowSample, finish_start, prepare_start
from llmtune.adapter.fused_lora import fuse_products
from llmtune.adapter.load import continue_adapter, find_adapter, wrap_model
from llmtune.adapter.peft_config import find_targets, make_config
from llmtune.adapter.projector import freeze_rest, name_projectors
from llmtune.adapter.reference_model import keep_reference, switches_off
from llmtune.adapter.target_modules import (
    are_transposed,
    count_adapted,
    ends_with,
    find_unmatched_parameters,
    group_by_ending,
)
from llmtune.adapter.wiring_check import probe_scores, prove_wiring
from llmtune.display.number_format import size as format_bytes
from llmtune.errors import Problem, RecipeError, first_line
from llmtune.model.config import (
    UNREADABLE,
    expert_parameters,
    head_names,
    in_heads,
    linear_shape,
    linear_shapes,
)
from llmtune.model.device import explain_oom, is_out_of_memory
from llmtune.model.experts import count_quantized
from llmtune.model.quantized_base import is_quantized, kept_quantization
from llmtune.model.towers import describe_towers
from llmtune.recipe.adapter_section import MUTATING, AdapterSection
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel, Examples, ModelRef, SelectedModel
from llmtune.store.atomic_files import hash_folder, hash_value

_OTHER = "Change the method's options or target_modules, or use another method."


def inject(
    selected: SelectedModel, recipe: Recipe, console: Console | None = None, sample: RowSample | None = None
) -> AdaptedModel:
    """Put the recipe's adapter into `selected.model` (in place), or make all of it trainable with `method: full`.

    `sample` has the rows for an initialization from rows. Adapter weights are float32. The model comes back in eval
    mode; its random state changes only by the seed.

    Raises:
        RecipeError: targets match nothing, options conflict, or the initialization does not fit.
        EnvironmentProblem: the adapter to start from is missing or damaged, or memory runs out.
        RuntimeError: the adapter has no effect; a bug of ours or of a library.
    """
    console = console or Console(stderr=True)
    torch.manual_seed(recipe.seed)
    with explain_oom(f"putting the adapter into {selected.model_ref.name}", str(selected.model.device)):
        full = recipe.adapter.method == "full"
        for name in name_projectors(selected.model, recipe.adapter) if full else ():
            selected.model.get_submodule(name).requires_grad_(True)
        adapted = wrap_full(selected) if full else _add_adapter(selected, recipe, console, sample)
    if selected.needs_reference_model and (recipe.adapter.start_from is not None or not switches_off(adapted.model)):
        keep_reference(adapted.model)
    if recipe.train.gradient_checkpointing is True:  # `auto` is resolved by the step that plans memory
        enable_checkpointing(selected.model)
    adapted.model.eval()
    show_adapter(adapted, console)
    return adapted


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Make layers in training mode recompute activations in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.2x renamed it
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that training changes, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def describe_adapter(adapted: AdaptedModel) -> dict[str, object]:
    """Return the report's facts about the adapter, ready for JSON."""
    config = getattr(adapted.model, "peft_config", {}).get("default")
    named = ((name, getattr(config, name, None)) for name in ("r", "lora_alpha", "use_dora"))
    shape = {name: value for name, value in named if isinstance(value, int)}  # supertuning has no r unless stated
    return {
        "method": adapted.method,
        "trainable": adapted.trainable,
        "total": adapted.total,
        "share": adapted.trainable / adapted.total,
        "matched_modules": len(adapted.matched_modules),
        "targets": group_by_ending(adapted.matched_modules),
        "adapter_bytes": adapted.adapter_bytes,
        **_weigh(adapted),
        **shape,
    }


def show_adapter(adapted: AdaptedModel, console: Console) -> None:
    """Print matched modules by their ending, the trainable share and the adapter's size."""
    share = 100 * adapted.trainable / adapted.total
    if towers := describe_towers(adapted.selected.model):
        console.print(towers, highlight=False)
    if adapted.matched_modules:
        groups = ", ".join(f"{ending} × {count}" for ending, count in group_by_ending(adapted.matched_modules).items())
        console.print(f"Adapter on {len(adapted.matched_modules)} modules: {groups}", highlight=False)
    console.print(
        f"Trainable: {adapted.trainable:,} of {adapted.total:,} parameters ({share:.2f} %), "
        f"{format_bytes(adapted.adapter_bytes)} to save",
        highlight=False,
    )
    if shares := _weigh(adapted):
        packed = f", {shares['share_quantized']:.1%} in {shares['quantized_bits']} bits" if len(shares) > 1 else ""
        console.print(
            f"Adapters cover {shares['share_under_adapter']:.1%} of the base weights{packed}", highlight=False
        )


def _weigh(adapted: AdaptedModel) -> dict[str, float]:
    """Return the shares of the base's weights that have an adapter, and that are stored in 4 bits (or 2, 3, 8)."""
    if adapted.method == "full":
        return {}
    base = adapted.total - adapted.trainable
    kept = kept_quantization(adapted.selected.model.config)
    quantized = {"share_quantized": count_quantized(adapted.model) / base, "quantized_bits": kept.bits} if kept else {}
    return {"share_under_adapter": count_adapted(adapted.model) / base, **quantized}


def wrap(selected: SelectedModel, model: PeftModel, method: str) -> AdaptedModel:
    """Count and describe a model with its adapter in place."""
    trainable, total = model.get_nb_trainable_parameters()
    packed = [module for module in model.modules() if is_quantized(module) and not [*module.parameters(recurse=False)]]
    total += sum(math.prod(linear_shape(module) or ()) for module in packed)  # GPTQ and AWQ store them as buffers
    saved = get_peft_model_state_dict(model, save_embedding_layers=False).values()
    kinds = ("targeted_module_names", "targeted_parameter_names")  # the latter are fused experts
    matched = tuple(name for kind in kinds for name in getattr(model.base_model, kind, ()))
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    return AdaptedModel(selected, model, method, trainable, total, matched, size)


def wrap_full(selected: SelectedModel) -> AdaptedModel:
    """Count and describe a fully trained model; its class may freeze some weights, such as sine tables."""
    model = selected.model
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trained_parameters(model))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return AdaptedModel(selected, model, "full", trained, total, (), size)


def _add_adapter(selected: SelectedModel, recipe: Recipe, console: Console, sample: RowSample | None) -> AdaptedModel:
    selected.model.requires_grad_(False)
    RecipeError.collect(_find_unknown_tokens(selected, recipe.adapter))
    before = None if recipe.adapter.is_lora else probe_scores(selected.model, selected, recipe)
    if recipe.adapter.start_from is not None:
        model = continue_adapter(selected, recipe, Path(recipe.adapter.start_from), console)
    else:
        model = _new_adapter(selected, recipe, console, sample)
    for parameter in trained_parameters(model):
        parameter.data = parameter.data.float()
    with _explained_targets(recipe.adapter):
        note = prove_wiring(model, selected, recipe, before)
    if note:
        console.print(note, highlight=False)
    if not recipe.adapter.is_prompt:
        _check_reload(model)
    fuse_products(model)
    return wrap(selected, model, recipe.adapter.method)


@contextmanager
def _explained_targets(adapter: AdapterSection) -> Iterator[None]:
    """Raise RecipeError if the model reads attributes from a named module that PEFT's layer lacks."""
    try:
        yield
    except (AttributeError, TypeError, ValueError) as error:
        if adapter.target_modules == "all-linear":
            raise
        what = f"the model does not run with this adapter: {first_line(error)}"
        raise RecipeError.of(what, "adapter.target_modules", _OTHER) from error


def _new_adapter(selected: SelectedModel, recipe: Recipe, console: Console, sample: RowSample | None) -> PeftModel:
    adapter = recipe.adapter
    whole = _find_whole(selected, adapter)
    reached, left_out = find_targets(selected, recipe)
    targets = [name for name in reached if not in_heads(name, whole)]
    if left_out:
        groups = ", ".join(f"{ending} × {count}" for ending, count in group_by_ending(left_out).items())
        console.print(
            f"all-linear skips {len(left_out)} modules that the input does not reach: {groups}", highlight=False
        )
    problems = [*_find_heads(adapter, whole, selected), *_find_conflicts(selected, adapter, targets)]
    problems += find_unmatched_parameters(selected.model, adapter.options.get("target_parameters", ()))
    tokens = _find_added_tokens(selected, recipe)
    RecipeError.collect([*problems, *_find_token_conflicts(selected.model, tokens or {}, targets, whole)])
    torch.manual_seed(recipe.seed)
    try:
        config = make_config(selected, adapter, targets, whole, tokens)
        if isinstance(config, LoraConfig):
            prepare_start(selected.model, config, sample)
        model = wrap_model(selected.model, config)
        if isinstance(config, LoraConfig):
            finish_start(model, sample)
        freeze_rest(model, adapter)
    except UNREADABLE as error:  # modules that PEFT cannot adapt, sizes that do not divide
        if is_out_of_memory(error):
            raise
        raise RecipeError.of(f"PEFT refuses this adapter: {first_line(error)}", "adapter", _OTHER) from error
    if str(adapter.init_lora_weights).startswith(MUTATING):
        model.start_weights = {  # the weights that PiSSA and OLoRA took out of the base
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }
    if not trained_parameters(model):
        raise RecipeError.of(f"{adapter.method} can adapt no module of this model", "adapter", _OTHER)
    _show_experts(model, targets, adapter, console)
    _show_untied(model, console)
    return model


def _show_untied(model: PeftModel, console: Console) -> None:
    """Print that embedding and head, tied in the base, are separate from now on because one of them is adapted."""
    inner = model.get_base_model()
    tied = getattr(inner.config.get_text_config(), "tie_word_embeddings", False)
    if not tied or inner.main_input_name == "input_values" or inner.get_output_embeddings() is None:
        return
    layers = {"embedding": inner.get_input_embeddings(), "head": inner.get_output_embeddings()}
    adapted = [name for name, layer in layers.items() if isinstance(layer, LoraLayer | ModulesToSaveWrapper)]
    if adapted:
        what = "Embedding and head share one weight in the base; with this adapter they are separate"
        console.print(f"{what} (trained: {', '.join(adapted)}). A merged model is larger by one of them.")


def _show_experts(model: PeftModel, targets: Sequence[str], adapter: AdapterSection, console: Console) -> None:
    """Print how fused experts (one tensor for all) are treated, if the recipe does not say."""
    experts = expert_parameters(model)
    if not experts or adapter.is_prompt:
        return
    if moved := sorted(set(targets) - set(model.targeted_module_names)):
        onto = ", ".join(getattr(model.peft_config["default"], "target_parameters", None) or ())
        what = (
            f"PEFT puts the adapters of {len(moved)} modules, such as {moved[0]}, on the fused experts instead: {onto}"
        )
        console.print(f"{what}. PEFT reads such names this way.", highlight=False, markup=False)
        return
    if adapter.target_modules != "all-linear" or "target_parameters" in adapter.options:
        return
    share = sum(shape.numel() for shape in experts.values()) / model.get_base_model().num_parameters()
    how = f"set adapter.target_parameters: [{', '.join(group_by_ending(experts))}]" if adapter.is_lora else "use lora"
    what = f"all-linear skips the experts, {share:.0%} of the weights, which are not linear modules here"
    console.print(f"{what}: {how} to adapt them.", highlight=False, markup=False)


def _find_whole(selected: SelectedModel, adapter: AdapterSection) -> list[str]:
    """Name the modules that are fully trained: those of the recipe, and the task's own head if it has one.

    Body layers with random weights (the pooling layer of an encoder that came without one) are among them.
    """
    names = [*(adapter.modules_to_save or ()), *name_projectors(selected.model, adapter)]
    if selected.trains_head:
        heads, every = head_names(selected.model), [name for name, _ in selected.model.named_modules()]
        stated = [name for entry in names for name in ends_with(every, entry)]
        fresh = {name.rpartition(".")[0] for name in selected.new_weights if not in_heads(name, heads)}
        names += [name for name in (*heads, *sorted(fresh)) if not in_heads(name, stated)]
    return names


def _find_heads(adapter: AdapterSection, whole: list[str], selected: SelectedModel) -> list[Problem]:
    """Find targets that name only fully trained modules, and so would get no adapter."""
    if not selected.trains_head or isinstance(adapter.target_modules, str):
        return []
    problems = []
    for entry in adapter.target_modules:
        matched = ends_with([name for name, _ in selected.model.named_modules()], entry)
        if matched and all(in_heads(name, whole) for name in matched):
            what = f"{entry!r} is a head: it is fully trained and gets no LoRA"
            problems.append(Problem(what, "adapter.target_modules", "Omit it."))
    return problems


def _find_conflicts(selected: SelectedModel, adapter: AdapterSection, targets: list[str]) -> list[Problem]:
    start = str(adapter.init_lora_weights)
    if not start.startswith(MUTATING):
        return []
    where = "adapter.init_lora_weights"
    if selected.quantized:
        what = f"{start} moves some base weight into the adapter, which a 4-bit base cannot undo exactly"
        return [Problem(what, where, "Use adapter.method: lora with it, or init_lora_weights: true with qlora.")]
    if start == "olora" and are_transposed(selected.model):
        what = "olora cannot start from this model's transposed projections (Conv1D)"
        return [Problem(what, where, "Use pissa or true.")]
    shapes = linear_shapes(selected.model)
    if other := next((name for name in targets if name not in shapes), None):
        what = f"{start} needs linear modules, and {other} is not one"
        return [Problem(what, where, "Remove it from adapter.target_modules, or use true.")]
    smallest = min((min(shapes[name]) for name in targets), default=adapter.r)
    if max([adapter.r, *adapter.rank_pattern.values()]) > smallest:
        what = f"{start} takes r directions of each matrix, but the smallest has only {smallest}"
        return [Problem(what, "adapter.r", f"Set adapter.r to {smallest} or less.")]
    return []


def _find_added_tokens(selected: SelectedModel, recipe: Recipe) -> dict[str, list[int]] | None:
    """Return the rows of the embedding (and of an untied head) that are trained: those of the added tokens."""
    if not recipe.model.add_tokens:
        return None
    ids = sorted(selected.processor.convert_tokens_to_ids(list(recipe.model.add_tokens)))
    model = selected.model
    layers = [model.get_input_embeddings()]
    if not getattr(model.config, "tie_word_embeddings", False):
        layers.append(model.get_output_embeddings())
    return {name: ids for name, module in model.named_modules() if any(module is layer for layer in layers)}


def _find_unknown_tokens(selected: SelectedModel, adapter: AdapterSection) -> Iterator[Problem]:
    """Find ids outside the vocabulary before a probe reads them, and activated LoRA on models other than decoders."""
    if "alora_invocation_tokens" in adapter.options and selected.peft_task_type != "CAUSAL_LM":
        what = "an activated LoRA starts at tokens within a decoder's prompt, and this model is not a decoder"
        yield Problem(what, "adapter.alora_invocation_tokens", "Omit it.")
    elif selected.model.main_input_name != "input_values":  # audio models have no token embedding
        size = selected.model.get_input_embeddings().weight.shape[0]
        for key in ("alora_invocation_tokens", "token_indices"):
            for token in adapter.options.get(key, ()):
                if type(token) is not int or not 0 <= token < size:
                    what = f"{token!r} is not a token id: this model has ids from 0 to {size - 1:,}"
                    yield Problem(what, f"adapter.{key}", "Use ids of the tokenizer's vocabulary.")


def _check_reload(model: PeftModel) -> None:
    """Raise RecipeError if PEFT would lose weights when it reloads the adapter.

    By transformers' table for the model type, PEFT may mistake their names for those of an older checkpoint.
    """
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(model, save_embedding_layers=False))
    if result.unexpected_keys:
        what = f"PEFT would lose {len(result.unexpected_keys)} of the adapter's weights on reload"
        where, fix = "adapter.target_modules", "Exclude the modules with that name in adapter.exclude_modules."
        if getattr(model.peft_config["default"], "bias", "none") == "all":
            where, fix = "adapter.bias", "Fully trained modules keep their biases; use lora_only or none."
        raise RecipeError.of(f"{what}: it reads one as {result.unexpected_keys[0]}", where, fix)


def _find_token_conflicts(
    model: PreTrainedModel, tokens: Iterable[str], targets: Sequence[str], whole: Sequence[str]
) -> list[Problem]:
    """Find adapter targets in which only the rows of added `tokens` are trained.

    This includes a head that shares the embedding's weight.
    """
    layers = set(tokens)
    output = model.get_output_embeddings() if layers and model.config.tie_word_embeddings else None
    layers |= {name for name, module in model.named_modules() if output is not None and module is output}
    return [
        Problem(
            f"{name} is trained only in the rows of model.add_tokens, but fully here",
            "adapter.modules_to_save" if any(ends_with([name], entry) for entry in whole) else "adapter.target_modules",
            "Omit it here, or omit model.add_tokens.",
        )
        for name in sorted(layers)
        if any(ends_with([name], entry) for entry in (*targets, *whole))
    ]


def adapter_settings(recipe: Recipe) -> list[object]:
    """Return the values that determine an adapter: its section, the dtype, and the content of `start_from`."""
    start = recipe.adapter.start_from
    content = hash_folder(find_adapter(Path(start))) if start else None
    return [recipe.adapter.model_dump(mode="json"), recipe.model.dtype, content]


def adapter_inputs(recipe: Recipe, model: ModelRef, examples: Examples) -> str:
    """Hash the inputs of the adapted model: the model, the examples (their labels), the seed, the adapter section."""
    contents = [model.content_hash, examples.content_hash, recipe.task_section()]
    return hash_value([*contents, recipe.seed, adapter_settings(recipe)])
