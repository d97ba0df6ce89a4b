"""The sections of the report that say what was measured, as blocks: for page, Markdown and terminal alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llmtune.recipe.task_facts import answer_kind
from llmtune.records import Contamination, Evaluation, GateResult, Json, Slice
from llmtune.report.blocks import (
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
from llmtune.report.charts import draw_meter
from llmtune.report.metric_info import LOWER_IS_BETTER, better_side, metric_note, rank_metrics
from llmtune.report.number_format import count, missing, score, share, signed
from llmtune.report.report_record import Power, Seeds
from llmtune.report.sample_view import present_samples
from llmtune.report.verdict import INCONCLUSIVE

MOST_CLASSES, MOST_PAIRS = 20, 15
"""Classes of a confusion matrix that can still be read, and pairs of classes that are listed."""
BETTER_NOTES = {1: "", -1: "lower is better", 0: "neither more nor less is better"}


def score_sections(evaluation: Evaluation, task: str | None, seeds: Seeds | None = None) -> list[Section]:
    """Return the sections of an evaluation, the most telling first; those without blocks are not shown."""
    base = base_name(evaluation)
    return [
        score_section(evaluation, task),
        sample_section(evaluation, task),
        champion_section(evaluation, task),
        seed_section(seeds, base),
        class_section(evaluation.details, base, entities=answer_kind(task) == "tags"),
        slice_section(evaluation.slices, base),
        *suite_sections(evaluation),
        overlap_section(evaluation),
        flip_section(evaluation, task),
    ]


def base_name(evaluation: Evaluation) -> str:
    """Return the heading of the base's column: a trivial baseline must not pass for a model."""
    return "baseline" if evaluation.baseline else "base"


def compare_metric(metric: str, scored: Evaluation | Slice, name: str = "", note: str = "") -> Compared:
    """Return the row of one metric, under a name of its own."""
    base, tuned, change = scored.base.get(metric), scored.tuned.get(metric), scored.difference.get(metric)
    return Compared(name or metric, base, tuned, change, better_side(metric), note)


def against_champion(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation with the champion in place of the base, if there is one."""
    champion = evaluation.champion
    if champion is None:
        return evaluation
    return replace(evaluation, base=champion.scores, tuned=champion.tuned, difference=champion.difference)


def gate_section(gates: Sequence[GateResult], look: str | None = None) -> Section:
    """What became of each gate, and which look at the test rows it was."""
    rows: TableRows = [[Cell(gate.name, code=True), gate.wanted, gate.got, passed_cell(gate)] for gate in gates]
    table = Table(["gate", "wanted", Column("got", "number"), "result"], rows)
    return Section("Gates", [table, *([Text(f"This is {look}.", "soft")] if look else [])] if rows else [])


def count_gates(gates: Sequence[GateResult]) -> str:
    """Return how many gates failed, else how many are inconclusive, else how many passed; nothing without gates."""
    noun = "gate" if len(gates) == 1 else "gates"
    for outcome, word in ((False, "failed"), (None, INCONCLUSIVE)):
        if number := sum(gate.passed is outcome for gate in gates):
            return f"{number} of {len(gates)} {noun} {word}"
    return f"{len(gates)} {noun} passed" if gates else ""


def passed_cell(gate: GateResult) -> Cell:
    """Return a word, and the note."""
    word = {True: "passed", False: "failed", None: INCONCLUSIVE}[gate.passed]
    return Cell(word, TONES[0 if gate.passed is None else 1 if gate.passed else -1], note=gate.note)


def power_section(power: Sequence[Power]) -> Section:
    """The smallest difference that the test rows show of each metric, and the rows that each gate needs."""
    rows: TableRows = []
    for one in power:
        planned = [signed(one.assumed), count(one.rows_needed)] if one.gate else ["", ""]
        name = Cell(one.gate or one.metric, code=True)
        rows.append([name, one.against, count(one.rows), score(one.smallest), *planned])
    numbers = ("test rows", "smallest difference", "planned with", "rows needed")
    columns: TableColumns = ["gate or metric", "against", *(Column(name, "number") for name in numbers)]
    text = "With 80 % power: four of five such evaluations show a true difference of that size, or pass or fail "
    text += (
        "the gate with that many rows. A gate with a margin is planned with a difference of zero, any other with the "
    )
    text += "difference that was seen; a dash: at the limit of the gate, where no number of rows would tell."
    blocks: list[Block] = [Table(columns, rows), Text(text, "soft")] if rows else []
    return Section("What the rows can show", blocks, "Power", "power", brief=any(one.gate for one in power))


def score_section(evaluation: Evaluation, task: str | None) -> Section:
    """A row a metric; one that only the tuned model has gets no difference."""
    changes, baseline = evaluation.difference, evaluation.baseline
    rows = [compare_metric(name, evaluation, note=full_note(name, task)) for name in evaluation.tuned]
    text = f"{'Baseline and tuned model' if baseline else 'Both models'} answered the same rows. Green and red: the "
    text += "paired interval leaves zero out. The verdict asks for more: that the change holds among all the metrics "
    text += "that were looked at (Holm’s correction of p)."
    if exact := [name for name, change in changes.items() if change.test == "McNemar mid-p"]:
        text += f" p of {spell_metrics(exact)}: McNemar’s test (mid-p); of all else: swaps of the two models’ answers."
    if any(change.groups for change in changes.values()):
        text += " Rows with one value of `data.split_by` are a group; groups, not rows, were drawn and swapped."
    if evaluation.tuned.keys() - changes.keys():
        text += " A dash: measured of the tuned model alone."
    blocks: list[Block] = [difference_table(rows, base=base_name(evaluation), code=True)]
    if baseline:
        why = "and no model: before tuning, the base model has no trained head for this task"
        blocks.append(Text(f"The baseline is `{baseline}`, {why}.", "note"))
    blocks.append(Text(text, "soft"))
    return Section("Scores on held-out rows", blocks if rows else [], "Scores", "scores")


def champion_section(evaluation: Evaluation, task: str | None) -> Section:
    """A row a metric against the champion, on the rows of both, and what could not be compared."""
    champion = evaluation.champion
    if champion is None:
        return Section("Against the champion", [])
    scored = against_champion(evaluation)
    rows = [compare_metric(name, scored, note=full_note(name, task)) for name in champion.difference]
    text = f"The champion is `{Path(champion.folder).name}`. Both models answered {count(champion.rows)} rows that "
    text += "neither was trained on"
    text += "." if champion.rows == evaluation.rows else f", of {count(evaluation.rows)} test rows."
    if champion.asked:
        text += f" {count(champion.asked)} of them are new: the champion’s model answered them now."
    blocks: list[Block] = [Text(text)]
    blocks += [difference_table(rows, base="champion", code=True)] if rows else []
    blocks += [Text(f"`{metric}` is left out: {why}.") for metric, why in sorted(champion.left_out.items())]
    return Section("Against the champion", blocks, "Champion", "champion")


def full_note(metric: str, task: str | None) -> str:
    """Return what a metric is, and whether less of it is better."""
    return "; ".join(part for part in (metric_note(metric, task), lower_note(metric)) if part)


def lower_note(metric: str) -> str:
    """Return `lower is better` where it is so."""
    return "lower is better" if metric in LOWER_IS_BETTER else ""


def spell_metrics(metrics: Iterable[str]) -> str:
    """Join names of metrics as a person writes them."""
    return ", ".join(metrics).replace("_", " ")


def seed_section(seeds: Seeds | None, base: str) -> Section:
    """The scores of several seeds, and what their spread says of the gain."""
    if not seeds:
        return Section("Seeds", [])
    text = "Each seed draws another beginning of the adapter, another order of the rows and another dropout; rows, "
    text += "split and all else are the same. Green and red: the gain of the mean is larger than what lies between the "
    text += "lowest and the highest seed. Scores, intervals and samples elsewhere on this page are those of seed "
    text += f"{seeds.runs[0].seed}; the others have a report each in `seeds/`."
    blocks: list[Block] = [Text(seeds.told), seed_table(seeds, base), Text(text, "soft")]
    return Section(f"The same recipe with {len(seeds.runs)} seeds", blocks, "Seeds", "seeds")


def seed_table(seeds: Seeds, base: str = "base") -> Table:
    """A row a metric: the base, each seed's score, mean, deviation, ends, and the gain of the mean."""
    names = [base, *(f"seed {run.seed}" for run in seeds.runs)]
    names += ["mean", "deviation", "lowest to highest", "gain of the mean"]
    rows: TableRows = []
    for metric, spread in seeds.metrics.items():
        scores = [score(one) for one in (spread.base, *spread.scores, spread.mean, spread.deviation)]
        tone = TONES[(1 if spread.better else -1) if spread.larger else 0]
        ends, gain = f"{score(spread.lowest)} to {score(spread.highest)}", Cell(signed(spread.gain), tone)
        rows.append([Cell(metric, note=lower_note(metric), code=True), *scores, ends, gain])
    return Table(["metric", *(Column(name, "number") for name in names)], rows)


def class_section(details: Json, base: str, *, entities: bool) -> Section:
    """A row a class, of the tuned model, the most frequent first; and what classes are taken for."""
    title, unit, kind = ("Kinds of entities", "entities", "kind") if entities else ("Classes", "rows", "class")
    tuned = details.get("tuned", {})
    if not tuned.get("classes"):
        return Section(title, [])
    base_f1 = {row["label"]: row["f1"] for row in details.get("base", {}).get("classes", [])}
    names = [unit, "precision", "recall", *([f"F1 of {base}"] if base_f1 else []), "F1"]
    rows: TableRows = []
    for row in sorted(tuned["classes"], key=lambda row: -row["support"]):
        before = [base_f1.get(row["label"])] if base_f1 else []
        numbers = map(score, (row["precision"], row["recall"], *before, row["f1"]))
        meter = Cell(picture=draw_meter(0.0 if missing(row["f1"]) else row["f1"]))
        rows.append([Cell(str(row["label"]), code=True), count(row["support"]), *numbers, meter])
    columns: TableColumns = [kind, *(Column(name, "number") for name in names), Column("", "picture")]
    table = Table(columns, rows, "By class, the most frequent first", scroll=True)
    confusion = tuned.get("confusion")
    blocks = confusion_blocks(confusion["labels"], confusion["counts"]) if confusion else []
    return Section(f"{title} on held-out rows, tuned model", [*blocks, table], title, "classes")


def confusion_blocks(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> list[Block]:
    """The confusion matrix as a picture where it can be read, and its largest errors as pairs."""
    labels, size = list(map(str, labels)), range(len(labels))
    rows, right = sum(map(sum, counts)), sum(counts[i][i] for i in size)
    text = f"{count(right)} of {count(rows)} rows right"
    errors = [(i, k) for i in size for k in size if i != k and counts[i][k]]
    errors.sort(key=lambda at: -counts[at[0]][at[1]])
    pairs: TableRows = [
        [labels[i], labels[k], count(counts[i][k]), share(counts[i][k], sum(counts[i]))] for i, k in errors
    ]
    columns: TableColumns = ["right class", "taken for", Column("rows", "number"), Column("of its rows", "number")]
    listed = [Table(columns, pairs[:MOST_PAIRS], f"Confused most often: {text}", scroll=True)] if pairs else []
    if not labels or len(labels) > MOST_CLASSES:
        return [*listed]

    def named(i: int, k: int) -> str:
        return f"{labels[i]} found" if i == k else f"{labels[i]} taken for {labels[k]}"

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
    note = Text("A row is a right class; the percentages are shares of it. Blue is right, red is wrong.", "soft")
    return [heatmap, note, *listed]


def slice_section(slices: Mapping[str, Sequence[Slice]], base: str) -> Section:
    """By column a table a metric: the most telling one, and the others folded away."""
    blocks = [block for column, parts in slices.items() for block in slice_tables(column, parts, base)]
    text = "Each slice has an interval of its own, of its own rows. Of twenty slices without any change, about one "
    text += "looks changed: a slice is a question to look into, and the verdict does not count it."
    return Section("Scores by slice", [*blocks, Text(text, "soft")] if blocks else [], "Slices", "slices")


def slice_tables(column: str, parts: Sequence[Slice], base: str) -> list[Block]:
    """A table a metric that both models have on some slice, the first open and the others folded away."""
    tables = []
    metrics = rank_metrics(dict.fromkeys(metric for part in parts for metric in part.difference))
    for metric in metrics:
        rows = [compare_metric(metric, part, part.value) for part in parts if metric in part.difference]
        title = ", ".join(part for part in (f"{spell_metrics([metric])} by {column}", lower_note(metric)) if part)
        tables.append(difference_table(rows, title=title, heading=column, base=base, code=True))
    return [*tables[:1], *([Details(f"{column}: {spell_metrics(metrics[1:])}", tables[1:])] if tables[1:] else [])]


def suite_sections(evaluation: Evaluation) -> list[Section]:
    """What both models were asked beyond the test rows, a section each: scores, limits, and tables folded away."""
    sections = []
    for name, suite in evaluation.studies.items():
        rows = []
        for metric, tuned in suite.tuned.items():
            better = suite.better.get(metric, 0)
            note = "; ".join(part for part in (suite.meanings.get(metric), BETTER_NOTES[better]) if part)
            scores = suite.base.get(metric), tuned, suite.difference.get(metric)
            rows.append(Compared(f"{name}.{metric}", *scores, better, note))
        blocks: list[Block] = [difference_table(rows, unit="n", code=True)] if rows else []
        blocks += [Text(suite.limits, "note")] if suite.limits else []
        blocks += [
            Details(one.title, [Table(one.heads, [[*row] for row in one.rows], scroll=True)]) for one in suite.tables
        ]
        sections.append(Section(suite.title, blocks, anchor=name))
    return sections


def overlap_section(evaluation: Evaluation) -> Section:
    """Test rows that are also training rows, and the scores without them; nothing without test rows."""
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
        heads = ["how", "test row", "training row", "what they share"]
        some = Details(f"{len(examples)} of them", [Table(heads, examples, scroll=True)])
        blocks += [overlap_table(overlap), *tables, some]
    text = "Compared are prompts and answers, without system messages and texts that questions are about. "
    if overlap.common:
        text += f"{count(overlap.common)} runs of 13 words stand in more than ten training rows and were left out: "
        text += "they are boilerplate, or the template of all rows. "
    text += "What a model read before this tuning is not known here, and rows that say the same in other words are "
    text += "not found."
    return Section("Overlap with training data", [*blocks, Text(text, "soft")], "Overlap", "overlap")


def overlap_kinds(overlap: Contamination) -> list[tuple[str, str, int, int]]:
    """Return the ways to overlap: a name for the table, one for a sentence, test rows, and of how many."""
    long, short = overlap.rows - overlap.short, overlap.short
    passage = "13 words in a row in common"
    return [
        ("equal", "equal", overlap.equal, overlap.rows),
        ("nearly equal (80 % of their word triples in common)", "nearly equal", overlap.near, overlap.rows),
        ("the same prompt, whatever the answer", "with the same prompt", overlap.prompted, overlap.rows),
        (f"{passage}, of rows that are so long", f"with {passage}", overlap.shared, long),
        ("the same words in the same order, of shorter rows", "short, with the same words", overlap.worded, short),
    ]


def overlap_table(overlap: Contamination) -> Table:
    """How many test rows overlap in each way, and of how many."""
    columns: TableColumns = [
        "test rows that are like a training row",
        *(Column(name, "number") for name in ("rows", "of", "share")),
    ]
    rows = [[name, count(part), count(of), share(part, of)] for name, _, part, of in overlap_kinds(overlap)]
    return Table(columns, rows)


def overlap_sentence(overlap: Contamination) -> str:
    """Return how many test rows overlap, how, and how many were left out before for that reason."""
    number = overlap.overlapping
    text = f"None of the {count(overlap.rows)} test rows overlaps with a training row "
    text += "(equal, nearly equal, the same prompt, 13 words in a row)."
    if number:
        kinds = ", ".join(f"{count(part)} {name}" for _, name, part, _ in overlap_kinds(overlap) if part)
        verb = "overlaps" if number == 1 else "overlap"
        text = f"{count(number)} of {count(overlap.rows)} test rows ({share(number, overlap.rows)}) {verb} with a "
        text += f"training row: {kinds}."
    if overlap.prompted:
        text += (
            " Set data.split_by to a column that is equal for rows of one question, or take the questions of the test "
        )
        text += "rows out of training."
    if left := sum(overlap.dropped.values()):
        were = "row was" if left == 1 else "rows were"
        text += f" {count(left)} other {were} kept out of training for that, or out of validation."
    return text


def flip_section(evaluation: Evaluation, task: str | None) -> Section:
    """How many rows changed sides each way, by right-or-wrong metric, and some of them folded away."""
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
    text = f"Rows that {who} and the tuned model do not both get right or wrong; those shown are spread evenly over "
    text += "all of them."
    return Section("What flipped", [Table(columns, rows), *folded, Text(text, "soft")] if rows else [], anchor="flips")


def sample_section(evaluation: Evaluation, task: str | None) -> Section:
    """Rows with their reference and what either model said."""
    samples = present_samples(evaluation.samples, evaluation, task)
    judged = "The numbers are log-likelihoods of the answers, or scores where the model gives scores. "
    told = "Spread evenly over the test rows, not chosen by how they look. All of them: `evaluation/predictions.jsonl`."
    text = judged + told if answer_kind(task) == "rating" else told
    return Section("Samples", [SampleList(samples), Text(text, "soft")] if samples else [])


def list_signatures(evaluation: Evaluation) -> dict[str, str]:
    """Return how each number came about, those of the suites by the names that gates use."""
    texts = dict(evaluation.signatures)
    for name, suite in evaluation.studies.items():
        texts |= {f"{name}.{metric}": text for metric, text in suite.signatures.items()}
    return texts
