"""A tuned model or its adapter as a GGUF file with an Ollama Modelfile, certified against the tuned model."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import cast

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from llmtune.adapter.merging import check_mergeable
from llmtune.adapter.merging import merge_adapter as merge_weights
from llmtune.deploy.export_score import export_run
from llmtune.deploy.gguf_adapter import ADAPTER_FORMATS, check_lora_only, compare_adapter, write_adapter
from llmtune.deploy.gguf_converter import (
    FORMATS,
    K_QUANTS,
    check_convertible,
    check_quantizer,
    find_ignored_window,
    has_llama,
    write_model,
)
from llmtune.deploy.gguf_readers import (
    FORMAT_LIMITS,
    check_reader,
    longest_text,
    open_gguf_export,
)
from llmtune.deploy.gguf_tokenizer import (
    MERGE_INSTEAD,
    NAMES,
    TokenizerFacts,
    describe_tokenizer,
    find_pre_tokenizer,
)
from llmtune.deploy.ollama_modelfile import MODELFILE, write_modelfile
from llmtune.deploy.parity import (
    LIMITS,
    Certificate,
    Limits,
    Onto,
    check_onto,
    check_output,
    describe_parity,
    write_certificate,
)
from llmtune.deploy.parity_reference import TextReference
from llmtune.deploy.search_parity import make_reference
from llmtune.deploy.tuned_model import TunedModel, load_tuned, training_base
from llmtune.display.console import spinner
from llmtune.errors import RecipeError, nearest
from llmtune.evaluate.generation import answer_ends
from llmtune.model.config import read_model_config
from llmtune.model.device import explain_oom
from llmtune.plan import Plan, RunContext
from llmtune.store.atomic_files import explained, hash_file, staged

DEFAULT_FORMAT = "f16"


def make_gguf(
    context: RunContext,
    out: Path | None = None,
    *,
    number_format: str = DEFAULT_FORMAT,
    adapter_only: bool = False,
    onto: str | None = None,
) -> Certificate:
    """Write a run's model, or only its adapter, as a GGUF file, by default into `gguf/FORMAT` of the run.

    Raises:
        RecipeError: an invalid option, or a task whose models cannot be GGUF files.
        EnvironmentProblem: a model or tokenizer that GGUF files cannot store.
        GateFailed: the file differs from the tuned model by more than the limits.
    """
    known = ADAPTER_FORMATS if adapter_only else tuple(FORMATS)
    if number_format not in known:
        kind = "an adapter" if adapter_only else "a GGUF file"
        what = f"{number_format!r} is not a number format of {kind}.{nearest(number_format, known)}"
        raise RecipeError.of(what, "--type", f"Choose one of: {', '.join(known)}.")
    if number_format in K_QUANTS:
        check_quantizer()  # before loading anything
    plan = context.plan
    trained_on = training_base(plan.recipe, plan.model_ref)
    if onto is not None and (adapter_only or trained_on == "original"):
        what = "an adapter without its base ignores it" if adapter_only else "the base was not quantised in training"
        raise RecipeError.of(what, "--onto", "Omit --onto.")
    onto = onto or trained_on
    RecipeError.collect(check_onto(onto, True, trained_on == "original" or plan.recipe.adapter.method == "qlora"))
    check_gguf(plan)
    folder = out or context.folder.path / "gguf" / (f"adapter-{number_format}" if adapter_only else number_format)

    def make(tuned: TunedModel, out: Path) -> Certificate:
        return export_gguf(
            tuned, out, context.console, number_format=number_format, onto=onto, adapter_only=adapter_only
        )

    if adapter_only:
        return make(load_tuned(context), folder)
    return export_run(context, folder, make, partial(open_gguf_export, length=longest_text(context)))


def check_gguf(plan: Plan) -> None:
    """Check without loading weights that a model can be written.

    Raises:
        RecipeError: the model neither continues a text nor classifies it.
        EnvironmentProblem: GGUF files cannot store the model or its tokenizer.
    """
    task, kind = plan.task, plan.task.model_kind
    encoder = not kind.decodes and kind.in_gguf and task.required_inputs == ("prompt",)
    if not kind.decodes and not encoder:
        what = f"GGUF export supports models that continue or classify a text, not this one of task {task.name}"
        raise RecipeError.of(what, "deploy", "Use the adapter, or the merged model of `llmtune deploy merge`.")
    config = read_model_config(plan.model_ref, plan.recipe.model)
    check_convertible(config, kind)
    check_reader(config.model_type, find_pre_tokenizer(plan.processor, encoder))


def export_gguf(
    tuned: TunedModel,
    out: Path,
    console: Console,
    *,
    number_format: str = DEFAULT_FORMAT,
    onto: str = "original",
    adapter_only: bool = False,
) -> Certificate:
    """Write `<name>-<FORMAT>.gguf`, a Modelfile and a certificate into the folder `out`.

    This consumes `tuned`. Return the certificate; on failure `out` stays empty.

    Raises:
        RecipeError: `out` contains something else, or llama.cpp cannot store the adapter.
        GateFailed: the file, read back, differs from the tuned model by more than the limits.
        EnvironmentProblem: the model cannot be written or read back, or disk or memory is full.
    """
    RecipeError.collect(check_output(out))
    second_texts = (tuned.task.stated_inputs(row, tuned.recipe).get("pair") for row in tuned.rows)
    if not tuned.task.model_kind.decodes and any(second_texts):
        raise RecipeError.of("llama.cpp's classifiers read one text, these rows have pairs", "data.test", MERGE_INSTEAD)
    selected = tuned.adapted.selected
    if adapter_only:
        check_lora_only(tuned.model)
    else:
        check_mergeable(tuned.adapted)
    if not selected.quantized:
        tuned.model.float()  # to round sums only once, to the target format
    with spinner(console, "asking the tuned model"):
        export = _Export(tuned, console, number_format)
    memory = explain_oom(f"exporting {selected.model_ref.name}", str(tuned.model.device))
    with explained(out), memory, staged(out) as folder:
        certificate = export.write_adapter(folder) if adapter_only else export.write_model(folder, cast(Onto, onto))
        fix = "" if number_format in ADAPTER_FORMATS else "Round less: --type f16. "
        write_certificate(certificate, folder, out, "the GGUF file", fix)
    _print_export(certificate, out, console)
    return certificate


class _Export:
    """One export: the tuned model's answers, recorded before it is merged, and the files made from it."""

    def __init__(self, tuned: TunedModel, console: Console, number_format: str) -> None:
        self.tuned, self.console, self.number_format = tuned, console, number_format
        self.name = re.sub(r"[^A-Za-z0-9._-]", "-", tuned.recipe.name)
        self.reference = make_reference(tuned)
        self.tokenizer: TokenizerFacts | None = None
        if isinstance(self.reference, TextReference):
            self.stops = answer_ends(tuned.model, tuned.processor, tuned.recipe)
            self.tokenizer = describe_tokenizer(tuned.processor, self.reference.prompts, self.stops)

    def write_model(self, folder: Path, onto: Onto) -> Certificate:
        """Merge, write the complete model, and read it back."""
        file = folder / f"{self.name}-{self.number_format.upper()}.gguf"
        with spinner(self.console, "merging"):
            merged = merge_weights(self.tuned.adapted, onto)
            config = merged.config
        shown = self.console.is_terminal and not self.console.quiet
        write_model(merged, self.tuned.processor, self.tokenizer, file, self.number_format, self.name, progress=shown)
        del merged
        limits = FORMAT_LIMITS[self.number_format]
        if self.tuned.adapted.selected.quantized:
            limits = limits.wider(LIMITS["rounded" if onto == "dequantized" else "other base"])
        facts = {**self._file_facts(file, onto), "ignored_window": find_ignored_window(config.to_dict())}
        return {**facts, **self._certify(file, limits)}

    def write_adapter(self, folder: Path) -> Certificate:
        """Write the adapter and read it back; with llama.cpp also on the base, unless that is in 4 bits."""
        file = folder / f"{self.name}-lora-{self.number_format.upper()}.gguf"
        model, selected = cast(PeftModel, self.tuned.model), self.tuned.adapted.selected
        with spinner(self.console, "writing the adapter"):
            write_adapter(model, file, self.number_format, self.name)
            compared = compare_adapter(model, file, self.number_format)
        note = f"An adapter. Put its base next to it as base.gguf: {selected.model_ref.name}"
        facts = {**self._file_facts(file, "none", note), "adapter": compared}
        if not has_llama() or selected.quantized:
            return facts
        whole, base = folder / "base.gguf", cast(PreTrainedModel, model.unload())
        write_model(base, self.tuned.processor, self.tokenizer, whole, "f32", self.name)
        try:
            return {**facts, **self._certify(whole, FORMAT_LIMITS[self.number_format], adapter=file)}
        finally:
            whole.unlink()

    def _file_facts(self, file: Path, onto: str, *notes: str) -> Certificate:
        """Write the Modelfile, and return the certificate before any program reads the file."""
        tuned = self.tuned
        written = None
        if self.tokenizer is not None:
            adds_bos = self.tokenizer[NAMES.ADD_BOS]
            written = write_modelfile(file, tuned, self.stops, notes, adds_bos=adds_bos, adapter=onto == "none")
        return {
            **tuned.certificate([]),
            "method": tuned.adapted.method,
            "onto": onto,
            "file": file.name,
            "file_bytes": file.stat().st_size,
            "file_sha256": hash_file(file),
            "number_format": self.number_format,
            "reader": "its own arithmetic",
            "limits": {},
            "measured": None,
            "adapter": None,
            "modelfile": written,
        }

    def _certify(self, file: Path, limits: Limits, adapter: Path | None = None) -> Certificate:
        """Read `file` back, with `adapter` on it, and return its comparison with the tuned model."""
        with spinner(self.console, "asking the GGUF file"):
            opened = open_gguf_export(file, self.tuned, self.reference.longest, adapter)
            return self.reference.certify(opened, limits)


def _print_export(certificate: Certificate, out: Path, console: Console) -> None:
    size = f"{certificate['file_bytes'] / 1e6:,.1f} MB, {certificate['number_format'].upper()}"
    lines = [f"GGUF: {out / certificate['file']} ({size})"]
    if compared := certificate["adapter"]:
        largest = f"largest difference {compared['largest_difference']:.2g} of its size"
        lines.append(f"adapter, read back: {compared['modules']} modules, {largest}")
    if measured := certificate["measured"]:
        parity = describe_parity(measured)
        lines.append(f"parity with the tuned model, read by {certificate['reader']}, {parity}")
    if window := certificate.get("ignored_window"):
        lines.append(f"context: {window:,} tokens, the model's sliding window, which llama.cpp ignores")
    if certificate["modelfile"] is False:
        lines.append("No Modelfile: Ollama's templates cannot express this chat template. Use llama-server.")
    elif certificate["modelfile"]:
        lines.append(f"Ollama: ollama create NAME -f {out / MODELFILE}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
