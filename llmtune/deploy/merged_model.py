"""The adapter merged into its base, saved as a plain model folder, and certified against the adapter."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import psutil
import torch
import transformers
from rich.console import Console
from transformers import PreTrainedModel

from llmtune.adapter import merge
from llmtune.adapter.saving import writing_weights
from llmtune.deploy.parity import LIMITS, Parity, find_breaches
from llmtune.deploy.parity_prompts import Exam, set_exam
from llmtune.errors import EnvironmentProblem, GateFailed, Problem, RecipeError
from llmtune.evaluate.generation import generation_settings
from llmtune.evaluate.task_predictions import decoder_settings
from llmtune.model import is_out_of_memory, load_processor, save_tokenizer
from llmtune.model.config import OTHER_CLASSES, OTHER_ORDER
from llmtune.model.oom import explain_oom
from llmtune.records import AdaptedModel, Row
from llmtune.store.atomic_files import explained, hash_file, read_json, staged, write_json
from llmtune.tasks import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.recipe import Recipe

Onto = Literal["original", "dequantized"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CERTIFICATE = "certificate.json"
SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Certificate:
    """What a merged model was held to, and what was measured."""

    passed: bool
    breaches: tuple[str, ...]
    base: str
    revision: str | None
    base_sha256: str
    method: str
    onto: str
    dtype: str
    limits: dict[str, float | None]
    measured: Parity
    weights_bytes: int
    files: tuple[str, ...]
    files_sha256: dict[str, str]
    trained_sha256: str | None
    """The hash of the run's folder of what was trained; None where the caller did not say."""
    other: dict[str, Any] | None
    """Of a quantised base: how far the model merged onto the other weights would be from what was trained."""


def merge_model(
    adapted: AdaptedModel,
    recipe: Recipe,
    task: AnyTask,
    out: Path,
    console: Console,
    *,
    onto: str = "original",
    dtype: str = "auto",
    rows: Sequence[Row] = (),
    trained_sha256: str | None = None,
) -> dict[str, Any]:
    """Merge, save into `out` (safetensors, tokenizer, template, certificate), and reload to compare with the adapter.

    `adapted` is used up. `rows` are asked beside the fixed prompts, and alone where answers are no continuation of a
    prompt. Returns the certificate as it is in certificate.json. Where it fails nothing is left in `out`, and the
    certificate stands beside it as `<out>.failed.json`.

    Raises:
        RecipeError: unknown `onto` or `dtype`, or `out` holds something else.
        GateFailed: the merged model differs from what was trained by more than the limits.
        EnvironmentProblem: what was saved cannot be loaded again; no room on disk or in memory, or no permission.
    """
    wanted = _check_arguments(adapted, out, onto, dtype)
    processor = cast("PreTrainedTokenizerBase", adapted.selected.processor)
    kind = _kind_of_limits(adapted, onto, wanted)
    with console.status("asking the tuned model"):
        exam = set_exam(adapted, recipe, task, rows)
    device = str(adapted.selected.model.device)
    failed = out.with_name(f"{out.name}.failed.json")
    memory = explain_oom(f"merging {adapted.selected.model_ref.name}", device)
    with explained(out), memory, staged(out) as folder:
        other = _measure_other(adapted, onto, exam, console)
        with console.status("merging and saving"):
            _save_merged(_merge(adapted, onto, wanted), processor, recipe, folder, wanted)
        with console.status("asking the merged model, read back from disk"):
            merged = _load_back(folder, recipe, task, device, wanted)
            saved = load_processor(replace(adapted.selected.model_ref, path=folder), _as_saved(recipe))
            parity = exam.examine(merged, saved, folder)
        certificate = _certify(adapted, onto, wanted, kind, parity, folder, trained_sha256, other)
        written = asdict(certificate)
        if not certificate.passed:
            write_json(failed, written)
            raise _failure(certificate, adapted, failed)
        write_json(folder / CERTIFICATE, written)
    failed.unlink(missing_ok=True)
    _show(certificate, out, console)
    return written


def _check_arguments(adapted: AdaptedModel, out: Path, onto: str, dtype: str) -> torch.dtype:
    problems = []
    if onto not in {"original", "dequantized"}:
        problems.append(Problem(f"{onto!r} is neither original nor dequantized", "--onto"))
    if dtype != "auto" and dtype not in DTYPES:
        problems.append(Problem(f"{dtype!r} is no number format", "--dtype", f"Choose auto, {', '.join(DTYPES)}."))
    if onto == "dequantized" and not adapted.selected.quantized:
        problems.append(Problem("the base was not quantised in training", "--onto", "Leave --onto away."))
    if out.is_dir() and any(out.iterdir()) and read_json(out / CERTIFICATE) is None:
        problems.append(Problem("the folder holds something else", str(out), "Choose another folder with --out."))
    elif out.exists() and not out.is_dir():
        problems.append(Problem("a file of this name is there", str(out), "Choose another folder with --out."))
    inside = next(path for path in out.absolute().parents if path.exists())
    if not inside.is_dir():
        problems.append(Problem("a file stands where a folder is needed", str(inside), "Choose another --out."))
    RecipeError.collect(problems)
    return _trained_dtype(adapted) if dtype == "auto" else DTYPES[dtype]


def _trained_dtype(adapted: AdaptedModel) -> torch.dtype:
    model = adapted.selected.model
    if adapted.selected.quantized:
        return cast(torch.dtype, model.config.quantization_config.bnb_4bit_compute_dtype)
    return cast(torch.dtype, model.dtype)


def _kind_of_limits(adapted: AdaptedModel, onto: str, wanted: torch.dtype) -> str:
    if adapted.selected.quantized and onto == "original":
        return "other base"
    exact = wanted == torch.float32 and _trained_dtype(adapted) == torch.float32
    return "exact" if exact else "rounded"


def _merge(adapted: AdaptedModel, onto: str, wanted: torch.dtype) -> PreTrainedModel:
    if not adapted.selected.quantized and adapted.selected.model.dtype != wanted:
        adapted.model.float()  # so that sums are rounded once, to the format that is wanted
    return cast(PreTrainedModel, merge(adapted, cast(Onto, onto)).to(wanted))


def _measure_other(adapted: AdaptedModel, onto: str, exam: Exam, console: Console) -> dict[str, Any] | None:
    """Merge onto the other weights too, in memory, and measure how far that model is from what was trained."""
    if not adapted.selected.quantized:
        return None
    other: Onto = "original" if onto == "dequantized" else "dequantized"
    needed = adapted.total * _trained_dtype(adapted).itemsize
    if adapted.selected.model.device.type == "cpu" and needed > psutil.virtual_memory().available:
        return {"onto": other, "not_measured": f"the model needs {needed / 1e9:,.1f} GB, and less is free"}
    started = time.perf_counter()
    with console.status(f"merging onto the {other} weights as well, to compare"):
        numbers = _compare_other(adapted, other, exam)
    gc.collect()
    return {"onto": other, **numbers, "seconds": time.perf_counter() - started}


def _compare_other(adapted: AdaptedModel, other: Onto, exam: Exam) -> dict[str, Any]:
    try:
        return exam.compare(merge(adapted, other)).as_numbers()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return {"not_measured": "memory ran out"}


def _save_merged(
    merged: PreTrainedModel,
    processor: PreTrainedTokenizerBase,
    recipe: Recipe,
    folder: Path,
    wanted: torch.dtype,
) -> None:
    if merged.can_generate():
        merged.generation_config = _settle_generation(merged, processor, recipe)
    merged.config.dtype = wanted
    for name in (OTHER_CLASSES, OTHER_ORDER):  # marks of ours, while it was loaded
        vars(merged.config).pop(name, None)
    with writing_weights(folder):
        merged.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    save_tokenizer(processor, folder)


def _settle_generation(merged: PreTrainedModel, processor: PreTrainedTokenizerBase, recipe: Recipe) -> Any:
    """Return the recipe's generation settings, and those without which the model cannot write.

    Whisper's own hold what its class looks languages and tasks up in: they stay, and say which the recipe wants.
    """
    own: Any = merged.generation_config
    if recipe.speech is not None or merged.config.model_type == "whisper":
        if recipe.speech is not None and getattr(own, "is_multilingual", False):
            own.language, own.task = recipe.speech.language, recipe.speech.task
        return own
    if merged.config.is_encoder_decoder:
        settings = decoder_settings(own, merged, processor, recipe)
    else:
        settings = generation_settings(merged, processor, recipe)
    settings.max_new_tokens = None  # a server takes it for the most that anyone may ask for
    return settings


def _load_back(folder: Path, recipe: Recipe, task: AnyTask, device: str, wanted: torch.dtype) -> PreTrainedModel:
    """Load as a user would, without anything of llmtune."""
    on_cpu_half = device == "cpu" and wanted == torch.float16  # read as 16 bits, computed in 32
    try:
        model, info = getattr(transformers, task.auto_class).from_pretrained(
            folder,
            dtype=torch.float32 if on_cpu_half else wanted,
            local_files_only=True,
            trust_remote_code=recipe.model.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise EnvironmentProblem.of(f"the merged model cannot be loaded again: {error}", str(folder)) from error
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if lost:
        raise GateFailed.of(f"{len(lost)} weights of the merged model are lost on the way to disk, {lost[0]} for one")
    return cast(PreTrainedModel, model.to(device).eval())


def _as_saved(recipe: Recipe) -> Any:
    """The recipe's model section without what is now part of the saved tokenizer."""
    return recipe.model.model_copy(update={"chat_template": None, "add_tokens": ()})


def _certify(
    adapted: AdaptedModel,
    onto: str,
    wanted: torch.dtype,
    kind: str,
    parity: Parity,
    folder: Path,
    trained_sha256: str | None,
    other: dict[str, Any] | None,
) -> Certificate:
    limits = LIMITS[kind]
    breaches = tuple(find_breaches(parity, limits))
    weights = sorted(folder.glob("*.safetensors"))
    place = adapted.selected.model_ref
    return Certificate(
        passed=not breaches,
        breaches=breaches,
        base=place.name,
        revision=place.revision,
        base_sha256=place.content_hash,
        method=adapted.method,
        onto=onto,
        dtype=str(wanted).removeprefix("torch."),
        limits={
            "kl_mean": limits.kl(parity.effect_kl),
            "top1_agreement": limits.top1,
            "largest_logit_difference": limits.logit_difference,
        },
        measured=parity,
        weights_bytes=sum(file.stat().st_size for file in weights),
        files=tuple(file.name for file in weights),
        files_sha256={file.name: hash_file(file) for file in weights},
        trained_sha256=trained_sha256,
        other=other,
    )


def _failure(certificate: Certificate, adapted: AdaptedModel, failed: Path) -> GateFailed:
    fix = f"Nothing was kept; the numbers are in {failed}."
    if adapted.selected.quantized and certificate.onto == "original":
        fix = f"Merge onto the weights that it was trained on: --onto dequantized. {fix}"
    elif certificate.dtype != "float32":
        fix = f"Merge without rounding: --dtype float32. {fix}"
    return GateFailed(*(Problem(f"the merged model differs: {breach}", None, fix) for breach in certificate.breaches))


def _show(certificate: Certificate, out: Path, console: Console) -> None:
    parity = certificate.measured
    moved = "" if parity.effect_kl is None else f" (tuning had moved it by {parity.effect_kl:.2g})"
    console.print(
        f"merged model: {out} ({certificate.weights_bytes / 1e6:,.0f} MB, {certificate.dtype})", highlight=False
    )
    console.print(
        f"parity with the adapter over {parity.positions} positions: mean KL {parity.kl_mean:.2g}{moved}, largest "
        f"logit difference {parity.largest_logit_difference:.2g}, same first choice {parity.top1_agreement:.1%}, "
        f"same answers {parity.answer_agreement:.0%}",
        highlight=False,
    )
    if other := certificate.other:
        console.print(_tell_other(other), highlight=False)


def _tell_other(other: dict[str, Any]) -> str:
    said = f"merged onto the {other['onto']} weights instead"
    if "not_measured" in other:
        return f"{said}: not measured, because {other['not_measured']}"
    return (
        f"{said} it would be: mean KL {other['kl_mean']:.2g}, same first choice {other['top1_agreement']:.1%} "
        f"(measured in {other['seconds']:.0f} s)"
    )
