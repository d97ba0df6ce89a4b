"""A scripted judge behind an OpenAI-compatible endpoint, with known biases and errors, and pairs to judge.

An answer's worth is the number in it. Which mistake the judge makes on a pair follows from a hash of the pair, so both
orders of a pair, and a second request, get the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.http_server import answering

WORTH = re.compile(r"worth (\d+)")


@dataclass
class ScriptedJudge:
    """Shares of pairs on which it picks the first answer, picks the longer one, or errs."""

    position: float = 0.0
    length: float = 0.0
    error: float = 0.0
    word: Callable[[str], str] = "Short reasons.\nVerdict: {}".format
    """Writes a verdict as a reply."""
    fails: Callable[[int], tuple[int, Any, Mapping[str, str]] | None] = lambda number: None
    """Returns the status, body and headers for the request of a number, counted from 1, or None for a verdict."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def verdict(self, text: str) -> str:
        """Return the verdict on a question: A, B or tie."""
        a, b = (re.search(rf"<answer_{one}>\n(.*?)\n</answer_{one}>", text, re.DOTALL)[1] for one in "ab")  # type: ignore[index]
        drawn = int(hashlib.sha256("\n".join(sorted((a, b))).encode()).hexdigest()[:12], 16)
        mode, err = drawn % 10_000 / 10_000, drawn // 10_000 % 10_000 / 10_000 < self.error
        if mode < self.position:
            return "A"
        if mode < self.position + self.length and len(a) != len(b):
            return "A" if len(a) > len(b) else "B"
        better = worth(a) - worth(b)
        return "tie" if better == 0 else "A" if (better > 0) != err else "B"

    def answer(self, verb: str, path: str, headers: Any, body: bytes) -> tuple[int, Any, Mapping[str, str]]:
        """Answer one HTTP request."""
        asked = json.loads(body)
        with self.lock:
            self.requests.append(asked)
            self.headers.append({name.lower(): value for name, value in headers.items()})
            number = len(self.requests)
        if failed := self.fails(number):
            return failed
        text = self.word(self.verdict(asked["messages"][0]["content"]))
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return 200, {"model": "scripted-1", "choices": [choice], "usage": usage}, {}

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve the judge inside the block; yield the address."""
        with answering(self.answer) as url:
            yield url


def worth(answer: str) -> int:
    """Return the number of an answer; without one, that of its characters."""
    found = WORTH.search(answer)
    return int(found[1]) if found else sum(map(ord, answer)) % 100


def write_labelled(path: Path, pairs: Sequence[tuple[str, str, int]]) -> Path:
    """Write pairs as labelled rows in JSON Lines."""
    labels = {1: "A", 0: "tie", -1: "B"}
    rows = [
        {"question": f"question {i}", "answer_a": first, "answer_b": second, "label": labels[better]}
        for i, (first, second, better) in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw_answers(
    count: int, seed: int, win: float, tie: float = 0.0, longer: float = 0.5
) -> list[tuple[str, str, int]]:
    """Draw pairs of answers: the first is better in a share `win`, longer in a share `longer`; with 1, 0 or -1."""
    generator = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        better = int(generator.choice([1, 0, -1], p=[win, tie, 1 - win - tie]))
        first, second = 50 + 10 * better, 50
        pad = " and so on" * 3
        long_first = generator.random() < longer
        texts = [f"answer {number}{side} is worth {value}" for side, value in (("x", first), ("y", second))]
        texts[0 if long_first else 1] += pad
        pairs.append((texts[0], texts[1], better))
    return pairs
