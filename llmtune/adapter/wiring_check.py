"""Check that an adapter is wired: it changes the output, can be switched off, and all its weights get gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from peft import LoraModel, PeftModel
from peft.tuners.lora.layer import ParamWrapper

from llmtune.adapter.target_modules import resolve_targets
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.model.causal_lm_loss import unwrap, virtual_logits
from llmtune.model.config import in_heads, linear_shapes
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.library_logging import hushed
from llmtune.model.towers import find_projectors
from llmtune.recipe.schema import Recipe
from llmtune.records import SelectedModel

_PROBE_TOKENS = 12
_PROBE_SAMPLES = 8000
"""Half a second at the sampling rate of speech models."""


SWITCHES_OFF = "switches_off"
"""Attribute of a probed model: whether switching the adapter off restores the base."""
_SAME = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Tolerance for rounding differences of scores, relative and absolute."""


class NotWiredError(RuntimeError):
    """The adapter has no effect: a bug, ours or a library's."""


def probe_scores(model: torch.nn.Module, selected: SelectedModel, recipe: Recipe) -> torch.Tensor:
    """Return the head outputs of `model` for a few tokens, in eval mode and without gradients."""
    device = selected.model.device
    dtype = resolve_dtype(recipe.model.dtype, device.type)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad(), compute_context(dtype, device.type), hushed():
        scores = _head_outputs(model, _probe_inputs(selected, recipe))
    for module, mode in modes.items():
        module.training = mode
    return scores


def prove_wiring(
    model: PeftModel, selected: SelectedModel, recipe: Recipe, before: torch.Tensor | None = None
) -> str | None:
    """Run a few tokens through the model to check its adapter; restore weights, modes and random state.

    `before` are the scores of the base, for methods not known to start as the base and to leave it unchanged. Returns
    a sentence if they do not.

    Raises:
        NotWiredError: moving the adapter's weights does not change the output, or the adapter cannot be switched off.
        EnvironmentProblem: the model's outputs are constant or not finite.
        RecipeError: some adapters get no gradient, such as those in a module that text does not reach.
    """
    device = selected.model.device
    inputs = _probe_inputs(selected, recipe)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    dtype = resolve_dtype(recipe.model.dtype, device.type)
    cuda = [device] if device.type == "cuda" else []
    start = None if before is None else probe_scores(model, selected, recipe)
    with torch.random.fork_rng(devices=cuda), compute_context(dtype, device.type), _moved(model) as moved:
        with hushed(), torch.no_grad(), model.disable_adapter():
            off = _head_outputs(model, inputs)
        _refuse_dead_base(off, selected)
        on = _head_outputs(model, inputs)
        if not moved or torch.equal(on.detach(), off):
            raise NotWiredError("moving the adapter's weights does not change the model's output")
        _send_gradient(on)
        fused = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ParamWrapper))
        dead = [name for name, parameter in model.named_parameters() if _is_dead(name, parameter, fused)]
        projectors = [f"base_model.model.{name}" for name in find_projectors(selected.model)]
        dead = [name for name in dead if not in_heads(name, projectors)]  # a text does not reach them
    for parameter in model.parameters():
        parameter.grad = None
    for module, mode in modes.items():
        module.training = mode
    if dead:
        raise RecipeError(_describe_dead(dead))
    if before is None or start is None:
        return None
    setattr(model, SWITCHES_OFF, torch.allclose(off, before, rtol=_SAME[dtype], atol=_SAME[dtype]))
    notes = (
        []
        if torch.allclose(start, before, rtol=_SAME[dtype], atol=_SAME[dtype])
        else ["does not start as the base model"]
    )
    notes += [] if getattr(model, SWITCHES_OFF) else ["changes the base model even when it is switched off"]
    return f"The adapter {' and '.join(notes)}: that is how {recipe.adapter.method} works." if notes else None


def _refuse_dead_base(scores: torch.Tensor, selected: SelectedModel) -> None:
    """Raise EnvironmentProblem if the base's outputs are useless: no adapter could be checked on it."""
    finite = bool(scores.isfinite().all())
    if finite and (scores.numel() == 1 or bool(scores.min() != scores.max())):
        return
    what = "all its outputs are equal" if finite else "its outputs are not finite numbers"
    fix = "Its weights or its configuration are damaged: download it again, or set model.dtype."
    raise EnvironmentProblem.of(f"the model computes nothing: {what}", str(selected.model_ref.path), fix)


def find_reached_targets(selected: SelectedModel, recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the modules that get an adapter, and those that `all-linear` skips because no input reaches them."""
    names = resolve_targets(selected.model, recipe.adapter)
    if recipe.adapter.target_modules != "all-linear" or recipe.adapter.method == "ln_tuning":
        return names, []
    reached = _find_reached(selected, recipe, names)
    if not reached:
        raise RecipeError.of("the input reaches no linear module", "adapter.target_modules", "Name the modules.")
    return [name for name in names if name in reached], [name for name in names if name not in reached]


def _find_reached(selected: SelectedModel, recipe: Recipe, names: Sequence[str]) -> set[str]:
    """Return the modules among `names` that contribute to an answer to a text: their outputs get a gradient.

    A pooling layer that the head skips does not, nor a layer that attends to images, nor a module whose weights another
    layer reads directly. Experts count as reached: not all of them get a token.
    """
    given: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def watch(name: str, _: object, inputs: tuple[torch.Tensor], output: object) -> torch.Tensor | None:
        # PEFT adds to a linear layer's output: not to a router's choice, nor to groups that are multiplied separately.
        if not isinstance(output, torch.Tensor) or output.shape != (*inputs[0].shape[:-1], widths[name]):
            return None
        given[name].append(torch.zeros_like(output, requires_grad=True))
        return output + given[name][-1]

    model, device = selected.model, selected.model.device
    widths = {name: outputs for name, (_, outputs) in linear_shapes(model).items()}
    hooks = [model.get_submodule(name).register_forward_hook(partial(watch, name)) for name in names]
    try:
        with compute_context(resolve_dtype(recipe.model.dtype, device.type), device.type):
            scores = _head_outputs(model, _probe_inputs(selected, recipe))
            _refuse_dead_base(scores.detach(), selected)
            if scores.requires_grad:  # otherwise nothing was reached
                _send_gradient(scores)
    finally:
        for hook in hooks:
            hook.remove()
    reached = {name for name, parts in given.items() if any(p.grad is not None and bool(p.grad.any()) for p in parts)}
    return reached | {name for name in names if "expert" in name}


def _send_gradient(scores: torch.Tensor) -> None:
    weights = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0)).to(scores.device)
    torch.autograd.backward((scores.float() * weights).sum())


@contextmanager
def _moved(model: PeftModel) -> Iterator[list[str]]:
    """Move the matrix of every adapter that starts at zero away from it; afterwards restore it bit for bit.

    This is B, and A for an embedding.
    """
    generator = torch.Generator().manual_seed(0)
    zero = (".lora_B.", ".lora_embedding_A.") if isinstance(model.base_model, LoraModel) else ("",)
    names = [name for name, p in model.named_parameters() if p.requires_grad and any(part in name for part in zero)]
    kept = {name: model.get_parameter(name).detach().clone() for name in names}
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name, start in kept.items():
                noise = torch.randn(start.shape, generator=generator) * (0.1 / max(1, start[0].numel()) ** 0.5)
                parameters[name].add_(noise.to(start.device, start.dtype))
        yield list(kept)
    finally:
        with torch.no_grad():
            for name, start in kept.items():
                parameters[name].copy_(start)


def _head_outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return all outputs of the head as one row of numbers."""
    takes_cache = "use_cache" in inspect.signature(type(unwrap(model)).forward).parameters
    output = model(**inputs, **({"use_cache": False} if takes_cache else {}))
    if "last_hidden_state" in output and "logits" not in output:
        return cast(torch.Tensor, output.last_hidden_state).reshape(-1)
    parts = (
        [output.logits[:, virtual_logits(model) :]] if "logits" in output else [output.start_logits, output.end_logits]
    )
    return torch.cat([part.reshape(-1) for part in parts])


def _probe_inputs(selected: SelectedModel, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return a small model input: tokens, or noise as a recording, and tokens for a decoder."""
    config, name = selected.model.config, selected.model.main_input_name
    generator = torch.Generator().manual_seed(0)
    ids_BT = _probe_ids(selected, recipe)
    if name == "input_features":
        frames = 2 * config.max_source_positions
        heard = {name: torch.randn((1, config.num_mel_bins, frames), generator=generator)}
    elif name == "input_values":
        heard = {name: torch.randn((1, _PROBE_SAMPLES), generator=generator)}
    else:
        heard = {"input_ids": ids_BT}
    inputs = heard | ({"decoder_input_ids": ids_BT} if config.is_encoder_decoder else {})
    return {name: part.to(selected.model.device) for name, part in inputs.items()}


def _probe_ids(selected: SelectedModel, recipe: Recipe) -> torch.Tensor:
    """Return token ids spread over the vocabulary, and those that the recipe adds: [1, T]."""
    size = min(len(selected.processor), selected.model.config.get_text_config().vocab_size)
    ids = [size * (i + 1) // (_PROBE_TOKENS + 1) for i in range(_PROBE_TOKENS)]
    adapter_options = recipe.adapter.options  # activated LoRA acts after its tokens, others at theirs
    ids = [*adapter_options.get("alora_invocation_tokens", ()), *adapter_options.get("token_indices", ())[:8], *ids]
    ids += selected.processor.convert_tokens_to_ids(list(recipe.model.add_tokens))
    return torch.tensor([ids])


def _is_dead(name: str, parameter: torch.nn.Parameter, fused: tuple[str, ...]) -> bool:
    """Whether a parameter wrongly lacks a gradient; unused experts and biases may lack one.

    GLoRA's D and E change a bias. `fused` are prefixes of adapters on all experts: some of those are reached.
    """
    apart = "expert" in name and not name.startswith(fused)
    if not parameter.requires_grad or apart or name.endswith("bias") or ".glora_D." in name or ".glora_E." in name:
        return False
    return parameter.grad is None or not bool(parameter.grad.isfinite().all()) or not bool(parameter.grad.any())


def _describe_dead(dead: list[str]) -> Problem:
    names = [name.removeprefix("base_model.model.").split(".lora_")[0] for name in dead]
    return Problem(
        f"{len(dead)} adapter weights get no gradient from text, such as those of {names[0]}",
        "adapter.target_modules",
        "Exclude these modules in adapter.exclude_modules.",
    )
