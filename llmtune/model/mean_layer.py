"""Mean pooling for classes of transformers that read the first token: one more layer, whose first token averages all.

A sentence encoder was trained with the mean of its token vectors, but `BertForSequenceClassification` reads the first
token through a pooler that was never trained. In the layer added here, queries and keys are nearly zero, so that each
token attends to all of them equally; values are copied and scaled up, so that the residual connection hardly counts;
and the feed-forward part adds nearly nothing. The first token then has the mean, normalised, and the pooler passes it
on. The model stays a plain one of its class, with one layer more, which is trained with the head.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmtune.errors import RecipeError
from llmtune.model.sentence_folder import read_settings

MARK = "averages_tokens"
"""Attribute of a configuration whose last layer was added."""
QUIET = 0.05
"""The share of random weights that stays: with none they would get no gradient."""
LOUDER = 16.0
"""The mean's size relative to the residual connection."""
LINEAR = 0.25
"""The pooler's scale: its tanh is nearly linear there."""


def add_mean_layer(config: PretrainedConfig) -> None:
    """Count one more layer in the configuration of a BERT that was trained with mean pooling, in place.

    Raises EnvironmentProblem if its files about pooling are damaged.
    """
    if config.model_type != "bert" or hasattr(config, MARK):
        return
    with suppress(RecipeError):  # it pools in a way that llmtune does not know
        if read_settings(Path(config.name_or_path)).pooling == "mean":
            config.num_hidden_layers += 1
            setattr(config, MARK, True)


def name_mean_layer(model: PreTrainedModel) -> list[str]:
    """Return the names of the added layer and of the pooler after it; empty without one."""
    if not hasattr(model.config, MARK):
        return []
    prefix = model.base_model_prefix
    return [f"{prefix}.encoder.layer.{model.config.num_hidden_layers - 1}", f"{prefix}.pooler"]


@torch.no_grad()
def initialize_mean_layer(model: PreTrainedModel) -> None:
    """Set the weights of the added layer and of the pooler, in place; those of a new layer are random before."""
    layer, pooler = (model.get_submodule(name) for name in name_mean_layer(model))
    for name in ("attention.self.query", "attention.self.key", "output.dense"):
        layer.get_submodule(name).weight.mul_(QUIET)
    torch.nn.init.eye_(layer.get_submodule("attention.self.value").weight)
    torch.nn.init.eye_(layer.get_submodule("attention.output.dense").weight).mul_(LOUDER)
    torch.nn.init.eye_(pooler.get_submodule("dense").weight).mul_(LINEAR)
    torch.nn.init.zeros_(pooler.get_submodule("dense").bias)
