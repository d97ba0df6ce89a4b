"""The report in short as Markdown, for a CI summary or a comment on a merge request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmtune.report.report_view import make_view

LONGEST_SAMPLE = 300
SHOWN_CLASSES, SHOWN_PAIRS = 30, 5
SHOWN_SAMPLES = 3


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return verdict, gates, scores, samples and key figures; free text stands in code spans, so that it stays text."""
    view = make_view(report)
    parts = [
        f"# {plain(view['name'])}: {plain(view['verdict']['word'])}{failed_gates(view)}",
        plain(view["verdict"]["reason"]),
        " · ".join(f"{name} {code(value)}" for name, value in view["chips"]),
        gates(view),
        scores(view),
        seeds(view),
        classes(view),
        slices(view),
        studies(view),
        overlap(view),
        flips(view),
        samples(view),
        figures(view),
        f"Made by llmtune {plain(view['version'])}; `report.html` beside this file has curves, data and recipe.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def failed_gates(view: Mapping[str, Any]) -> str:
    """What stands behind the verdict in the title, where gates failed."""
    failed = sum(not gate["passed"] for gate in view["gates"])
    return f", {failed} gate{'s' if failed > 1 else ''} failed" if failed else ""


def gates(view: Mapping[str, Any]) -> str:
    """A table of the gates."""
    if not view["gates"]:
        return ""
    rows = [
        [("✅ passed" if gate["passed"] else "❌ failed"), code(gate["name"]), code(gate["wanted"]), code(gate["got"])]
        for gate in view["gates"]
    ]
    return "## Gates\n\n" + table(["", "gate", "wanted", "got"], rows)


def scores(view: Mapping[str, Any]) -> str:
    """A table of the scores with their intervals."""
    if not view["scores"]:
        return ""
    words = {"better": "better", "worse": "worse", "unsure": "–"}
    rows = [
        [
            code(row["metric"]),
            row["base"],
            row["tuned"],
            row["change"],
            row["interval"],
            row["p"],
            row["n"],
            words[row["kind"]],
        ]
        for row in view["scores"]
    ]
    heads = ["metric", view["base_name"], "tuned", "difference", "95 % interval", "p", "rows", ""]
    return "## Scores\n\n" + table(heads, rows) + baseline(view)


def baseline(view: Mapping[str, Any]) -> str:
    """What stands in the place of a base model, where it is none."""
    if not view["baseline"]:
        return ""
    why = "and no model: before tuning, the base model has no trained head for this task"
    return f"\n\nThe baseline is {code(view['baseline'])}, {why}."


def seeds(view: Mapping[str, Any]) -> str:
    """A table of the scores of several seeds, and what their spread says of the gain."""
    found = view["seeds"]
    if not found:
        return ""
    rows = [
        [code(row["metric"]), row["base"], *row["each"], row["mean"], row["deviation"], row["range"], row["gain"]]
        for row in found["rows"]
    ]
    heads = [view["base_name"], *(f"seed {name}" for name in found["names"])]
    heads = ["metric", *heads, "mean", "deviation", "lowest to highest", "gain of the mean"]
    return f"## Seeds\n\n{plain(found['told'])}\n\n{table(heads, rows)}"


def classes(view: Mapping[str, Any]) -> str:
    """A table of the classes, and those that are taken for one another most often."""
    found = view["classes"]
    if not found:
        return ""
    heads = [found["unit"], "precision", "recall", f"F1 of {view['base_name']}", "F1"]
    rows = [
        [code(row["label"]), row["support"], row["precision"], row["recall"], row["base_f1"], row["f1"]]
        for row in found["rows"][:SHOWN_CLASSES]
    ]
    parts = [f"## {found['title']}", table(["", *heads], rows)]
    if left_out := len(found["rows"]) - len(rows):
        parts.append(f"{left_out} more in `report.html`.")
    pairs = (view["confusion"] or {}).get("pairs") or []
    if pairs:
        parts.append("Taken for one another most often:")
        lines = [
            f"- {code(pair['reference'])} for {code(pair['predicted'])}: {pair['rows']} rows, {pair['share']} of all"
            for pair in pairs[:SHOWN_PAIRS]
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def slices(view: Mapping[str, Any]) -> str:
    """A table a column: each slice by the metric that says most."""
    parts = []
    for part in view["slices"]:
        for found in part["tables"][:1]:
            rows = [
                [code(row["value"]), row["base"], row["tuned"], row["change"], row["interval"], row["n"]]
                for row in found["rows"]
            ]
            heads = [code(part["column"]), view["base_name"], "tuned", "difference", "95 % interval", "rows"]
            parts += [f"### {plain(part['column'])}: {plain(found['metric'])}", table(heads, rows)]
    return "\n\n".join(["## Scores by slice", *parts]) if parts else ""


def studies(view: Mapping[str, Any]) -> str:
    """Each study's scores, and what they can and cannot show."""
    parts = []
    for study in view["studies"]:
        rows = [
            [code(row["gate"]), row["base"], row["tuned"], row["change"], row["interval"], row["p"], row["n"]]
            for row in study["scores"]
        ]
        heads = ["metric", "base", "tuned", "difference", "95 % interval", "p", "n"]
        parts += [f"## {plain(study['title'])}", table(heads, rows) if rows else "", plain(study["limits"])]
    return "\n\n".join(part for part in parts if part)


def overlap(view: Mapping[str, Any]) -> str:
    """Say how many test rows stand in the training rows, and give the score that says most without them."""
    found = view["overlap"]
    if not found:
        return ""
    parts = ["## Overlap with training data", plain(found["told"])]
    for part in found["tables"][:1]:
        rows = [
            [row["value"], row["base"], row["tuned"], row["change"], row["interval"], row["n"]] for row in part["rows"]
        ]
        heads = [plain(part["metric"]), view["base_name"], "tuned", "difference", "95 % interval", "rows"]
        parts.append(table(heads, rows))
    return "\n\n".join(parts)


def flips(view: Mapping[str, Any]) -> str:
    """How many rows changed sides, each way."""
    rows = [[code(part["metric"]), *(way["count"] for way in part["ways"]), part["rows"]] for part in view["flips"]]
    heads = ["metric", "wrong before, right now", "right before, wrong now", "rows"]
    return "## What flipped\n\n" + table(heads, rows) if rows else ""


def samples(view: Mapping[str, Any]) -> str:
    """The first few samples."""
    shown = [sample for sample in view["samples"][:SHOWN_SAMPLES] if sample["answers"]]
    if not shown:
        return ""
    rows = [
        [
            code(sample.get("prompt", "")),
            code(sample["reference"]),
            *(code(answer["text"]) for answer in sample["answers"]),
        ]
        for sample in shown
    ]
    heads = [shown[0]["prompt_name"], shown[0]["reference_name"], *(answer["who"] for answer in shown[0]["answers"])]
    return "## Samples\n\n" + table(heads, rows)


def figures(view: Mapping[str, Any]) -> str:
    """Rows, losses, time and memory as a list."""
    lines = []
    if data := view["data"]:
        sides = ", ".join(f"{side['rows']} {side['side']}" for side in data["sides"])
        learned = f"; {data['share']} of tokens learned" if data["share"] else ""
        lines.append(f"- data: {data['rows_in']} rows in, {data['dropped_sum']} dropped, {sides}{learned}")
        if data["classes"]:
            lines.append(f"- classes: {data['classes']['spread']}" + unseen(data["classes"]["unseen"]))
    if training := view["training"]:
        lines.append("- training: " + ", ".join(f"{name} {code(text)}" for name, text in training["facts"]))
    if adapter := view["adapter"]:
        lines.append("- adapter: " + ", ".join(f"{name} {code(text)}" for name, text in adapter["facts"]))
    if view["steps"]:
        times = ", ".join(
            f"{plain(step['name'])} {'skipped' if step['skipped'] else step['time']}" for step in view["steps"]
        )
        lines.append(f"- time: {times}")
    return "## Figures\n\n" + "\n".join(lines) if lines else ""


def unseen(labels: list[str]) -> str:
    """The classes that training has no rows of, by name."""
    return ": " + ", ".join(code(label) for label in labels[:SHOWN_CLASSES]) if labels else ""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are safe already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(value: Any) -> str:
    """Free text as a code span that cannot end early, break a table row or run too long."""
    text = re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", " ⏎ ", str(value)).strip()
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    if len(text) > LONGEST_SAMPLE:
        text = text[:LONGEST_SAMPLE] + "…"
    if not text:
        return "(empty)"
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|")


def plain(value: Any) -> str:
    """Short text of our own or a name, with every sign that means something in Markdown escaped."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!@&$])", r"\\\1", text)
