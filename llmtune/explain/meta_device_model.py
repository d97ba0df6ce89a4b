"""A model without its weights: built from its configuration, and run on shapes alone."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from llmtune.explain.block_wiring import Recording, record
from llmtune.explain.target import Target
from llmtune.model.config import find_class, first_line
from llmtune.records import ModelRef

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

INDEX = "model.safetensors.index.json"
MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
"""By the name of a mask, the ids that it is for."""
UNRUNNABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError)
"""What models raise that look at numbers as they run."""
SHORTEST = 8
"""Tokens of a forward pass that shows how a model is wired; a model of speech reads its whole window."""

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
Arguments = tuple[tuple[object, ...], dict[str, object]]
FlopCounts = dict[str, dict[str, int]]
"""By the name of a module ("" is the whole model) and the name of an operation."""


class UntraceableError(Exception):
    """The model cannot be run on shapes alone."""


@dataclass
class MetaModel:
    """A model whose parameters are on the meta device, and how to run it."""

    model: PreTrainedModel
    rebuild: Callable[[], PreTrainedModel]
    """Builds it again, with zeros that take no memory: for models that look at numbers as they run."""

    @cached_property
    def recording(self) -> Recording:
        """A forward pass over a short text, with autograd's graph; raises UntraceableError if it cannot be run."""
        return self._run(SHORTEST, record)

    def count_flops(self, tokens: int) -> FlopCounts:
        """Return the floating-point operations of a forward pass, of both halves of an encoder-decoder.

        Raises UntraceableError where it cannot be run.
        """
        return self._run(tokens, _count_flops)

    def arguments_of(self, module: str, tokens: int) -> Arguments:
        """Return the arguments that one of its modules is called with, as tensors on the meta device.

        Raises UntraceableError where it cannot be run.
        """

        def run_up_to(model: PreTrainedModel, inputs: dict[str, object]) -> Arguments:
            def stop(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> NoReturn:
                raise _Reached(args, kwargs)

            hook = model.get_submodule(module).register_forward_pre_hook(stop, with_kwargs=True)
            try:
                with torch.no_grad():
                    model(**inputs)
            except _Reached as reached:
                return reached.arguments
            finally:
                hook.remove()
            raise RuntimeError(f"{module} is not run")

        return self._run(tokens, run_up_to)

    def _run(self, tokens: int, action: Callable[[PreTrainedModel, dict[str, object]], T]) -> T:
        """Decoders need a mask where they have no cache, and encoders look at the numbers in a mask: try both ways."""
        reasons: list[str] = []
        for masked in (True, False, True):
            model = self.model if len(reasons) < 2 else self.rebuild()
            try:
                tensors, accepted = make_inputs(model, tokens), set(inspect.signature(model.forward).parameters)
                inputs: dict[str, object] = {**tensors}
                if "use_cache" in accepted:
                    inputs["use_cache"] = False
                for mask, ids in MASKS.items():
                    if masked and mask in accepted and ids in tensors:
                        inputs[mask] = torch.ones_like(tensors[ids])
                return action(model, inputs)
            except UNRUNNABLE as error:
                reasons.append(first_line(error))
        raise UntraceableError(reasons[0])


class _Reached(Exception):
    """A forward pass has come to the module that was waited for."""

    def __init__(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        super().__init__()
        self.arguments: Arguments = (args, kwargs)


def _count_flops(model: PreTrainedModel, inputs: dict[str, object]) -> FlopCounts:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    whole = type(model).__name__
    counts = {
        name.removeprefix(whole).removeprefix("."): {str(operation): int(flops) for operation, flops in found.items()}
        for name, found in counter.get_flop_counts().items()
        if name.startswith(whole)
    }
    return {**counts, "": {"all": int(counter.get_total_flops())}}


def build_meta_model(target: Target) -> MetaModel:
    """Build the target's model without weights, in the class that it is loaded in; of a run, that of its task."""
    folder = Path(target.config.name_or_path)
    model_class, config = _find_class(target, folder)

    def build() -> PreTrainedModel:
        own = copy.deepcopy(config)
        if hasattr(model_class, "from_config"):  # an Auto class
            trusted = bool(getattr(own, "auto_map", None))
            model = model_class.from_config(own, trust_remote_code=trusted, attn_implementation="eager")
        else:
            model = model_class._from_config(own, attn_implementation="eager")
        grows = target.recipe is not None and bool(target.recipe.model.add_tokens)
        if grows and len(target.processor) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(target.processor), mean_resizing=False)
        if getattr(model.config, "_experts_implementation", None) is not None:
            model.set_experts_implementation("batched_mm")  # experts are chosen without a look at numbers
        return cast("PreTrainedModel", model.eval())

    def rebuild() -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            model = build()
        zeros: dict[int, torch.nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                zero = torch.nn.Parameter(torch.zeros(()).expand(parameter.shape))
                setattr(module, name, zeros.setdefault(id(parameter), zero))
        return model

    with torch.device("meta"):
        model = build()
    _untie(model, folder)
    return MetaModel(model, rebuild)


def _find_class(target: Target, folder: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    if target.task is not None and target.recipe is not None:
        return find_class(ModelRef(target.name, folder, None, ""), target.recipe, target.task)
    config = target.config
    own = getattr(config, "auto_map", None) or {}
    if not type(config).__module__.startswith("transformers."):
        return getattr(transformers, next(name for name in own if name.startswith("AutoModel"))), config
    named = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
    return next((known for known in named if known is not None), transformers.AutoModel), config


def _untie(model: PreTrainedModel, folder: Path) -> None:
    """Part what the configuration ties and the files hold as two different tensors; so does transformers on loading."""
    for second, first in (model.all_tied_weights_keys or {}).items():
        pair = [_read_stored(folder, name) for name in (first, second)]
        if pair[0] is not None and pair[1] is not None and not torch.equal(pair[0], pair[1]):
            owner, _, name = second.rpartition(".")
            with torch.device("meta"):
                setattr(model.get_submodule(owner), name, torch.nn.Parameter(torch.empty(pair[1].shape)))


def _read_stored(folder: Path, name: str) -> torch.Tensor | None:
    """Read one tensor of a model folder, or None where its files do not hold it under this name."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        by_name = json.loads((folder / INDEX).read_text("utf-8")).get("weight_map", {})
        files = [folder / by_name[name]] if name in by_name else []
    for path in files:
        with safe_open(str(path), "pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a dict
                return cast(torch.Tensor, file.get_tensor(name))
    return None


def make_inputs(model: PreTrainedModel, tokens: int) -> Tensors:
    """Return what the model reads for a text of `tokens` tokens: ids, or as many frames of a recording."""
    config, device = model.config, model.device
    ids = torch.ones((1, tokens), dtype=torch.long, device=device)
    name = model.main_input_name
    if name == "input_features":  # Whisper reads a window of one size
        inputs = {name: torch.zeros((1, config.num_mel_bins, 2 * config.max_source_positions), device=device)}
    elif name == "input_values":
        samples = tokens  # those that make so many frames: the convolutions turned round
        for size, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + size
        inputs = {name: torch.zeros((1, samples), device=device)}
    else:
        inputs = {"input_ids": ids}
    return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
