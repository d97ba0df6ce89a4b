"""Builds the report's sections about scores, for HTML pages, Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    SampleList,
    Section,
    Table,
    TableColumns,
    TableRows,
    Text,
    difference_table,
)
from llmtune.display.charts import draw_meter
from llmtune.display.number_format import count, missing, score, share, signed
from llmtune.evaluate.metric_info import BETTER_NOTES, better_side, full_note, list_sides, rank_metrics, side_note
from llmtune.evaluate.significance import INCONCLUSIVE, NOT_APPLICABLE
from llmtune.recipe.task_facts import DECISIONS, TASK_FACTS, answer_kind
from llmtune.records import Json
from llmtune.report.calibration_section import calibration_section
from llmtune.report.class_view import class_blocks
from llmtune.report.decision_view import decision_section
from llmtune.report.overlap_view import overlap_sentence, overlap_table
from llmtune.report.sample_view import NUMBERS, present_samples
from llmtune.report.search_sections import length_section
from llmtune.report.simple_baseline_view import simple_baseline_section
from llmtune.store.report_record import Power, Seeds
from llmtune.store.score_records import Evaluation, GateResult, Slice

MOST_CLASSES, MOST_PAIRS = 20, 15
"""Maximum classes of a readable confusion matrix, and maximum listed pairs of classes."""


def score_sections(
    evaluation: Evaluation, task: str | None, seeds: Seeds | None = None, section: str | None = None
) -> list[Section]:
    """Return the sections of an evaluation, the most informative first; sections without blocks are not shown.

    Without `task` metrics have no notes; then `section` is the recipe's section with the classes.
    """
    base = base_name(evaluation)
    return [
        score_section(evaluation, task),
        simple_baseline_section(evaluation, task),
        sample_section(evaluation, task),
        calibration_section(evaluation),
        champion_section(evaluation, task, section),
        new_section(evaluation, task),
        seed_section(seeds, base),
        decision_section(evaluation),
        class_section(evaluation.details, base, entities=answer_kind(task) == "tags"),
        length_section(evaluation.details, base),
        slice_section(evaluation.slices, base),
        *suite_sections(evaluation),
        overlap_section(evaluation),
        flip_section(evaluation, task),
    ]


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


def gate_section(gates: Sequence[GateResult], look: str | None = None) -> Section:
    """Return the result of each gate, and which look at the test rows this is."""
    rows: TableRows = [[Cell(gate.name, code=True), gate.wanted, gate.got, passed_cell(gate)] for gate in gates]
    table = Table(["gate", "wanted", Column("got", "number"), "result"], rows)
    return Section("Gates", [table, *([Text(f"This is {look}.", "soft")] if look else [])] if rows else [])


def count_gates(gates: Sequence[GateResult]) -> str:
    """Return how many gates failed, else how many are inconclusive, else how many passed; empty without gates."""
    noun = "gate" if len(gates) == 1 else "gates"
    for outcome, word in ((False, "failed"), (None, INCONCLUSIVE)):
        if number := sum(gate.passed is outcome for gate in gates):
            return f"{number} of {len(gates)} {noun} {word}"
    idle = sum(not gate.applies for gate in gates)
    passed = f"{len(gates) - idle} {'gate' if len(gates) - idle == 1 else 'gates'} passed" if len(gates) > idle else ""
    return ", ".join(part for part in (passed, f"{idle} {NOT_APPLICABLE}" if idle else "") if part)


def passed_cell(gate: GateResult) -> Cell:
    """Return the result of a gate as a word, with its note."""
    if not gate.applies:
        return Cell(NOT_APPLICABLE, TONES[0], note=gate.note)
    word = {True: "passed", False: "failed", None: INCONCLUSIVE}[gate.passed]
    return Cell(word, TONES[0 if gate.passed is None else 1 if gate.passed else -1], note=gate.note)


def power_section(power: Sequence[Power]) -> Section:
    """Return the smallest difference that the test rows can detect per metric, and the rows that each gate needs."""
    rows: TableRows = []
    for one in power:
        planned = [signed(one.assumed), count(one.rows_needed)] if one.gate else ["", ""]
        name = Cell(one.gate or one.metric, code=True)
        rows.append([name, one.against, count(one.rows), score(one.smallest), *planned])
    numbers = ("test rows", "smallest difference", "planned with", "rows needed")
    columns: TableColumns = ["gate or metric", "against", *(Column(name, "number") for name in numbers)]
    text = "At 80 % power, four of five such evaluations detect a true difference of that size, or decide the gate "
    text += "with that many rows. A gate with a margin is planned with a difference of zero, any other with the "
    text += "observed one, partly luck. A dash: the difference is at the gate's limit, and no number of rows is enough."
    blocks: list[Block] = [Table(columns, rows), Text(text, "soft")] if rows else []
    return Section("Power of the test rows", blocks, "Power", "power", brief=any(one.gate for one in power))


def score_section(evaluation: Evaluation, task: str | None) -> Section:
    """Return a row per metric; metrics that only the tuned model has show no difference."""
    changes, baseline = evaluation.difference, evaluation.baseline
    own = {metric for metrics in DECISIONS.values() for metric in metrics}  # in the section on decisions
    shown = [name for name in evaluation.tuned if name not in own]
    rows = [compare_metric(name, evaluation, note=full_note(name, task)) for name in shown]
    text = f"{'Baseline and tuned model' if baseline else 'Both models'} answered the same rows. Green and red: the "
    text += "paired interval excludes zero (one in 20 does by chance). The verdict corrects p for many metrics (Holm)."
    if any(change.groups for change in changes.values()):
        text += " Rows with the same value of `data.split_by` form a group; groups, not rows, are resampled."
    if {*shown} - changes.keys():
        text += " A dash: measured for the tuned model only."
    blocks: list[Block] = [difference_table(rows, base=base_name(evaluation), code=True)]
    if baseline:
        why = evaluation.baseline_reason or "the base model has no trained head for this task"
        blocks.append(Text(f"The baseline is `{baseline}`, not a model: {why}.", "note"))
    blocks.append(Text(text, "soft"))
    return Section("Scores on held-out rows", blocks if rows else [], "Scores", "scores")


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


def spell_metrics(metrics: Iterable[str]) -> str:
    """Join metric names with commas and without underscores."""
    return ", ".join(metrics).replace("_", " ")


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


def slice_section(slices: Mapping[str, Sequence[Slice]], base: str) -> Section:
    """Return a table per column and metric, the most informative metric open and the others collapsed."""
    blocks = [block for column, parts in slices.items() for block in slice_tables(column, parts, base)]
    text = "Each slice has its own interval, from its own rows. Of twenty slices without any change, about one looks "
    text += "changed. Slices show where to look; the verdict does not use them."
    return Section("Scores by slice", [*blocks, Text(text, "soft")] if blocks else [], "Slices", "slices")


def slice_tables(column: str, parts: Sequence[Slice], base: str) -> list[Block]:
    """Return a table per metric that both models have on some slice, the first open and the others collapsed."""
    tables = []
    metrics = rank_metrics(dict.fromkeys(metric for part in parts for metric in part.difference))
    for metric in metrics:
        rows = [compare_metric(metric, part, part.value) for part in parts if metric in part.difference]
        title = ", ".join(part for part in (f"{spell_metrics([metric])} by {column}", side_note(metric)) if part)
        tables.append(difference_table(rows, title=title, heading=column, base=base, code=True))
    return [*tables[:1], *([Details(f"{column}: {spell_metrics(metrics[1:])}", tables[1:])] if tables[1:] else [])]


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


def overlap_section(evaluation: Evaluation) -> Section:
    """Return test rows that overlap with training rows, and the scores without them; empty without test rows."""
    overlap = evaluation.contamination
    if not overlap or not overlap.rows:
        return Section("Overlap", [])
    blocks: list[Block] = [Text(overlap_sentence(overlap))]
    if overlap.overlapping:
        whole = Slice("all rows", evaluation.rows, evaluation.base, evaluation.tuned, evaluation.difference)
        tables = slice_tables("overlap", [whole, *overlap.scores], base_name(evaluation)) if overlap.scores else []
        examples: TableRows = [
            [one["kind"], Path(one["test"]).name, Path(one["train"]).name, one["words"]] for one in overlap.examples
        ]
        heads = ["how", "test row", "training row", "shared words"]
        some = Details(f"{len(examples)} of them", [Table(heads, examples, scroll=True)])
        blocks += [overlap_table(overlap), *tables, some]
    text = "The search compares prompts and answers, without system messages and the contexts of questions. "
    if overlap.common:
        text += f"It ignores {count(overlap.common)} 13-word passages that occur in more than ten training rows: they "
        text += "are boilerplate or part of a template. "
    text += "It cannot find paraphrases, and does not know the model's pre-training data."
    return Section("Overlap with training data", [*blocks, Text(text, "soft")], "Overlap", "overlap")


def flip_section(evaluation: Evaluation, task: str | None) -> Section:
    """Return how many rows flipped each way, by right-or-wrong metric, and some of them collapsed."""
    gained, lost = "wrong before, right now", "right before, wrong now"
    rows: TableRows = []
    folded: list[Block] = []
    for metric in rank_metrics(evaluation.flips):
        flips = evaluation.flips[metric]
        better = Cell(count(flips.gained), "better" if flips.gained else "")
        worse = Cell(count(flips.lost), "worse" if flips.lost else "")
        rows.append([Cell(metric, code=True), better, worse, count(flips.rows)])
        for title, some, number in ((gained, flips.gained_rows, flips.gained), (lost, flips.lost_rows, flips.lost)):
            if some:
                part = f"{len(some)} of " if len(some) != number else ""
                samples = SampleList(present_samples(some, evaluation, task))
                folded.append(Details(f"{spell_metrics([metric])}, {title}: {part}{count(number)}", [samples]))
    columns = [Column("metric"), *(Column(name, "number") for name in (gained, lost, "rows"))]
    who = "the baseline" if evaluation.baseline else "the base model"
    text = f"Rows that {who} gets right and the tuned model wrong, or the other way round. The rows shown are spread "
    text += "evenly over all of them."
    return Section("What flipped", [Table(columns, rows), *folded, Text(text, "soft")] if rows else [], anchor="flips")


def sample_section(evaluation: Evaluation, task: str | None) -> Section:
    """Return rows with their reference and both models' answers."""
    samples = present_samples(evaluation.samples, evaluation, task)
    source = "Spread evenly over the test rows, not hand-picked. `evaluation/predictions.jsonl` has all rows."
    text = NUMBERS.get(answer_kind(task), "") + source
    return Section("Samples", [SampleList(samples), Text(text, "soft")] if samples else [])


def list_signatures(evaluation: Evaluation) -> dict[str, str]:
    """Return how each metric was computed; metrics of studies have the names that gates use."""
    texts = dict(evaluation.signatures)
    for name, suite in evaluation.studies.items():
        texts |= {f"{name}.{metric}": text for metric, text in suite.signatures.items()}
    return texts
