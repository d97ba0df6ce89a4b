"""A sweep: its search, its refusals, resuming after a kill, and its claims."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from support.families import build_bert
from support.rows import chat, write_jsonl
from support.runs import invoke, llmtune, write_recipe

from llmtune.recipe.loader import load_recipe

optuna = pytest.importorskip("optuna")
SPACE = """
train.learning_rate: {low: 1.0e-4, high: 3.0e-2, log: true}
adapter.r: [2, 4, 8]
"""
COLOURS = ("red", "green", "blue", "black")


def write_noise(path: Path, seed: int, rows: int = 60) -> Path:
    """Questions with random answers: only the words can be learned."""
    draw = random.Random(seed)
    return write_jsonl(
        path, [chat(f"Which colour has number {i * 7 + seed}?", draw.choice(COLOURS)) for i in range(rows)]
    )


def write_sweep(model: Path, seed: int = 1) -> Path:
    rows = write_noise(Path("rows.jsonl"), seed)
    Path("space.yaml").write_text(SPACE)
    data = {"validation": 0.2, "test": 0.3, "deduplicate": "none"}
    train = {"num_train_epochs": 2, "batch_size": 8}
    return write_recipe(
        Path("recipe.yaml"), model, rows, data=data, train=train, seed=seed, evaluate={"metrics": ["loss"]}
    )


def run_sweep(out: str, trials: int = 5, **more: object) -> dict[str, object]:
    from llmtune.compare.sweep import run_sweep
    from llmtune.compare.sweep_trial import SweepOptions

    quiet = Console(quiet=True)
    return run_sweep("recipe.yaml", SweepOptions(Path("space.yaml"), trials, out=Path(out), **more), quiet, quiet)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_sweep_killed_in_a_trial_ends_like_an_uninterrupted_one(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    write_sweep(tiny_llama)
    whole = run_sweep("whole", 7)
    report, calls = optuna.trial.Trial.report, []

    def killed(self: object, value: float, step: int) -> None:
        calls.append(step)
        if len(calls) in (3, 8):
            raise KeyboardInterrupt
        report(self, value, step)

    monkeypatch.setattr(optuna.trial.Trial, "report", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_sweep("stopped", 7)
    stopped = run_sweep("stopped", 7)
    assert stopped == whole
    assert len({json.dumps(one["values"]) for one in whole["trials"]}) == 7
    best = load_recipe("stopped/best.yaml").recipe
    values = whole["values"]
    assert best.train.learning_rate == values.get("train.learning_rate", 0.01)
    assert best.adapter.r == values.get("adapter.r", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_sweep_killed_with_all_its_processes_ends_like_an_uninterrupted_one(tiny_llama: Path):
    """SIGKILL to the process group, twice, each time in the middle of two trials that train in parallel."""
    write_sweep(tiny_llama)
    words = ("sweep", "recipe.yaml", "--space", "space.yaml", "--trials", "5", "--processes", "2", "--json")
    whole = llmtune(*words, "--out", "whole", cwd=Path.cwd())
    assert whole.returncode == 0, whole.stderr
    killed = 0
    for number in (2, 4):
        metrics = Path(f"killed/trials/{number:03d}/metrics.jsonl")
        process = subprocess.Popen(
            [sys.executable, "-m", "llmtune", *words, "--out", "killed"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed == 2, "no trial was under way when it was killed"
    again = llmtune(*words, "--out", "killed", cwd=Path.cwd())
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(whole.stdout)
    best = [Path(f"{name}/best.yaml").read_text() for name in ("whole", "killed")]
    assert best[0] == best[1].replace("killed/", "whole/")


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_parallel_trials_form_a_round_and_the_test_rows_are_read_only_at_the_end(tiny_llama: Path):
    write_sweep(tiny_llama)
    done = invoke(
        "sweep", "recipe.yaml", "--space", "space.yaml", "--trials", 3, "--processes", 2, "--out", "out", "--json"
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["number"] for one in found["trials"]] == [0, 1, 2]
    measured = {path.parent.name for path in Path("out/trials").glob("*/evaluation")}
    assert measured == {"000", f"{found['winner']:03d}"}
    assert "Trials saw only training and validation rows" in Path("out/sweep.html").read_text()


@pytest.mark.usefixtures("here")
def test_an_invalid_space_is_refused_with_all_its_problems(tiny_llama: Path):
    write_sweep(tiny_llama)
    bad = [
        "data.max_length: [64, 128]",
        "train.learning_rat: [1.0, 2.0]",
        "adapter.r: [4, 0]",
        "train.max_grad_norm: {low: 2, high: 1}",
        "train.learning_rate: {low: 0.1, high: 0.2, step: x}",
        "train.warmup_steps: {low: 1, high: 8, step: 0}",
        "adapter.lora_alpha: {low: 8, high: 16, step: [2.5]}",
        "adapter.lora_dropout: {low: 0.1, high: 0.2, step: .nan}",
        "train.weight_decay: {low: 0.1, high: 0.2, log: maybe}",
    ]
    Path("space.yaml").write_text("\n".join(bad))
    done = invoke("sweep", "recipe.yaml", "--space", "space.yaml")
    assert done.exit_code == 2
    for words in (
        "'data.max_length' cannot be searched",
        "Did you mean 'train.learning_rate'?",
        "'adapter.r' is 0",
        "goes from 2 to 1",
        "'train.learning_rate' cannot have the step x",
        "'train.warmup_steps' cannot have the step 0",
        "cannot have the step [2.5]",
        "'adapter.lora_dropout' cannot have the step .nan",
        "'train.weight_decay' cannot have the log maybe",
    ):
        assert words in done.stderr


@pytest.mark.usefixtures("here")
def test_a_recipe_without_rows_to_rank_by_or_to_measure_on_is_refused(tiny_llama: Path):
    write_sweep(tiny_llama)
    for key, words in (("data.validation", "a sweep needs data.validation"), ("data.test", "without test rows")):
        done = invoke("sweep", "recipe.yaml", "--space", "space.yaml", "--set", f"{key}=0")
        assert (done.exit_code, words in done.stderr) == (2, True)
    Path("other").mkdir()
    Path("other/file").write_text("")
    done = invoke("sweep", "recipe.yaml", "--space", "space.yaml", "--out", "other")
    assert (done.exit_code, "not a sweep" in done.stderr) == (2, True)


@pytest.mark.slow
def test_of_forty_sweeps_without_anything_to_learn_at_most_two_claim_a_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder, words = build_bert(tmp_path / "model"), []
    for seed in range(40):
        (folder := tmp_path / str(seed)).mkdir()
        monkeypatch.chdir(folder)
        draw = random.Random(seed)
        texts = [f"order {i * 7 + seed} of {draw.choice('abcdef')}" for i in range(80)]
        labels = [draw.choice(("late", "lost", "paid")) for _ in texts]
        lines = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
        Path("space.yaml").write_text(
            "train.learning_rate: {low: 1.0e-5, high: 1.0e-2, log: true}\n"
            "adapter.r: [2, 4, 8]\ntrain.weight_decay: {low: 0.0, high: 0.2}\n"
        )
        write_recipe(
            Path("recipe.yaml"),
            encoder,
            write_jsonl(Path("rows.jsonl"), lines),
            task="classify",
            data={"validation": 0.2, "test": 0.3, "deduplicate": "none"},
            train={"num_train_epochs": 2, "batch_size": 8, "learning_rate": 1e-3},
            evaluate={"metrics": ["loss", "accuracy"]},
            generation=None,
            seed=seed,
        )
        words.append(run_sweep("out", 6)["word"])
    assert words.count("better") <= 2


@pytest.mark.usefixtures("here")
def test_embedding_models_are_ranked_by_validation_loss_and_judged_by_their_first_metric(tmp_path: Path):
    pairs = [{"query": f"number {i}", "passage": f"The {COLOURS[i % 4]} cat number {i}."} for i in range(60)]
    rows = write_jsonl(tmp_path / "rows.jsonl", pairs)
    sections = {"task": "embed", "generation": {"max_new_tokens": None}, "evaluate": {"metrics": ["recall@1", "map"]}}
    train = {"num_train_epochs": None, "max_steps": 2}
    write_recipe(Path("recipe.yaml"), build_bert(tmp_path / "model"), rows, data={}, train=train, **sections)
    Path("space.yaml").write_text("train.learning_rate: [1.0e-5, 1.0e-2]")
    found = run_sweep("out", 3)
    losses = [trial["validation_loss"] for trial in found["trials"]]
    assert losses[found["winner"]] == min(losses)
    assert (found["test_gain"], found["luck"]) == (None, None)
    assert found["winner"] == 0 or f"{found['difference']['recall@1']['n']} test rows recall@1" in found["summary"]
    Path("space.yaml").write_text("train.batch_size: [8, 16]")
    done = invoke("sweep", "recipe.yaml", "--space", "space.yaml")
    assert (done.exit_code, "'train.batch_size' cannot be searched" in done.stderr) == (2, True)
