"""Work on several cores: results keep their order, whatever the number of workers."""

import gc
import operator
import os
import pickle
import re
import subprocess
import sys
from functools import partial

import psutil
import pytest
from support.models import CHATML
from support.rows import write_jsonl
from support.templates import conversation, recipe_for, tokenizer_with

from llmtune.data import deduplication, ingest
from llmtune.data.chat_encoding import encode_chat
from llmtune.data.examples import encode_rows
from llmtune.data.preparation import prepare_rows
from llmtune.data.worker_pool import WorkerPool, usable_cores
from llmtune.errors import DataError, EnvironmentProblem
from llmtune.tasks.chat import Chat
from llmtune.tasks.registry import VARIANTS, get_task

BATCHES = [[number, number + 1] for number in range(40)]


@pytest.mark.parametrize("cores", [1, 3])
def test_results_come_in_order_whatever_the_number_of_cores(cores):
    pool = WorkerPool(sum, cores=cores, eager=True)
    assert list(pool.map(BATCHES, len, 80)) == [sum(batch) for batch in BATCHES]


def test_a_killed_worker_is_an_environment_problem():
    with pytest.raises(EnvironmentProblem, match="lack of memory"):
        list(WorkerPool(os._exit, cores=2, eager=True).map([1], lambda batch: 1, 1))


def test_workers_exit_when_their_parent_is_killed():
    code = (
        "import os, signal, time; from llmtune.data.worker_pool import WorkerPool\n"
        "def batches():\n"
        "    yield 0\n"
        "    time.sleep(1)\n"
        "    print(*psutil.Process().children(), sep=chr(10), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "import psutil; list(WorkerPool(time.sleep, cores=2, eager=True).map(batches(), lambda b: 1, 9))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    workers = [psutil.Process(pid) for pid in map(int, re.findall(r"pid=(\d+)", done.stdout)) if psutil.pid_exists(pid)]
    assert done.stdout
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_small_work_stays_in_this_process():
    pool = WorkerPool(operator.methodcaller("append", os.getpid()), cores=2)
    batches = [[], []]
    assert list(pool.map(batches, len, 2)) == [None, None]
    assert batches == [[os.getpid()], [os.getpid()]]


def test_the_number_of_cores_is_limited_by_threads(monkeypatch):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    assert usable_cores() == 1


def encode_file(folder, rows, console, tokenizer, **pool):
    path = write_jsonl(folder / "rows.jsonl", rows)
    keys = {"validation": 0.2, "test": 0, "deduplicate": "none", "on_overlong": "drop", "max_length": 64}
    recipe = recipe_for(train=str(path), **keys)
    prepared = prepare_rows(recipe, folder / "rows", console)
    make = partial(WorkerPool, **pool)
    return encode_rows(prepared, get_task("chat"), tokenizer, recipe, folder / "examples", console, make)


@pytest.mark.slow
def test_the_same_bytes_are_written_whatever_the_number_of_cores(tmp_path, console):
    rows = [conversation(f"question {k}", f"answer {'cat ' * (k % 70)}{k}") for k in range(1500)]
    tokenizer = tokenizer_with(CHATML)
    alone = encode_file(tmp_path / "one", rows, console, tokenizer, cores=1)
    spread = encode_file(tmp_path / "two", rows, console, tokenizer, cores=2, eager=True)
    assert alone.dropped
    assert (alone.content_hash, alone.dropped) == (spread.content_hash, spread.dropped)
    for side in ("train", "validation"):
        assert spread.files[side].read_bytes() == alone.files[side].read_bytes()
    lists = [(tmp_path / name / "left_out.jsonl").read_text().replace(f"/{name}/", "/") for name in ("one", "two")]
    assert lists[0] == lists[1]


def test_rows_are_the_same_bytes_whatever_the_number_of_cores(tmp_path, console, monkeypatch):
    rows = [conversation(f"question {k} {k * k}", "cat " * (k % 70)) for k in range(5000)]
    write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:50]])
    found = []
    for name, pool in (("one", {"cores": 1}), ("two", {"cores": 2, "eager": True})):
        for module in (ingest, deduplication):
            monkeypatch.setattr(module, "WorkerPool", partial(WorkerPool, **pool))
        recipe = recipe_for(train=str(tmp_path / "rows.jsonl"), deduplicate="near", max_dropped=0.1)
        prepared = prepare_rows(recipe, tmp_path / name / "rows", console)
        files = [*sorted((tmp_path / name / "rows").iterdir()), tmp_path / name / "bad_rows.jsonl"]
        found.append([path.read_bytes() for path in files])
    assert {"bad: no answer", "exact duplicate"} & prepared.dropped.keys()
    assert found[0] == found[1]


def test_an_error_in_a_worker_becomes_the_error_of_the_run():
    with pytest.raises(ValueError, match="invalid literal"):
        list(WorkerPool(int, cores=2, eager=True).map(["x"], len, 1))
    error = pickle.loads(pickle.dumps(DataError.of("bad", "rows.jsonl:3", "mend it")))
    assert error.problems == DataError.of("bad", "rows.jsonl:3", "mend it").problems


@pytest.mark.parametrize("variant", [variant for variants in VARIANTS.values() for variant in variants])
def test_every_variant_can_be_pickled_for_a_worker(variant):
    assert pickle.loads(pickle.dumps(variant.encode)).__func__ is type(variant).encode


def test_a_worker_encodes_conversations_without_torch(tmp_path):
    (tmp_path / "encode").write_bytes(pickle.dumps(get_task("chat").row_encoder()))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "encode"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("variant", [variant for variants in VARIANTS.values() for variant in variants])
def test_a_worker_encodes_as_its_task_does(variant):
    assert variant.row_encoder() == (encode_chat if type(variant) is Chat else variant.encode)


def test_imports_that_are_frozen_stay_so_after_a_map():
    before = gc.get_freeze_count()
    gc.freeze()
    frozen = gc.get_freeze_count()
    assert list(WorkerPool(sum, cores=1).map([[0]], len, 1)) == [0]
    assert gc.get_freeze_count() == frozen > before
