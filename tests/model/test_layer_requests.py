"""Processes with shards of one model run different passes of it."""

import os
from pathlib import Path

from support.training import launch_work

from llmtune.launch.topology import Topology


def test_processes_with_shards_run_different_numbers_and_kinds_of_passes(tiny_llama, console, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    found = launch_work("run_own_passes", [tiny_llama], Topology(2, "fsdp"), console, 2)
    names = (
        "sharded",
        "modes",
        "unequal numbers",
        "parts",
        "generated",
        "after a refusal",
        "ended",
        "same passes",
        "resharded",
        "trained between",
    )
    assert found == dict.fromkeys(names, True)
