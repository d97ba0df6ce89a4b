"""ONNX files in onnxruntime, called like the transformers model that they were made from.

Shapes: B rows, T tokens, P tokens in the cache, S positions of the encoder, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput

from llmtune.deploy.exported_model import ExportedModel, ModelSource, borrow_class, saved_processor
from llmtune.deploy.onnx_session import PAST, OnnxSession, Tensors
from llmtune.deploy.tuned_model import render_prompts, served_by_folder
from llmtune.errors import EnvironmentProblem
from llmtune.evaluate.greedy_decoding import cache_argument
from llmtune.model.causal_lm_loss import READ
from llmtune.model.config import find_class
from llmtune.store.atomic_files import read_json

MODEL, ENCODER, DECODER = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
PRESENT, CROSS = "present", "cross"
"""First part of the names of keys and values, next to PAST: of all tokens, and of the encoder's output."""


def read_inner_values(file: Path, layers: Mapping[str, str], given: Tensors) -> dict[str, torch.Tensor]:
    """Return the values of a graph by the names that `layers` maps to them, for a batch without padding."""
    outputs = OnnxSession(file, list(layers.values())).run(complete_texts(given))
    return {module: outputs[name] for module, name in layers.items()}


def open_onnx_export(path: Path, source: ModelSource) -> ExportedModel:
    """Open an ONNX file, or a folder of them, as this run's model.

    Labels and their order come from the folder's `config.json`, the tokenizer and the tokens that end answers from its
    files. Without these files, they come from the run.
    """
    folder = path if path.is_dir() else path.parent
    kind, config = find_class(source.model_ref, source.recipe, source.task)
    stated = read_json(folder / "config.json") or {}
    columns = order_labels(config, stated) if source.task.model_kind.has_head else None
    files = _find_graphs(path)
    sessions = [OnnxSession(file) for file in files]
    if len(sessions) == 2:
        model = _borrow_encoder_decoder(kind, config, *sessions)
    elif any(name.startswith(PAST) for name in sessions[0].inputs):
        model = borrow_class(kind, config, _continue_texts(sessions[0], kind))
    else:
        text = config.get_text_config()
        widths = (config.num_labels, text.vocab_size, text.hidden_size)
        sessions[0].check_head(widths, source.task.model_kind)
        model = borrow_class(kind, config, _read_heads(sessions[0], columns))
    settings = next((one for one in (folder, source.model_ref.path) if (one / GENERATION_CONFIG_NAME).is_file()), None)
    if settings is not None:
        model.generation_config = GenerationConfig.from_pretrained(settings)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    processor = saved_processor(folder, source.model_ref, source.recipe.model) if has_tokenizer else source.processor
    served = partial(served_by_folder, folder) if has_tokenizer else partial(render_prompts, processor=processor)
    coarsest = next((one for one in sessions if one.is_rounded()), sessions[0])
    return ExportedModel("onnx", coarsest.runtime, model, processor, path, coarsest.limits(), served)


def _find_graphs(path: Path) -> list[Path]:
    """Return the file of a model, or the files of its encoder and its decoder."""
    files = [path] if path.is_file() else sorted(path.glob("*.onnx"))
    if [file.stem for file in files] == [Path(DECODER).stem, Path(ENCODER).stem]:
        return files[::-1]
    if len(files) != 1:
        what = f"expected one ONNX file, found {len(files)}"
        raise EnvironmentProblem.of(what, str(path), "Give the path of the file.")
    return files


def order_labels(config: PretrainedConfig, stated: Mapping[str, Any]) -> list[int] | None:
    """Return for each of the run's labels the column of an export that states others; None if they are the same.

    The export's own labels are set in `config`, for its certificate. Raises EnvironmentProblem if they are not numbered
    from 0.
    """
    ours = dict(config.id2label)
    named = stated.get("id2label") or ours
    if not isinstance(named, Mapping) or {*map(str, named)} != {*map(str, range(len(named)))}:
        what = f"id2label does not number the labels from 0: {str(named)[:80]}"
        raise EnvironmentProblem.of(
            what, "config.json", 'Write {"0": FIRST, "1": SECOND}, in the order of the outputs.'
        )
    theirs = {int(number): str(name) for number, name in named.items()}
    if theirs == ours or all(name == f"LABEL_{i}" for i, name in theirs.items()):
        return None
    config.id2label = theirs
    columns = {name: number for number, name in theirs.items()}
    return [columns.get(name, i) for i, name in enumerate(ours.values())] if len(theirs) == len(ours) else None


def _read_heads(session: OnnxSession, columns: Sequence[int] | None) -> Callable[..., ModelOutput]:
    """Return the forward pass of an encoder, or of a decoder with a head."""

    def forward(self: PreTrainedModel, *first: torch.Tensor, **given: Any) -> ModelOutput:
        named = {**dict(zip(READ, first, strict=False)), **{name: given.get(name) for name in READ if name in given}}
        outputs = session.run(complete_texts(named))
        if len(outputs) > 1 and hasattr(self, "qa_outputs"):
            start, end = list(outputs.values())[:2]
            return ModelOutput(start_logits=start, end_logits=end)
        if "last_hidden_state" in outputs:
            return ModelOutput(last_hidden_state=outputs["last_hidden_state"])
        logits = next(iter(outputs.values()))
        return ModelOutput(logits=logits if columns is None else logits[..., list(columns)])

    return forward


def complete_texts(given: Tensors, length: int = 0) -> dict[str, torch.Tensor | None]:
    """Return the inputs of texts with a mask and positions, unless given; `length` tokens are in the cache."""
    ids_BT = given.get("input_ids")
    if ids_BT is None:
        return dict(given)
    rows, width = ids_BT.shape
    mask = ids_BT.new_ones(rows, length + width)
    defaults = {"attention_mask": mask, "position_ids": torch.arange(length, length + width).expand(rows, width)}
    return {**defaults, **{name: part.cpu() for name, part in given.items() if part is not None}}


def _continue_texts(session: OnnxSession, kind: type[PreTrainedModel]) -> Callable[..., CausalLMOutputWithPast]:
    """Return the forward pass of a decoder: texts [B, T] and a cache of [B, P] -> logits [B, T, V], and the cache."""
    name = cache_argument(kind)

    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        if attention_mask is not None and attention_mask.dim() > 2:
            raise ValueError("onnxruntime makes its own mask")
        past = read_cache(rest.get(name))
        length = next(iter(past.values())).shape[2] if past else 0
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = session.run({**complete_texts(given, length), **past})
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = outputs.pop("logits")[:, kept]
        return CausalLMOutputWithPast(logits=logits_BTV, **{name: fill_cache(outputs)})

    return forward


def _borrow_encoder_decoder(
    kind: type[PreTrainedModel], config: PretrainedConfig, reader: OnnxSession, writer: OnnxSession
) -> PreTrainedModel:
    """Return a model whose encoder and decoder are onnxruntime's."""
    name = cache_argument(kind)

    class Encoder(torch.nn.Module):
        main_input_name = kind.main_input_name

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            input_features: torch.Tensor | None = None,
            **rest: Any,
        ) -> BaseModelOutput:
            named = {"input_ids": input_ids, "attention_mask": attention_mask, "input_features": input_features}
            outputs = reader.run(named)
            output = BaseModelOutput(outputs.pop("last_hidden_state"))
            for key, part in outputs.items():  # entries of the output, so that beams repeat them
                output[key] = part
            return output

    encoder = Encoder()

    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | None = None,
        **rest: Any,
    ) -> Seq2SeqLMOutput:
        if encoder_outputs is None:
            encoder_outputs = encoder(input_ids, attention_mask, rest.get("input_features"))
        given = {"input_ids": decoder_input_ids, "encoder_attention_mask": attention_mask, **encoder_outputs}
        if attention_mask is None and input_ids is not None:
            given["encoder_attention_mask"] = torch.ones_like(input_ids)
        cache = rest.get(name)
        outputs = writer.run({**given, **read_cache(cache and cache.self_attention_cache)})
        logits_BTV = outputs.pop("logits")
        return Seq2SeqLMOutput(logits=logits_BTV, **{name: EncoderDecoderCache(fill_cache(outputs), DynamicCache())})

    return borrow_class(kind, config, forward, get_encoder=lambda self, *args, **options: encoder)


def read_cache(cache: Any) -> dict[str, torch.Tensor]:
    """Return the keys and values of a cache by the names of a graph's inputs; none of an empty one.

    Raises ValueError for llmtune's own cache, which onnxruntime cannot write to.
    """
    if cache is None:
        return {}
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"onnxruntime does not write to a {type(cache).__name__}")
    return name_states(PAST, cache) if cache.get_seq_length() else {}


def name_states(prefix: str, cache: DynamicCache) -> dict[str, torch.Tensor]:
    """Return keys and values of all layers by the names of a graph's inputs and outputs."""
    states: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(cache.layers):
        states |= {f"{prefix}.{i}.key": layer.keys, f"{prefix}.{i}.value": layer.values}
    return states


def fill_cache(present: Mapping[str, torch.Tensor]) -> DynamicCache:
    """Return a cache of the keys and values that a graph returned."""
    states = list(present.values())
    return DynamicCache(zip(states[::2], states[1::2], strict=True))
