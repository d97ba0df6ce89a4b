"""Conversations that are too long: what `data.on_overlong` costs, by the length of the conversations.

    python benchmarks/long_conversations.py [--rows 200] [--max-length 384]

Encodes conversations of 10, 100 and 1,000 messages (as many messages of each), and a mix of 41 on average and 558 at
most, with `drop`, `truncate` and `split`. Each case runs in a fresh process, with the template and tokenizer of
SmolLM2 on one thread, and is measured in CPU seconds without the imports. One JSON document goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from typing import Any

MODEL = "builtin:smollm2-135m-instruct"
WAYS = ("drop", "truncate", "split")
SIZES = ("10", "100", "1000", "mixed")
WORDS = ("the", "of", "and", "cat", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "river", "as")
LONGEST = 558
MEAN, SPREAD = 3.25, 0.95
"""Of the logarithm of a mixed conversation's messages, which gives 41 on average."""


def main() -> int:
    """Measure every case; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200, help="mixed conversations; the others have 2,000 messages")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(measure(*asked.case, asked.rows, asked.max_length)))
        return 0
    found: dict[str, Any] = {"rows": asked.rows, "max_length": asked.max_length}
    for size in SIZES:
        found[size] = {}
        for way in WAYS:
            words = [sys.executable, __file__, "--rows", str(asked.rows), "--max-length", str(asked.max_length)]
            done = subprocess.run([*words, "--case", size, way], check=True, capture_output=True, text=True)
            found[size][way] = json.loads(done.stdout.splitlines()[-1])
            print(size, way, found[size][way], file=sys.stderr)
    print(json.dumps(found, indent=2))
    return 0


def measure(size: str, way: str, rows: int, max_length: int) -> dict[str, Any]:
    """Encode the conversations of one case."""
    from rich.console import Console

    from llmtune.data.chat_encoding import encode_chat
    from llmtune.model.processor import load_processor
    from llmtune.model.resolve import resolve_model
    from llmtune.recipe.schema import Recipe

    data = {"train": "rows.jsonl", "max_length": max_length, "on_overlong": way}
    given = {"recipe_version": 1, "name": "long", "task": "chat", "data": data, "model": {"name": MODEL}}
    recipe = Recipe.model_validate(given)
    processor = load_processor(resolve_model(MODEL, recipe.model, Console(stderr=True), True), recipe.model)
    conversations = make_conversations(size, rows)
    encode_chat(conversations[:1], processor, recipe)  # the first call loads things
    began = time.process_time()
    encoded = encode_chat(conversations, processor, recipe)
    seconds = time.process_time() - began
    kept = [one for one in encoded if not isinstance(one, str)]
    messages = sum(len(row["messages"]) for row in conversations)
    return {
        "cpu_seconds": round(seconds, 2),
        "conversations": len(conversations),
        "messages": messages,
        "kept": len(kept),
        "examples": sum(map(len, kept)),
    }


def make_conversations(size: str, rows: int) -> list[Any]:
    """Return conversations of one size, the same in every process."""
    draw = random.Random(0)
    if size == "mixed":
        counts = [max(2, min(LONGEST, int(draw.lognormvariate(MEAN, SPREAD)))) // 2 * 2 for _ in range(rows)]
        counts[0] = LONGEST
    else:
        counts = [int(size)] * (2000 // int(size))
    roles = ("user", "assistant")
    return [{"messages": [{"role": roles[i % 2], "content": say(draw)} for i in range(count)]} for count in counts]


def say(draw: random.Random) -> str:
    """Return a message of 5 to 60 words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(5, 60))).capitalize() + "."


if __name__ == "__main__":
    sys.exit(main())
