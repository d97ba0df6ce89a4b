"""A model sharded over processes (FSDP2) learns the same as in one process, and resumes with any number of them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from support.adapting import build_family, quiet
from support.models import build_llama
from support.runs import invoke, llmtune, write_recipe
from support.training import (
    METHODS,
    TRAIN,
    assert_same,
    launch_work,
    leave_step_4,
    make_recipe,
    read_metrics,
    run_training,
    train_together,
    write_examples,
)

from llmtune.errors import EnvironmentProblem
from llmtune.launch.topology import Topology

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "processes", "strategy"),
    [
        ("lora", 2, "fsdp"),
        pytest.param("full", 2, "fsdp", marks=SLOW),
        pytest.param("added", 2, "fsdp", marks=SLOW),
        pytest.param("qlora", 2, "fsdp", marks=SLOW),
        pytest.param("qlora, plain scales", 3, "fsdp", marks=SLOW),
        pytest.param("qlora, dora", 2, "fsdp", marks=SLOW),
        pytest.param("lora", 4, "fsdp", marks=SLOW),
        pytest.param("full", 4, "fsdp", marks=SLOW),
        pytest.param("lora", 4, "ddp", marks=SLOW),
        pytest.param("full", 4, "ddp", marks=SLOW),
    ],
)
def test_a_sharded_model_learns_the_same_as_an_unsharded_one(
    method, processes, strategy, tmp_path, tiny_llama, console
):
    examples = write_examples(tmp_path / "examples", train=61, validation=7)
    recipe = make_recipe(tmp_path, tiny_llama, train=TRAIN | {"gradient_checkpointing": True}, adapter=METHODS[method])
    together = train_together(tmp_path, "together", processes, strategy, console)
    run_training(tmp_path / "alone", recipe, examples)
    assert_same(tmp_path / "alone", together)
    result = "weights" if method == "full" else "adapter"
    alone, files = ({path.name for path in (run / result).iterdir()} for run in (tmp_path / "alone", together))
    assert files == alone
    for name in alone - {"adapter_model.safetensors", "model.safetensors"}:
        assert (together / result / name).read_bytes() == (tmp_path / "alone" / result / name).read_bytes()
    if method != "full":
        AutoPeftModelForCausalLM.from_pretrained(together / "adapter")


@pytest.mark.parametrize(
    ("method", "first", "then"),
    [
        pytest.param("lora", (2, "fsdp"), (1, "ddp"), marks=SLOW),
        pytest.param("lora", (4, "fsdp"), (2, "fsdp"), marks=SLOW),
        pytest.param("lora", (4, "fsdp"), (1, "ddp"), marks=SLOW),
        pytest.param("qlora", (4, "fsdp"), (2, "fsdp"), marks=SLOW),
        pytest.param("qlora", (4, "fsdp"), (1, "ddp"), marks=SLOW),
        pytest.param("qlora", (1, "ddp"), (2, "fsdp"), marks=SLOW),
        pytest.param("full", (4, "fsdp"), (2, "fsdp"), marks=SLOW),
        pytest.param("full", (4, "fsdp"), (1, "ddp"), marks=SLOW),
        pytest.param("full", (4, "fsdp"), (2, "ddp"), marks=SLOW),
        pytest.param("full", (1, "ddp"), (4, "fsdp"), marks=SLOW),
        pytest.param("lora", (2, "ddp"), (2, "fsdp"), marks=SLOW),
    ],
)
def test_a_checkpoint_resumes_with_another_number_of_processes(method, first, then, tmp_path, tiny_llama, console):
    examples = write_examples(tmp_path / "examples", train=61, validation=7)
    recipe = make_recipe(tmp_path, tiny_llama, train=TRAIN, adapter=METHODS[method])
    run_training(tmp_path / "alone", recipe, examples)
    run = train_together(tmp_path, "run", *first, console)
    leave_step_4(run)
    content = json.loads((run / "checkpoints" / "step-4" / "state.json").read_text())
    assert any("shards/" in name for name in content["files"]) == (first[1] != "ddp")
    train_together(tmp_path, "run", *then, console)
    assert_same(tmp_path / "alone", run)


@SLOW
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("processes", "tied"), [(3, True), (2, False)])
def test_one_process_reads_the_model_and_the_others_receive_their_shards(method, processes, tied, tmp_path, console):
    make_recipe(tmp_path, build_llama(tmp_path / "model", tie_word_embeddings=tied), adapter=METHODS[method])
    found = launch_work("share_tiny", [tmp_path], Topology(processes, "fsdp"), console, processes)
    assert found == dict.fromkeys(("numbers", "without", "tied", "buffers", "cut"), True)


LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8}


@SLOW
def test_two_processes_need_little_more_than_half_of_one_processs_memory_to_train_and_evaluate(
    tmp_path, chat_rows, console
):
    model = build_llama(tmp_path / "model", **WIDE)
    full = {"adapter": {"method": "full", "r": None, "lora_alpha": None}}
    short = {"train": {"max_steps": 2, "num_train_epochs": None}, "generation": {"max_new_tokens": 4}}
    recipe, peaks = write_recipe(tmp_path / "tiny.yaml", model, chat_rows, **full, **short), {}
    for processes in (1, 2):
        for until in ("train", "evaluate"):
            words = [recipe, tmp_path / f"run-{processes}", until]
            peaks[processes, until] = launch_work("measure_pipeline", words, Topology(processes, "fsdp"), console, 2)
    (alone, _), *_ = peaks[1, "train"]
    assert all(peak < 0.6 * alone for until in ("train", "evaluate") for peak, _ in peaks[2, until]), peaks


@SLOW
@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_has_a_part_of_4_bit_weights_and_experts(processes, tmp_path, console):
    config = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    model = build_family(tmp_path / "model", "qwen3_moe", **config)
    experts = {"method": "qlora", "target_parameters": ["gate_up_proj", "down_proj"]}
    make_recipe(tmp_path, model, train=TRAIN, adapter=experts)
    write_examples(tmp_path / "examples", train=16)
    found = launch_work("shard_packed", [tmp_path], Topology(processes, "fsdp"), console, processes)
    assert found == {"storage": ["float32"], "uncut": [], "loss": True, "share": True}


@SLOW
@pytest.mark.parametrize("method", ["lora", "full"])
def test_memory_per_process_falls_with_the_number_of_processes(method, tmp_path, console):
    peaks = {}
    for size in ({}, LARGE):
        folder = tmp_path / f"of-{len(size)}"
        folder.mkdir()
        make_recipe(folder, build_llama(folder / "model", **size), train={"max_steps": 2}, adapter=METHODS[method])
        write_examples(folder / "examples", train=16)
        for processes in (1, 4):
            words = [folder, folder / f"run-{processes}", "fsdp"]
            found = launch_work("measure_training", words, Topology(processes, "fsdp"), console, 4)
            peaks[processes] = [
                peak - before for peak, before in zip(found, peaks.get(processes, [0] * 4), strict=False)
            ]
    (alone,), (first, *others) = peaks[1], peaks[4]  # the memory of the larger model minus that of the tiny one
    assert max(others) < (0.7 if method == "lora" else 0.5) * alone, peaks  # a layer is unsharded while it computes
    assert first < alone * (1.1 if method == "lora" else 0.6), peaks  # it has held the full model


WATCHED = {
    "eval_metrics": ["accuracy", "chrf"],
    "metric_for_best_model": "accuracy",
    "early_stopping_patience": 1,
    "eval_steps": 1,
    "num_train_epochs": 3,
}


@SLOW
def test_metrics_of_validation_rows_decide_under_fsdp_as_in_one_process(here, tiny_llama, chat_rows):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows, train=WATCHED)
    for command in (["run"], ["launch", "local", "--processes", 2, "--strategy", "fsdp"]):
        done = llmtune(*command, "tiny.yaml", "--out", command[0], cwd=here)
        assert done.returncode == 0, done.stderr
    lines = [[line for line in read_metrics(here / name) if "validation_loss" in line] for name in ("run", "launch")]
    for alone, together in zip(*lines, strict=True):
        assert together["validation_metrics"] == pytest.approx(alone["validation_metrics"], rel=1e-5)
        assert together["validation_loss"] == pytest.approx(alone["validation_loss"], rel=1e-4)
    alone, together = (json.loads((here / name / "report.json").read_text())["train"] for name in ("run", "launch"))
    for name in ("best_step", "steps", "stopped_early"):
        assert together[name] == alone[name]
    assert alone["stopped_early"]


@SLOW
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_process_killed_while_it_evaluates_or_saves_leaves_the_same_bytes(method, tmp_path, tiny_llama, chat_rows):
    sections = {"train": {"num_train_epochs": 1}, "generation": {"max_new_tokens": 16}}
    adapter = {"method": "full", "r": None, "lora_alpha": None} if method == "full" else {}
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_llama, chat_rows, adapter=adapter, **sections)
    result = "weights" if method == "full" else "adapter"
    topology, files = Topology(2, "fsdp"), []
    for number, (rank, *moment) in enumerate(
        [
            (None,),
            (1, "line", "tuned: loss"),
            (0, "line", "tuned: answers"),
            (1, "open", "step-4/shard-00002-model-00001-of-00001.safetensors"),
            (0, "os.rename", f".{result}.new"),
        ]
    ):
        words = [recipe, tmp_path / f"run-{number}", rank, *(moment or ("line", "never"))]
        if rank is not None:
            with pytest.raises(EnvironmentProblem, match=f"process {rank} was killed by SIGKILL"):
                launch_work("run_and_die", words, topology, quiet(), 2)
        launch_work("run_and_die", [*words[:2], None, "line", "never"], topology, quiet(), 2)
        kept = [path for part in (result, "evaluation") for path in (tmp_path / f"run-{number}" / part).iterdir()]
        files.append({path.name: path.read_bytes() for path in kept})
        assert files[-1] == files[0], moment


@SLOW
def test_an_error_in_the_first_process_ends_the_others(here, tiny_llama, chat_rows):
    model = Path(shutil.copytree(tiny_llama, here / "model"))
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    write_recipe(here / "tiny.yaml", model, chat_rows)
    found = llmtune("launch", "local", "tiny.yaml", "--processes", 2, "--strategy", "fsdp", cwd=here)
    assert found.returncode == 4, found.stderr
    assert "NaN or infinite" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_dry_run_plans_the_memory_of_one_process(here, tiny_llama, chat_rows):
    write_recipe(here / "tiny.yaml", tiny_llama, chat_rows)
    plans = []
    for options in ([], ["--processes", 2, "--machines", 2, "--address", "a:1", "--strategy", "fsdp"]):
        found = invoke("launch", "local", "tiny.yaml", "--dry-run", "--json", *options)
        assert found.exit_code == 0, found.stderr
        plans.extend(json.loads(found.stdout)["plan"]["plans"].values())
    alone, part = plans
    assert "cpu, each of 4 processes" in found.stderr
    assert part["processes"] == 4
    assert part["limit"] == alone["limit"] // 2
    for name in ("weights", "adapter", "gradients", "optimizer"):
        assert part["parts"][name] == alone["parts"][name] // 4
    assert part["parts"]["gathered"] > 0


OSF, VECTORS, BANK, FULL = (
    {"method": name, "r": None, "lora_alpha": None} for name in ("osf", "prompt_tuning", "vblora", "full")
)


@pytest.mark.parametrize(
    ("options", "sections", "words"),
    [
        (["--strategy", "fdsp"], {}, ["Did you mean 'fsdp'?"]),
        (["--strategy", "cp"], {}, ["'cp'", "ring attention", "fsdp"]),
        (["--strategy", "fsdp"], {"adapter": OSF}, ["adapter.method", "full weights", "--strategy ddp with osf"]),
        (["--strategy", "fsdp"], {"adapter": VECTORS}, ["adapter.method", "full weights"]),
        (["--strategy", "fsdp"], {"adapter": BANK}, ["adapter.method", "shared by layers"]),
        (["--strategy", "fsdp"], {"train": {"optim": "paged_adamw_8bit"}}, ["train.optim", "Omit `paged_`"]),
        (["--strategy", "fsdp"], {"train": {"optim": "galore_adamw"}, "adapter": FULL}, ["train.optim", "projections"]),
        (["--processes", "2", "--fsdp-offload-params"], {}, ["--fsdp-offload-params", "no model is sharded"]),
        (["--strategy", "fsdp", "--fsdp-offload-params"], {}, ["--fsdp-offload-params", "--processes 2"]),
        (["--machines", "2"], {}, ["--address", "HOST:PORT"]),
        (["--machines", "2", "--address", "here"], {}, ["'here' is not HOST:PORT"]),
        (["--machines", "2", "--rank", "2", "--address", "a:1"], {}, ["--rank", "from 0 to 1"]),
        (["--address", "a:1"], {}, ["--address", "no effect"]),
    ],
)
def test_invalid_options_are_refused_before_anything_is_loaded(here, options, sections, words, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llmtune.pipeline", None)  # importing it would be an error
    (here / "rows.csv").write_text("question,answer\nWhere is my parcel?,On its way.\n")
    write_recipe(here / "tiny.yaml", "owner/model", "rows.csv", **sections)
    found = invoke("launch", "local", "tiny.yaml", *options)
    assert found.exit_code == 2, found.stderr
    for word in words:
        assert word in found.stderr.replace("\n    ", " "), found.stderr
