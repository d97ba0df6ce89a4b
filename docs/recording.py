"""Records a real run of the quickstart as docs/recording.svg: `python docs/recording.py`.

The command runs in a terminal of 100 columns. Each line keeps the second at which it appeared; the picture replays them
ten times as fast and stops at the end.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).with_name("recording.svg")
COMMAND = "llmtune run quickstart"
COLUMNS = 100
SPEED = 10
MOVES = re.compile(r"(\x1b\[[0-9;?]*[A-HJKSTfhlsu]|\x1b\][^\x07]*\x07|\r|\n)")
"""Everything but text and colours. Of these, llmtune's bars use: up, erase a line, carriage return."""


def main() -> None:
    """Run, record and draw."""
    lines = [(0.0, f"\x1b[1m$ {COMMAND}\x1b[0m"), *record()]
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for _, line in lines:
        console.print(Text.from_ansi(line), soft_wrap=False, overflow="crop", no_wrap=True)
    PICTURE.write_text(animate(console.export_svg(title=COMMAND), [second / SPEED for second, _ in lines]))


def record() -> list[tuple[float, str]]:
    """Return the lines that a terminal shows at the end, with the second at which each appeared."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "LINES": "60", "TERM": "xterm-256color"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llmtune", *COMMAND.split()[1:], "--out", "quickstart"]
        process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        start, pieces = time.monotonic(), []
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the terminal is closed: the program has ended
                break
            pieces.append((time.monotonic() - start, piece))
        process.wait()
    return shown(pieces)


def shown(pieces: list[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """Return the lines on the terminal at the end, each with the second at which it last changed."""
    lines: list[tuple[float, str]] = [(0.0, "")]
    row, start = 0, True
    for second, piece in pieces:
        for part in MOVES.split(piece.decode(errors="replace")):
            if part == "\n":
                row, start = row + 1, True
                lines += [(second, "")] * (row + 1 - len(lines))
            elif part == "\r" or part.endswith("K"):
                start = True
            elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
                row, start = max(0, row - int(up[1] or 1)), True
            elif part and not MOVES.fullmatch(part):
                lines[row] = (second, part if start else lines[row][1] + part)
                start = False
    return [(second, line) for second, line in lines if Text.from_ansi(line).plain.strip()]


def animate(svg: str, seconds: list[float]) -> str:
    """Let each line of rich's picture appear at its second."""
    tops = sorted({float(top) for top in re.findall(r'<text [^>]*?y="([\d.]+)"', svg)})
    rows = dict(zip(tops[-len(seconds) :], seconds, strict=False))
    style = "<style>@keyframes appear{from{opacity:0}}</style>"

    def delayed(match: re.Match[str]) -> str:
        second = rows.get(float(match["top"]))
        return match[0] if second is None else f'{match[0]} style="animation:appear 1ms {second:.1f}s both"'

    svg = re.sub(r'<text [^>]*?y="(?P<top>[\d.]+)"', delayed, svg)
    return svg.replace("<style>", f"{style}<style>", 1)


if __name__ == "__main__":
    main()
