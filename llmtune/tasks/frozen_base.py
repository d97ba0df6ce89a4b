"""The base without training: its features of texts, and a new head that starts at a regression on them.

Training begins where a classifier on the frozen base ends (Kumar et al., "Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution", 2022, arXiv 2202.10054). A random head needs many steps to get there, as
its weights move by about the learning rate in each.

Shapes: N training texts, H features, K outputs of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers.utils import ModelOutput

from llmtune.data.example import Example
from llmtune.data.task_interface import HeadStart
from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.intervals import Floats
from llmtune.evaluate.regression import TargetKind, compare_with_words, fit_head, name_fit
from llmtune.evaluate.token_batches import run_encoder
from llmtune.model.causal_lm_loss import unwrap
from llmtune.model.config import head_names, in_heads, is_encoder
from llmtune.model.device import compute_context, resolve_dtype
from llmtune.model.mean_layer import name_mean_layer
from llmtune.model.sentence_folder import read_settings
from llmtune.recipe.schema import Recipe
from llmtune.records import AdaptedModel
from llmtune.tasks.class_targets import ClassExample
from llmtune.tasks.sentence_vectors import pool

TRAINED_COPY = ".modules_to_save.default"
"""How PEFT names the copy of a module that it trains."""


def read_features(examples: Sequence[Example], loaded: LoadedModel) -> list[Floats]:
    """Return the base's vector of each text, pooled as the base was trained: else mean, or a decoder's last token.

    Raises RecipeError if the base pools in a way that llmtune does not know.
    """
    body = unwrap(loaded.model).base_model
    pooling = read_settings(Path(body.config.name_or_path)).pooling
    mode = pooling or ("mean" if is_encoder(body.config) else "lasttoken")
    body.config.output_hidden_states = added = bool(name_mean_layer(unwrap(loaded.model)))

    def read(i: int, output: ModelOutput, row: int) -> Floats:
        hidden_BTD = output.hidden_states[-2] if added else output.last_hidden_state
        return np.asarray(pool(hidden_BTD[row, : len(examples[i].input_ids)], mode).double().cpu())

    return run_encoder(body, examples, loaded.processor.pad_token_id, loaded.device, read, loaded.advance)


def find_new_layer(adapted: AdaptedModel, outputs: int) -> torch.nn.Linear | None:
    """Return the last linear layer of a new head with this many outputs; None if the head is not new."""
    heads = head_names(adapted.selected.model)
    found = None
    for name, module in adapted.selected.model.named_modules():
        plain = name.replace(TRAINED_COPY, "")
        is_new = in_heads(plain, heads) and f"{plain}.weight" in adapted.selected.new_weights
        if is_new and "original_module" not in name and isinstance(module, torch.nn.Linear):
            found = module if module.out_features == outputs else found
    return found


def start_at_regression(
    adapted: AdaptedModel,
    examples: Sequence[ClassExample],
    kind: TargetKind,
    outputs: int,
    recipe: Recipe,
    *,
    whole: bool,
) -> HeadStart | None:
    """Set the head's last layer to a regression of the labels on what it reads; return what was fitted.

    None, and no change, if the head is not new or has no linear layer at its end, or if all labels are equal. A model
    that is not `whole` cannot be run: its numbers start at their mean, as training would mostly move the bias.
    """
    layer = find_new_layer(adapted, outputs)
    targets = np.array([example.values or example.class_ids for example in examples])
    targets = targets if kind == "multi" else targets[:, 0]
    if layer is None or (whole and len(np.unique(targets, axis=0)) < 2):
        return None
    if whole:
        weights_N = np.array([example.weights[0] for example in examples]) if len(examples[0].weights) else None
        features_NH = read_head_inputs(adapted, layer, examples, recipe)
        weights_KH, biases_K, strength = fit_head(kind, features_NH, targets, outputs, weights_N)
        layer.weight.data.copy_(torch.from_numpy(weights_KH))
    else:
        biases_K = np.array([targets.mean()] if kind == "regression" else [0.0] * outputs)
    if layer.bias is not None:
        layer.bias.data.copy_(torch.from_numpy(biases_K))
    if not whole:
        return None
    note = name_fit(kind, "the base's features", len(examples), len(examples), strength)
    if kind == "regression":
        return HeadStart(note)
    texts = adapted.selected.processor.batch_decode([one.input_ids for one in examples], skip_special_tokens=True)
    told, warning = compare_with_words(kind, features_NH, texts, targets)
    return HeadStart(f"{note}{told}", warning)


def read_head_inputs(
    adapted: AdaptedModel, layer: torch.nn.Linear, examples: Sequence[Example], recipe: Recipe
) -> Floats:
    """Return what the layer gets [N, H] for each text; of a layer that reads every token, the text's last."""
    latest: dict[str, torch.Tensor] = {}
    hook = layer.register_forward_pre_hook(lambda _, given: latest.update(features=given[0]))
    model, device = adapted.model, str(layer.weight.device)
    pad_id = getattr(adapted.selected.processor, "pad_token_id", None)
    trained = model.training
    model.eval()

    def read(i: int, output: ModelOutput, row: int) -> Floats:
        features = latest["features"][row]
        last = features[len(examples[i].input_ids) - 1] if features.dim() == 2 else features
        return np.asarray(last.double().cpu())

    try:
        with torch.inference_mode(), compute_context(resolve_dtype(recipe.model.dtype, device), device):
            return np.stack(run_encoder(model, examples, pad_id, device, read))
    finally:
        hook.remove()
        model.train(trained)
