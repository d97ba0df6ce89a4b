"""A model without its weights: built from its configuration in fake tensors, and run on shapes alone."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from llmtune.errors import first_line
from llmtune.explain.explainer import Target
from llmtune.explain.module_tree import Unit, find_units
from llmtune.explain.trained_modules import read_tensor, tensor_files
from llmtune.model.config import architecture_class, find_class
from llmtune.model.processor import count_ids
from llmtune.records import ModelRef

UNRUNNABLE = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError)
"""What models raise that look at numbers as they run."""
SHORTEST = 8
"""Tokens of the text; a model of speech reads its whole window."""
logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # it logs what cannot be run, before raising


class UntraceableError(Exception):
    """The model cannot be run on shapes alone, or its cost is no polynomial of the length."""


@dataclass(frozen=True)
class FakeModel:
    """A model whose tensors have shapes and no numbers."""

    model: PreTrainedModel
    mode: FakeTensorMode

    def run(self, tokens: int) -> Any:
        """Return what the model gives for a text of `tokens` tokens; raises UntraceableError if it cannot be run."""
        try:
            with self.mode, torch.no_grad():
                inputs: dict[str, Any] = {**shape_inputs(self.model, tokens)}
                if "use_cache" in inspect.signature(self.model.forward).parameters:
                    inputs["use_cache"] = False
                return self.model(**inputs)
        except UNRUNNABLE as error:
            raise UntraceableError(first_line(error)) from error

    def record_calls(self) -> tuple[list[Unit], tuple[int, ...]]:
        """Return the units in the order in which a text passes them, and the shape of the logits.

        Raises UntraceableError where the model cannot be run on shapes.
        """
        calls: list[Unit] = []
        with ExitStack() as hooks:
            for unit in find_units(self.model):
                hook = unit.module.register_forward_pre_hook(lambda *_, unit=unit: calls.append(unit))
                hooks.callback(hook.remove)
            logits = getattr(self.run(SHORTEST), "logits", None)
        return calls, tuple(getattr(logits, "shape", ()))


def build_fake_model(target: Target) -> FakeModel:
    """Build the target's model without weights, in the class that it is loaded in; of a run, that of its task."""
    folder = Path(target.config.name_or_path)
    if target.task is not None and target.recipe is not None:
        model_class, config = find_class(ModelRef(target.name, folder, None, ""), target.recipe, target.task)
    else:
        own_code = not type(target.config).__module__.startswith("transformers.")
        model_class, config = architecture_class(target.config, own_code), copy.deepcopy(target.config)

    def build() -> PreTrainedModel:
        if hasattr(model_class, "from_config"):  # an Auto class
            own_code = bool(getattr(config, "auto_map", None))
            return model_class.from_config(config, trust_remote_code=own_code, attn_implementation="eager")
        return model_class._from_config(config, attn_implementation="eager")

    fake = fake_model(build)
    untied = find_untied(fake.model, folder)
    with fake.mode, torch.no_grad():
        for name in untied:
            owner, _, last = name.rpartition(".")
            weight = fake.model.get_parameter(name)
            setattr(fake.model.get_submodule(owner), last, torch.nn.Parameter(torch.empty(weight.shape)))
        grows = target.recipe is not None and bool(target.recipe.model.add_tokens)
        if grows and (needed := count_ids(target.processor)) > fake.model.get_input_embeddings().weight.shape[0]:
            fake.model.resize_token_embeddings(needed, mean_resizing=False)
    return fake


def fake_model(build: Callable[[], PreTrainedModel]) -> FakeModel:
    """Build a model in fake tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, no_init_weights():
        model = build().eval()
    with mode:
        model.tie_weights()
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("batched_mm")  # experts are chosen without a look at numbers
    return FakeModel(cast("PreTrainedModel", model), mode)


def find_untied(model: PreTrainedModel, folder: Path) -> list[str]:
    """Return what the configuration ties and the files hold as a tensor of its own; so does transformers on loading."""
    files = tensor_files(folder)
    return [
        second
        for second, first in (model.all_tied_weights_keys or {}).items()
        if first in files
        and second in files
        and not torch.equal(read_tensor(files[first], first), read_tensor(files[second], second))
    ]


def shape_inputs(model: PreTrainedModel, tokens: int) -> dict[str, torch.Tensor]:
    """Return what the model reads for a text of `tokens` tokens: ids, or as many frames of a recording."""
    config = model.config
    ids = torch.ones((1, tokens), dtype=torch.long)
    name = model.main_input_name
    if name == "input_features":  # Whisper reads a window of one size
        inputs = {name: torch.zeros((1, config.num_mel_bins, 2 * config.max_source_positions))}
    elif name == "input_values":
        samples = tokens  # those that make so many frames: the convolutions turned round
        for size, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + size
        inputs = {name: torch.zeros((1, samples))}
    else:
        inputs = {"input_ids": ids}
    return inputs | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
