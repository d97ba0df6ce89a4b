"""Rows processed by a real Ray cluster of two nodes on this machine."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
from support.models import CHATML
from support.rows import write_jsonl
from support.templates import conversation, recipe_for, tokenizer_with
from support.workers import die_once, node_of

from llmtune.data import deduplication, ingest, worker_pool
from llmtune.data.examples import encode_rows
from llmtune.data.preparation import prepare_rows
from llmtune.data.worker_pool import WorkerPool, spread_on_ray
from llmtune.errors import EnvironmentProblem
from llmtune.tasks.registry import get_task

pytestmark = pytest.mark.needs("ray")

BATCHES = [[number, number + 1] for number in range(100)]


def work(address: str, function, batches=BATCHES) -> list:
    with spread_on_ray(address, offline=False):
        return list(WorkerPool(function, eager=True).map(batches, len, 2 * len(batches)))


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        yield nodes.address
        nodes.shutdown()


def files_of(folder: Path, console) -> dict[str, bytes]:
    """The output for 3,000 rows: rows, examples, and rows left out."""
    recipe = recipe_for(
        train=str(folder.parent / "rows.jsonl"), deduplicate="near", max_dropped=0.1, on_overlong="drop"
    )
    rows = prepare_rows(recipe, folder / "rows", console)
    encode_rows(rows, get_task("chat"), tokenizer_with(CHATML), recipe, folder / "examples", console)
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_bytes_as_this_machine(tmp_path, console, cluster, monkeypatch):
    rows = [conversation(f"question {k} {k * k}", "cat " * (k % 70)) for k in range(3000)]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:50]])
    here = files_of(tmp_path / "here", console)
    monkeypatch.setattr(ingest, "WorkerPool", partial(WorkerPool, eager=True))
    monkeypatch.setattr(deduplication, "WorkerPool", partial(WorkerPool, eager=True))
    monkeypatch.setattr(encode_rows, "__defaults__", (partial(WorkerPool, eager=True),))
    with spread_on_ray(cluster, offline=False):
        there = files_of(tmp_path / "there", console)
    assert here.keys() >= {"train.rows.arrow", "train.arrow", "bad_rows.jsonl"}
    assert there == here


@pytest.mark.slow
def test_all_nodes_take_part_and_results_come_in_order(cluster):
    assert work(cluster, sum) == [sum(batch) for batch in BATCHES]
    assert len(set(work(cluster, node_of)) - {""}) == 2


@pytest.mark.slow
def test_batches_of_a_killed_worker_are_processed_again(tmp_path, cluster):
    function = partial(die_once, tmp_path / "died", os.getpid())
    assert work(cluster, function) == [sum(batch) for batch in BATCHES]
    assert (tmp_path / "died").exists()


@pytest.mark.slow
def test_an_error_of_a_remote_worker_becomes_the_error_of_the_run(cluster):
    with pytest.raises(ValueError, match="invalid literal"):
        work(cluster, int, ["x"] * 20)


def test_an_unusable_cluster_is_refused_by_name(monkeypatch):
    with pytest.raises(EnvironmentProblem, match="--offline forbids"), spread_on_ray("10.0.0.1:6379", offline=True):
        pass
    with pytest.raises(EnvironmentProblem, match="Install the same version"):
        worker_pool._work_remotely("name", "0.0.1", b"", [])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentProblem, match=r"llmtune-cli\[ray\]"):
        work("local", sum)


@pytest.mark.slow
def test_an_unreachable_address_is_reported_immediately():
    with pytest.raises(EnvironmentProblem, match="nothing answers at"):
        work("127.0.0.1:9", sum)
