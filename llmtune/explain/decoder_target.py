"""What the decoder of an encoder-decoder reads: the text of --target, or the model's own greedy answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llmtune.evaluate.evaluated_task import LoadedModel
from llmtune.evaluate.generation import only_these_settings
from llmtune.explain.inputs import AttentionRequest, ModelInputs, fit_tokens, is_whisper, transcript_ids
from llmtune.explain.target import Target
from llmtune.model.model_inputs import decoder_inputs
from llmtune.tasks.text_to_text import decoder_settings, generate, target_ids, write_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_ANSWER = 64


def decode_target(
    model: PreTrainedModel, inputs: ModelInputs, target: Target, request: AttentionRequest
) -> tuple[list[int], str]:
    """Return the tokens that the decoder reads, and the text: --target, or the model's own greedy answer."""
    assert inputs.pair is not None, "an encoder-decoder reads and writes"
    text = inputs.pair.target
    if not text:
        text, request = _greedy_answer(model, inputs, target).strip(), replace(request, cut=True)
    pair = replace(inputs.pair, target=text)
    if is_whisper(target):
        return fit_tokens(transcript_ids(pair, target), "--target", target, request), text
    labels, _, end = target_ids(pair, target.processor)
    shifted = decoder_inputs(model, torch.tensor([labels], device=model.device))[0].tolist()
    return fit_tokens([int(i) for i in shifted[:end]], "--target", target, request), text


def _greedy_answer(model: PreTrainedModel, inputs: ModelInputs, target: Target) -> str:
    """Let the model write; an answer that is looked at is a short one."""
    greedy = {"max_new_tokens": LONGEST_ANSWER, "do_sample": False, "num_beams": 1}
    generation = type(inputs.recipe.generation).model_validate(greedy)
    recipe, device = inputs.recipe.model_copy(update={"generation": generation}), str(model.device)
    processor, pair = target.processor, inputs.pair
    assert pair is not None
    with torch.inference_mode():
        if not is_whisper(target):
            return write_targets([pair], LoadedModel(model, processor, recipe, device))[0]
        prefix = list(processor.prefix_tokens)
        features = inputs.tensors["input_features"].to(device)
        tensors = {"input_features": features, "decoder_input_ids": torch.tensor([prefix], device=device)}
        tensors["attention_mask"] = torch.ones((1, features.shape[-1]), dtype=torch.int64, device=device)
        with only_these_settings(model) as own:
            settings = decoder_settings(own, model, processor, recipe)
            settings.max_new_tokens = min(LONGEST_ANSWER, target.config.max_target_positions - len(prefix))
            written_1T = generate(model, tensors, settings)
        return str(processor.decode(written_1T[0, len(prefix) :].tolist(), skip_special_tokens=True))
