"""Records a real run of the quickstart as docs/recording.svg: `python docs/recording.py`.

The command runs in a terminal of 100 columns. Each line keeps the second at which it appeared; the picture replays them
ten times as fast, a tenth of a second apart at least, scrolls as a terminal does, and stops at the end.
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).with_name("recording.svg")
COMMAND = "llmtune run quickstart"
COLUMNS = 100
ROWS = 30
SPEED = 10
GAP = 0.1
MOVES = re.compile(r"(\x1b\[[0-9;?]*[A-HJKSTfhlsu]|\x1b\][^\x07]*\x07|\r|\n)")
"""Everything but text and colours. Of these, llmtune's bars use: up, erase a line, carriage return."""


def main() -> None:
    """Run, record and draw."""
    lines = [(0.0, f"\x1b[1m$ {COMMAND}\x1b[0m"), *record()]
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for _, line in lines:
        console.print(Text.from_ansi(line), soft_wrap=False, overflow="crop", no_wrap=True)
    PICTURE.write_text(animate(console.export_svg(title=COMMAND), paced([second / SPEED for second, _ in lines])))


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


def paced(seconds: list[float]) -> list[float]:
    """Return when each line appears in the picture: in order, and with a gap between lines that came at once."""
    return list(accumulate(seconds, lambda last, second: max(last + GAP, second)))


def animate(svg: str, seconds: list[float]) -> str:
    """Let each line of rich's picture appear at its second, in a window of ROWS lines that scrolls."""
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # they are on the network
    svg = re.sub(r"<text [^>]*>\n</text>", "\n", svg)
    tops = sorted({float(top) for top in re.findall(r'<text [^>]*?y="([\d.]+)"[^>]*clip-path', svg)})
    rows = dict(zip(tops, seconds, strict=True))
    height, end = tops[1] - tops[0], seconds[-1]
    below = max(0, len(seconds) - ROWS)
    moves = {f"{100 * second / end:.1f}%": line for line, second in enumerate(seconds[ROWS:], 1)}
    scroll = "".join(f"{when}{{transform:translateY({-height * line:.1f}px)}}" for when, line in moves.items())
    style = (
        f"@keyframes appear{{from{{opacity:0}}}}@keyframes scroll{{from{{transform:none}}{scroll}}}"
        f".scroll{{transform:translateY({-height * below:.1f}px);animation:scroll {end:.1f}s step-end both}}"
        "@media(prefers-reduced-motion:reduce){*{animation:none!important}}"
    )

    def delayed(match: re.Match[str]) -> str:
        return f'{match[0]} style="animation:appear 1ms {rows[float(match["top"])]:.1f}s both"'

    def lowered(match: re.Match[str]) -> str:
        return f"{match[1]}{float(match[2]) - height * below:.1f}"

    svg = re.sub(r'<text [^>]*?y="(?P<top>[\d.]+)"(?=[^>]*clip-path)', delayed, svg)
    svg = re.sub(
        r'(viewBox="0 0 \S+ |-clip-terminal">\s*<rect [^>]*height="|<rect fill[^>]*height=")([\d.]+)', lowered, svg
    )
    svg = svg.replace('-matrix">', '-matrix scroll">', 1)
    return svg.replace("<style>", f"<style>{style}", 1)


if __name__ == "__main__":
    main()
