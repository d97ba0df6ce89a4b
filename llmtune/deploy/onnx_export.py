"""A tuned model as ONNX files for onnxruntime, in float32 or int8, certified against the tuned model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from llmtune.adapter.merging import check_mergeable
from llmtune.adapter.merging import merge_adapter as merge_weights
from llmtune.deploy.export import ExportFormat, WrittenExport
from llmtune.deploy.exported_model import ModelSource, check_pictures, weight_bytes
from llmtune.deploy.failure_causes import LayerDifference, find_first_difference, record_layers
from llmtune.deploy.merged_model import save_settings
from llmtune.deploy.onnx_graphs import list_graphs, write_graph
from llmtune.deploy.onnx_model import MODEL, open_onnx_export, read_inner_values
from llmtune.deploy.onnx_program import PROGRAM, write_program
from llmtune.deploy.parity import Certificate, describe_parity
from llmtune.deploy.parity_reference import HeadReference, TextReference, TunedReference
from llmtune.deploy.tuned_model import TunedModel, training_base
from llmtune.display.console import spinner
from llmtune.display.number_format import size
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.model.causal_lm_loss import model_inputs, move_to, unwrap
from llmtune.model.config import find_class
from llmtune.store.atomic_files import hash_file

SLIGHT, LARGEST_ROUNDING = 0.01, 0.5
"""Relative difference of a layer's outputs that fails a certificate: in float32, and in int8. The largest in MiniLM
are 1e-6 and 0.24; a layer with outliers in int8 differs by 1."""
KEY_VALUE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def onnx_format(*, int8: bool = False) -> ExportFormat:
    """Return the format of ONNX files with a program that runs them, in float32 or with weights in 8 bits."""
    return ExportFormat(
        "onnx/int8" if int8 else "onnx/float32",
        "the ONNX model",
        check=check_onnx,
        prepare=_compute_in_float32,
        write=partial(write_onnx, int8=int8),
        open=lambda folder, reference: open_onnx_export(folder, reference.tuned),
        describe=_describe_onnx,
    )


def check_onnx(source: ModelSource) -> None:
    """Check packages and the model's architecture without loading weights.

    Raises EnvironmentProblem for a missing package, RecipeError for an adapter or a model that cannot be exported.
    """
    EnvironmentProblem.collect(missing_packages())
    check_pictures(source, "deploy", "Use the merged model of `llmtune deploy merge`.")
    check_mergeable(source.recipe.adapter.method, source.recipe.adapter.options)
    kind, config = find_class(source.model_ref, source.recipe, source.task)
    text = config.get_text_config(decoder=True)
    if "mrope_section" in (getattr(text, "rope_parameters", None) or {}):
        what = f"ONNX graphs have one position for each token, and {config.model_type} has three"
        raise RecipeError.of(what, "deploy", "Use the merged model of `llmtune deploy merge`.")
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


def _compute_in_float32(tuned: TunedModel) -> None:
    if not tuned.adapted.selected.quantized:
        tuned.model.float()


def write_onnx(reference: TunedReference, folder: Path, int8: bool) -> WrittenExport:
    """Merge, trace, and write the graphs with everything that runs them.

    Raises EnvironmentProblem if torch cannot trace the model.
    """
    tuned, onto = reference.tuned, training_base(reference.tuned.recipe, reference.tuned.model_ref)
    example = example_inputs(reference)
    expected = record_layers(tuned.model, example) if example else {}

    def find(file: Path, layers: Mapping[str, str], least: float = LARGEST_ROUNDING) -> LayerDifference | None:
        if not (example and layers):
            return None
        return find_first_difference(expected, read_inner_values(file, layers, example), least)

    with spinner(tuned.console, "merging and tracing"):
        merged = merge_weights(tuned.adapted, onto).float().cpu().eval()
        save_settings(merged, tuned, folder, torch.float32)
        graphs = [
            write_graph(merged, graph, folder, find if int8 else None) for graph in list_graphs(merged, reference)
        ]
        write_program(merged, tuned, folder)
    float32_names = [layer for graph in graphs for layer in graph.float32_layers]
    files = sorted(path for path in folder.iterdir() if path.suffix in (".onnx", ".data"))
    facts = {
        "format": "onnx-int8" if int8 else "onnx",
        "onto": onto,
        **({"float32_layers": float32_names} if int8 else {}),
        "weights_bytes": weight_bytes(folder),
        "files_sha256": {path.name: hash_file(path) for path in files},
    }

    def find_cause(passed: bool) -> str | None:
        difference = find(folder / MODEL, graphs[0].layers, LARGEST_ROUNDING if int8 and passed else SLIGHT)
        return None if difference is None else difference.text

    return WrittenExport(facts, advice="Round less: omit --int8. " if int8 else "", find_cause=find_cause)


def _describe_onnx(certificate: Certificate, out: Path) -> list[str]:
    float32_names = certificate.get("float32_layers")
    return [
        f"ONNX model: {out} ({size(certificate['weights_bytes'])})",
        *(
            [f"in float32, because int8 changes their outputs too much: {', '.join(float32_names)}"]
            if float32_names
            else []
        ),
        f"parity with the tuned model, {describe_parity(certificate['measured'])}",
        f"run it without llmtune: python {out / PROGRAM} ...",
    ]


def example_inputs(reference: TunedReference) -> dict[str, Any] | None:
    """Return the inputs of one text, to compare layers with; None for an encoder-decoder, which has two graphs."""
    model = reference.tuned.model
    if unwrap(model).config.is_encoder_decoder:
        return None
    if isinstance(reference, HeadReference):
        return _longest_text(model_inputs(model, move_to(unwrap(model).device, reference.batches[0])))
    first = cast(TextReference, reference)
    return {"input_ids": torch.tensor([[*first.prompts[0], *first.answers[0]]], device=unwrap(model).device)}


def _longest_text(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the longest text of a batch, without padding: rounding may change outputs at padding, which none reads."""
    mask_BT = inputs.get("attention_mask")
    if mask_BT is None or mask_BT.all():
        return inputs
    row = int(mask_BT.sum(1).argmax())
    read_T = mask_BT[row].bool()
    return {name: part[row : row + 1, read_T] for name, part in inputs.items() if part is not None}
