"""Makes the pictures of docs/inside.md, by the commands that the page names: `python docs/pictures.py [RUN]`.

RUN is a finished run of the quickstart; without one, the quickstart is run into build/inside/run, once. With `looks` in
its place, only docs/looks.svg is drawn, from the simulations that the tests repeat.
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
    draw_looks(ROOT / "docs/looks.svg")
    if sys.argv[1:] == ["looks"]:
        return 0
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


def draw_looks(path: Path) -> None:
    """Draw false alarms in fifty models without a change, and what becomes of one that lost something."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    from llmtune.compare.comparison_pictures import COLOURS, SETTINGS

    sys.path.insert(0, str(ROOT / "tests"))
    from support import looks

    kind = "losses"
    with mpl.rc_context(SETTINGS | {"axes.spines.bottom": True, "svg.hashsalt": "looks"}):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        alarms, outcomes = figure.subplots(1, 2)
        numbers = np.arange(1, looks.LOOKS + 1)
        names = ("each run by itself", f"looks: {looks.LOOKS}")
        for name, first_T, colour in zip(names, looks.first_alarms(kind)[::-1], COLOURS, strict=False):
            share = [100 * float(np.mean(first_T <= number)) for number in numbers]
            alarms.plot(numbers, share, color=colour)
            alarms.annotate(
                name, (looks.LOOKS, share[-1]), (-4, 5), textcoords="offset points", ha="right", color=colour
            )
        alarms.axhline(5, color="grey", linewidth=0.8, linestyle=":")
        alarms.annotate("5 %", (looks.LOOKS, 5), (18, -3), textcoords="offset points", color="grey")
        alarms.set(title="Series with a false alarm, %", xlabel="models without a change", ylim=(-2, 100))
        deviation = np.concatenate([looks.draw_series(kind, np.random.default_rng(1), 20)]).std()
        losses = np.linspace(0, 0.24, 9)
        finer = np.linspace(0, 0.24, 97)
        for part, label, colour in (("failed", "fails", COLOURS[4]), ("unsure", "inconclusive", COLOURS[5])):
            computed = [100 * getattr(looks.compute_shares(deviation, -loss), part) for loss in finer]
            seen = [100 * getattr(looks.share_outcomes(kind, -loss), part) for loss in losses]
            outcomes.plot(finer, computed, color=colour)
            outcomes.plot(losses, seen, "o", color=colour, markersize=4)
            outcomes.annotate(label, (0.01 if part == "unsure" else 0.2, 88), color=colour)
        title = f"One of {looks.LOOKS}: computed (line) and seen (dots), %"
        outcomes.set(title=title, xlabel="true loss of the model", ylim=(-2, 102))
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


def take(made: Path, place: Path) -> None:
    """Copy a picture; one in pixels with a palette of 128 colours, which is less than half of the bytes."""
    if made.suffix == ".png":
        with Image.open(made) as picture:
            picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(place, optimize=True)
    else:
        shutil.copyfile(made, place)


if __name__ == "__main__":
    sys.exit(main())
