"""A tuned model as ONNX files for onnxruntime, in float32 or int8, certified against the tuned model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from llmtune.adapter.merging import check_mergeable
from llmtune.adapter.merging import merge_adapter as merge_weights
from llmtune.deploy.export_score import export_run
from llmtune.deploy.exported_model import weight_bytes
from llmtune.deploy.layer_comparison import LayerDifference, find_first_difference, record_layers
from llmtune.deploy.merged_model import save_settings
from llmtune.deploy.onnx_graphs import list_graphs, write_graph
from llmtune.deploy.onnx_model import (
    MODEL,
    open_onnx_export,
    read_inner_values,
)
from llmtune.deploy.onnx_scripts import SCRIPT, write_script
from llmtune.deploy.parity import (
    Certificate,
    check_output,
    describe_parity,
    write_certificate,
)
from llmtune.deploy.parity_reference import HeadReference, TextReference, TunedReference
from llmtune.deploy.search_parity import make_reference
from llmtune.deploy.tuned_model import TunedModel, training_base
from llmtune.display.console import spinner
from llmtune.display.number_format import size
from llmtune.errors import EnvironmentProblem, Problem, RecipeError
from llmtune.model.causal_lm_loss import model_inputs, move_to, unwrap
from llmtune.model.config import find_class
from llmtune.model.device import explain_oom
from llmtune.plan import Plan, RunContext
from llmtune.store.atomic_files import explained, hash_file, staged

SLIGHT, LARGEST_ROUNDING = 0.01, 0.5
"""Relative difference of a layer's outputs that fails a certificate: in float32, and in int8. The largest in MiniLM
are 1e-6 and 0.24; a layer with outliers in int8 differs by 1."""
KEY_VALUE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


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
        return export_onnx(tuned, out, context.console, int8=int8)

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


def export_onnx(tuned: TunedModel, out: Path, console: Console, *, int8: bool = False) -> Certificate:
    """Write the graphs with everything that runs them into the folder `out`, and certify them.

    This consumes `tuned`. Return the certificate; on failure `out` stays empty.
    """
    RecipeError.collect(check_output(out))
    check_mergeable(tuned.adapted)
    if not tuned.adapted.selected.quantized:
        tuned.model.float()
    with spinner(console, "asking the tuned model"):
        reference = make_reference(tuned)
        example = example_inputs(reference)
        expected = record_layers(tuned.model, example) if example else {}

    def find(file: Path, layers: Mapping[str, str], least: float = LARGEST_ROUNDING) -> LayerDifference | None:
        if not (example and layers):
            return None
        return find_first_difference(expected, read_inner_values(file, layers, example), least)

    memory = explain_oom(f"exporting {tuned.model_ref.name}", tuned.device)
    with explained(out), memory, staged(out) as folder:
        with spinner(console, "merging and tracing"):
            onto = training_base(tuned.recipe, tuned.model_ref)
            merged = merge_weights(tuned.adapted, onto).float().cpu().eval()
            save_settings(merged, tuned, folder, torch.float32)
            graphs = [
                write_graph(merged, graph, folder, find if int8 else None) for graph in list_graphs(merged, reference)
            ]
            kept = [layer for graph in graphs for layer in graph.float32_layers]
            write_script(merged, tuned, folder)
        del merged
        with spinner(console, "asking onnxruntime"):
            certified = reference.certify(open_onnx_export(folder, tuned))
            least = LARGEST_ROUNDING if int8 and certified["passed"] else SLIGHT
            if difference := find(folder / MODEL, graphs[0].layers, least):
                certified |= {"passed": False, "breaches": [*certified["breaches"], difference.text]}
        files = sorted(path for path in folder.iterdir() if path.suffix in (".onnx", ".data"))
        certificate = {
            **certified,
            "format": "onnx-int8" if int8 else "onnx",
            "onto": onto,
            **({"float32_layers": kept} if int8 else {}),
            "weights_bytes": weight_bytes(folder),
            "files_sha256": {path.name: hash_file(path) for path in files},
        }
        fix = "Round less: omit --int8. " if int8 else ""
        write_certificate(certificate, folder, out, "the ONNX model", fix)
    console.print(f"ONNX model: {out} ({size(certificate['weights_bytes'])})", highlight=False, soft_wrap=True)
    if kept:
        console.print(
            f"in float32, because int8 changes their outputs too much: {', '.join(kept)}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"parity with the tuned model, {describe_parity(certificate['measured'])}", highlight=False)
    console.print(f"run it without llmtune: python {out / SCRIPT} ...", highlight=False, soft_wrap=True)
    return certificate


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
