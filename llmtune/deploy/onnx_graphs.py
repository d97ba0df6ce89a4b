"""The ONNX graphs of a model: examples of their inputs, traced by torch's exporter, and their weights in int8.

Shapes of the examples: B rows, T tokens, P tokens in the cache, S positions of the encoder.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from llmtune.deploy.failure_causes import LayerDifference
from llmtune.deploy.onnx_model import (
    CROSS,
    DECODER,
    ENCODER,
    MODEL,
    PRESENT,
    fill_cache,
    name_states,
)
from llmtune.deploy.onnx_session import PAST
from llmtune.deploy.parity_reference import HeadReference, TunedReference
from llmtune.errors import EnvironmentProblem, RecipeError, first_line
from llmtune.evaluate.greedy_decoding import cache_argument
from llmtune.model.causal_lm_loss import accepted_arguments, model_inputs
from llmtune.model.config import is_encoder
from llmtune.model.device import is_out_of_memory
from llmtune.model.library_logging import silent

LARGEST_FILE = 1.5e9
"""Bytes of weights up to which a graph is one file; protobuf ends at 2 GB."""
FLOAT32_SHARE = 0.25
"""Largest share of an encoder's linear layers that an int8 graph may keep in float32."""
GraphInputs = Mapping[str, torch.Tensor]
FindDifference = Callable[[Path, Mapping[str, str]], LayerDifference | None]
"""Finds the layer of an int8 graph that rounding changed too much, given the outputs of layers by module name."""


@dataclass(frozen=True)
class Graph:
    """One ONNX file: examples of its inputs, its outputs, and the part of the model that computes them."""

    file: str
    inputs: dict[str, torch.Tensor]
    outputs: Sequence[str]
    run: Callable[[GraphInputs], Iterable[torch.Tensor]]

    def sizes(self, name: str) -> dict[int, Any]:
        """Return the axes of an input whose sizes vary."""
        fixed = name == "input_features"  # a spectrogram always covers the same time
        axes = (0, 2) if name.startswith((PAST, CROSS)) else (0,) if fixed else (0, 1)
        return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)


class _Traced(torch.nn.Module):
    def __init__(self, model: PreTrainedModel, graph: Graph) -> None:
        super().__init__()
        self.model, self.graph = model, graph

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.graph.run(dict(zip(self.graph.inputs, values, strict=True))))


# The parts of a model


def list_graphs(model: PreTrainedModel, reference: TunedReference) -> list[Graph]:
    """Return the graphs of a model: one, or those of encoder and decoder."""
    if model.config.is_encoder_decoder:
        return _encoder_decoder_graphs(model)
    if reference.tuned.task.model_kind.decodes:
        return [_decoder_graph(model)]
    batch = cast(HeadReference, reference).batches[0]
    return [_head_graph(model, [*dict.fromkeys([*model_inputs(model, batch), "attention_mask"])])]


def _example_texts(model: PreTrainedModel, length: int) -> dict[str, torch.Tensor]:
    ids_BT = torch.arange(2 * length).reshape(2, length) % model.config.get_text_config(decoder=True).vocab_size
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, length - 2 :] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "token_type_ids": torch.zeros_like(ids_BT)}


def _head_graph(model: PreTrainedModel, names: Sequence[str]) -> Graph:
    """Return the graph of an encoder, or of a decoder with a head: class, tags, ends of answers, letters."""
    examples = _example_texts(model, 9)
    if "input_values" in names:
        examples = {"input_values": torch.randn(2, 20_000), "attention_mask": torch.ones(2, 20_000, dtype=torch.int64)}
    accepted = accepted_arguments(type(model))  # type: ignore[arg-type]
    options = {"use_cache": False} if "use_cache" in accepted else {}

    def run(inputs: GraphInputs) -> list[torch.Tensor]:
        output = model(**inputs, **options)
        return [output[name] for name in outputs]

    outputs = ["start_logits", "end_logits"] if hasattr(model, "qa_outputs") else ["logits"]
    if model.base_model is model:
        outputs = ["last_hidden_state"]
    return Graph(MODEL, {name: examples[name] for name in names if name in accepted}, outputs, run)


def _decoder_graph(model: PreTrainedModel) -> Graph:
    """Return the graph of a decoder: tokens and the cache of earlier ones -> logits, and the cache of all."""
    cache_name = cache_argument(type(model))
    with torch.no_grad():
        example = model(input_ids=_example_texts(model, 4)["input_ids"], use_cache=True)[cache_name]
    if not isinstance(example, DynamicCache):
        raise _other_cache(model)
    past = name_states(PAST, example)
    ids_BT, positions_BT = _example_texts(model, 3)["input_ids"], torch.arange(4, 7).repeat(2, 1)
    mask_BT = torch.ones(2, 7, dtype=torch.int64)
    mask_BT[1, 0] = 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
    if "position_ids" not in accepted_arguments(type(model)):  # type: ignore[arg-type]
        del inputs["position_ids"]

    def run(given: GraphInputs) -> Iterable[torch.Tensor]:
        cache = fill_cache({name: given[name] for name in past})
        plain = {name: given[name] for name in inputs}
        output = model(**plain, **{cache_name: cache}, use_cache=True)
        return output.logits, *name_states(PRESENT, output[cache_name]).values()

    outputs = ["logits", *(name.replace(PAST, PRESENT) for name in past)]
    return Graph(MODEL, {**inputs, **past}, outputs, run)


def _encoder_decoder_graphs(model: PreTrainedModel) -> list[Graph]:
    """Return both graphs; the encoder also computes the keys and values that every decoder step attends to.

    For them the encoder's graph takes one decoder step. The exporter removes the rest of this step.
    """
    encoder, cache_name = model.get_encoder(), cache_argument(type(model))
    heard = model.main_input_name == "input_features"
    frames = {"input_features": torch.randn(2, *_spectrogram(model))} if heard else {}
    texts = {name: part for name, part in _example_texts(model, 9).items() if name != "token_type_ids"}
    inputs = frames or texts
    start_BT = torch.full((2, 1), int(model.config.decoder_start_token_id or 0))

    def read(given: GraphInputs) -> tuple[torch.Tensor, Any]:
        hidden_BSD = encoder(**given)[0]
        masks = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
        ids_BT = start_BT[:1].expand(hidden_BSD.shape[0], 1)
        output = model(encoder_outputs=BaseModelOutput(hidden_BSD), decoder_input_ids=ids_BT, use_cache=True, **masks)
        return hidden_BSD, output[cache_name]

    with torch.no_grad():
        hidden_BSD, example = read(inputs)
    if not isinstance(example, EncoderDecoderCache):
        raise _other_cache(model)
    past, cross = name_states(PAST, example.self_attention_cache), name_states(CROSS, example.cross_attention_cache)
    past = {name: torch.cat([part] * 4, 2) for name, part in past.items()}
    width = hidden_BSD.shape[-1]

    def encode(given: GraphInputs) -> Iterable[torch.Tensor]:
        hidden_BSD, cache = read(given)
        return hidden_BSD, *name_states(CROSS, cache.cross_attention_cache).values()

    def decode(given: GraphInputs) -> Iterable[torch.Tensor]:
        states = {name: given[name] for name in cross}
        cache = EncoderDecoderCache(fill_cache({name: given[name] for name in past}), fill_cache(states))
        cache.is_updated = dict.fromkeys(range(len(states) // 2), True)
        first = states[next(iter(cross))]
        unread_BSD = first.new_zeros(first.shape[0], first.shape[2], width)  # only its shape is used
        masks = {"attention_mask": given["encoder_attention_mask"]} if "encoder_attention_mask" in given else {}
        output = model(
            encoder_outputs=BaseModelOutput(unread_BSD),
            decoder_input_ids=given["input_ids"],
            use_cache=True,
            **{cache_name: cache},
            **masks,
        )
        return output.logits, *name_states(PRESENT, output[cache_name].self_attention_cache).values()

    given = {"input_ids": _example_texts(model, 3)["input_ids"]}
    given |= {} if heard else {"encoder_attention_mask": texts["attention_mask"]}
    written = ["logits", *(name.replace(PAST, PRESENT) for name in past)]
    return [
        Graph(ENCODER, inputs, ["last_hidden_state", *cross], encode),
        Graph(DECODER, {**given, **past, **cross}, written, decode),
    ]


def _spectrogram(model: PreTrainedModel) -> tuple[int, int]:
    return model.config.num_mel_bins, 2 * model.config.max_source_positions


def _other_cache(model: PreTrainedModel) -> RecipeError:
    what = f"ONNX export keeps keys and values, but {model.config.model_type} has another cache"
    error = RecipeError.of(what, "deploy", "Use the merged model of `llmtune deploy merge`.")
    return cast(RecipeError, error)


# Files


@dataclass(frozen=True)
class WrittenGraph:
    """The layers of a graph in its file."""

    layers: dict[str, str]
    """Names of linear layers' outputs by module name; empty if the weights are in a file of their own."""
    float32_layers: list[str]
    """Linear layers of an int8 graph that stay in float32, because rounding changes their outputs too much."""


def write_graph(model: PreTrainedModel, graph: Graph, folder: Path, find: FindDifference | None) -> WrittenGraph:
    """Trace one graph and write it; in int8 with `find`, which finds layers that have to stay in float32.

    Raises EnvironmentProblem if torch cannot trace the model.
    """
    traced, values = _Traced(model, graph), tuple(graph.inputs.values())
    shapes = {"values": tuple(graph.sizes(name) for name in graph.inputs)}
    options: Any = {"dynamo": True, "verbose": False, "dynamic_shapes": shapes, "optimize": True}
    try:
        with torch.no_grad(), silent():
            program = torch.onnx.export(
                traced, values, input_names=[*graph.inputs], output_names=[*graph.outputs], **options
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        cause: BaseException = error  # the exporter's own errors only name the step
        while cause.__cause__ is not None:
            cause = cause.__cause__
        what = f"torch {torch.__version__} cannot export {model.config.model_type} to ONNX: {first_line(cause)}"
        raise EnvironmentProblem.of(what, None, "Use the merged model of `llmtune deploy merge`.") from error
    assert program is not None
    layers = {}
    for node in program.model.graph.all_nodes():
        *_, module, name = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
        if name.startswith(("linear", "addmm")):
            layers[module.removeprefix("model.")] = str(node.outputs[0].name)
        node.metadata_props.clear()  # paths of this machine
    weights = sum(part.numel() * part.element_size() for part in model.parameters())
    large = weights > LARGEST_FILE
    file = folder / graph.file
    program.save(file, external_data=large)
    if large:
        layers = {}  # they are read from a graph in one piece
    float32_names = (
        [] if find is None else quantize(file, layers, find, external=large, by_block=not is_encoder(model.config))
    )
    return WrittenGraph(_in_graph(file, layers), float32_names)


def _in_graph(file: Path, layers: Mapping[str, str]) -> dict[str, str]:
    """Return the layers whose outputs a graph has: constant folding removes some."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    outputs = {name for node in graph.node for name in node.output}
    return {module: name for module, name in layers.items() if name in outputs}


def quantize(
    file: Path, layers: Mapping[str, str], find: FindDifference, *, external: bool, by_block: bool
) -> list[str]:
    """Round the weights of a graph's matrix products to int8, in place; also the embeddings, unless `by_block`.

    Return the layers that stay in float32.

    With `by_block`, 32 weights, and 32 of the numbers that they are multiplied with, share a scale: single channels of
    decoders are so large that one scale per row hides the others. In SmolLM2 a mean KL of 1.0 became 0.012; with the
    embeddings in int8 it is 0.018, and the first choice agrees at 90 % of positions instead of 95 %.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folded, rounded = (file.with_name(f"{step}-{file.name}") for step in ("folded", "rounded"))
    float32_names: list[str] = []
    with silent():  # first, to transpose weights that two layers share
        quant_pre_process(file, folded, skip_symbolic_shape=True, save_as_external_data=external)
        if by_block:
            graph = onnx.load(folded)
            quantizer = MatMulNBitsQuantizer(graph, bits=8, block_size=32, is_symmetric=True, accuracy_level=4)
            quantizer.process()
            quantizer.model.save_model_to_file(str(rounded), external)
        else:
            float32_names = _round_channels(folded, rounded, _in_graph(folded, layers), find, external)
    for part in (*file.parent.glob(f"{file.name}*"), *file.parent.glob(f"{folded.name}*")):
        part.unlink()
    rounded.replace(file)
    return float32_names


def _round_channels(
    folded: Path, rounded: Path, layers: Mapping[str, str], find: FindDifference, external: bool
) -> list[str]:
    """Round with a scale per output channel, again for each layer that then differs too much: it stays in float32.

    Return these layers. The last graph still differs if they would be more than `FLOAT32_SHARE`.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    float32_names: list[str] = []
    products = _find_products(folded, layers)
    while True:
        quantize_dynamic(
            folded,
            rounded,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,  # 7 bits of weights: CPUs without VNNI add pairs of products in 16 bits
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[products[layer] for layer in float32_names],
            use_external_data_format=external,
        )
        difference = find(rounded, layers)
        if (
            difference is None or difference.layer not in products.keys() - float32_names
        ):  # its inputs may differ, not its weights
            return float32_names
        if len(float32_names) + 1 > FLOAT32_SHARE * len(layers):
            return float32_names
        float32_names.append(difference.layer)


def _find_products(file: Path, layers: Mapping[str, str]) -> dict[str, str]:
    """Return the name of each layer's matrix product: its output, or the output before the bias is added."""
    import onnx

    makers = {name: node for node in onnx.load(file, load_external_data=False).graph.node for name in node.output}
    products = {}
    for layer, output in layers.items():
        node = makers[output]
        if node.op_type == "Add":
            node = next((makers[name] for name in node.input if name in makers), node)
        if node.op_type in ("MatMul", "Gemm"):
            # quantize_dynamic first splits a Gemm
            products[layer] = node.name if node.op_type == "MatMul" else f"{node.name}_MatMul"
    return products
