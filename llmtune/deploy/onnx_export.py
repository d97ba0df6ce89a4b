"""A tuned model as ONNX graphs for onnxruntime, in float32 or int8, certified against the tuned model.

Shapes of the examples that are traced: B rows, T tokens, P tokens in the cache, S positions of the encoder.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from llmtune.adapter.merging import check_mergeable
from llmtune.adapter.merging import merge_adapter as merge_weights
from llmtune.deploy.export_score import export_run
from llmtune.deploy.exported_model import weight_bytes
from llmtune.deploy.layer_comparison import find_first_difference, record_layers
from llmtune.deploy.merged_model import save_settings
from llmtune.deploy.onnx_model import (
    CROSS,
    DECODER,
    ENCODER,
    MODEL,
    PAST,
    PRESENT,
    cache_argument,
    open_onnx_export,
    read_layers,
)
from llmtune.deploy.onnx_scripts import SCRIPT, write_script
from llmtune.deploy.parity import (
    Certificate,
    Limits,
    check_output,
    describe_parity,
    find_breaches,
    write_certificate,
)
from llmtune.deploy.tuned_model import (
    HeadReference,
    TextReference,
    TunedModel,
    TunedReference,
    make_reference,
    training_base,
)
from llmtune.errors import EnvironmentProblem, Problem, RecipeError, first_line
from llmtune.model.causal_lm_loss import accepted_arguments, model_inputs, move_to, unwrap
from llmtune.model.config import find_class
from llmtune.model.device import explain_oom, is_out_of_memory
from llmtune.report.number_format import size
from llmtune.report.render_terminal import spinner
from llmtune.session import Plan, RunContext
from llmtune.store.atomic_files import explained, hash_file, staged

FORMAT_LIMITS = {
    "onnx": Limits(kl_floor=1e-5, kl_cap=1e-4, top1=0.99, logit_difference=0.05),
    "onnx-int8": Limits(kl_floor=3e-2, kl_cap=3e-2, top1=0.9),
}
LARGEST_FILE = 1.5e9
"""Bytes of weights up to which a graph is one file; protobuf ends at 2 GB."""
KEY_VALUE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Graph:
    """One ONNX file: examples of its inputs, its outputs, and the part of the model that computes them."""

    file: str
    inputs: dict[str, torch.Tensor]
    outputs: Sequence[str]
    run: Callable[[Tensors], Iterable[torch.Tensor]]

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


def make_onnx(context: RunContext, out: Path | None = None, *, int8: bool = False) -> Certificate:
    """Write a run's model as ONNX files, by default into `onnx/float32` or `onnx/int8` of the run.

    Raises:
        RecipeError: an adapter or model that cannot be exported, or `out` contains something else.
        EnvironmentProblem: a missing package, or torch cannot export the model.
        GateFailed: the files differ from the tuned model by more than the limits.
    """
    check_onnx(context.plan)
    folder = out or context.folder.path / "onnx" / ("int8" if int8 else "float32")

    def make(tuned: TunedModel, out: Path) -> Certificate:
        return export_onnx(tuned, out, context, int8=int8)

    return export_run(context, folder, make, open_onnx_export, splits=("test", "validation", "train"))


def check_onnx(plan: Plan) -> None:
    """Check packages and the model's architecture without loading weights."""
    EnvironmentProblem.collect(missing_packages())
    kind, config = find_class(plan.model_ref, plan.recipe, plan.task)
    text = config.get_text_config(decoder=True)
    others = {*(getattr(text, "layer_types", None) or ())} - KEY_VALUE_LAYERS
    if getattr(kind, "_is_stateful", False) or others:
        state = f" ({', '.join(sorted(others))})" if others else ""
        what = f"ONNX export keeps keys and values, but {config.model_type} has another state{state}"
        raise RecipeError.of(what, "deploy", "Use the merged model of `llmtune deploy merge`.")


def missing_packages() -> Iterable[Problem]:
    """Yield a problem if a package of the extra `onnx` is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        yield Problem(f"ONNX export needs {error.name}", None, "Run: pip install 'llmtune-cli[onnx]'")


def export_onnx(tuned: TunedModel, out: Path, context: RunContext, *, int8: bool = False) -> Certificate:
    """Write the graphs with everything that runs them into the folder `out`, and certify them.

    This consumes `tuned`. Return the certificate; on failure `out` stays empty.
    """
    RecipeError.collect(check_output(out))
    check_mergeable(tuned.adapted)
    selected, console = tuned.adapted.selected, context.console
    if not selected.quantized:
        tuned.model.float()
    with spinner(console, "asking the tuned model"):
        reference = make_reference(tuned)
        example = _example_inputs(reference)
        expected = record_layers(tuned.model, example) if example else {}
    name = "onnx-int8" if int8 else "onnx"
    memory = explain_oom(f"exporting {selected.model_ref.name}", str(tuned.model.device))
    with explained(out), memory, staged(out) as folder:
        with spinner(console, "merging and tracing"):
            onto = training_base(tuned.recipe, selected.model_ref)
            merged = merge_weights(tuned.adapted, onto).float().cpu().eval()
            save_settings(merged, tuned, folder, torch.float32)
            layers = {}
            for graph in list_graphs(merged, reference):
                layers = write_graph(merged, graph, folder, int8)
            write_script(merged, tuned, folder)
        del merged
        with spinner(console, "asking onnxruntime"):
            exported = open_onnx_export(folder, context)
            parity = reference.parity(exported.model, exported.processor, folder)
            breaches = find_breaches(parity, FORMAT_LIMITS[name])
            if breaches and example:
                found = find_first_difference(expected, read_layers(folder / MODEL, layers, example))
                breaches += [found] if found else []
            if breaches:
                unsorted = open_onnx_export(folder, context, by_name=False)
                again = reference.parity(unsorted.model, unsorted.processor, folder)
                if not find_breaches(again, FORMAT_LIMITS[name]):
                    breaches.append("config.json names the labels in another order than the outputs have")
        limits = FORMAT_LIMITS[name]
        files = sorted(path for path in folder.iterdir() if path.suffix in (".onnx", ".data"))
        certificate = {
            **tuned.certificate(breaches),
            "format": name,
            "reader": exported.runtime,
            "onto": onto,
            "limits": {
                "kl_mean": limits.kl(parity.effect_kl),
                "top1_agreement": limits.top1,
                "largest_logit_difference": limits.logit_difference,
            },
            "measured": asdict(parity),
            "weights_bytes": weight_bytes(folder),
            "files_sha256": {path.name: hash_file(path) for path in files},
        }
        fix = "Round less: omit --int8. " if int8 else ""
        write_certificate(certificate, folder, out, "the ONNX model", fix)
    console.print(f"ONNX model: {out} ({size(certificate['weights_bytes'])})", highlight=False, soft_wrap=True)
    console.print(f"parity with the tuned model, {describe_parity(certificate['measured'])}", highlight=False)
    console.print(f"run it without llmtune: python {out / SCRIPT} ...", highlight=False, soft_wrap=True)
    return certificate


def _example_inputs(reference: TunedReference) -> dict[str, Any] | None:
    """Return the inputs of one question, to compare layers with; None for an encoder-decoder, which has two graphs."""
    model = reference.tuned.model
    if unwrap(model).config.is_encoder_decoder:
        return None
    if isinstance(reference, HeadReference):
        return model_inputs(model, move_to(unwrap(model).device, reference.batches[0]))
    first = cast(TextReference, reference)
    return {"input_ids": torch.tensor([[*first.prompts[0], *first.answers[0]]], device=unwrap(model).device)}


# The parts of a model


def list_graphs(model: PreTrainedModel, reference: TunedReference) -> list[Graph]:
    """Return the graphs of a model: one, or those of encoder and decoder."""
    if model.config.is_encoder_decoder:
        return _encoder_decoder_graphs(model)
    if reference.tuned.task.continues_text:
        return [_decoder_graph(model)]
    batch = cast(HeadReference, reference).batches[0]
    return [_head_graph(model, [*dict.fromkeys([*model_inputs(model, batch), "attention_mask"])])]


def _texts(model: PreTrainedModel, length: int) -> dict[str, torch.Tensor]:
    ids_BT = torch.arange(2 * length).reshape(2, length) % model.config.get_text_config(decoder=True).vocab_size
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, length - 2 :] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "token_type_ids": torch.zeros_like(ids_BT)}


def _head_graph(model: PreTrainedModel, names: Sequence[str]) -> Graph:
    """Return the graph of an encoder, or of a decoder with a head: class, tags, ends of answers, letters."""
    known = _texts(model, 9)
    if "input_values" in names:
        known = {"input_values": torch.randn(2, 20_000), "attention_mask": torch.ones(2, 20_000, dtype=torch.int64)}
    accepted = accepted_arguments(type(model))
    options = {"use_cache": False} if "use_cache" in accepted else {}

    def run(inputs: Tensors) -> list[torch.Tensor]:
        output = model(**inputs, **options)
        return [output.start_logits, output.end_logits] if "start_logits" in output else [output.logits]

    outputs = ["start_logits", "end_logits"] if hasattr(model, "qa_outputs") else ["logits"]
    return Graph(MODEL, {name: known[name] for name in names if name in accepted}, outputs, run)


def _decoder_graph(model: PreTrainedModel) -> Graph:
    """Return the graph of a decoder: tokens and the cache of earlier ones -> logits, and the cache of all."""
    cache_name = cache_argument(type(model))
    with torch.no_grad():
        example = model(input_ids=_texts(model, 4)["input_ids"], use_cache=True)[cache_name]
    if not isinstance(example, DynamicCache):
        raise _other_cache(model)
    past = _name_states(PAST, example)
    ids_BT, positions_BT = _texts(model, 3)["input_ids"], torch.arange(4, 7).repeat(2, 1)
    mask_BT = torch.ones(2, 7, dtype=torch.int64)
    mask_BT[1, 0] = 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}
    if "position_ids" not in accepted_arguments(type(model)):
        del inputs["position_ids"]

    def run(given: Tensors) -> Iterable[torch.Tensor]:
        cache = _fill_cache([given[name] for name in past])
        plain = {name: given[name] for name in inputs}
        output = model(**plain, **{cache_name: cache}, use_cache=True)
        return output.logits, *_name_states(PRESENT, output[cache_name]).values()

    outputs = ["logits", *(name.replace(PAST, PRESENT) for name in past)]
    return Graph(MODEL, {**inputs, **past}, outputs, run)


def _encoder_decoder_graphs(model: PreTrainedModel) -> list[Graph]:
    """Return both graphs; the encoder also computes the keys and values that every decoder step attends to.

    For them the encoder's graph takes one decoder step. The exporter removes the rest of this step.
    """
    encoder, cache_name = model.get_encoder(), cache_argument(type(model))
    heard = model.main_input_name == "input_features"
    frames = {"input_features": torch.randn(2, *_spectrogram(model))} if heard else {}
    texts = {name: part for name, part in _texts(model, 9).items() if name != "token_type_ids"}
    inputs = frames or texts
    start_BT = torch.full((2, 1), int(model.config.decoder_start_token_id or 0))

    def read(given: Tensors) -> tuple[torch.Tensor, Any]:
        hidden_BSD = encoder(**given)[0]
        masks = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
        ids_BT = start_BT[:1].expand(hidden_BSD.shape[0], 1)
        output = model(encoder_outputs=BaseModelOutput(hidden_BSD), decoder_input_ids=ids_BT, use_cache=True, **masks)
        return hidden_BSD, output[cache_name]

    with torch.no_grad():
        hidden_BSD, example = read(inputs)
    if not isinstance(example, EncoderDecoderCache):
        raise _other_cache(model)
    past, cross = _name_states(PAST, example.self_attention_cache), _name_states(CROSS, example.cross_attention_cache)
    past = {name: torch.cat([part] * 4, 2) for name, part in past.items()}
    width = hidden_BSD.shape[-1]

    def encode(given: Tensors) -> Iterable[torch.Tensor]:
        hidden_BSD, cache = read(given)
        return hidden_BSD, *_name_states(CROSS, cache.cross_attention_cache).values()

    def decode(given: Tensors) -> Iterable[torch.Tensor]:
        states = [given[name] for name in cross]
        cache = EncoderDecoderCache(_fill_cache([given[name] for name in past]), _fill_cache(states))
        cache.is_updated = dict.fromkeys(range(len(states) // 2), True)
        unread_BSD = states[0].new_zeros(states[0].shape[0], states[0].shape[2], width)  # only its shape is used
        masks = {"attention_mask": given["encoder_attention_mask"]} if "encoder_attention_mask" in given else {}
        output = model(
            encoder_outputs=BaseModelOutput(unread_BSD),
            decoder_input_ids=given["input_ids"],
            use_cache=True,
            **{cache_name: cache},
            **masks,
        )
        return output.logits, *_name_states(PRESENT, output[cache_name].self_attention_cache).values()

    given = {"input_ids": _texts(model, 3)["input_ids"]}
    given |= {} if heard else {"encoder_attention_mask": texts["attention_mask"]}
    written = ["logits", *(name.replace(PAST, PRESENT) for name in past)]
    return [
        Graph(ENCODER, inputs, ["last_hidden_state", *cross], encode),
        Graph(DECODER, {**given, **past, **cross}, written, decode),
    ]


def _spectrogram(model: PreTrainedModel) -> tuple[int, int]:
    return model.config.num_mel_bins, 2 * model.config.max_source_positions


def _name_states(prefix: str, cache: DynamicCache) -> dict[str, torch.Tensor]:
    """Return keys and values of all layers by name."""
    found = {}
    for i, layer in enumerate(cache.layers):
        found |= {f"{prefix}.{i}.key": layer.keys, f"{prefix}.{i}.value": layer.values}
    return found


def _fill_cache(states: Sequence[torch.Tensor]) -> DynamicCache:
    return DynamicCache(zip(states[::2], states[1::2], strict=True))


def _other_cache(model: PreTrainedModel) -> RecipeError:
    what = f"ONNX export keeps keys and values, but {model.config.model_type} has another cache"
    error = RecipeError.of(what, "deploy", "Use the merged model of `llmtune deploy merge`.")
    return cast(RecipeError, error)


# Files


def write_graph(model: PreTrainedModel, graph: Graph, folder: Path, int8: bool) -> dict[str, str]:
    """Trace one graph and write it; return the names of linear layers' outputs by the modules' names.

    Raises EnvironmentProblem if torch cannot trace the model.
    """
    traced, values = _Traced(model, graph), tuple(graph.inputs.values())
    shapes = {"values": tuple(graph.sizes(name) for name in graph.inputs)}
    options = {"dynamo": True, "verbose": False, "dynamic_shapes": shapes, "optimize": True}
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                traced, values, input_names=[*graph.inputs], output_names=[*graph.outputs], **options
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        what = f"torch {torch.__version__} cannot export {model.config.model_type} to ONNX: {first_line(error)}"
        raise EnvironmentProblem.of(what, None, "Use the merged model of `llmtune deploy merge`.") from error
    layers = {}
    for node in program.model.graph.all_nodes():
        *_, module, name = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
        if name.startswith(("linear", "addmm")):
            layers[module.removeprefix("model.")] = str(node.outputs[0].name)
        node.metadata_props.clear()  # paths of this machine
    weights = sum(part.numel() * part.element_size() for part in model.parameters())
    program.save(folder / graph.file, external_data=weights > LARGEST_FILE)
    if int8:
        quantize(folder / graph.file, weights > LARGEST_FILE)
    return layers


def quantize(file: Path, external: bool) -> None:
    """Round the weights of a graph's matrix products and embeddings to int8, in place."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rounded = file.with_name(f"int8-{file.name}")
    quantize_dynamic(
        file,
        rounded,
        op_types_to_quantize=["MatMul", "Gather"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=True,
        use_external_data_format=external,
    )
    rounded.replace(file)
