"""The model card: the hub's metadata, and what a reader must know before using the model (model_card.md.jinja)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llmtune.deploy.hub import PACKAGED_MODELS, UNKNOWN, find_license
from llmtune.deploy.parity import Certificate, describe_parity
from llmtune.deploy.path_redaction import hide_paths, is_local_path
from llmtune.recipe import TASK_FACTS
from llmtune.report.metric_info import METRIC_NOTES
from llmtune.report.redaction import redact
from llmtune.report.render_markdown import code, plain, render_section, table
from llmtune.report.report_reader import read_sections
from llmtune.store.atomic_files import read_json

if TYPE_CHECKING:
    from rich.console import Console

    from llmtune.recipe import Recipe

AUTO_CLASSES = {
    r"For(CausalLM|SequenceClassification|TokenClassification|QuestionAnswering|MaskedLM|CTC)": r"AutoModelFor\1",
    r"LMHeadModel$": "AutoModelForCausalLM",
    r"^WhisperForConditionalGeneration$": "AutoModelForSpeechSeq2Seq",
    r"(ForConditionalGeneration|MTModel)$": "AutoModelForSeq2SeqLM",
}
"""By a pattern of a model's class."""
PEFT_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""By PEFT's name of a task, the class that loads its base."""
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
}
"""The hub's name of what a model does, by its class."""
HUB_METRICS = {r"f1.*": "f1", r"rouge.*": "rouge", r"matthews": "matthews_correlation", r"auroc": "roc_auc"}
"""By a pattern of our name of a metric the hub's, where they differ."""


Document = Mapping[str, Any]
"""A JSON document of a run or of a model: report.json, llmtune.lock, adapter_config.json."""


@dataclass(frozen=True)
class PublishOptions:
    """What the publisher wants and states; nothing of it can be found in a run."""

    to: Path | None = None
    repo: str | None = None
    private: bool = False
    merged: bool = False
    gguf: Path | None = None
    dry_run: bool = False
    despite_gates: bool = False
    offline: bool = False
    base_model: str | None = None
    license: str | None = None
    data_license: str | None = None
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedModel:
    """A model's folder with its certificate."""

    kind: str
    """adapter, weights (a full tuning) or merged."""
    folder: Path
    certificate: Certificate
    gguf: Certificate | None

    @property
    def config(self) -> Document:
        """The content of adapter_config.json or config.json."""
        config: Document = read_json(self.folder / ("adapter_config.json" if self.kind == "adapter" else "config.json"))
        return config


def write_card(
    report: Document, lock: Document, recipe: Recipe, model: PublishedModel, options: PublishOptions, console: Console
) -> ModelCard:
    """Render the card; everything in it comes from the run's report and lock, and from what the publisher states."""
    base, base_name, notes = name_base(lock, options)
    name = redact(options.repo or recipe.name).rpartition("/")[2]
    license_name, license_from = _find_license(lock, base, options)
    _print_unknown(base, license_name, lock, options, console)
    shared = cast(dict[str, Any], hide_paths(report))
    auto_class = find_auto_class(model.config)
    card: ModelCard = ModelCard.from_template(
        _metadata(shared, model, options, name=name, auto_class=auto_class, base=base, license_name=license_name),
        template_str=files("llmtune.deploy").joinpath("model_card.md.jinja").read_text("utf-8"),
        name=name,
        repo=options.repo or name,
        report=shared,
        method=shared["adapter"]["method"],
        summary=TASK_FACTS[recipe.task].summary,
        kind=model.kind,
        auto_class=auto_class,
        base=base,
        base_name=base_name,
        revision=lock["model"]["revision"] if base == lock["model"]["name"] else None,
        license=license_name,
        license_from=license_from,
        data_license=options.data_license or UNKNOWN,
        sources=_source_names(shared),
        parity=_describe_certificates(model),
        quantization=_quantization(report, model),
        added_tokens=bool(recipe.model.add_tokens),
        chat=(model.folder / "chat_template.jinja").is_file() and TASK_FACTS[recipe.task].templated,
        template_kwargs=recipe.model.chat_template_kwargs,
        gguf=options.gguf.name if options.gguf else None,
        notes=notes,
        measured=_measured(shared),
        training=_training(shared, lock, base_name),
        plain=plain,
        code=code,
        repr=repr,
    )
    return card


def name_base(lock: Document, options: PublishOptions) -> tuple[str | None, str, list[str]]:
    """Return the base's name on the hub, if it has one, its name as a reader may see it, and notes on it."""
    name = str(lock["model"]["name"])
    if options.base_model:
        return options.base_model, options.base_model, []
    if name.startswith("builtin:"):
        packaged = PACKAGED_MODELS.get(name.removeprefix("builtin:"))
        if packaged is None:
            return None, name, []
        note = f"It was trained on {name}, which is {packaged.name} as a package has it ({packaged.difference}): "
        return packaged.name, name, [note + "numbers were measured on that copy."]
    if is_local_path(name):
        note = "Its base model is known by its hash alone: the publisher has not named its model of the hub."
        return None, Path(name).name, [note]
    return name, name, []


def _find_license(lock: Document, base: str | None, options: PublishOptions) -> tuple[str, str]:
    """Return the licence, and who states it."""
    if options.license:
        return options.license, "stated by the publisher"
    network = bool(options.repo) and not options.offline
    license_name = find_license(str(lock["model"]["name"]), Path(lock["model"]["folder"]), base, network=network)
    if license_name:
        return license_name, "that of the base model"
    return UNKNOWN, "not stated by the publisher, and not found with the base model"


def _print_unknown(
    base: str | None, license_name: str, lock: Document, options: PublishOptions, console: Console
) -> None:
    if base is None and is_local_path(str(lock["model"]["name"])):
        console.print("The base model is a local folder: name its model of the hub with --base-model OWNER/NAME.")
    if license_name == UNKNOWN:
        console.print("The licence of the base model is not known: state it with --license.")
    if options.data_license is None:
        console.print("The licence of the data is not stated (--data-license): the card says so.")


def find_auto_class(config: Document) -> str:
    """Return the Auto class of an adapter_config.json, or of a model's config.json."""
    if config.get("task_type"):
        return PEFT_CLASSES[config["task_type"]]
    names = [(config.get("auto_mapping") or {}).get("base_model_class"), *(config.get("architectures") or ())]
    name = next((str(one) for one in names if one), "")
    for pattern, auto_class in AUTO_CLASSES.items():
        if match := re.search(pattern, name):
            return match.expand(auto_class)
    return "AutoModel"


def _metadata(
    report: Document,
    model: PublishedModel,
    options: PublishOptions,
    *,
    name: str,
    auto_class: str,
    base: str | None,
    license_name: str,
) -> ModelCardData:
    """Return the metadata, by the hub's names."""
    hub_data = [source.removeprefix("hub:") for source in _source_names(report) if source.startswith("hub:")]
    adapter, pipeline = model.kind == "adapter", TASK_FACTS[report["task"]].pipeline or PIPELINES.get(auto_class)
    relation: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    return ModelCardData(
        base_model=base,
        datasets=hub_data or None,
        eval_results=list(_eval_results(report, hub_data, pipeline or "other")) or None,
        language=list(options.languages) or None,
        library_name="peft" if adapter else "transformers",
        license=license_name,
        metrics=sorted({_hub_metric(metric) for metric in _scores(report)}) or None,
        model_name=name,
        pipeline_tag=pipeline,
        tags=["llmtune", report["task"], report["adapter"]["method"], *(["gguf"] if options.gguf else [])],
        **relation,
    )


def _source_names(report: Document) -> list[str]:
    """Return the training data: a data set of the hub by its name, a file by the last part of its path."""
    paths = [str(source["path"]) for source in report["recipe"]["data"]["train"]]
    return [path if path.startswith(("hub:", "builtin:")) else Path(path).name for path in paths]


def _scores(report: Document) -> dict[str, float]:
    """Return the scores of the tuned model."""
    tuned = report["evaluation"].get("tuned") or {}
    return {name: value for name, value in tuned.items() if value is not None and math.isfinite(value)}


def _hub_metric(metric: str) -> str:
    return next((name for pattern, name in HUB_METRICS.items() if re.fullmatch(pattern, metric)), metric)


def _eval_results(report: Document, hub_data: list[str], pipeline: str) -> Iterator[EvalResult]:
    """Yield a result per metric of the tuned model; base and interval stand in its name, for want of fields."""
    names = ", ".join(_source_names(report))
    for metric, value in _scores(report).items():
        yield EvalResult(
            task_type=pipeline,
            dataset_type=hub_data[0] if len(hub_data) == 1 else re.sub(r"[^\w.-]+", "-", names).strip("-"),
            dataset_name=f"held-out rows of {names}",
            dataset_split="test",
            metric_type=_hub_metric(metric),
            metric_value=round(value, 6),
            metric_name=_long_name(metric, report["evaluation"]),
        )


def _long_name(metric: str, evaluation: Document) -> str:
    change, base = (evaluation.get("difference") or {}).get(metric), evaluation["base"].get(metric)
    if change is None or base is None:
        return metric
    low, high = (f"{end:+.4g}" if end is not None else "?" for end in change["interval"])
    baseline = evaluation.get("baseline") or "base"
    return f"{metric} ({baseline} {base:.4g}, difference {change['value']:+.4g}, 95 % interval {low} to {high})"


def _quantization(report: Document, model: PublishedModel) -> Document | None:
    """Return the arguments of BitsAndBytesConfig by which the base is loaded."""
    if report["adapter"]["method"] != "qlora" or model.kind != "adapter":
        return None
    adapter, dtype = report["recipe"]["adapter"], report["recipe"]["model"]["dtype"]
    heads = model.config.get("modules_to_save")
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": adapter["bnb_4bit_quant_type"],
        "bnb_4bit_use_double_quant": adapter["bnb_4bit_use_double_quant"],
        "bnb_4bit_compute_dtype": "bfloat16" if dtype == "auto" else dtype,
        **({"llm_int8_skip_modules": heads} if heads else {}),
    }


def _describe_certificates(model: PublishedModel) -> str:
    merged, lines = model.certificate, []
    if model.kind != "merged":
        merged = model.certificate["merged"]
        sums = ", ".join(f"`{name}` {digest[:16]}…" for name, digest in model.certificate["files_sha256"].items())
        lines.append(f"These are, byte for byte, the weights that were evaluated (sha256 {sums}).")
    if merged is not None:
        whose = "This model" if model.kind == "merged" else "Merged into its base"
        onto = f"onto the {merged['onto']} weights, in {merged['dtype']}"
        lines.append(f"{whose} ({onto}) and the adapter on its training base: {describe_parity(merged['measured'])}.")
    if (gguf := model.gguf) is not None:
        numbers = describe_parity(gguf["measured"]) if gguf["measured"] else "the adapter's products were compared"
        lines.append(f"GGUF ({gguf['number_format']}, read by {gguf['reader']}): {numbers}.")
    return "\n\n".join(lines)


def _measured(report: Document) -> str:
    """Return scores against the base with intervals, gates, several seeds, other studies."""
    notes = [f"- {code(name)}: {plain(METRIC_NOTES[name])}" for name in _scores(report) if name in METRIC_NOTES]
    scores, *rest = (render_section(section, level=3) for section in read_sections(report))
    return "\n\n".join(part for part in (scores, "\n".join(notes), *rest) if part)


def _training(report: Document, lock: Document, base_name: str) -> str:
    adapter, train, hardware = report["adapter"], report["train"], lock["hardware"]
    commit = f" at commit {lock['model']['revision']}" if lock["model"]["revision"] else ""
    shape = f", r {adapter['r']}, alpha {adapter['lora_alpha']}" if adapter.get("r") else ""
    rows = {
        "base": f"{base_name}{commit}",
        "base, sha256": lock["model"]["sha256"],
        "data, sha256": lock["data"]["sha256"],
        "method": f"{adapter['method']}{shape}, {adapter['trainable']:,} of {adapter['all']:,} parameters",
        "steps": f"{train['steps']} ({train['epochs']:.3g} epochs), {train['tokens']:,} tokens",
        "seed": ", ".join(map(str, [lock["seed"], *(report["recipe"]["train"].get("seeds") or ())])),
        "hardware": f"{hardware.get('processor') or hardware['machine']}, {hardware.get('device')}",
        "packages": ", ".join(f"{name} {version}" for name, version in lock["packages"].items() if version),
    }
    return table(["", ""], [[name, code(value)] for name, value in rows.items()])
