"""The model card: the hub's metadata, and facts to know before using the model (model_card.md.jinja)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from pydantic import TypeAdapter
from rich.console import Console
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from llmtune.deploy.parity import Certificate, describe_parity
from llmtune.display.number_format import missing
from llmtune.evaluate.metric_info import metric_note
from llmtune.model.builtin_models import PACKAGED
from llmtune.model.model_files import read_json_object
from llmtune.model.resolve import UNKNOWN, find_license
from llmtune.recipe.model_kind import CAUSAL, MODEL_KINDS, ModelKind
from llmtune.recipe.schema import Recipe
from llmtune.recipe.secrets import hide_paths, is_local_path
from llmtune.recipe.task_facts import TASK_FACTS
from llmtune.report.evaluation_sections import gate_section
from llmtune.report.render_markdown import code, markdown_text, render_section
from llmtune.report.run_sections import export_section
from llmtune.report.score_sections import base_name, score_section, seed_section, suite_sections
from llmtune.store.report_record import Seeds
from llmtune.store.score_records import Evaluation, GateResult
from llmtune.tasks.registry import VARIANTS

HUB_METRICS = {r"f1.*": "f1", r"rouge.*": "rouge", r"matthews": "matthews_correlation", r"auroc": "roc_auc"}
"""The hub's metric names by a pattern of ours, if they differ."""


TUNED_WITH_PICTURES = (
    "It was tuned with pictures, scaled by the processor's files in this folder. Pictures of another kind, and more of "
    "them in one question than in the training rows, were not measured. The parts that read images are those of the "
    "base{}."
)
TUNED_ON_TEXT = "It was tuned on text. The parts that read images are those of the base, and were not measured."
Document = Mapping[str, Any]
"""A JSON document of a run or of a model: report.json, llmtune.lock, adapter_config.json."""


@dataclass(frozen=True)
class PublishOptions:
    """The publisher's options and statements, which no run contains."""

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
class Publication:
    """A finished run as published: model, certificates, records, and the publisher's options."""

    kind: str
    """adapter, weights (a full tuning) or merged."""
    folder: Path
    certificate: Certificate
    gguf: Certificate | None
    report: Document
    evaluation: Evaluation
    lock: Document
    recipe: Recipe
    options: PublishOptions

    @property
    def config(self) -> Document:
        """The content of adapter_config.json or config.json."""
        return read_json_object(self.folder / ("adapter_config.json" if self.kind == "adapter" else "config.json"))

    @property
    def needs_peft(self) -> bool:
        """Whether it is an adapter, but no sentence-transformers folder, which loads its base itself."""
        return self.kind == "adapter" and not (self.folder / "modules.json").is_file()

    @property
    def takes_images(self) -> bool:
        """Whether it was tuned with pictures."""
        section = TASK_FACTS[self.recipe.task].section
        resolved = self.report["recipe"].get(section) if section else None
        recipe = self.recipe.with_section(**resolved) if resolved else self.recipe
        return any(one.model_kind.takes_images for one in VARIANTS[recipe.task] if one.matches(recipe))

    @property
    def reads_images(self) -> bool:
        """Whether it is a tune, also one on text alone, of a checkpoint that reads images."""
        config, complete = self.config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
        return not config.get("is_encoder_decoder") and any(name in complete for name in _stated_classes(config))

    @property
    def base(self) -> tuple[str | None, str, list[str]]:
        """The base's name on the hub (if any), its public name, and notes on it."""
        name = str(self.lock["model"]["name"])
        if self.options.base_model:
            return self.options.base_model, self.options.base_model, []
        packaged = PACKAGED.get(name.removeprefix("builtin:")) if name.startswith("builtin:") else None
        if packaged is not None:
            note = f"It was trained on {name}, the packaged copy of {packaged.origin} ({packaged.difference}): "
            return packaged.origin, name, [note + "numbers were measured on that copy."]
        if is_local_path(name):
            note = "Its base model is known only by its hash: the publisher has not named it on the hub."
            return None, Path(name).name, [note]
        return None if name.startswith("builtin:") else name, name, []

    @property
    def revision(self) -> str | None:
        """The commit of the base on the hub, if it is a hub model."""
        revision: str | None = self.lock["model"]["revision"]
        return revision if self.base[0] == self.lock["model"]["name"] else None


def write_card(published: Publication, console: Console) -> ModelCard:
    """Render the card from the run's report and lock, and the publisher's statements."""
    options, recipe, (base, base_name, notes) = published.options, published.recipe, published.base
    license_name, license_from = _find_license(published)
    _print_unknown(published, license_name, console)
    name = (options.repo or recipe.name).rpartition("/")[2]
    report = cast(Document, hide_paths({**published.report, "recipe": recipe.model_dump(mode="json")}))
    scores = TypeAdapter(Evaluation).validate_python(hide_paths(asdict(published.evaluation)))
    model_kind = CAUSAL if published.reads_images else find_model_kind(published.config)
    if published.takes_images:
        projector = ", except its projector, which was trained" if recipe.adapter.train_projector else ""
        notes = [*notes, TUNED_WITH_PICTURES.format(projector)]
    elif published.reads_images:
        notes = [*notes, TUNED_ON_TEXT]
    metadata = _metadata(published, scores, _source_names(report), model_kind)
    card: ModelCard = ModelCard.from_template(
        ModelCardData(base_model=base, license=license_name, model_name=name, **metadata),
        template_str=files("llmtune.deploy").joinpath("model_card.md.jinja").read_text("utf-8"),
        name=name,
        repo=options.repo or name,
        report=report,
        lock=published.lock,
        model=published,
        options=options,
        recipe=recipe,
        facts=TASK_FACTS[recipe.task],
        model_kind=model_kind,
        base=base,
        base_name=base_name,
        license=license_name,
        license_from=license_from,
        sources=_source_names(report),
        has_template=(published.folder / "chat_template.jinja").is_file(),
        notes=notes,
        measured=_measured(report, scores),
        describe_parity=describe_parity,
        plain=markdown_text,
        code=code,
        repr=repr,
    )
    return card


def _find_license(published: Publication) -> tuple[str, str]:
    """Return the licence and its source."""
    options, model = published.options, published.lock["model"]
    if options.license:
        return options.license, "stated by the publisher"
    network = bool(options.repo) and not options.offline
    license_name = find_license(str(model["name"]), Path(model["folder"]), published.base[0], network=network)
    if license_name:
        return license_name, "that of the base model"
    return UNKNOWN, "not stated by the publisher, and not found with the base model"


def _print_unknown(published: Publication, license_name: str, console: Console) -> None:
    if published.base[0] is None and is_local_path(str(published.lock["model"]["name"])):
        console.print("The base model is a local folder. Name it on the hub with --base-model OWNER/NAME.")
    if license_name == UNKNOWN:
        console.print("The licence of the base model is unknown. State it with --license.")
    if published.options.data_license is None:
        console.print("The licence of the data is unknown, and the card says so. State it with --data-license.")


def find_model_kind(config: Document) -> ModelKind:
    """Return the kind of model of an adapter_config.json, or of a model's config.json."""
    name = next((str(one) for one in (config.get("task_type"), *_stated_classes(config)) if one), "")
    return next(kind for kind in MODEL_KINDS if re.search(kind.card_pattern, name))


def _stated_classes(config: Document) -> list[Any]:
    """Return the model classes that an adapter_config.json or a config.json names."""
    mapping, architectures = config.get("auto_mapping"), config.get("architectures")
    base_class = [mapping.get("base_model_class")] if isinstance(mapping, dict) else []
    return base_class + (architectures if isinstance(architectures, list) else [])


def _metadata(published: Publication, scores: Evaluation, sources: list[str], kind: ModelKind) -> dict[str, Any]:
    """Return the metadata by the hub's names."""
    task, options, method = published.recipe.task, published.options, published.report["adapter"]["method"]
    pipeline = TASK_FACTS[task].pipeline or kind.hub_task
    if published.reads_images and pipeline == CAUSAL.hub_task:
        pipeline = "image-text-to-text"
    hub_data = [source.removeprefix("hub:") for source in sources if source.startswith("hub:")]
    relation = {"base_model_relation": "adapter" if published.kind == "adapter" else "finetune"}
    return {
        "datasets": hub_data or None,
        "eval_results": list(_eval_results(scores, sources, hub_data, pipeline or "other")) or None,
        "language": list(options.languages) or None,
        "library_name": "peft" if published.needs_peft else TASK_FACTS[task].library,
        "metrics": sorted({_hub_metric(metric) for metric in _known_scores(scores)}) or None,
        "pipeline_tag": pipeline,
        "tags": ["llmtune", task, *TASK_FACTS[task].tags, method, *(["gguf"] if options.gguf else [])],
        **(relation if published.base[0] else {}),
    }


def _source_names(report: Document) -> list[str]:
    """Return the training data: hub data sets by name, files by the last part of the path."""
    paths = [str(source["path"]) for source in report["recipe"]["data"]["train"]]
    return [path if path.startswith(("hub:", "builtin:")) else Path(path).name for path in paths]


def _known_scores(scores: Evaluation) -> dict[str, float]:
    """Return the scores of the tuned model that are numbers."""
    return {name: value for name, value in scores.tuned.items() if math.isfinite(value)}


def _hub_metric(metric: str) -> str:
    return next((name for pattern, name in HUB_METRICS.items() if re.fullmatch(pattern, metric)), metric)


def _eval_results(scores: Evaluation, sources: list[str], hub_data: list[str], pipeline: str) -> Iterator[EvalResult]:
    """Yield a result per metric of the tuned model; base and interval are in its name, for lack of fields."""
    names = ", ".join(sources)
    for metric, value in _known_scores(scores).items():
        yield EvalResult(
            task_type=pipeline,
            dataset_type=hub_data[0] if len(hub_data) == 1 else re.sub(r"[^\w.-]+", "-", names).strip("-"),
            dataset_name=f"held-out rows of {names}",
            dataset_split="test",
            metric_type=_hub_metric(metric),
            metric_value=round(value, 6),
            metric_name=_long_name(metric, scores),
        )


def _long_name(metric: str, scores: Evaluation) -> str:
    change, base = scores.difference.get(metric), scores.base.get(metric)
    if change is None or missing(base):
        return metric
    low, high = ("?" if missing(end) else f"{end:+.4g}" for end in (change.low, change.high))
    baseline = scores.baseline or "base"
    return f"{metric} ({baseline} {base:.4g}, difference {change.value:+.4g}, 95 % interval {low} to {high})"


def _measured(report: Document, scores: Evaluation) -> str:
    """Return the scores compared with the base, with intervals, gates, seeds and other studies."""
    seeds = TypeAdapter(Seeds | None).validate_python(report["evaluation"].get("seeds"))
    sections = (
        gate_section([GateResult(**gate) for gate in report["gates"]]),
        seed_section(seeds, base_name(scores)),
        *suite_sections(scores),
        export_section(scores, report.get("deploy")),
    )
    notes = [
        f"- {code(name)}: {markdown_text(note)}"
        for name in _known_scores(scores)
        if (note := metric_note(name, report["task"]))
    ]
    first = render_section(score_section(scores, report["task"]), level=3)
    rest = [render_section(section, level=3) for section in sections]
    return "\n\n".join(part for part in (first, "\n".join(notes), *rest) if part)
