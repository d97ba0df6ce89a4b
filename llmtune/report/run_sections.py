"""Builds the report's sections about the run: training, data, model, adapter, time, recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from llmtune.data.data_notes import (
    filled_sentence,
    long_answers_sentence,
    lost_sentence,
    name_changes_sentences,
    negatives_blocks,
    picture_blocks,
    vanishing_sentence,
)
from llmtune.display.blocks import (
    Beside,
    Block,
    Bullets,
    Cell,
    Column,
    Compared,
    Details,
    Html,
    KeyValues,
    Section,
    Shares,
    Table,
    TableColumns,
    TableRows,
    Text,
    difference_table,
)
from llmtune.display.charts import ChartPoint, Curve, draw_curves, draw_histogram, draw_meter, element, heading
from llmtune.display.number_format import DASH, count, duration, missing, score, share, size
from llmtune.evaluate.metric_info import better_side, rank_metrics
from llmtune.recipe.task_facts import TASK_FACTS, answer_kind
from llmtune.records import StepTiming
from llmtune.report.score_sections import list_signatures, spell_metrics
from llmtune.store.json_shapes import HardRow, SelectedFacts
from llmtune.store.report_record import AdapterFacts, DataFacts, TrainFacts, list_exports
from llmtune.store.score_records import Evaluation

SPLITS = ("train", "validation", "test")
PART_NAMES = {"optimizer": "optimizer state"}
FEWEST_POINTS = 10
"""Minimum log lines for a chart of the learning rate; with fewer, its peak may be missing."""
WORDED = frozenset({"exact_match", "f1", "rouge1", "rouge2", "rougeL", "rougeLsum", "chrf", "bleu", "ter"})
"""Metrics that reward wording."""
WRITING_TASKS = frozenset(name for name, facts in TASK_FACTS.items() if facts.generates and not facts.takes_audio)


def known(pairs: Sequence[tuple[str, str | None]]) -> list[tuple[str, str]]:
    """Drop unknown values."""
    return [(name, text) for name, text in pairs if text and not text.startswith(DASH)]


def training_section(train: TrainFacts | None) -> Section:
    """Return losses, curves and speed."""
    if not train:
        return Section("Training", [])
    curve = [line for line in train.get("curve", []) if not missing(line.get("step"))]
    padding = train.get("padding_share")
    facts = [
        ("first loss", score(train.get("first_loss"))),
        ("last training loss", score(train.get("train_loss"))),
        ("validation loss", score(train.get("validation_loss"))),
        ("steps", count(train.get("steps"))),
        ("steps without an update", count(train.get("skipped_steps") or None)),
        ("epochs", score(train.get("epochs"))),
        ("best step", count(train.get("best_step"))),
        ("tokens", count(train.get("tokens"))),
        ("padding", None if padding is None else f"{100 * padding:.1f} %"),
        ("speed", f"{count(train.get('tokens_per_second'))} tokens/s"),
        ("time", duration(train.get("wall_seconds"))),
        ("peak memory", size(train.get("peak_bytes"))),
        ("stopped early", train.get("stopped_early")),
        ("resumed from step", count(train.get("resumed_from"))),
    ]
    losses = [
        Curve("training loss", points(curve, "loss")),
        Curve("validation loss", points(curve, "validation_loss"), "validation"),
    ]
    drawn = Html(draw_curves(losses, label="training and validation loss by step", height=300))
    rate, norm = (
        Html(
            draw_curves(
                [Curve(title, points(curve, key), "other")], label=f"{title.lower()} by step", title=title, height=150
            )
        )
        for title, key in (("Learning rate", "learning_rate"), ("Gradient norm", "grad_norm"))
    )
    courses = [Beside([rate], [norm])] if len(curve) >= FEWEST_POINTS else []
    blocks: list[Block] = [Beside([drawn], [KeyValues(known(facts))]), *metric_curves(curve), *courses]
    if collapse := train.get("collapse"):
        blocks.insert(0, Text(collapse, "note"))
    return Section("Training", [*blocks, *hardest_rows(train.get("hardest_rows", []))])


CHARTED = {"figures": ("samples", "other"), "validation_metrics": ("validation rows", "validation")}
"""Keys of a line of `metrics.jsonl` with values by name; the rows that they were measured on, and the chart's style."""


def metric_curves(curve: Sequence[Mapping[str, object]]) -> list[Block]:
    """Return a chart of each metric measured during training, on samples or on validation rows."""
    drawn = []
    for key, (rows, style) in CHARTED.items():
        lines = [{"step": line["step"], **metrics} for line in curve if isinstance(metrics := line.get(key), dict)]
        for name in dict.fromkeys(name for line in lines for name in line if name != "step"):
            curves, title = [Curve(name, points(lines, name), style)], f"{name.replace('_', ' ')} of {rows}"
            drawn.append(Html(draw_curves(curves, label=f"{name} by step", title=title, height=150)))
    return [Beside(drawn[at : at + 1], drawn[at + 1 : at + 2]) for at in range(0, len(drawn), 2)]


def hardest_rows(rows: Sequence[HardRow]) -> list[Block]:
    """Return a collapsed table of the training rows that were hardest to learn; empty if none are known."""
    if not rows:
        return []
    cells: TableRows = []
    for one in rows:
        numbers = score(one["loss"]), score(one["excess"])
        cells.append(
            [
                f"{one['prompt']} → {one['reference']}",
                *numbers,
                Cell(one["origin"], note=one["id"][:12]),
            ]
        )
    columns: TableColumns = ["prompt → reference", Column("loss", "number"), Column("above its steps", "number"), "row"]
    text = "Mean loss of each row during training, and how far it was above the mean of its steps. Rows that stay "
    text += "hard are often mislabelled: read these first. `row_losses.npz` has all rows."
    shown: list[Block] = [Text(text, "soft"), Table(columns, cells, scroll=True)]
    return [Details(f"The {len(rows)} training rows that were hardest to learn", shown)]


def points(curve: Sequence[Mapping[str, object]], key: str) -> list[ChartPoint]:
    """Return the points of one column of the metrics."""
    pairs = []
    for line in curve:
        step, value = line.get("step"), line.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float):
            pairs.append((float(step), float(value)))
    return pairs


def data_section(data: DataFacts | None, task: str | None, thumbnails: Sequence[str] = ()) -> Section:
    """Return rows in, kept and dropped, tokens and learned tokens, classes, pictures, and one example."""
    if not data:
        return Section("Data", [])
    kept, tokens, supervised = data.get("kept", {}), data.get("tokens", {}), data.get("supervised_tokens", {})
    dropped = data.get("dropped", {})
    by_token = data.get("supervised_share", 1) is not None
    columns = [Column(name, "number") for name in ("rows", "tokens", "learned" if by_token else "predictions")]
    rows = []
    for split in (name for name in SPLITS if name in kept):
        learned = share(supervised.get(split), tokens.get(split)) if by_token else count(supervised.get(split))
        rows.append([split, count(kept.get(split)), count(tokens.get(split)), learned])
    left: list[Block] = [Table(["split", *columns], rows)]
    reasons = [[reason, count(number)] for reason, number in sorted(dropped.items(), key=lambda item: -item[1])]
    title = f"{count(data.get('rows_in'))} rows in, {count(sum(dropped.values()))} dropped"
    left.append(Table(["reason", Column("dropped", "number")], reasons, title) if reasons else Text(f"{title}."))
    left += [Text(text, "note") for text in name_changes_sentences(data.get("class_changes") or ())]
    if filled := data.get("filled"):
        left.append(Text(filled_sentence(filled), "note"))
    if vanishing := data.get("vanishing"):
        left.append(Text(vanishing_sentence(vanishing), "note"))
    if lost := data.get("lost"):
        left.append(Text(lost_sentence(lost, sum(supervised.values())), "note"))
    if long_answers := data.get("long_answers"):
        left.append(Text(long_answers_sentence(long_answers), "note"))
    names = {"label": "training examples by length in tokens", "title": "Training examples by length", "axis": "tokens"}
    lengths = data.get("lengths")
    chart = [Html(draw_histogram(lengths["edges"], lengths["counts"], **names))] if lengths else []
    blocks: list[Block] = [Beside(left, chart)]
    if classes := data.get("classes"):
        blocks.append(class_counts(classes, "entities" if answer_kind(task) == "tags" else "rows"))
    blocks += picture_blocks(data.get("pictures") or {}, thumbnails)
    blocks += negatives_blocks(data.get("mined"), data.get("surveyed"))
    if example := data.get("example"):
        learned = share(sum(supervised.values()), sum(tokens.values()) or None) if by_token else ""
        text = "One training example as the model sees it: it learns the marked text and only reads the rest."
        text += f" It learns {learned} of all tokens." if learned else ""
        pieces = [element("mark", piece) if marked else escape(piece) for piece, marked in example]
        blocks.append(Html(heading(text) + element("pre", Markup("").join(pieces), class_="example")))
    return Section("Data", blocks)


def class_counts(classes: Mapping[str, Mapping[str, int]], unit: str) -> Table:
    """Return a table of each class's rows per split, the most frequent first; marks classes missing from training."""
    trained = {label: splits.get("train") or 0 for label, splits in classes.items()}
    total, most = sum(trained.values()), max(trained.values()) or 1
    heads = [Column(name, "number") for name in (*SPLITS, "of train")]
    rows: TableRows = []
    for label, number in sorted(trained.items(), key=lambda item: -item[1]):
        counts = [count(classes[label].get(split)) for split in SPLITS]
        part = Cell(share(number, total or None), "" if number else "worse")
        name = Cell(str(label), note="" if number else "not in training")
        rows.append([name, *counts, part, Cell(picture=draw_meter(number / most))])
    heading, title = ("type", "Entity types") if unit == "entities" else ("class", "Classes")
    columns = [Column(heading), *heads, Column("", "picture")]
    return Table(columns, rows, f"{title}: {class_spread(trained, unit)}", scroll=True)


def class_spread(trained: Mapping[str, int], unit: str) -> str:
    """Return a phrase on the class balance in training."""
    seen = [number for number in trained.values() if number]
    if unseen := [label for label, number in trained.items() if not number]:
        return f"{len(unseen)} of {len(trained)} have no training {unit}: {', '.join(map(str, unseen[:30]))}"
    ratio = max(seen) / min(seen)
    return "balanced" if ratio < 1.1 else f"the largest has {ratio:.3g} times the {unit} of the smallest"


def model_section(model: SelectedFacts | None) -> Section:
    """Return name, revision, memory plan and ranking."""
    if not model:
        return Section("Model and memory plan", [])
    plan = model.get("plan") or {}
    parts = plan.get("parts", {})
    limit, total = plan.get("limit"), sum(parts.values())
    facts = [("name", model.get("name")), ("revision", model.get("revision")), ("sha256", model.get("sha256"))]
    blocks: list[Block] = [KeyValues(known(facts))]
    if total:
        title = f"Planned: {size(total)}{f' of {size(limit)}' if limit else ''} on {plan.get('device')}, "
        title += f"at least {size(plan.get('lower_bound'))}"
        whole = max(total, limit or 0)
        named = [(PART_NAMES.get(name, name), size(part), part / whole) for name, part in parts.items() if part]
        blocks.append(Shares(named, title))
    ranking = model.get("ranking") or {}
    if candidates := ranking.get("candidates"):
        tried, metric = any(row.get("steps") for row in candidates), ranking.get("metric", "bits_per_byte")
        rows: TableRows = [
            [
                Cell(row["name"], note=f"skipped: {row['reason']}" if row.get("reason") else ""),
                score(row.get(metric)),
                *([score(row.get("tuned")), count(row.get("steps"))] if tried else []),
                size(row.get("lower_bound")),
            ]
            for row in candidates
        ]
        numbers = (metric.replace("_", " "), *(("after a trial", "of steps") if tried else ()), "needs")
        columns: TableColumns = ["model", *(Column(name, "number") for name in numbers)]
        blocks.append(Table(columns, rows, "Candidates, ranked on the rows"))
    return Section("Model and memory plan", blocks, "Model", "model", brief=False)


def adapter_section(adapter: AdapterFacts | None) -> Section:
    """Return method, trained share and target modules."""
    if not adapter:
        return Section("Adapter", [])
    trainable, whole = adapter.get("trainable"), adapter.get("all")
    facts = [
        ("method", adapter.get("method")),
        ("rank", count(adapter.get("r"))),
        ("alpha", count(adapter.get("lora_alpha"))),
        ("trained", f"{count(trainable)} of {count(whole)} parameters"),
        ("share", share(trainable, whole, 2)),
        ("base weights covered", share(adapter.get("share_under_adapter"), 1)),
        (f"base weights in {adapter.get('quantized_bits')} bits", share(adapter.get("share_quantized"), 1)),
        ("on disk", size(adapter.get("bytes"))),
        ("modules", count(adapter.get("matched_modules"))),
    ]
    blocks: list[Block] = [KeyValues(known(facts))]
    if targets := adapter.get("targets"):
        rows: TableRows = [[Cell(ending, code=True), f"{count(times)} ×"] for ending, times in targets.items()]
        blocks.append(Details("target modules", [Table(["", Column("", "number")], rows)]))
    return Section("Adapter", blocks)


def step_section(steps: Sequence[StepTiming], hardware: Mapping[str, object]) -> Section:
    """Return time and memory of each step, the machine, and package versions."""
    longest = max((step.seconds for step in steps), default=0) or 1
    rows: TableRows = []
    for step in steps:
        name = Cell(step.name, note="unchanged, skipped" if step.skipped else "")
        meter = Cell(picture=draw_meter(step.seconds / longest))
        rows.append([name, meter, duration(step.seconds), size(step.peak_bytes)])
    columns: TableColumns = ["step", Column("", "picture"), Column("time", "number"), Column("peak memory", "number")]
    facts = [(key, str(value)) for key, value in hardware.items() if not isinstance(value, dict) and value]
    packages = hardware.get("packages")
    facts += [(name, str(version)) for name, version in packages.items()] if isinstance(packages, dict) else []
    blocks = [Beside([Table(columns, rows)], [KeyValues(facts)])] if rows else []
    return Section("Time and memory by step", blocks, "Time and memory", "steps", brief=False)


def method_section(evaluation: Evaluation | None, task: str | None) -> Section:
    """Return how each number was computed, and the limits of the numbers."""
    limits = [
        "Test rows are never trained on: each row is in one split only, and training rows that repeat a test row are "
        "dropped.",
        "The intervals apply to other rows of this kind. They do not apply to other data, other seeds or other uses "
        "of the model.",
        "Each interval has its own 5 % error: about one in twenty misses the true value. Decide in advance which "
        "metric matters, and make it a gate.",
    ]
    if evaluation and task in WRITING_TASKS and WORDED & evaluation.tuned.keys():
        limits.append(
            "Exact match, ROUGE and chrF depend on wording. Choice accuracy does not: it compares the likelihood of "
            "possible answers."
        )
    if evaluation is None or "forgetting" not in evaluation.studies:
        limits.append(
            "The base model's other abilities are not measured here, except those in the test rows. "
            "`evaluate.forgetting` measures some of them."
        )
    methods = list(list_signatures(evaluation).items()) if evaluation else []
    blocks: list[Block] = [*([KeyValues(methods)] if methods else []), Bullets(limits, soft=True)]
    return Section("Method and limits", blocks, anchor="method", brief=False)


def recipe_section(recipe_yaml: str) -> Section:
    """Return the resolved recipe."""
    text = Text("The resolved recipe: every value with its origin.", "soft")
    return Section(
        "Recipe", [text, Html(element("pre", recipe_yaml, class_="code"))] if recipe_yaml else [], brief=False
    )


def export_section(evaluation: Evaluation | None, deploy: Mapping[str, Any] | None) -> Section:
    """Return size, speed, certificate and scores of each export, next to those of the tuned model."""
    exports = list_exports(deploy)
    rows: TableRows = []
    scores = [one.certificate["score"] for one in exports if one.state == "done"]
    if scores:
        rows.append(["tuned model", "", "", *write_usage(scores[0]["tuned_bytes"], scores[0]["tuned_usage"]), ""])
    for export in exports:
        if export.state == "done":
            scored = export.certificate["score"]
            cells = [scored["runtime"], write_scored(scored), *write_usage(scored["bytes"], scored["usage"])]
            rows.append([Cell(export.name, code=True), *cells, Cell("passed", "better")])
        else:
            state = Cell(export.state, "worse" if export.state == "failed" else "unsure")
            rows.append([Cell(export.name, code=True), "", "", "", "", "", state])
    numbers = ("scored rows", "weights", "rows/s", "memory")
    columns: TableColumns = ["", "runtime", *(Column(name, "number") for name in numbers), "certificate"]
    blocks: list[Block] = [Table(columns, rows)] if rows else []
    blocks += [Text(f"`{one.name}`: {one.failure['message']}", "note") for one in exports if one.failure]
    if any(one.state == "unfinished" for one in exports):
        blocks.append(Text("To make the unfinished exports, run the same command again.", "note"))
    studies = evaluation.exports if evaluation else {}
    for metric in rank_metrics(dict.fromkeys(metric for one in studies.values() for metric in one.difference)):
        compared = [
            Compared(name, one.base[metric], one.tuned[metric], one.difference[metric], better_side(metric))
            for name, one in studies.items()
            if metric in one.difference
        ]
        heads = {"heading": "export", "base": "tuned", "tuned": "export"}
        blocks.append(difference_table(compared, title=spell_metrics([metric]), code=True, **heads))
    if scores:
        note = "Each export was loaded by its own runtime, and answered the test rows. Differences are paired with the "
        blocks.append(Text(note + "tuned model's answers. Rows per second: one row at a time.", "soft"))
    return Section("Exports", blocks, anchor="exports")


def write_scored(scored: Mapping[str, Any]) -> str:
    """Return the number of scored rows, and of all test rows if `deploy.limit` left some out."""
    rows, every = scored.get("rows"), scored.get("test_rows")
    return count(rows) if rows == every or every is None else f"{count(rows)} of {count(every)}"


def write_usage(weights: int, usage: Mapping[str, Any] | None) -> list[str]:
    """Return size on disk, rows per second and added memory as text."""
    usage = usage or {}
    return [size(weights), score(usage.get("rows_per_second")), size(usage.get("peak_bytes"))]
