"""The model card: the hub's metadata, and what a reader must know before he uses the model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llmtune.report.metric_info import METRIC_NOTES
from llmtune.report.render_markdown import code, plain, render_section, table
from llmtune.report.report_reader import read_sections

UNKNOWN = "unknown"
"""The hub's word for a licence that nobody stated."""
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
TASK_PIPELINES = {"translate": "translation", "summarize": "summarization"}
HUB_METRICS = {
    "rouge1": "rouge",
    "rouge2": "rouge",
    "rougeL": "rouge",
    "rougeLsum": "rouge",
    "matthews": "matthews_correlation",
}
"""By our name of a metric the hub's, where they differ; F1 and AUROC in all their forms by `f1` and `roc_auc`."""
USES = {
    "chat": "answering in conversations of the kind of its training rows",
    "completion": "going on with texts of the kind of its training rows",
    "translate": "translating texts of the kind of its training rows",
    "summarize": "summarising texts of the kind of its training rows",
    "qa": "answering questions of the kind of its training rows about a given text",
    "classify": "putting texts of the kind of its training rows into the classes named in `config.json`",
    "token-classify": "marking words in texts of the kind of its training rows",
    "speech": "writing down recordings of the kind of its training rows",
    "preference": "what its base model is for, with answers nearer to the preferences in its training rows",
}


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    name: str
    report: Mapping[str, Any]
    lock: Mapping[str, Any]
    kind: str
    """adapter, weights (a full tuning) or merged."""
    auto_class: str
    base: str | None
    """The base model's name on the hub; None where it is a folder of somebody's disk."""
    base_name: str
    """As a reader may see it."""
    license: str
    license_from: str
    data_license: str
    languages: tuple[str, ...]
    snippet: str
    parity: str
    gguf: str | None = None
    """Name of a GGUF file beside the model."""
    notes: tuple[str, ...] = ()

    @property
    def sources(self) -> list[str]:
        """Names of the training data: a data set of the hub by its name, a file by the last part of its path."""
        return [_source_name(source) for source in self.report["recipe"]["data"]["train"]]

    @property
    def hub_data(self) -> list[str]:
        """Names of those that are data sets of the hub."""
        paths = [str(source["path"]) for source in self.report["recipe"]["data"]["train"]]
        return [path.removeprefix("hub:") for path in paths if path.startswith("hub:")]


def _source_name(source: Mapping[str, Any]) -> str:
    path = str(source["path"])
    return path if path.startswith(("hub:", "builtin:")) else Path(path).name


def write_card(subject: Subject) -> ModelCard:
    """Put the card together; what it says is what the run's report and lock say."""
    parts = [
        f"# {plain(subject.name)}",
        _opening(subject),
        f"## How to load\n\n```python\n{subject.snippet}```",
        _beside(subject),
        *_measured(subject),
        f"## Parity\n\n{subject.parity}",
        _data(subject),
        _training(subject),
        _limits(subject),
        f"Made by llmtune {plain(subject.report['llmtune'])}. `recipe.yaml` says how, `llmtune.lock` from what, "
        "`certificate.json` what was proven.",
    ]
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{describe(subject).to_yaml()}\n---\n\n{body}\n")


def describe(subject: Subject) -> ModelCardData:
    """Return the metadata, by the hub's names."""
    report = subject.report
    method = report["adapter"]["method"]
    adapter = subject.kind == "adapter"
    tags = ["llmtune", str(report["task"]), method, *(["gguf"] if subject.gguf else [])]
    found = {metric: _hub_metric(metric) for metric in _numbers(report)}
    relation: dict[str, Any] = {}
    if subject.base is not None:
        relation["base_model_relation"] = "adapter" if adapter else "finetune"
    return ModelCardData(
        base_model=subject.base,
        datasets=subject.hub_data or None,
        eval_results=list(_results(subject, found)) or None,
        language=list(subject.languages) or None,
        library_name="peft" if adapter else "transformers",
        license=subject.license,
        metrics=sorted(set(found.values())) or None,
        model_name=subject.name,
        pipeline_tag=TASK_PIPELINES.get(report["task"]) or PIPELINES.get(subject.auto_class),
        tags=tags,
        **relation,
    )


def _hub_metric(metric: str) -> str:
    if metric.startswith("f1"):
        return "f1"
    return {"auroc": "roc_auc"}.get(metric) or HUB_METRICS.get(metric, metric)


def _numbers(report: Mapping[str, Any]) -> dict[str, float]:
    tuned = (report.get("evaluation") or {}).get("tuned") or {}
    return {name: value for name, value in tuned.items() if value is not None and math.isfinite(value)}


def _results(subject: Subject, found: Mapping[str, str]) -> Sequence[EvalResult]:
    """Return a result a metric of the tuned model; base and interval stand in its name, for want of fields."""
    evaluation = subject.report["evaluation"]
    names = ", ".join(subject.sources)
    data_type = subject.hub_data[0] if len(subject.hub_data) == 1 else re.sub(r"[^\w.-]+", "-", names).strip("-")
    return [
        EvalResult(
            task_type=describe_pipeline(subject),
            dataset_type=data_type,
            dataset_name=f"held-out rows of {names}",
            dataset_split="test",
            metric_type=found[metric],
            metric_value=round(value, 6),
            metric_name=_long_name(metric, evaluation),
        )
        for metric, value in _numbers(subject.report).items()
    ]


def describe_pipeline(subject: Subject) -> str:
    """Return the hub's name of what the model does."""
    return TASK_PIPELINES.get(subject.report["task"]) or PIPELINES.get(subject.auto_class, "other")


def _long_name(metric: str, evaluation: Mapping[str, Any]) -> str:
    change = (evaluation.get("difference") or {}).get(metric)
    base = evaluation["base"].get(metric)
    if change is None or base is None:
        return metric
    low, high = (f"{end:+.4g}" if end is not None else "?" for end in change["interval"])
    against = evaluation.get("baseline") or "base"
    return f"{metric} ({against} {base:.4g}, difference {change['value']:+.4g}, 95 % interval {low} to {high})"


def _opening(subject: Subject) -> str:
    report, method = subject.report, subject.report["adapter"]["method"]
    what = {
        "adapter": f"A PEFT adapter ({method}) for",
        "merged": f"A merge of a PEFT adapter ({method}) with",
        "weights": "All weights, tuned, of",
    }[subject.kind]
    base = f"[{subject.base}](https://huggingface.co/{subject.base})" if subject.base else plain(subject.base_name)
    verdict = report["verdict"]
    said = f"Against its base on the same held-out rows: **{plain(verdict['word'])}**. {plain(verdict['reason'])}"
    return f"{what} {base}, tuned for the task {code(report['task'])}.\n\n{said}"


def _beside(subject: Subject) -> str:
    if not subject.gguf:
        return ""
    line = f"`{subject.gguf}` is the same model for llama.cpp, with an Ollama `Modelfile` where one was made."
    return f"{line} `gguf-certificate.json` says how near it is."


def _measured(subject: Subject) -> list[str]:
    """Return what was measured: scores against the base with intervals, gates, several seeds, other studies."""
    report = subject.report
    rows = (report.get("evaluation") or {}).get("rows")
    known = [name for name in _numbers(report) if name in METRIC_NOTES]
    about = [f"- {code(name)}: {plain(METRIC_NOTES[name])}" for name in known]
    head = f"## What was measured\n\nBase and tuned model on the same {rows} held-out rows, which training never saw."
    if subject.kind == "merged":
        head += (
            " Scores are those of the adapter on its training base; how near this merge is to it stands under Parity."
        )
    scores, *rest = (render_section(section, level=3) for section in read_sections(report))
    return [part for part in (head, scores, "\n".join(about), *rest) if part]


def _data(subject: Subject) -> str:
    data = subject.report["data"]
    kept = ", ".join(f"{count} {side}" for side, count in data["kept"].items())
    dropped = sum(data["dropped"].values())
    lines = [
        f"- sources: {', '.join(map(code, subject.sources))}",
        f"- rows: {data['rows_in']} read, {dropped} dropped, {kept}",
        f"- licence of the data: {plain(subject.data_license)}",
    ]
    if subject.data_license == UNKNOWN:
        lines[-1] += " (not stated by the publisher: find out before you rely on it)"
    return "## Training data\n\n" + "\n".join(lines)


def _training(subject: Subject) -> str:
    report, lock = subject.report, subject.lock
    adapter, train = report["adapter"], report["train"]
    shape = f", r {adapter['r']}, alpha {adapter['lora_alpha']}" if adapter.get("r") else ""
    packages = ", ".join(f"{name} {found}" for name, found in lock["packages"].items() if found)
    further = report["recipe"]["train"].get("seeds") or []
    rows = [
        (
            "base",
            f"{subject.base_name}" + (f" at commit {lock['model']['revision']}" if lock["model"]["revision"] else ""),
        ),
        ("base, sha256", str(lock["model"]["sha256"])),
        ("data, sha256", str(lock["data"]["sha256"])),
        ("method", f"{adapter['method']}{shape}, {adapter['trainable']:,} of {adapter['all']:,} parameters"),
        ("steps", f"{train['steps']} ({train['epochs']:.3g} epochs), {train['tokens']:,} tokens"),
        ("seed", ", ".join(map(str, [lock["seed"], *further]))),
        (
            "hardware",
            f"{lock['hardware'].get('processor') or lock['hardware']['machine']}, {lock['hardware'].get('device')}",
        ),
        ("packages", packages),
    ]
    return "## Training\n\n" + table(["", ""], [[name, code(value)] for name, value in rows])


def _limits(subject: Subject) -> str:
    origin = f"{code(subject.license)} ({plain(subject.license_from)})"
    lines = [
        f"- Meant for {USES[subject.report['task']]}. Nothing else was measured.",
        "- What its base model gets wrong, and what its training rows say that is wrong or unfair, it may say too.",
        "- Intervals tell chance in the choice of test rows alone: other data may give other numbers.",
        f"- Licence: {origin}. The licences of the base model and of the data hold beside it.",
        *(f"- {note}" for note in subject.notes),
    ]
    return "## Intended use and limits\n\n" + "\n".join(lines)
