"""A model without its weights, and what it computes: built from its configuration, run on shapes alone."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open

from llmtune.explain.op_trace import Trace, trace_forward
from llmtune.explain.target import Subject
from llmtune.model.config import find_class, first_line
from llmtune.records import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
MASKS = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
"""By the name of a mask, the ids that it is for."""
UNRUNNABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError)
"""What models raise that look at numbers as they go."""
SHORTEST = 8
"""Tokens of a forward pass that shows how a model is wired; a model of speech reads its whole window."""


T = TypeVar("T")
Tensors = dict[str, torch.Tensor]


class UntraceableError(Exception):
    """The model cannot be run on shapes alone."""


@dataclass
class Blueprint:
    """A model whose parameters are on the meta device, and how to run it."""

    model: PreTrainedModel
    rebuild: Callable[[], PreTrainedModel]
    """Builds it again, with zeros that take no memory: for models that look at numbers as they go."""

    @cached_property
    def trace(self) -> Trace:
        """What it computes over a short text.

        Raises UntraceableError where it cannot be run.
        """
        return self.run(SHORTEST)

    def run(self, tokens: int) -> Trace:
        """Return what it computes over `tokens` tokens, of both halves of an encoder-decoder.

        Raises UntraceableError where it cannot be run.
        """
        return self._attempt(tokens, lambda model, inputs, settings: trace_forward(model, inputs, **settings))

    def inputs_of(self, block: str, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that one of its modules is called with, as tensors on the meta device.

        Raises UntraceableError where it cannot be run.
        """

        def reach(model: PreTrainedModel, inputs: Tensors, settings: dict[str, Any]) -> Any:
            def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                raise _Reached(args, kwargs)

            hook = model.get_submodule(block).register_forward_pre_hook(stop, with_kwargs=True)
            try:
                with torch.no_grad():
                    model(**inputs, **settings)
            except _Reached as reached:
                return reached.args[0], reached.args[1]
            finally:
                hook.remove()
            raise RuntimeError(f"{block} is not run")

        return cast("tuple[tuple[Any, ...], dict[str, Any]]", self._attempt(tokens, reach))

    def _attempt(self, tokens: int, action: Callable[[PreTrainedModel, Tensors, dict[str, Any]], T]) -> T:
        """Decoders want a mask where they have no cache, and encoders look at the numbers in a mask: try both ways."""
        reasons: list[str] = []
        for masked in (True, False, True):
            model = self.model if len(reasons) < 2 else self.rebuild()
            try:
                inputs, accepted = make_inputs(model, tokens), set(inspect.signature(model.forward).parameters)
                settings: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
                for mask, ids in MASKS.items():
                    if masked and mask in accepted and ids in inputs:
                        settings[mask] = torch.ones_like(inputs[ids])
                return action(model, inputs, settings)
            except UNRUNNABLE as error:
                reasons.append(first_line(error))
        raise UntraceableError(reasons[0])


class _Reached(Exception):
    """A forward pass has come to the module that was waited for."""


def draw_blueprint(subject: Subject) -> Blueprint:
    """Build the model of `subject` without weights, in the class that it is loaded in; of a run, that of its task."""
    folder = Path(subject.config.name_or_path)
    model_class, config = _find_class(subject, folder)

    def build() -> PreTrainedModel:
        own = copy.deepcopy(config)
        if hasattr(model_class, "from_config"):  # an Auto class
            options = {"trust_remote_code": bool(getattr(own, "auto_map", None)), "attn_implementation": "eager"}
            made = model_class.from_config(own, **options)
        else:
            made = model_class._from_config(own, attn_implementation="eager")
        _grow(made, subject)
        _choose_experts_blindly(made)
        return cast("PreTrainedModel", made.eval())

    def rebuild() -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            made = build()
        zeros: dict[int, torch.nn.Parameter] = {}
        for module in made.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in zeros:
                    wide = torch.zeros(()).expand(parameter.shape)
                    zeros[id(parameter)] = torch.nn.Parameter(wide, requires_grad=False)
                setattr(module, name, zeros[id(parameter)])
        return made

    with torch.device("meta"):
        model = build()
    _untie(model, folder)
    return Blueprint(model, rebuild)


def _find_class(subject: Subject, folder: Path) -> tuple[Any, Any]:
    if subject.task is not None and subject.recipe is not None:
        return find_class(ModelRef(subject.name, folder, None, ""), subject.recipe, subject.task)
    config = subject.config
    own = getattr(config, "auto_map", None) or {}
    if not type(config).__module__.startswith("transformers."):
        return getattr(transformers, next(name for name in own if name.startswith("AutoModel"))), config
    named = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
    return next((found for found in named if found is not None), transformers.AutoModel), config


def _grow(model: PreTrainedModel, subject: Subject) -> None:
    """Make room for the tokens that a recipe adds."""
    if subject.recipe is not None and subject.recipe.model.add_tokens:
        rows = model.get_input_embeddings().weight.shape[0]
        if len(subject.processor) > rows:
            model.resize_token_embeddings(len(subject.processor), mean_resizing=False)


def _choose_experts_blindly(model: PreTrainedModel) -> None:
    """Let experts be chosen without a look at numbers."""
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("batched_mm")


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
        placed = json.loads((folder / INDEX).read_text("utf-8")).get("weight_map", {})
        files = [folder / placed[name]] if name in placed else []
    for path in files:
        with safe_open(str(path), "pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a dict
                return cast(torch.Tensor, file.get_tensor(name))
    return None


def make_inputs(model: PreTrainedModel, tokens: int) -> dict[str, torch.Tensor]:
    """Return what the model reads for a text of `tokens` tokens: ids, or as many frames of a recording."""
    config, device = model.config, model.device
    ids = torch.ones((1, tokens), dtype=torch.long, device=device)
    name = model.main_input_name
    if name == "input_features":  # Whisper reads a window of one size
        inputs = {name: torch.zeros((1, config.num_mel_bins, 2 * config.max_source_positions), device=device)}
    elif name == "input_values":
        inputs = {name: torch.zeros((1, _count_samples(model, tokens)), device=device)}
    else:
        inputs = {"input_ids": ids}
    return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _count_samples(model: Any, frames: int) -> int:
    """Return how many samples of a recording make `frames` frames: the convolutions turned round."""
    samples = frames
    for size, stride in zip(reversed(model.config.conv_kernel), reversed(model.config.conv_stride), strict=True):
        samples = (samples - 1) * stride + size
    return samples
