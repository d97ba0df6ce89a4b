"""Makes the pictures of docs/inside.md, by the commands that the page names: `python docs/pictures.py [RUN]`.

RUN is a finished run of the quickstart; without one, the quickstart is run into build/inside/run, once.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURES = ROOT / "docs/inside.md", ROOT / "docs/inside"
RUN = ROOT / "build/inside/run"
MADE = re.compile(r"^    (llmtune explain .+)\n\n(?:!\[[^]]*\]\(inside/([\w.-]+)\)\n?)", re.MULTILINE)
"""A command on the page, and the picture below it: KIND-FILE, where FILE is what the command writes."""


def main() -> int:
    """Run each command that has a picture below it, and take the picture over; returns the exit code."""
    run = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else RUN
    llmtune = [sys.executable, "-m", "llmtune"]
    if not (run / "run.json").exists():
        subprocess.run([*llmtune, "run", "quickstart", "--out", str(run), "--offline"], check=True)
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, (line, picture) in enumerate(MADE.findall(PAGE.read_text(encoding="utf-8"))):
            out = Path(folder) / str(number)
            words = [str(run) if word == "RUN" else word for word in shlex.split(line)[1:]]
            subprocess.run([*llmtune, *words, "--out", str(out)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            take(out / picture.partition(".")[2], PICTURES / picture)
    return 0


def take(made: Path, place: Path) -> None:
    """Copy a picture; one in pixels with a palette of 128 colours, which is less than half of the bytes."""
    if made.suffix == ".png":
        with Image.open(made) as picture:
            picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(place, optimize=True)
    else:
        shutil.copyfile(made, place)


if __name__ == "__main__":
    sys.exit(main())
