"""Sections on single rows: samples, flips, slices, likely label errors, and overlap with training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llmtune.display.blocks import (
    Block,
    Cell,
    Column,
    Details,
    ModelAnswer,
    Sample,
    SampleList,
    Section,
    Table,
    TableColumns,
    TableRows,
    Text,
    difference_table,
)
from llmtune.display.number_format import count, score, share
from llmtune.errors import write_origin
from llmtune.evaluate.metric_info import rank_metrics, side_note
from llmtune.evaluate.source_labels import unchecked_sentence
from llmtune.recipe.task_facts import TASK_FACTS, answer_kind
from llmtune.report.score_sections import base_name, compare_metric, spell_metrics
from llmtune.store.report_record import SuspectFacts
from llmtune.store.score_records import Contamination, Evaluation, Slice

LONGEST_SHOWN, HEAD, TAIL = 1600, 1000, 400
"""Maximum characters of a text shown in full, and the characters shown of the start and end of a longer text."""
Thumbnails = Mapping[str, Sequence[str]]
"""Small copies of the pictures of test rows, by the row's number."""
NO_PICTURES: Thumbnails = {}
NUMBERS = {
    "rating": "The numbers are log-likelihoods of the answers, or the scores of a reward model. ",
    "relevances": "Relevances and scores are in the order of the passages. ",
}
"""By kind of answer, the meaning of answers that are numbers; none equals its reference."""


def present_samples(
    samples: Sequence[Mapping[str, str]], evaluation: Evaluation, task: str | None, thumbnails: Thumbnails = NO_PICTURES
) -> list[Sample]:
    """Return rows with both models' answers; an answer equal to the reference is marked right."""
    names = {"base": "baseline" if evaluation.baseline else "base", "tuned": "tuned", "blind": "tuned, grey picture"}
    shown = [read_sample(sample, names, task) for sample in samples]
    pictures = [thumbnails.get(str(sample.get("row")), ()) for sample in samples]
    return [replace(one, pictures=some) for one, some in zip(shown, pictures, strict=True)]


def read_sample(sample: Mapping[str, str], names: Mapping[str, str], task: str | None) -> Sample:
    """Return one row; `names` has the shown name of each model."""
    reference, prompt = str(sample.get("reference", "")), str(sample.get("prompt", ""))
    kind = answer_kind(task)
    answers = []
    for model in (name for name in names if name in sample):
        text = read_tags(prompt, str(sample[model])) if kind == "tags" else str(sample[model])
        answers.append(ModelAnswer(names[model], cut(text), kind not in NUMBERS and is_same(text, reference, kind)))
    chosen = [
        ModelAnswer(names[model], str(sample[f"{model}_choice"]), sample[f"{model}_choice"] == reference)
        for model in names
        if sample.get(f"{model}_choice")
    ]
    reference_name = "relevances" if kind == "relevances" else "reference"
    if kind == "rating":  # the better of two answers, or the only one
        reference_name = "chosen answer" if str(sample.get("tuned", "")).startswith("chosen") else "judged answer"
    origin = str(sample.get("origin", "")).rsplit("/", 1)[-1]
    prompt_name = TASK_FACTS[task].prompt_name if task in TASK_FACTS else "prompt"
    return Sample(prompt_name, cut(prompt), reference_name, cut(reference), answers, chosen, origin)


def is_same(text: str, reference: str, kind: str) -> bool:
    """Return whether an answer equals the reference; several labels may be in any order."""
    if kind == "labels":
        return sorted(text.split(", ")) == sorted(reference.split(", "))
    return text.strip() == reference.strip()


def read_tags(text: str, tags: str) -> str:
    """Return the entities marked by IOB2 tags, written like references: `Ada Lovelace (person)`.

    An I- tag that continues nothing starts an entity. Tags that do not match the words are returned unchanged.
    """
    words, marks = text.split(" "), tags.split(" ")
    if len(words) != len(marks):
        return tags
    entities: list[tuple[str, list[str]]] = []
    before = "O"
    for word, tag in zip(words, marks, strict=True):
        if tag.startswith("I-") and before[2:] == tag[2:]:
            entities[-1][1].append(word)
        elif tag != "O":
            entities.append((tag[2:], [word]))
        before = tag
    return ", ".join(f"{' '.join(entity)} ({kind})" for kind, entity in entities) or "(none)"


def cut(text: str) -> str:
    """Shorten a very long text, and state the number of characters removed."""
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:HEAD]} [… {len(text) - HEAD - TAIL:,} characters …] {text[-TAIL:]}"


def overlap_kinds(overlap: Contamination) -> list[tuple[str, str, int, int]]:
    """Return the kinds of overlap: name in the table, name in a sentence, overlapping rows, and rows searched."""
    long, short = overlap.rows - overlap.short, overlap.short
    return [
        ("equal", "equal", overlap.equal, overlap.rows),
        ("nearly equal (shares 80 % of word triples)", "nearly equal", overlap.near, overlap.rows),
        ("same prompt, any answer", "with the same prompt", overlap.prompted, overlap.rows),
        ("shares a 13-word passage (rows of 13 words or more)", "with a shared 13-word passage", overlap.shared, long),
        ("same words in the same order (shorter rows)", "short, with the same words", overlap.worded, short),
        ("same input in a run that this one starts from", "learned before this run", overlap.inherited, overlap.rows),
    ]


def overlap_table(overlap: Contamination) -> Table:
    """Return a table of the test rows with each kind of overlap."""
    columns: TableColumns = [
        "overlap with a training row",
        *(Column(name, "number") for name in ("rows", "of", "share")),
    ]
    rows: TableRows = [[name, count(part), count(of), share(part, of)] for name, _, part, of in overlap_kinds(overlap)]
    return Table(columns, rows)


def overlap_sentence(overlap: Contamination) -> str:
    """Return how many test rows overlap, by kind, and how many rows were already dropped for overlap."""
    number = overlap.overlapping
    text = f"None of the {count(overlap.rows)} test rows overlaps with a training row "
    text += "(equal, nearly equal, same prompt, or a shared 13-word passage)."
    if number:
        kinds = ", ".join(f"{count(part)} {name}" for _, name, part, _ in overlap_kinds(overlap) if part)
        verb = "overlaps" if number == 1 else "overlap"
        text = f"{count(number)} of {count(overlap.rows)} test rows ({share(number, overlap.rows)}) {verb} with a "
        text += f"training row: {kinds}."
    if overlap.prompted:
        text += " Set data.split_by to a column that identifies the question, or remove the test questions from "
        text += "training."
    if left := sum(overlap.dropped.values()):
        were = "row was" if left == 1 else "rows were"
        text += f" {count(left)} other {were} dropped from training or validation for overlap."
    return " ".join([text, *inherited_sentences(overlap)])


def inherited_sentences(overlap: Contamination) -> list[str]:
    """Return how many test rows earlier runs learned that this one starts from, and starts with unknown rows."""
    texts = []
    if number := overlap.inherited:
        were = "was a training row" if number == 1 else "were training rows"
        text = f"{count(number)} of {count(overlap.rows)} test rows {were} of the run that this one starts from."
        texts.append(f"{text} Test on rows that no earlier run learned.")
    if overlap.unknown:
        folders = ", ".join(f"`{folder}`" for folder in overlap.unknown)
        texts.append(f"It is unknown which rows {folders} learned: no run folder with its rows was found.")
    return texts


def suspect_section(suspects: SuspectFacts | None) -> Section:
    """Return the labels that are likely wrong: how many, and a table of the first."""
    title = "Likely label errors"
    if suspects is None:
        return Section(title, [])
    counts = ", ".join(f"{count(number)} in {split}" for split, number in suspects["found"].items())
    text = "A regression on the tuned model’s hidden states, fitted without the row, finds another label more likely "
    text += (
        "(confident learning). These are candidates to read, not proven errors. `evaluation/suspects.jsonl` has all."
    )
    cells: TableRows = []
    for label in suspects["listed"]:
        shown = label["text"] if label["word"] is None else f"{label['word']} (in: {label['text']})"
        line, number = label["line"], label.get("row")
        place = label["file"] if line is None and number is None else write_origin(label["file"], line=line, row=number)
        cells.append(
            [shown, label["given"], label["suggested"], score(label["score"]), Cell(place, note=label["split"])]
        )
    columns: TableColumns = ["text", "label", "suggested", Column("probability of the label", "number"), "row"]
    table: list[Block] = [Table(columns, cells, scroll=True)] if cells else []
    left_out: list[Block] = [Text(unchecked_sentence(suspects["unchecked"]), "note")] if suspects["unchecked"] else []
    by_file: TableRows = [
        [
            Cell(one.file, "worse" if one.stands_out else ""),
            count(one.labels),
            count(one.doubtful),
            share(one.doubtful, one.labels),
        ]
        for one in suspects.get("sources", [])
    ]
    heads: TableColumns = ["source file", *(Column(name, "number") for name in ("labels", "suspects", "share"))]
    left_out = [*([Table(heads, by_file, "By source file")] if len(by_file) > 1 else []), *left_out]
    first = Text(f"Labels that are likely wrong: {counts or 'none'}.")
    return Section(title, [first, *left_out, *table, Text(text, "soft")])


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


def flip_section(evaluation: Evaluation, task: str | None, thumbnails: Thumbnails = NO_PICTURES) -> Section:
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
                samples = SampleList(present_samples(some, evaluation, task, thumbnails))
                folded.append(Details(f"{spell_metrics([metric])}, {title}: {part}{count(number)}", [samples]))
    columns = [Column("metric"), *(Column(name, "number") for name in (gained, lost, "rows"))]
    who = "the baseline" if evaluation.baseline else "the base model"
    text = f"Rows that {who} gets right and the tuned model wrong, or the other way round. The rows shown are spread "
    text += "evenly over all of them."
    return Section("What flipped", [Table(columns, rows), *folded, Text(text, "soft")] if rows else [], anchor="flips")


def sample_section(evaluation: Evaluation, task: str | None, thumbnails: Thumbnails = NO_PICTURES) -> Section:
    """Return rows with their reference and both models' answers."""
    samples = present_samples(evaluation.samples, evaluation, task, thumbnails)
    source = "Spread evenly over the test rows, not hand-picked. `evaluation/predictions.jsonl` has all rows."
    text = NUMBERS.get(answer_kind(task), "") + source
    return Section("Samples", [SampleList(samples), Text(text, "soft")] if samples else [])
