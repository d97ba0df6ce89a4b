import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.process import Watched, run_in_child, train_in_process
from support.training import adapt, make_recipe, read_metrics, run_training, trained_bytes, with_methods

from llmtune.errors import EnvironmentProblem, Stopped
from llmtune.tasks.registry import get_task
from llmtune.train.checkpoint import (
    Checkpoint,
    Damage,
    TrainState,
    list_checkpoints,
    read_checkpoint,
    staged_on_disk,
    write_checkpoint,
)

KILLS = [
    "line:Rehearsed",
    "line:step 5/",
    "os.rename:.step-8.new",
    "shutil.rmtree:.step-8.old",
    "os.rename:.adapter.new",
]


def without_times(lines):
    return [{key: line[key] for key in ("step", "epoch", "loss", "learning_rate", "grad_norm")} for line in lines]


def damage(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of a finished run to damage, with its last checkpoints but without its adapter."""
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    return tmp_path / "run"


def test_a_run_killed_anywhere_resumes_to_the_same_bytes(tmp_path, tiny_llama, examples):
    train = {"num_train_epochs": 3, "save_steps": 4, "save_total_limit": 1}
    recipe = make_recipe(tmp_path, tiny_llama, adapter={"lora_dropout": 0.1}, train=train)
    shutil.copytree(examples.folder, tmp_path / "examples")
    for kill in KILLS:
        done = train_in_process(tmp_path, tmp_path / "killed", "--kill", kill)
        assert done.returncode == -9, (kill, done.stderr)
    resumed = run_training(tmp_path / "killed", recipe, examples)
    whole = run_training(tmp_path / "whole", recipe, examples)
    assert resumed.resumed_from == whole.steps == 24
    assert trained_bytes(tmp_path / "killed") == trained_bytes(tmp_path / "whole")
    assert without_times(read_metrics(tmp_path / "killed")) == without_times(read_metrics(tmp_path / "whole"))
    assert (resumed.train_loss, resumed.tokens) == (whole.train_loss, whole.tokens)
    left = {path.name for path in (tmp_path / "killed").rglob(".*")}
    assert not left, "nothing half-written is left"


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_damage_is_detected_and_named(name, how, copy):
    file = copy / "checkpoints" / "step-16" / name
    if how == "flipped":
        damage(file)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    found = read_checkpoint(file.parent)
    if (how, name) != ("flipped", "state.json"):  # the flipped bit may be in whitespace
        assert isinstance(found, Damage)
        assert name in found.reason


@pytest.mark.parametrize(
    ("key", "value"), [("step", 0), ("step", 15), ("step", "16"), ("step", None), ("tokens", []), ("divergence", 5)]
)
def test_a_state_from_another_checkpoint_counts_as_damage(key, value, copy):
    file = copy / "checkpoints" / "step-16" / "state.json"
    content = json.loads(file.read_text())
    del content["sha256"]  # as earlier versions wrote it
    content["state"][key] = value
    file.write_text(json.dumps(content))
    found = read_checkpoint(file.parent)
    assert isinstance(found, Damage)
    assert "state.json" in found.reason


def _read_with_little_memory(folder):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 16 * 2**20,) * 2)
    try:
        print(read_checkpoint(folder))
    except MemoryError as error:
        print("MemoryError", error)


@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_running_out_of_memory_while_reading_does_not_count_as_damage(part, tmp_path):
    large = torch.zeros(16, 2**20)
    write_checkpoint(
        tmp_path / "step-1",
        {"a": large if part == "weights" else large[:1]},
        {"optimizer": {"a": large if part == "optimizer" else large[:1]}, "schedule": {}},
        TrainState(budget=1, step=1),
        "inputs",
    )
    done = run_in_child(_read_with_little_memory, tmp_path / "out", tmp_path / "step-1")
    assert done.stdout.startswith("MemoryError"), done


def test_a_damaged_checkpoint_is_moved_aside_and_the_previous_one_is_used(copy, finished, examples, console):
    damage(copy / "checkpoints" / "step-16" / "optimizer.pt")
    assert run_training(copy, finished[1], examples, console=console).resumed_from == 15
    said = " ".join(console.file.getvalue().split())
    assert "is damaged (optimizer.pt was changed)" in said
    assert "using the one before it" in said
    assert (copy / "checkpoints" / "damaged-step-16").is_dir()
    assert isinstance(read_checkpoint(copy / "checkpoints" / "step-16"), Checkpoint)
    assert trained_bytes(copy) == trained_bytes(finished[0])


def test_with_every_checkpoint_damaged_training_restarts_and_ends_the_same(copy, finished, examples):
    for folder in list_checkpoints(copy / "checkpoints"):
        damage(folder / "trainable.safetensors")
    assert run_training(copy, finished[1], examples).resumed_from is None
    assert trained_bytes(copy) == trained_bytes(finished[0])


def test_a_checkpoint_that_a_killed_process_did_not_rotate_goes_at_the_end(copy, finished, examples):
    shutil.copytree(copy / "checkpoints" / "step-15", copy / "checkpoints" / "step-14")
    assert run_training(copy, finished[1], examples).resumed_from == 16
    assert [path.name for path in list_checkpoints(copy / "checkpoints")] == ["step-16", "step-15"]


VARIED = [
    {"model": {"dtype": "bfloat16"}},
    {"adapter": {"method": "qlora"}},
    {"train": {"optim": "adamw_8bit"}},
    {"train": {"loraplus_lr_ratio": 16.0}},
]


@pytest.mark.parametrize("change", VARIED)
def test_other_formats_and_optimizers_learn_and_resume_bit_by_bit(change, examples, tmp_path, tiny_llama):
    train = {"max_steps": 8, "save_steps": 4, **change.get("train", {})}
    recipe = make_recipe(tmp_path, tiny_llama, **{**change, "train": train})
    run_training(tmp_path / "whole", recipe, examples)
    lines = read_metrics(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"]
    shutil.copytree(tmp_path / "whole", tmp_path / "halved")
    shutil.rmtree(tmp_path / "halved" / "checkpoints" / "step-8")
    assert run_training(tmp_path / "halved", recipe, examples).resumed_from == 4
    assert trained_bytes(tmp_path / "halved") == trained_bytes(tmp_path / "whole")


def test_metrics_are_truncated_to_the_checkpoint_and_an_incomplete_line_is_removed(copy, finished, examples):
    shutil.rmtree(copy / "checkpoints" / "step-16")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    run_training(copy, finished[1], examples)
    assert without_times(read_metrics(copy)) == without_times(read_metrics(finished[0]))


def test_a_damaged_checkpoint_does_not_count_as_newest(copy, finished, examples):
    """Otherwise a limit of one would remove each later checkpoint as soon as it is written."""
    damage(copy / "checkpoints" / "step-16" / "trainable.safetensors")
    shutil.rmtree(copy / "checkpoints" / "step-15")
    recipe = finished[1]
    one = recipe.model_copy(update={"train": recipe.train.model_copy(update={"save_total_limit": 1})})
    fingerprint = json.loads((copy / "checkpoints" / "step-16" / "state.json").read_text())["fingerprint"]
    stop = Console(file=Watched("  loss ", lambda: os.kill(os.getpid(), signal.SIGTERM)), width=200)
    with pytest.raises(Stopped) as caught:
        run_training(copy, one, examples, console=stop, inputs=fingerprint)
    saved = Path(caught.value.problems[0].where)
    assert isinstance(read_checkpoint(saved), Checkpoint)
    assert list_checkpoints(copy / "checkpoints")[0] == saved


def test_only_checkpoints_of_the_same_inputs_are_resumed(finished, examples, tmp_path, capsys):
    """Inputs cover what training does not see itself, such as the content of the adapter that it starts from."""
    _, recipe, _ = finished
    run = tmp_path / "run"
    run_training(run, recipe, examples, inputs="a" * 64)
    assert run_training(run, recipe, examples, inputs="a" * 64).resumed_from == 16
    old, lines = trained_bytes(run), (run / "metrics.jsonl").read_bytes()
    stop = Console(file=Watched("step 2/", lambda: os.kill(os.getpid(), signal.SIGTERM)), width=200)
    other = recipe.model_copy(update={"seed": 8})
    with pytest.raises(Stopped):
        run_training(run, other, examples, inputs="b" * 64, console=stop)
    assert trained_bytes(run) == old, "what was trained stays until there is something new"
    assert "belong to other data or settings" in " ".join(capsys.readouterr().err.split())
    assert (run / "checkpoints" / "other-aaaaaaaa" / "step-16").is_dir()
    assert (run / "checkpoints" / "other-aaaaaaaa" / "metrics.jsonl").read_bytes() == lines
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert (
        run_training(run, other, examples, inputs="b" * 64, console=Console(stderr=True, width=200)).resumed_from == 2
    )
    assert trained_bytes(run) != old
    assert "no training resumes from: other-aaaaaaaa" in capsys.readouterr().err
    assert not [*(run / "checkpoints").glob("*other*")]


def test_a_metrics_line_is_not_duplicated_by_a_stop_and_a_kill(finished, examples, tmp_path, tiny_llama):
    """The stop saves step 7 before its line; the resumed run writes the line and is killed before it saves again."""
    train_settings = {"save_steps": 3, "eval_steps": 5}
    recipe = make_recipe(tmp_path, tiny_llama, adapter={"lora_dropout": 0.1}, train=train_settings)
    shutil.copytree(examples.folder, tmp_path / "examples")
    task, run = get_task("chat"), tmp_path / "run"

    def loss(model, batch, by_row=False):
        if model.training and (run / "metrics.jsonl").exists() and len(read_metrics(run)) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return task.loss(model, batch, by_row)

    stopping = with_methods(task, loss=loss)
    with pytest.raises(Stopped, match="after step 7 of 16"):
        run_training(run, recipe, examples, task=stopping)
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert train_in_process(tmp_path, run, "--kill", "line:step 7/").returncode == -9
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6, 7]
    run_training(run, recipe, examples)
    assert without_times(read_metrics(run)) == without_times(read_metrics(finished[0]))


def test_code_in_an_optimizer_state_is_not_executed(copy, tmp_path):
    import pickle

    class Program:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    file = copy / "checkpoints" / "step-16" / "optimizer.pt"
    file.write_bytes(pickle.dumps(Program(), protocol=2))
    content = json.loads((file.parent / "state.json").read_text())
    content["files"]["optimizer.pt"] = __import__("hashlib").sha256(file.read_bytes()).hexdigest()
    (file.parent / "state.json").write_text(json.dumps(content))
    assert isinstance(read_checkpoint(file.parent), Damage)
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()

    def fill() -> None:
        with staged_on_disk(tmp_path / "adapter") as place:
            (place / "new").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentProblem, match="adapter could not be written: No space left on device"):
        fill()
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "old"]


def test_a_run_folder_that_is_not_writable_is_an_environment_problem(tmp_path, tiny_llama, examples):
    recipe = make_recipe(tmp_path, tiny_llama)
    adapted = adapt(recipe)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file in the way")
    with pytest.raises(EnvironmentProblem, match="could not be written") as caught:
        run_training(tmp_path / "run", recipe, examples, adapted=adapted)
    assert "--out" in caught.value.problems[0].fix


@pytest.mark.slow
def test_a_disk_that_fills_up_during_training_keeps_the_previous_checkpoint(tmp_path, tiny_llama, examples):
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces are not permitted here")
    make_recipe(tmp_path, tiny_llama, train={"save_steps": 2})
    shutil.copytree(examples.folder, tmp_path / "examples")
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", _fill_script(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode == 99:
        pytest.skip("tmpfs cannot be mounted here")
    assert "exit 4" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not be written: No space left on device" in done.stderr
    assert "MB are free. Make room" in done.stderr
    listing = done.stdout.partition("exit 4")[2].split()
    assert "step-4" in listing
    assert not [name for name in listing if name.startswith(".tmp")]
    assert isinstance(read_checkpoint(tmp_path / "kept"), Checkpoint)


def _fill_script(folder: Path) -> str:
    """Mount a small disk, fill it once step 4 is saved, check that the run fails, and keep the remaining files."""
    disk = folder / "disk"
    return f"""
export PYTHONPATH={Path(__file__).parents[1]} OMP_NUM_THREADS=1
mount -t tmpfs -o size=2m none {disk} || exit 99
{sys.executable} -m support.process {folder} {disk}/run --fill "step 5/" {disk}/ballast
echo exit $?
ls -A {disk}/run/checkpoints
cp -r {disk}/run/checkpoints/step-4 {folder}/kept
"""
