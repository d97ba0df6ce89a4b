import json
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute  # its import must not count in the measurement
import pytest
from support.rows import make_recipe

from llmtune.data import deduplication
from llmtune.data.deduplication import find_near
from llmtune.data.worker_pool import WorkerPool

SCRIPT = """
import resource, sys
from pathlib import Path
from rich.console import Console
from llmtune.data.preparation import prepare_rows
from llmtune.recipe.loader import load_recipe
rows = prepare_rows(load_recipe(sys.argv[1]).recipe, Path(sys.argv[2]), Console(quiet=True))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
accounted = sum(rows.counts.values()) + sum(rows.dropped.values())
print(rows.rows_in, accounted, rows.dropped.get("near duplicate", 0), peak)
"""


@pytest.fixture(scope="module")
def million(tmp_path_factory) -> Path:
    """A million chat rows of some 500 bytes; every twentieth repeats the previous row with one more word."""
    rng = random.Random(0)
    words = [
        a + b + c
        for a in ("ka", "lo", "mi", "tu")
        for b in ("ra", "to", "ne", "bi", "sh")
        for c in ("", "s", "ly", "ing")
    ]
    path = tmp_path_factory.mktemp("million") / "rows.jsonl"
    question = answer = ""
    with path.open("w") as file:
        for number in range(1_000_000):
            if number % 20:
                question = " ".join(rng.choices(words, k=rng.randint(20, 50)))
                answer = " ".join(rng.choices(words, k=rng.randint(5, 40)))
            turns = [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": question if number % 20 else question + " please"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("method", "gigabytes", "minutes"), [("exact", 0.5, 5), ("near", 0.6, 15)])
def test_a_million_rows_stay_below_the_documented_memory(tmp_path, million, method, gigabytes, minutes):
    make_recipe(tmp_path, str(million), deduplicate=method, validation=0.05, test=0.1)
    start = time.perf_counter()
    command = [sys.executable, "-c", SCRIPT, tmp_path / "recipe.yaml", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    rows_in, accounted, dropped, peak = (int(number) for number in done.stdout.split())
    print(f"{method}: {seconds:.0f} s, {peak / 1e9:.2f} GB")
    assert rows_in == accounted == 1_000_000
    assert peak < gigabytes * 1e9
    assert seconds < minutes * 60
    assert (dropped > 30_000) == (method == "near")


def near_search_peak(rows: int, folder: Path) -> int:
    """The peak of allocated bytes while every second row is found to be near another one."""

    def texts() -> Iterator[tuple[int, pa.Array]]:
        for first in range(0, rows, 500):
            numbers = [number // 2 for number in range(first, first + 500)]
            yield first, pa.array([json.dumps({"tokens": [f"{number} {number}a"]}) for number in numbers])

    order = np.random.default_rng(0).permutation(rows)
    folder.mkdir()
    tracemalloc.start()
    try:
        assert sum(1 for _ in find_near(order, texts, folder)) == rows // 2
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_near_search_takes_under_a_hundred_bytes_per_row_even_if_all_rows_are_near(tmp_path, monkeypatch):
    monkeypatch.setattr(deduplication, "FILE_ROWS", 2**10)
    monkeypatch.setattr(deduplication, "WorkerPool", partial(WorkerPool, cores=1))
    few, many = (near_search_peak(rows, tmp_path / str(rows)) for rows in (1000, 3000))
    assert (many - few) / 2000 < 100
