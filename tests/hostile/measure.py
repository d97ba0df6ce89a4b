"""Run and measure the hostile corpus, each command in its own process: `make hostile` prints the table."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import hostile
from support.warm import BUG, Conditions, Warm

from llmtune.errors import STEERING

SECONDS, BYTES = 10, 2 * 10**9
LATE_SECONDS = 120
"""Seconds after which a command counts as endless; on a busy machine, ten CPU seconds take longer."""
SECRETS = {name: f"{name.lower()}-s3cret-0123456789abcdef" for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")}
PATCHED = "not folders_has_an_end and not any_ and not refusal and not client and not request"
"""Tests that change limits of this process, or run no commands."""


@dataclass
class Measured:
    """A command of the corpus, with its time and memory."""

    test: str
    code: int
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    faults: list[str] = field(default_factory=list)


class Corpus:
    """Runs commands in children of a warm process, and records their time and memory."""

    def __init__(self) -> None:
        self.warm, self.measured = Warm(), list[Measured]()
        self.outputs = tempfile.TemporaryDirectory()

    def run(self, arguments: Sequence[str], seconds: float) -> hostile.Attempt:
        """Run one command."""
        try:
            here = Path.cwd()
            here.joinpath("x").name.encode()
            str(here).encode()
        except (OSError, UnicodeEncodeError):  # the path of the working folder cannot be passed to another process
            return hostile.run_here(arguments, seconds)
        given = Conditions(environment={**SECRETS, "HOME": os.environ["HOME"]})
        ended = self.warm.start(arguments, here, Path(self.outputs.name), given).wait(LATE_SECONDS)
        name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2].partition(" (")[0]
        one = Measured(name, ended.code, ended.cpu_seconds, ended.wall_seconds, ended.peak_bytes)
        texts = [ended.said, ended.printed]
        texts += [path.read_text(errors="replace") for path in self._written(here) if path.stat().st_size < 10**7]
        checks = {
            "tracebacks": BUG in ended.said or ended.code == 1,
            f"over {SECONDS} s": ended.late or ended.cpu_seconds > SECONDS,
            f"over {BYTES / 1e9:g} GB": ended.peak_bytes > BYTES,
            "escapes unescaped": STEERING.search((ended.said + ended.printed).replace("\r", "")) is not None,
            "secrets found": any(secret in text for secret in SECRETS.values() for text in texts),
        }
        one.faults = [fault for fault, holds in checks.items() if holds]
        self.measured.append(one)
        return hostile.Attempt(ended.code, ended.said, one.faults)

    def _written(self, here: Path) -> list[Path]:
        return [path for path in here.glob("run/**/*") if path.is_file() and not path.is_symlink()]

    def describe(self) -> str:
        """Return a table of the measurements."""
        kinds = ["tracebacks", f"over {SECONDS} s", f"over {BYTES / 1e9:g} GB", "escapes unescaped", "secrets found"]
        faults = Counter(fault for one in self.measured for fault in one.faults)
        codes = Counter(one.code for one in self.measured)
        slowest = max(self.measured, key=lambda one: one.cpu_seconds)
        largest = max(self.measured, key=lambda one: one.peak_bytes)
        rows = [f"| {kind} | {faults[kind]} |" for kind in kinds]
        return "\n".join(
            [
                f"| commands with hostile input | {len(self.measured)} |",
                "|---|---:|",
                *rows,
                f"| longest | {slowest.cpu_seconds:.1f} s ({slowest.test}) |",
                f"| most memory | {largest.peak_bytes / 1e9:.2f} GB ({largest.test}) |",
                f"| exit codes | {', '.join(f'{code}: {number}' for code, number in sorted(codes.items()))} |",
            ]
        )


def main() -> int:
    """Run the corpus and print the table."""
    corpus = Corpus()
    hostile.RUNNERS.append(corpus.run)
    folder = str(Path(__file__).parent.parent / "hostile")
    code = int(
        pytest.main(
            [folder, "-q", "-m", "not gpu", "-k", PATCHED, "-p", "no:cacheprovider", "--assert=plain", *sys.argv[1:]]
        )
    )
    print(corpus.describe())
    for one in corpus.measured:
        if one.faults:
            print(one)
    corpus.warm.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
