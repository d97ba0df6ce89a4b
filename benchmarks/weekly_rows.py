"""Real rows that grow week by week: Debian packages, and the one purpose (`use::`) that their debtags name.

Reads the package lists of the machine's apt. A row has the package's name, its short description, its size and its
purpose. Only one package of a source is kept: packages of one source are near copies.
"""

from __future__ import annotations

import csv
import hashlib
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

FIELDS = re.compile(r"^(Package|Source|Description|Tag|Installed-Size): (.*(?:\n .*)*)", re.MULTILINE)
COLUMNS = ("package", "description", "megabytes", "team")
Row = dict[str, str]


def read_packages(purposes: Sequence[str]) -> list[Row]:
    """Return a row for each source with one of these purposes and no other, in the order of a hash of its name."""
    done = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True)
    rows: dict[str, Row] = {}
    for stanza in done.stdout.split("\n\n"):
        fields = dict(FIELDS.findall(stanza))
        tags = re.split(r",\s*", re.sub(r"\s+", " ", fields.get("Tag", "")).strip())
        (purpose, *others) = [tag.removeprefix("use::") for tag in tags if tag.startswith("use::")] or [""]
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        if purpose in purposes and not others and source not in rows:
            size = f"{int(fields['Installed-Size']) / 1024:.2f}"
            values = (fields["Package"], fields["Description"].split("\n")[0], size, purpose)
            rows[source] = dict(zip(COLUMNS, values, strict=True))
    return [rows[source] for source in sorted(rows, key=lambda name: hashlib.sha256(name.encode()).digest())]


def share(rows: Sequence[Row], sizes: Sequence[int]) -> Iterator[list[Row]]:
    """Yield consecutive parts of the rows of these sizes."""
    start = 0
    for size in sizes:
        yield [dict(row) for row in rows[start : start + size]]
        start += size


def shuffle_labels(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Give `count` of the rows the label of another row of them."""
    draw = random.Random(seed)
    chosen = draw.sample(range(len(rows)), count)
    labels = [rows[at]["team"] for at in chosen]
    draw.shuffle(labels)
    mixed = [dict(row) for row in rows]
    for at, label in zip(chosen, labels, strict=True):
        mixed[at]["team"] = label
    return mixed


def write_week(path: Path, rows: Sequence[Row], encoding: str = "utf-8", separator: str = ",") -> None:
    """Write rows as CSV; with `;` as separator, numbers have a decimal comma, as spreadsheets of many countries do."""
    if separator == ";":
        rows = [row | {"megabytes": row["megabytes"].replace(".", ",")} for row in rows]
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
