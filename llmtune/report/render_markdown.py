"""Renders blocks as Markdown, for a README, a CI summary or a merge request comment.

Free text is escaped or put in code spans. Pictures and collapsed parts appear on HTML pages only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmtune.display.blocks import Beside, Block, Bullets, Cell, KeyValues, Page, SampleList, Section, Table, Text

LONGEST_TEXT = 300
MOST_ROWS, MOST_SAMPLES = 30, 3
SIGNS = {"better": "✅", "worse": "❌"}


def to_markdown(page: Page) -> str:
    """Return title, facts and sections, without empty parts."""
    verdict = page.verdict
    failed = f", {markdown_text(verdict.gates)}" if verdict and verdict.gates_tone in ("worse", "unsure") else ""
    parts = [
        f"# {markdown_text(page.title)}{f': {markdown_text(verdict.word)}{failed}' if verdict else ''}",
        markdown_text(verdict.reason if verdict else page.lead),
        " · ".join(f"{markdown_text(name)} {code(value)}" for name, value in page.chips),
        *map(render_section, page.sections),
        sentence(page.footer),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_section(section: Section, level: int = 2) -> str:
    """Return a section under its heading; empty if it has nothing to show in Markdown."""
    text = render_blocks(section.blocks) if section.brief else ""
    return f"{'#' * level} {markdown_text(section.title)}\n\n{text}" if text else ""


def render_blocks(blocks: Sequence[Block]) -> str:
    """Return the blocks that Markdown can show, separated by empty lines."""
    return "\n\n".join(part for part in map(render_block, blocks) if part)


def render_block(block: Block) -> str:
    """Return one block; empty if only an HTML page can show it."""
    match block:
        case Table():
            return render_table(block)
        case Text():
            return "" if block.style == "soft" else sentence(block.text)
        case Bullets():
            return "\n".join(f"- {sentence(item)}" for item in block.items)
        case KeyValues():
            values = " · ".join(f"{markdown_text(name)} {code(value)}" for name, value in block.pairs)
            return f"{markdown_text(block.title)}: {values}" if block.title and values else values
        case SampleList():
            return render_samples(block)
        case Beside():
            return render_blocks([*block.left, *block.right])
        case _:
            return ""


def render_table(block: Table) -> str:
    """Return the first rows of a table; better and worse values have a leading sign."""
    shown = [number for number, column in enumerate(block.heads) if column.kind != "picture"]
    heads = [markdown_text(block.heads[number].heading) for number in shown]
    rows = [[render_cell(row[number]) for number in shown] for row in block.cells[:MOST_ROWS]]
    parts = [f"### {markdown_text(block.title)}" if block.title else "", table(heads, rows)]
    if left := len(block.rows) - len(rows):
        parts.append(f"{left} more on the page.")
    return "\n\n".join(part for part in parts if part)


def render_cell(cell: Cell) -> str:
    """Return the text of a cell."""
    text = code(cell.text) if cell.code else markdown_text(cell.text)
    return f"{SIGNS[cell.tone]} {text}" if cell.tone in SIGNS else text


def render_samples(block: SampleList) -> str:
    """Return the first few samples as a table."""
    shown = [sample for sample in block.samples[:MOST_SAMPLES] if sample.answers]
    if not shown:
        return ""
    names = [*dict.fromkeys(answer.name for one in shown for answer in one.answers)]
    heads = [shown[0].prompt_name, shown[0].reference_name, *names]
    texts = [{answer.name: answer.text for answer in one.answers} for one in shown]
    rows = [[one.prompt, one.reference, *map(of.get, names)] for one, of in zip(shown, texts, strict=True)]
    return table(heads, [[code(text or "") for text in row] for row in rows])


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of escaped cells."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sentence(text: str) -> str:
    """Return llmtune's own text; text between backticks becomes code."""
    parts = re.sub(r"\s+", " ", text).split("`")
    return "".join(code(part) if number % 2 else escape(part) for number, part in enumerate(parts)).strip()


def code(value: object) -> str:
    """Return free text as a code span that cannot end early or break a table row; long text is truncated."""
    text = printable(re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", " ⏎ ", str(value)).strip())
    if len(text) > LONGEST_TEXT:
        text = text[:LONGEST_TEXT] + "…"
    if not text:
        return "(empty)"
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|")


def markdown_text(value: object) -> str:
    """Return llmtune's own short text, or a name, on one line."""
    return escape(" ".join(str(value).split()))


def escape(text: str) -> str:
    """Escape every character with a meaning in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!@&$])", r"\\\1", printable(text))


def printable(text: str) -> str:
    """Replace unprintable characters."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
