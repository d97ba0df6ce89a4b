"""Eight weeks of an office that retrains each Monday, with real rows: python benchmarks/eight_weeks.py FOLDER.

Every week a file of new rows arrives and the same command runs. The table says, for each week, how the command ended
and which release serves afterwards. The recipe comes from `llmtune init`; the lines of `WEEKLY` are those of the guide
docs/every-week.md. It is changed where an error asks for it, and nowhere else. Takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from weekly_rows import Row, read_packages, share, shuffle_labels, write_week

PURPOSES = ("gameplaying", "converting", "editing", "monitor", "configuring", "viewing")
LATE, RENAMED = "playing", {"editing": "authoring"}
SIZES = (150, 550, 141, 141, 141, 141, 141, 141)
LATE_SIZES = (0, 0, 0, 0, 40, 30, 20, 17)
WRONG = 129
"""Shuffled labels in week 4."""
NAME = "teams"
WEEKLY = """
evaluate:
  metrics: [accuracy, f1_macro]
  champion: release:teams
  gates:
    - accuracy.low > champion - 0.1
    - accuracy[new] >= 0.6
    - accuracy.low > base
  when_unsure: report
deploy: [release]
"""
KILLS = ("prepare", "encode", "train", "evaluate", "release")
"""Week 8 is killed once in each of these, by the words that stderr shows when they begin."""
QUESTIONS = ("ftp client: puts files of a web site on its server", "a chess game", "turns wav files into mp3")


@dataclass
class Week:
    """One line of the table."""

    number: str
    what: str
    exit_code: int
    verdict: str
    failed: list[str]
    """Failed tests in junit.xml."""
    release: str
    answers: str
    """Hash of the answers of the release that serves."""
    seconds: float


def llmtune(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the office's folder."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    command = [sys.executable, "-m", "llmtune", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


def serving(folder: Path) -> tuple[str, str]:
    """Return the hash of the current release and of its answers; `-` if there is none."""
    listed = llmtune(folder, "release", "list", "--json")
    current = [one for one in json.loads(listed.stdout or "[]") if one.get("current")]
    if not current:
        return "-", "-"
    answers = [llmtune(folder, "generate", f"release:{NAME}", "--prompt", text, "--json").stdout for text in QUESTIONS]
    return current[0]["address"].partition("@")[2], hashlib.sha256("".join(answers).encode()).hexdigest()[:8]


def train(folder: Path, number: str, what: str) -> Week:
    """Run the week's command; read its results and the release."""
    started = time.monotonic()
    done = llmtune(folder, "run", f"{NAME}.yaml", "--json")
    (folder / f"week{number}.log").write_text(done.stdout + "\n----\n" + done.stderr)
    return describe(folder, number, what, done.returncode, done.stdout, time.monotonic() - started)


def describe(folder: Path, number: str, what: str, code: int, output: str, seconds: float) -> Week:
    """Read the document of a run, its JUnit file and the release that serves."""
    document: dict[str, Any] = json.loads(output) if output.strip() else {}
    verdict = (document.get("verdict") or {}).get("word", "-")
    junit = (document.get("reports") or {}).get("junit")
    failed = []
    if junit and Path(folder, junit).is_file():
        cases = ElementTree.parse(folder / junit).iter("testcase")
        failed = [case.get("name", "") for case in cases if case.find("failure") is not None]
    return Week(number, what, code, verdict, failed, *serving(folder), seconds)


def kill_at(folder: Path, words: str) -> bool:
    """Start the week's command and kill it when its log shows `words`; return whether that was seen."""
    command = [sys.executable, "-m", "llmtune", "run", f"{NAME}.yaml", "--json"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if re.match(rf"\s*{words}\b", line):
                process.send_signal(signal.SIGKILL)
                return True
    return False


def print_table(weeks: Sequence[Week]) -> None:
    """Print the weeks as a Markdown table."""
    print("| week | what arrives | exit | verdict | failed in JUnit | release that serves | its answers | s |")
    print("|---|---|---:|---|---|---|---|---:|")
    for one in weeks:
        failed = "; ".join(one.failed) or "-"
        cells = (
            one.number,
            one.what,
            one.exit_code,
            one.verdict,
            failed,
            one.release,
            one.answers,
            f"{one.seconds:.0f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def rename(rows: Sequence[Row]) -> list[Row]:
    """Write the label that changed its name."""
    return [row | {"team": RENAMED.get(row["team"], row["team"])} for row in rows]


def office(folder: Path, numbers: range) -> list[Week]:
    """Live through the weeks of these numbers."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    packages = read_packages((*PURPOSES, LATE))
    usual = share([row for row in packages if row["team"] != LATE], SIZES)
    late = share([row for row in packages if row["team"] == LATE], LATE_SIZES)
    arrivals = [[*often, *seldom] for often, seldom in zip(usual, late, strict=True)]
    weeks: list[Week] = []

    def live(number: str, what: str) -> None:
        weeks.append(train(folder, number, what))
        print_table(weeks[-1:])

    if 1 in numbers:
        write_week(data / "week1.csv", arrivals[0])
        begin(folder)
        live("1", f"{len(arrivals[0])} rows, 6 teams")
    if 2 in numbers:
        write_week(data / "week2.csv", arrivals[1])
        live("2", f"{len(arrivals[1])} rows more")
    if 3 in numbers:
        write_week(data / "week3.csv", arrivals[2])
        live("3", f"{len(arrivals[2])} rows more")
    if 4 in numbers:
        write_week(data / "week4.csv", shuffle_labels(arrivals[3], WRONG, seed=4))
        live("4", f"{len(arrivals[3])} rows, {WRONG} labels shuffled")
        write_week(data / "week4.csv", arrivals[3])
        live("4b", "the file corrected by its sender")
    if 5 in numbers:
        write_week(data / "week5.csv", arrivals[4])
        live("5", f"{len(arrivals[4])} rows, a new team ({LATE})")
    if 6 in numbers:
        write_week(data / "week6.csv", rename(arrivals[5]))
        live("6", f"{len(arrivals[5])} rows, {' '.join(RENAMED)} is now {' '.join(RENAMED.values())}")
        names = ", ".join(f"{old}: {new}" for old, new in RENAMED.items())
        add_lines(folder, f"classify: {{rename: {{{names}}}}}\n")
        live("6b", "classify.rename set, as the message proposes")
    if 7 in numbers:
        write_week(data / "week7.csv", rename(arrivals[6]), "utf-16", ";")
        live("7", f"{len(arrivals[6])} rows, UTF-16, semicolons and decimal commas")
    if 8 in numbers:
        write_week(data / "week8.csv", rename(arrivals[7]))
        for words in KILLS:
            seen = kill_at(folder, words)
            release, answers = serving(folder)
            what = f"killed at {words}" if seen else f"{words} was not seen"
            weeks.append(Week("8", what, -signal.SIGKILL, "-", [], release, answers, 0.0))
            print_table(weeks[-1:])
        live("8", f"{len(arrivals[7])} rows, the same command again")
    return weeks


def begin(folder: Path) -> None:
    """Write the recipe with `init`; replace its name and the section that it asks to decide by those of the guide."""
    done = llmtune(folder, "init", "data", "--task", "classify", "--out", f"{NAME}.yaml")
    print(done.stdout, done.stderr, file=sys.stderr)
    recipe = re.sub(r"^name: .*", f"name: {NAME}", (folder / f"{NAME}.yaml").read_text(), flags=re.MULTILINE)
    recipe = re.sub(r"test: 0\.1\b", "test: 0.2", recipe).partition("\nevaluate:")[0]
    (folder / f"{NAME}.yaml").write_text(recipe + WEEKLY)


def add_lines(folder: Path, lines: str) -> None:
    """Add lines to the end of the recipe."""
    with (folder / f"{NAME}.yaml").open("a") as file:
        file.write(lines)


def main() -> None:
    """Live through the weeks, then take the last release back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=1, help="Continue in a folder that has the weeks before.")
    parser.add_argument("--last", type=int, default=8)
    options = parser.parse_args()
    weeks = office(options.folder.absolute(), range(options.first, options.last + 1))
    print()
    print_table(weeks)
    before = serving(options.folder.absolute())
    done = llmtune(options.folder.absolute(), "release", "rollback", NAME)
    print(f"\nrollback: exit {done.returncode}: {done.stdout.strip()} {done.stderr.strip()}")
    print(f"before: release {before[0]}, answers {before[1]}; after: ", *serving(options.folder.absolute()))


if __name__ == "__main__":
    main()
