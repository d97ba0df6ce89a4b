"""Make number-sums.jsonl: questions for the sum of two numbers, and the sum.

python recipes/data/make_number_sums.py recipes/data/number-sums.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import combinations_with_replacement
from pathlib import Path

ROWS, SMALLEST, LARGEST = 128, 2, 20


def main() -> None:
    """Write a random part of all pairs; no pair occurs in both orders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    generator = random.Random(0)
    pairs = generator.sample([*combinations_with_replacement(range(SMALLEST, LARGEST + 1), 2)], ROWS)
    rows = [to_row(*generator.sample(pair, 2)) for pair in pairs]
    parser.parse_args().out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def to_row(first: int, second: int) -> dict[str, object]:
    """Return a question with its answer."""
    question, answer = f"What is {first}+{second}?", str(first + second)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    main()
