"""A tuned model, or its adapter, as a GGUF file with Ollama's Modelfile, certified against what was trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from llmtune.adapter import merge
from llmtune.deploy.gguf_adapter import ADAPTER_FORMATS, check_adapter, compare_adapter, write_adapter
from llmtune.deploy.gguf_architectures import find_family
from llmtune.deploy.gguf_file import FORMATS, find_quantizer, has_llama, write_model
from llmtune.deploy.gguf_parity import (
    find_lost_adapter,
    limits_of,
    mean_divergence,
    measure_reader,
    serve_from_file,
)
from llmtune.deploy.gguf_readers import Reader, check_reader, open_file
from llmtune.deploy.gguf_vocabulary import (
    Vocabulary,
    describe_vocabulary,
    find_cut,
    read_description,
    read_vocabulary,
)
from llmtune.deploy.ollama_modelfile import describe_chat, write_modelfile
from llmtune.deploy.parity import (
    ANSWER_TOKENS,
    PROMPTS,
    Limits,
    Parity,
    Trace,
    find_breaches,
    logits_over,
    measure_effect,
    render_prompts,
    trace_answers,
)
from llmtune.errors import GateFailed, Problem, RecipeError, nearest
from llmtune.evaluate.generation import answer_ends
from llmtune.model.oom import explain_oom
from llmtune.recipe import TASK_FACTS
from llmtune.records import AdaptedModel, Row
from llmtune.store.atomic_files import explained, hash_file, read_json, staged, write_json, write_text
from llmtune.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

CERTIFICATE = "certificate.json"
MODELFILE = "Modelfile"
DEFAULT_FORMAT = "f16"


@dataclass(frozen=True)
class GgufCertificate:
    """What a GGUF file was held to, what it was read with, and what was measured."""

    passed: bool
    breaches: tuple[str, ...]
    base: str
    revision: str | None
    base_sha256: str
    trained_sha256: str | None
    """Of the trained folder that it was made from; None where that is in memory alone."""
    method: str
    onto: str
    file: str
    file_bytes: int
    file_sha256: str
    number_format: str
    reader: str
    limits: dict[str, float]
    measured: Parity | None
    kl_from_base: float | None
    """Mean KL of the file from the base model over the fixed prompts, which must be more than from what was trained."""
    adapter: dict[str, Any] | None
    """Of an adapter: how many modules, and how far the products of the file are from what was trained."""
    modelfile_template: bool


@dataclass(frozen=True)
class Heard:
    """What the tuned model said before it was taken apart, and what ends its answers."""

    traces: list[Trace]
    effect: float | None
    base: list[torch.Tensor] | None
    """The base model's logits over the fixed prompts and their answers; None where no adapter can be switched off."""
    stops: list[int]

    @property
    def length(self) -> int:
        """Room for the longest prompt and answer."""
        return max(len(trace.prompt) for trace in self.traces) + 2 * ANSWER_TOKENS


def check_export(number_format: str, adapter_only: bool) -> None:
    """Refuse a format that is unknown, or that nothing here can make, before anything is loaded.

    Raises:
        RecipeError: there is no such format.
        EnvironmentProblem: the program that makes it is not installed.
    """
    known = ADAPTER_FORMATS if adapter_only else tuple(FORMATS)
    if number_format not in known:
        kind = "an adapter" if adapter_only else "a GGUF file"
        what = f"{number_format!r} is no number format of {kind}.{nearest(number_format, known)}"
        raise RecipeError.of(what, "--type", f"Choose one of: {', '.join(known)}.")
    if FORMATS[number_format].written_as:
        find_quantizer()


def check_model(config: Any, processor: PreTrainedTokenizerBase) -> None:
    """Refuse a model or tokenizer that GGUF files have no place for, or that nothing here could read back.

    Raises EnvironmentProblem.
    """
    find_family(config)
    find_cut(read_description(processor))
    check_reader(config.model_type)


def export_gguf(
    adapted: AdaptedModel,
    recipe: Recipe,
    task: AnyTask,
    out: Path,
    console: Console,
    *,
    number_format: str = DEFAULT_FORMAT,
    onto: str = "original",
    adapter_only: bool = False,
    rows: Sequence[Row] = (),
    trained_sha256: str | None = None,
) -> dict[str, Any]:
    """Write `<name>-<FORMAT>.gguf`, a Modelfile and a certificate into the folder `out`.

    `adapted` is used up. `rows`, if any, are asked beside the fixed prompts. Returns the certificate as it is in
    certificate.json. Where it fails nothing is left in `out`; the certificate stands beside it as `<out>.failed.json`.

    Raises:
        RecipeError: `out` holds something else, or the adapter has what llama.cpp's adapters have no place for.
        GateFailed: the file, read back, differs from what was trained by more than the limits.
        EnvironmentProblem: the model cannot be written or read back; no room on disk or in memory.
    """
    check_export(number_format, adapter_only)
    _check_place(out)
    processor = cast("PreTrainedTokenizerBase", adapted.selected.processor)
    tuned = cast(PreTrainedModel, adapted.model)
    check_model(adapted.selected.model.config, processor)
    if adapter_only:
        check_adapter(tuned)
    if not adapted.selected.quantized:
        tuned.float()  # so that sums are rounded once, to the format that is wanted
    with console.status("asking the tuned model"):
        heard = _listen(tuned, processor, task, recipe, rows)
    memory = explain_oom(f"exporting {adapted.selected.model_ref.name}", str(tuned.device))
    failed = out.with_name(f"{out.name}.failed.json")
    with explained(out), memory, staged(out) as folder:
        export = _Export(adapted, recipe, task, folder, console, heard, number_format, onto, rows)
        certificate = export.make_adapter() if adapter_only else export.make_model()
        written = {**asdict(certificate), "trained_sha256": trained_sha256}
        if not certificate.passed:
            write_json(failed, written)
            raise _failure(certificate, failed)
        write_json(folder / CERTIFICATE, written)
    failed.unlink(missing_ok=True)
    _show(certificate, out, console)
    return written


def _check_place(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and read_json(out / CERTIFICATE) is None:
        raise RecipeError.of("the folder holds something else", str(out), "Choose another folder with --out.")
    inside = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not inside.is_dir():
        raise RecipeError.of("a file stands where a folder is needed", str(inside), "Choose another --out.")


def _listen(
    tuned: PreTrainedModel, processor: PreTrainedTokenizerBase, task: AnyTask, recipe: Recipe, rows: Sequence[Row]
) -> Heard:
    traces = trace_answers(tuned, processor, render_prompts(task, processor, recipe, rows))
    effect, base = measure_effect(tuned, traces), None
    if effect is not None:
        with cast(PeftModel, tuned).disable_adapter():
            base = [logits_over(tuned, [*trace.prompt, *trace.answer]) for trace in traces[: len(PROMPTS)]]
    return Heard(traces, effect, base, answer_ends(tuned, processor))


@dataclass(frozen=True)
class _Export:
    """One export at work in its new folder."""

    adapted: AdaptedModel
    recipe: Recipe
    task: AnyTask
    folder: Path
    console: Console
    heard: Heard
    number_format: str
    onto: str
    rows: Sequence[Row]

    @property
    def name(self) -> str:
        """What the file is called, without its ending."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.recipe.name)

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        """The tokenizer as the model was trained with it."""
        return cast("PreTrainedTokenizerBase", self.adapted.selected.processor)

    def make_model(self) -> GgufCertificate:
        """Merge, write the whole model, and read it back."""
        file = self.folder / f"{self.name}-{self.number_format.upper()}.gguf"
        with self.console.status("merging and writing"):
            merged = merge(self.adapted, cast(Any, self.onto))
            vocabulary = self.describe(merged)
            write_model(merged, vocabulary, file, self.number_format, self.name)
        config = merged.config
        del merged
        templated = self.write_modelfile(file, vocabulary, [])
        base = None
        if self.adapted.selected.quantized:
            base = "rounded" if self.onto == "dequantized" else "other base"
        certificate = self.certificate(file, templated)
        return self.certify(certificate, file, config, limits_of(self.number_format, base))

    def make_adapter(self) -> GgufCertificate:
        """Write the adapter, and read it back; with llama.cpp also on the base, where that is not in 4 bits."""
        file = self.folder / f"{self.name}-lora-{self.number_format.upper()}.gguf"
        model = cast(PeftModel, self.adapted.model)
        with self.console.status("writing the adapter"):
            write_adapter(model, file, self.number_format, self.name)
            compared = compare_adapter(model, file, self.number_format)
        config: Any = model.config
        vocabulary = self.describe(cast(PreTrainedModel, model.get_base_model()))
        notes = [f"An adapter. Put its base beside it as base.gguf: {self.adapted.selected.model_ref.name}"]
        templated = self.write_modelfile(file, vocabulary, notes, adapter=True)
        certificate = self.certificate(file, templated, adapter=compared)
        if not has_llama() or self.adapted.selected.quantized:
            return certificate
        whole = self.folder / "base.gguf"
        write_model(cast(PreTrainedModel, model.unload()), vocabulary, whole, "f32", self.name)
        try:
            return self.certify(certificate, whole, config, limits_of(self.number_format, None), adapter=file)
        finally:
            whole.unlink()

    def describe(self, model: PreTrainedModel) -> Vocabulary:
        """Return the vocabulary for a model with so many rows in its embedding."""
        size = int(cast(Any, model.get_input_embeddings()).weight.shape[0])
        return describe_vocabulary(
            self.processor, size, [trace.prompt for trace in self.heard.traces], self.ends(model)
        )

    def ends(self, model: PreTrainedModel) -> list[int]:
        """Return the ids that end an answer, those of the chat template with them."""
        return answer_ends(model, self.processor, self.recipe)

    def write_modelfile(self, file: Path, vocabulary: Vocabulary, notes: Sequence[str], adapter: bool = False) -> bool:
        """Write the Modelfile; returns whether it has a template."""
        pieces = None
        notes = list(notes)
        if TASK_FACTS[self.task.name].templated and self.processor.chat_template:
            pieces = describe_chat(self.processor, self.recipe, vocabulary.add_bos)
            if pieces is None:
                notes.append("The chat template does more than a Go template can: Ollama is left to find its own.")
                self.console.print("Modelfile: this chat template has no equal in Go, so TEMPLATE is left out.")
        stops = [vocabulary.tokens[index] for index in self.ends(self.adapted.selected.model)]
        text = write_modelfile(file.name, pieces, stops, self.recipe, notes, adapter)
        write_text(self.folder / MODELFILE, text)
        return pieces is not None

    def certificate(self, file: Path, templated: bool, adapter: dict[str, Any] | None = None) -> GgufCertificate:
        """Return the certificate of a file that no program has read yet."""
        place = self.adapted.selected.model_ref
        return GgufCertificate(
            passed=True,
            breaches=(),
            base=place.name,
            revision=place.revision,
            base_sha256=place.content_hash,
            trained_sha256=None,
            method=self.adapted.method,
            onto="none" if adapter else self.onto,
            file=file.name,
            file_bytes=file.stat().st_size,
            file_sha256=hash_file(file),
            number_format=self.number_format,
            reader="its own arithmetic",
            limits={},
            measured=None,
            kl_from_base=None,
            adapter=adapter,
            modelfile_template=templated,
        )

    def certify(
        self, certificate: GgufCertificate, whole: Path, config: Any, limits: Limits, adapter: Path | None = None
    ) -> GgufCertificate:
        """Read `whole` back, with `adapter` on it, and hold it against what was heard."""
        vocabulary = read_vocabulary(whole)
        with (
            self.console.status("asking the GGUF file"),
            open_file(whole, vocabulary, config, self.heard.length, adapter) as reader,
        ):
            made = serve_from_file(self.task, vocabulary, reader, self.recipe, self.rows)
            parity = measure_reader(self.heard.traces, reader, made, self.heard.stops, self.heard.effect)
            near, far = self.measure_nearness(reader)
        breaches = (*find_breaches(parity, limits), *find_lost_adapter(near, far, self.heard.effect))
        return replace(
            certificate,
            passed=not breaches,
            breaches=breaches,
            reader=reader.name,
            limits={"kl_mean": limits.kl(parity.effect_kl), "top1_agreement": limits.top1},
            measured=parity,
            kl_from_base=far,
        )

    def measure_nearness(self, reader: Reader) -> tuple[float, float | None]:
        """Return how far the file is from what was trained, and from the base, over the fixed prompts."""
        traces = self.heard.traces[: len(PROMPTS)]
        got = [reader.logits([*trace.prompt, *trace.answer]) for trace in traces]
        base = None if self.heard.base is None else mean_divergence(self.heard.base, got)
        return mean_divergence([trace.logits for trace in traces], got), base


def _failure(certificate: GgufCertificate, failed: Path) -> GateFailed:
    fix = f"Nothing was kept; the numbers are in {failed}."
    if certificate.number_format not in ADAPTER_FORMATS:
        fix = f"Round less: --type f16. {fix}"
    return GateFailed(*(Problem(f"the GGUF file differs: {breach}", None, fix) for breach in certificate.breaches))


def _show(certificate: GgufCertificate, out: Path, console: Console) -> None:
    size = f"{certificate.file_bytes / 1e6:,.1f} MB, {certificate.number_format.upper()}"
    console.print(f"GGUF: {out / certificate.file} ({size})", highlight=False, soft_wrap=True)
    if certificate.adapter is not None:
        compared = certificate.adapter
        said = f"largest difference {compared['largest_difference']:.2g} of its size"
        console.print(f"adapter, read back: {compared['modules']} modules, {said}", highlight=False)
    if (parity := certificate.measured) is not None:
        moved = "" if parity.effect_kl is None else f" (tuning had moved it by {parity.effect_kl:.2g})"
        console.print(
            f"parity with what was trained, read by {certificate.reader}, over {parity.positions} positions: mean KL "
            f"{parity.kl_mean:.2g}{moved}, same first choice {parity.top1_agreement:.1%}, same answers "
            f"{parity.answer_agreement:.0%}",
            highlight=False,
        )
    console.print(f"Ollama: ollama create NAME -f {out / MODELFILE}", highlight=False, soft_wrap=True)
