"""Methods over several processes: the page's table, states of optimisers, offloaded shards, 16-bit layers."""

import os
from pathlib import Path

import numpy as np
import pytest
from support.sharding_table import CASES, LAYOUTS, MARKS, PAGE, SAME, measure, write_page
from support.training import (
    METHODS,
    TRAIN,
    assert_same,
    launch_work,
    leave_step_4,
    losses,
    make_recipe,
    run_training,
    train_together,
    write_examples,
)

from llmtune.launch.topology import Topology
from llmtune.recipe.peft_options import peft_methods

pytestmark = pytest.mark.slow
QUICK = ("lora", "qlora, `use_dora`", "qlora on experts", "full, dpo", "`optim: adamw_8bit`", "`optim: adafactor`")


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)


@pytest.mark.timeout(1200)
def test_methods_learn_the_same_in_several_processes(tmp_path):
    found = measure(tmp_path, QUICK)
    assert found == {name: dict.fromkeys(LAYOUTS, "equal") for name in QUICK}
    written = PAGE.read_text().partition(MARKS[0])[2].partition(MARKS[1])[0]
    for line in write_page(found).splitlines()[2 : 2 + len(QUICK)]:
        assert line in written


PLACES = tuple(name for name in CASES if name in {*peft_methods(), "qlora", "full"})


@pytest.mark.promise(
    "method", "two processes", place=PLACES, equal="losses of one process, within 1e-5 at first (docs/scale-methods.md)"
)
@pytest.mark.timeout(2400)
def test_every_method_learns_the_same_in_two_processes(tmp_path):
    for name, cells in measure(tmp_path, PLACES, ("one process", "ddp, 2")).items():
        assert cells["ddp, 2"].startswith("equal"), (name, cells)


def test_the_page_has_every_case():
    written = PAGE.read_text().partition(MARKS[0])[2].partition(MARKS[1])[0]
    for name in CASES:
        (line,) = [line for line in written.splitlines() if line.startswith(f"| {name} |")]
        assert "fails" not in line
        assert "differs" not in line or name == "NEFTune"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("optim", "first", "then"),
    [
        ("adamw_8bit", (2, "fsdp"), (1, "ddp")),
        ("muon", (2, "fsdp"), (3, "fsdp")),
        ("adafactor", (1, "ddp"), (2, "fsdp")),
    ],
)
def test_the_state_of_whole_matrices_resumes_in_another_number_of_processes(
    optim, first, then, tmp_path, tiny_llama, console
):
    examples = write_examples(tmp_path / "examples", train=61, validation=7)
    recipe = make_recipe(tmp_path, tiny_llama, train=TRAIN | {"optim": optim}, adapter=METHODS["full"])
    run_training(tmp_path / "alone", recipe, examples)
    run = train_together(tmp_path, "run", *first, console)
    leave_step_4(run)
    train_together(tmp_path, "run", *then, console)
    rtol = 1e-3 if optim == "muon" else SAME  # its products are in bfloat16
    np.testing.assert_allclose(losses(run), losses(tmp_path / "alone"), rtol=rtol)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_offloaded_shards_learn_the_same_and_resume_on_devices(method, tmp_path, tiny_llama, console):
    examples = write_examples(tmp_path / "examples", train=61, validation=7)
    recipe = make_recipe(tmp_path, tiny_llama, train=TRAIN, adapter=METHODS[method])
    run_training(tmp_path / "alone", recipe, examples)
    run = tmp_path / "run"
    launch_work("train_tiny", [tmp_path, run, "fsdp"], Topology(2, "fsdp", offload_params=True), console, 2)
    assert_same(tmp_path / "alone", run)
    leave_step_4(run)
    train_together(tmp_path, "run", 2, "fsdp", console)
    assert_same(tmp_path / "alone", run)


def test_layers_of_full_tuning_are_gathered_in_the_dtype_of_their_products(tmp_path, tiny_llama, console):
    make_recipe(tmp_path, tiny_llama, model={"dtype": "bfloat16"}, adapter=METHODS["full"])
    found = launch_work("gather_layers", [tmp_path], Topology(2, "fsdp"), console, 2)
    assert found.pop("loss") == pytest.approx(found.pop("alone"), rel=0.01)
    assert found == {"shards": "float32", "computes": "bfloat16", "gradients": "float32"}
