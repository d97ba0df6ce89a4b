"""Processes with different layers of one model run different passes of it."""

import os
from pathlib import Path

import pytest
from support.models import build_llama
from support.training import launch_work

from llmtune.launch.topology import Topology

NAMES = ("divided", "modes", "unequal numbers", "states", "parts", "generated", "decoded", "cache", "after a refusal")


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("strategy", ["placed", "sharded"])
def test_processes_with_layers_of_one_model_run_different_numbers_and_kinds_of_passes(
    strategy, processes, tmp_path, console, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    model = build_llama(tmp_path / "model", num_hidden_layers=8)
    found = launch_work("run_own_passes", [model, strategy], Topology(processes, "fsdp"), console, processes)
    trained = ("same passes", "resharded", "trained between") if strategy == "sharded" else ()
    assert found == dict.fromkeys((*NAMES, *trained, "ended"), True)
