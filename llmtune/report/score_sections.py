"""Builds the report's sections about scores, for HTML pages, Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from llmtune.display.blocks import (
    TONES,
    Block,
    Cell,
    Column,
    Compared,
    Details,
    Heatmap,
    Section,
    Table,
    TableColumns,
    TableRows,
    Text,
    difference_table,
)
from llmtune.display.charts import draw_meter
from llmtune.display.number_format import count, missing, score, share, signed
from llmtune.evaluate.class_sentences import list_class_changes
from llmtune.evaluate.metric_info import (
    BETTER_NOTES,
    better_side,
    full_note,
    list_sides,
    side_note,
)
from llmtune.evaluate.verdict import is_base
from llmtune.recipe.class_names import show_name
from llmtune.recipe.task_facts import DECISIONS, TASK_FACTS
from llmtune.records import Difference, Json
from llmtune.store.report_record import Seeds
from llmtune.store.score_records import ClassChanges, Evaluation, NewClass, SimpleBaseline, Slice

MOST_CLASSES, MOST_PAIRS = 20, 15
"""Maximum classes of a readable confusion matrix, and maximum listed pairs of classes."""
FEWEST_GROUPS = 12
"""Effective groups below which a report warns."""


def base_name(evaluation: Evaluation) -> str:
    """Return the heading of the base's column; a trivial baseline must not look like a model."""
    return "baseline" if evaluation.baseline else "base"


def compare_metric(metric: str, scored: Evaluation | Slice, name: str = "", note: str = "") -> Compared:
    """Return the row of one metric, optionally under another name."""
    base, tuned, change = scored.base.get(metric), scored.tuned.get(metric), scored.difference.get(metric)
    sides = list_sides(scored.base, scored.tuned, scored.decided if isinstance(scored, Evaluation) else None)
    return Compared(name or metric, base, tuned, change, sides.get(metric, better_side(metric)), note)


def against_champion(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation with the champion in place of the base; unchanged without a champion."""
    champion = evaluation.champion
    if champion is None:
        return evaluation
    return replace(evaluation, base=champion.scores, tuned=champion.tuned, difference=champion.difference)


def score_section(evaluation: Evaluation, task: str | None) -> Section:
    """Return a row per metric; metrics that only the tuned model has show no difference."""
    changes, baseline = evaluation.difference, evaluation.baseline
    decision_metrics = {metric for metrics in DECISIONS.values() for metric in metrics}  # in the section on decisions
    shown = [name for name in evaluation.tuned if name not in decision_metrics]
    rows = [compare_metric(name, evaluation, note=full_note(name, task)) for name in shown]
    text = f"{'Baseline and tuned model' if baseline else 'Both models'} answered the same rows. Green and red: the "
    text += "paired interval excludes zero (one in 20 does by chance). The verdict corrects p for many metrics (Holm)."
    if grouped := [change for change in changes.values() if change.groups]:
        text += " Rows with the same value of `data.split_by`, or a picture or prompt in common, form a group; groups "
        text += "are resampled."
        if (fewest := min(change.units for change in grouped)) < FEWEST_GROUPS:
            text += (
                f" **Few groups**: they tell as much as {fewest:.1f} of equal size. Below {FEWEST_GROUPS}, the largest "
            )
            text += "groups decide the intervals. Add groups to the test rows, or limit the rows of the largest."
    if {*shown} - changes.keys():
        text += " A dash: measured for the tuned model only."
    blocks: list[Block] = [difference_table(rows, base=base_name(evaluation), code=True)]
    if baseline:
        why = evaluation.baseline_reason or "the base model has no trained head for this task"
        blocks.append(Text(f"The baseline is `{baseline}`, not a model: {why}.", "note"))
    blocks.append(Text(text, "soft"))
    return Section("Scores on held-out rows", blocks if rows else [], "Scores", "scores")


def spell_metrics(metrics: Iterable[str]) -> str:
    """Join metric names with commas and without underscores."""
    return ", ".join(metrics).replace("_", " ")


def class_section(details: Json, base: str, *, entities: bool) -> Section:
    """Return the tuned model's scores per class, the most frequent first, and the confusions between classes."""
    title, unit, kind = ("Entity types", "entities", "type") if entities else ("Classes", "rows", "class")
    tuned = details.get("tuned", {})
    if not tuned.get("classes"):
        return Section(title, [])
    base_f1 = {scores["label"]: scores["f1"] for scores in details.get("base", {}).get("classes", [])}
    names = [unit, "precision", "recall", *([f"F1 of {base}"] if base_f1 else []), "F1"]
    rows: TableRows = []
    for scores in sorted(tuned["classes"], key=lambda scores: -scores["support"]):
        before = [base_f1.get(scores["label"])] if base_f1 else []
        numbers = map(score, (scores["precision"], scores["recall"], *before, scores["f1"]))
        meter = Cell(picture=draw_meter(0.0 if missing(scores["f1"]) else scores["f1"]))
        rows.append([Cell(str(scores["label"]), code=True), count(scores["support"]), *numbers, meter])
    columns: TableColumns = [kind, *(Column(name, "number") for name in names), Column("", "picture")]
    table = Table(columns, rows, "By class, the most frequent first", scroll=True)
    confusion = tuned.get("confusion")
    blocks = confusion_blocks(confusion["labels"], confusion["counts"]) if confusion else []
    return Section(f"{title} on held-out rows, tuned model", [*blocks, table], title, "classes")


def confusion_blocks(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> list[Block]:
    """Return the confusion matrix as a picture, unless it is too large to read, and its largest errors as pairs."""
    labels, size = list(map(str, labels)), range(len(labels))
    rows, right = sum(map(sum, counts)), sum(counts[i][i] for i in size)
    text = f"{count(right)} of {count(rows)} rows right"
    errors = [(i, k) for i in size for k in size if i != k and counts[i][k]]
    errors.sort(key=lambda at: -counts[at[0]][at[1]])
    pairs: TableRows = [
        [labels[i], labels[k], count(counts[i][k]), share(counts[i][k], sum(counts[i]))] for i, k in errors
    ]
    columns: TableColumns = ["right class", "predicted", Column("rows", "number"), Column("of its rows", "number")]
    listed = [Table(columns, pairs[:MOST_PAIRS], f"Most frequent confusions: {text}", scroll=True)] if pairs else []
    if not labels or len(labels) > MOST_CLASSES:
        return [*listed]

    def named(i: int, k: int) -> str:
        return f"{labels[i]} found" if i == k else f"{labels[i]} predicted as {labels[k]}"

    shares = [[number / (sum(row) or 1) for number in row] for row in counts]
    heatmap = Heatmap(
        labels,
        labels,
        [[shares[i][k] if i == k else -shares[i][k] for k in size] for i in size],
        f"confusion matrix of {len(labels)} classes: {right} of {rows} rows right",
        f"Confusion matrix: {text}",
        "right class",
        "predicted",
        [[f"{counts[i][k]:,}\n{100 * shares[i][k]:.0f} %" if counts[i][k] else "" for k in size] for i in size],
        [[f"{named(i, k)}: {counts[i][k]:,} rows, {shares[i][k]:.1%}" for k in size] for i in size],
    )
    note = Text("Each row is a right class; percentages are shares of the row. Blue is right, red is wrong.", "soft")
    return [heatmap, note, *listed]


def suite_sections(evaluation: Evaluation) -> list[Section]:
    """Return a section per study beyond the test rows: scores, limits, and collapsed tables."""
    sections = []
    for name, suite in evaluation.studies.items():
        rows = []
        for metric, tuned in suite.tuned.items():
            if suite.base and metric not in suite.base:
                continue  # not a score of a model; a table has it
            better = suite.better.get(metric, 0)
            note = "; ".join(part for part in (suite.meanings.get(metric), BETTER_NOTES[better]) if part)
            scores = suite.base.get(metric), tuned, suite.difference.get(metric)
            rows.append(Compared(f"{name}.{metric}", *scores, better, note))
        blocks: list[Block] = [difference_table(rows, unit="n", code=True)] if rows else []
        blocks += [Text(suite.limits, "note")] if suite.limits else []
        for one in suite.tables:
            cells: TableRows = [[*row] for row in one.rows]
            table = Table(one.heads, cells, one.title if one.open else "", scroll=True)
            blocks.append(table if one.open else Details(one.title, [table]))
        sections.append(Section(suite.title, blocks, anchor=name))
    return sections


def list_signatures(evaluation: Evaluation) -> dict[str, str]:
    """Return how each metric was computed; metrics of studies have the names that gates use."""
    texts = dict(evaluation.signatures)
    for name, suite in evaluation.studies.items():
        texts |= {f"{name}.{metric}": text for metric, text in suite.signatures.items()}
    return texts


def length_section(details: Json, base: str) -> Section:
    """Return the scores of vectors cut to each length of `embed.dimensions`, base and tuned."""
    title = "Scores by vector length"
    models = {name: details.get(key, {}).get("lengths") for name, key in ((base, "base"), ("tuned", "tuned"))}
    models = {name: lengths for name, lengths in models.items() if lengths}
    if "tuned" not in models:
        return Section(title, [])
    metrics = [name for name in models["tuned"][0] if name != "length"]
    rows: TableRows = [
        [count(cut["length"]), *(score(models[name][i].get(metric)) for metric in metrics for name in models)]
        for i, cut in enumerate(models["tuned"])
    ]
    heads = [f"{metric}, {name}" for metric in metrics for name in models]
    columns: TableColumns = [Column("numbers", "number"), *(Column(head, "number") for head in heads)]
    text = "Vectors of base and tuned model, cut to their first numbers. The longest is the complete vector."
    return Section(title, [Table(columns, rows, scroll=True), Text(text, "soft")], "Lengths", "lengths")


def simple_baseline_section(evaluation: Evaluation, task: str | None) -> Section:
    """Return a row per metric against each simple baseline, and how it was fitted."""
    shown = [one for one in evaluation.simple_baselines.values() if not is_base(one, evaluation) and one.difference]
    blocks = [block for one in shown for block in baseline_blocks(one, task)]
    title = f"Against {shown[0].title}" if len(shown) == 1 else "Against simple baselines"
    return Section(title, blocks, "Baseline", "simple-baseline")


def baseline_blocks(simple: SimpleBaseline, task: str | None) -> list[Block]:
    """Return the table against one simple baseline, and a note."""
    rows = [
        Compared(name, simple.scores[name], simple.tuned[name], change, better_side(name), full_note(name, task))
        for name, change in simple.difference.items()
    ]
    text = f"`{simple.name}`, which was not fine-tuned, answered the same rows: {simple.note}."
    return [difference_table(rows, base=simple.name, code=True), Text(text, "note")]


def class_blocks(changes: ClassChanges, key: str) -> list[Block]:
    """Return both models on the champion's classes, what changed, and the tuned model's scores on each new class."""
    blocks: list[Block] = [Text(sentence, "note") for sentence in list_class_changes(changes, key)]
    if class_slice := changes.known:
        rows_known = [
            Compared(name, class_slice.base[name], class_slice.tuned[name], change, better_side(name))
            for name, change in class_slice.difference.items()
        ]
        title = f"On the {count(class_slice.rows)} rows of the champion’s classes"
        blocks.insert(0, difference_table(rows_known, title=title, base="champion", code=True))
    if changes.renamed:
        listed = ", ".join(f"{show_name(old)} is {show_name(new)}" for old, new in changes.renamed.items())
        blocks.insert(0, Text(f"Renamed classes of the champion: {listed}."))
    if changes.new:
        heads = ("test rows", "recall", "precision", "F1")
        columns: TableColumns = ["new class", *(Column(name, "number") for name in heads), "result"]
        rows: TableRows = [
            [
                Cell(one.label, code=True),
                count(one.rows),
                *(write_interval(one.scores.get(metric)) for metric in ("recall", "precision", "f1")),
                Cell(one.verdict, TONES[{"learned": 1, "not learned": -1}.get(one.verdict, 0)]),
            ]
            for one in changes.new
        ]
        text = "The champion cannot answer a new class, so its answers to these rows count as wrong above. A new class "
        text += "is learned if more than half of its test rows get it: the whole interval of its recall decides. Fewer "
        text += "than ten test rows are not judged."
        blocks += [Table(columns, rows, "Classes that the champion does not have, tuned model"), Text(text, "soft")]
    return blocks


def write_interval(interval: Difference | None) -> str:
    """Return a score with its own 95 % interval."""
    if interval is None:
        return score(None)
    ends = "" if missing(interval.low) else f" ({score(interval.low)} to {score(interval.high)})"
    return f"{score(interval.value)}{ends}"


def describe_new_class(one: NewClass) -> str:
    """Return test rows, recall and result of a new class on one line."""
    recall = f", recall {write_interval(one.scores['recall'])}" if "recall" in one.scores else ""
    return f"{one.verdict}: {count(one.rows)} test rows{recall}"


def champion_section(evaluation: Evaluation, task: str | None, section: str | None = None) -> Section:
    """Return a row per metric against the champion, on the rows of both, and metrics that could not be compared."""
    champion = evaluation.champion
    if champion is None:
        return Section("Against the champion", [])
    scored = against_champion(evaluation)
    rows = [compare_metric(name, scored, note=full_note(name, task)) for name in champion.difference]
    text = f"The champion is `{Path(champion.folder).name}`. Both models answered {count(champion.rows)} rows that "
    text += "neither was trained on"
    text += "." if champion.rows == evaluation.rows else f", of {count(evaluation.rows)} test rows."
    if champion.asked:
        text += f" {count(champion.asked)} of them are new, and the champion’s model answered them in this run."
    blocks: list[Block] = [Text(text)]
    blocks += [difference_table(rows, base="champion", code=True)] if rows else []
    blocks += [Text(f"`{metric}` is not compared: {why}.") for metric, why in sorted(champion.left_out.items())]
    blocks += [Text(f"`{metric}`: {why}.") for metric, why in sorted(champion.partial.items())]
    blocks += [Text(f"New rows are not judged apart: {champion.why_no_new}.")] if champion.why_no_new else []
    if (changes := champion.classes) is not None:
        section = TASK_FACTS[task].section if task in TASK_FACTS else section
        blocks += class_blocks(changes, f"{section}.rename")
    return Section("Against the champion", blocks, "Champion", "champion")


def new_section(evaluation: Evaluation, task: str | None) -> Section:
    """Return the scores on test rows that are new to the champion: against it, the base, and the other test rows."""
    new = evaluation.champion.new if evaluation.champion else None
    if new is None:
        return Section("New rows", [])
    text = f"{count(new.scores.rows)} test rows have an input that the champion never saw. Gates name them "
    text += "`METRIC[new]`. "
    if new.rows < new.scores.rows:
        text += f"The champion’s model could answer {count(new.rows)} of them; the others may have new labels. "
    tuned, apart = new.scores.tuned, new.from_old
    champion = replace(evaluation, base=new.before, tuned=new.tuned, difference=new.difference)
    against = [compare_metric(name, champion, note=full_note(name, task)) for name in new.difference]
    base = [compare_metric(name, new.scores, note=full_note(name, task)) for name in new.scores.difference]
    old: TableRows = [
        [Cell(row.name, code=True), score(tuned[row.name]), score(tuned[row.name] - change.value), row.tone_cell]
        for change, row in ((one, Compared(name, None, None, one, better_side(name))) for name, one in apart.items())
    ]
    columns: TableColumns = ["metric", Column("new rows", "number"), Column("other rows", "number"), "difference"]
    blocks: list[Block] = [Text(text)]
    blocks += [difference_table(against, base="champion", code=True)] if against else []
    blocks += [Table(columns, old, "The tuned model on new rows and on the others")] if old else []
    blocks += (
        [Details("Against the base", [difference_table(base, base=base_name(evaluation), code=True)])] if base else []
    )
    return Section("Rows that are new to the champion", blocks, "New rows", "new")


def seed_section(seeds: Seeds | None, base: str) -> Section:
    """Return the scores of several seeds, and how the gain compares with their spread."""
    if not seeds:
        return Section("Seeds", [])
    text = "Each seed changes the initial adapter, the order of the rows and the dropout; everything else is the same. "
    text += "Green and red: the gain of the mean is larger than the range from the lowest to the highest seed. Scores, "
    text += f"intervals and samples elsewhere on this page are from seed {seeds.runs[0].seed}. The other seeds have "
    text += "their own reports in `seeds/`."
    blocks: list[Block] = [Text(seeds.told), seed_table(seeds, base), Text(text, "soft")]
    return Section(f"The same recipe with {len(seeds.runs)} seeds", blocks, "Seeds", "seeds")


def seed_table(seeds: Seeds, base: str = "base") -> Table:
    """Return a row per metric: base, each seed's score, mean, deviation, range, and the gain of the mean."""
    names = [base, *(f"seed {run.seed}" for run in seeds.runs)]
    names += ["mean", "deviation", "lowest to highest", "gain of the mean"]
    rows: TableRows = []
    for metric, spread in seeds.metrics.items():
        scores = [score(one) for one in (spread.base, *spread.scores, spread.mean, spread.deviation)]
        tone = TONES[(1 if spread.better else -1) if spread.larger else 0]
        ends, gain = f"{score(spread.lowest)} to {score(spread.highest)}", Cell(signed(spread.gain), tone)
        rows.append([Cell(metric, note=side_note(metric), code=True), *scores, ends, gain])
    return Table(["metric", *(Column(name, "number") for name in names)], rows)
