"""Make kjv-psalms.jsonl: the Psalms in the King James version, up to eight verses a row, from a Debian package.

python recipes/data/make_kjv_psalms.py recipes/data/kjv-psalms.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("bible-kjv", "bible-kjv-text")
VERSES_A_ROW = 8


def main() -> None:
    """Fetch the packages, unpack them beside the system, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        rows = list(to_rows(read_psalms(Path(folder))))
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows")


def read_psalms(folder: Path) -> str:
    """Let the packages' own program print the Psalms, a verse a line."""
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    command = [folder / "usr/bin/bible", "-p", folder / "usr/lib", "-l10000", "ps1:1-ps150:6"]
    return subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout.decode("ascii")


def to_rows(text: str) -> Iterator[dict[str, object]]:
    """Yield the verses of a psalm in rows of `VERSES_A_ROW`; `psalm` stands beside the text."""
    for psalm in re.split(r"\n(?=Psalms \d+\n)", text)[1:]:
        number = int(psalm.split()[1])
        verses = re.findall(r"^ *\d+ (.+?)\s*$", psalm, flags=re.M)
        for start in range(0, len(verses), VERSES_A_ROW):
            yield {"text": "\n".join(verses[start : start + VERSES_A_ROW]), "psalm": number}


if __name__ == "__main__":
    main()
