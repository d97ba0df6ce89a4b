"""Write rows for measurements: a question and an answer as long as Alpaca's, in English words of the shipped texts.

    python benchmarks/workload.py FILE --rows 100000 --seed 0

The words are real, so they give as many tokens as any English text; the sentences have no meaning. The same count and
seed give the same bytes on every machine. Lengths in tokens of SmolLM2's tokenizer: questions have about
20, answers are lognormal with a median of about 65, one in a hundred has more than 500; a row with the model's template
about 120.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

TEXTS = Path(__file__).resolve().parent.parent / "recipes" / "data"
PIECE_WORDS = 7
"""Number of consecutive words: enough to read like English, but too few for near-duplicate rows."""
QUESTIONS = (
    "Describe",
    "Explain in your own words",
    "Give three examples of",
    "Write a short story about",
    "Summarize the following text:",
    "What is the meaning of",
    "Rewrite this sentence in a formal tone:",
    "List the main reasons for",
    "Compare and contrast the following:",
    "Find the error in this statement:",
    "Suggest a title for",
    "How would you answer someone who says",
)
ANSWER_WORDS = 46.0
"""Median of the answers' words."""
ANSWER_SPREAD = 0.98
"""Standard deviation of the logarithm of the answers' words."""
MOST_WORDS = 560


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write_rows(asked.file, asked.rows, asked.seed)
    return 0


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Write `count` rows as JSON lines; returns `path`."""
    with path.open("w", encoding="utf-8") as file:
        for row in chat_rows(count, seed):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def chat_rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield `count` rows of one user and one assistant message; the first ones do not depend on `count`."""
    draw = random.Random(seed)
    for _ in range(count):
        question = f"{draw.choice(QUESTIONS)} {compose(draw, 3 + int(draw.random() * 12))}"
        if draw.random() < 0.2:
            question += f"\n\n{compose(draw, 6 + int(draw.random() * 24))}"
        words = math.exp(draw.gauss(math.log(ANSWER_WORDS), ANSWER_SPREAD))
        answer = compose(draw, max(1, min(MOST_WORDS, round(words))))
        yield {
            "messages": [
                {"role": "user", "content": f"{question}."},
                {"role": "assistant", "content": f"{answer[0].upper()}{answer[1:]}."},
            ]
        }


def compose(draw: random.Random, words: int) -> str:
    """Join `words` words, a few at a time from one place in the texts."""
    text = shipped_words()
    pieces: list[str] = []
    while words > 0:
        start = int(draw.random() * (len(text) - PIECE_WORDS))
        pieces.extend(text[start : start + min(words, PIECE_WORDS)])
        words -= PIECE_WORDS
    return " ".join(pieces)


@cache
def shipped_words() -> tuple[str, ...]:
    """Return the words of the shipped English texts, in their order."""
    texts: list[str] = []
    for name, key in (("kjv-psalms", "text"), ("movie-sentences", "text"), ("debian-preferences", "prompt")):
        lines = (TEXTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts.extend(json.loads(line)[key].rpartition("\n\n")[2] for line in lines)
    return tuple(word for text in texts for word in text.split())


if __name__ == "__main__":
    raise SystemExit(main())
