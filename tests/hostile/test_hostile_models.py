"""Damaged or malicious model folders, adapters and checkpoints are refused by name, in time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.torch import load_file, save_file
from support.hostile import attempt
from support.runs import write_colours, write_recipe

from llmtune.adapter import load

DEEP = '{"a":' * 1000 + "1" + "}" * 1000
Damage = Callable[[Path], object]


def write(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def state(name: str, **values: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def header(**values: object) -> Damage:
    """Change one tensor's entry in the header of the weights."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + size])
        entries["model.norm.weight"] |= values
        changed = json.dumps(entries).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])

    return damage


def weights(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = {key: change(value).contiguous() for key, value in load_file(folder / name).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return damage


MODELS = {
    "no heads": (state("config.json", num_attention_heads=0), "config.json: transformers"),
    "negative vocabulary": (state("config.json", vocab_size=-5), "vocab_size is -5"),
    "a million layers": (state("config.json", num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "unknown activation": (state("config.json", hidden_act="nope"), "nope"),
    "unknown rope": (state("config.json", rope_parameters={"rope_type": "nope", "rope_theta": 1}), "nope"),
    "numbers for names": (state("config.json", architectures=5), "architectures is 5"),
    "odd heads": (state("config.json", num_key_value_heads=3), "the weights cannot be loaded"),
    "text for a number": (state("config.json", rms_norm_eps="x"), "rms_norm_eps"),
    "quantised": (state("config.json", quantization_config={"quant_method": "bitsandbytes"}), "already quantised"),
    "ends that are no ids": (state("generation_config.json", eos_token_id=["x"]), "eos_token_id is"),
    "length that is text": (state("tokenizer_config.json", model_max_length="x"), "model_max_length is 'x'"),
    "class that is a number": (state("tokenizer_config.json", tokenizer_class=5), "tokenizer cannot be loaded"),
    "deep config": (write("config.json", DEEP), "nested too deep"),
    "deep tokenizer": (write("tokenizer.json", DEEP), "nested too deep"),
    "deep generation config": (write("generation_config.json", DEEP), "nested too deep"),
    "cut tokenizer": (write("tokenizer.json", '{"a":'), "not valid JSON"),
    "config pipe": (pipe("config.json"), "a pipe, not a regular file"),
    "tokenizer pipe": (pipe("tokenizer.json"), "a pipe, not a regular file"),
    "weights pipe": (pipe("model.safetensors"), "a pipe, not a regular file"),
    "overlapping tensors": (header(data_offsets=[0, 256]), "is damaged or truncated"),
    "wrong shape": (header(shape=[65]), "is damaged or truncated"),
    "huge shape": (header(shape=[2**62, 2**62]), "is damaged or truncated"),
    "unknown format": (header(dtype="F99"), "is damaged or truncated"),
    "backward offsets": (header(data_offsets=[5, 2]), "is damaged or truncated"),
    "deep header": (write("model.safetensors", (9000).to_bytes(8, "little") + b"[" * 9000), "is damaged or truncated"),
    "NaN weights": (weights("model.safetensors", lambda weight: weight * float("nan")), "NaN or infinite"),
    "zero weights": (weights("model.safetensors", lambda weight: weight * 0), "the model computes nothing"),
    "huge weights": (weights("model.safetensors", lambda weight: weight * 1e30), "the model computes nothing"),
}


def cases(kinds: Iterable[str], brief: Sequence[str]) -> list[ParameterSet]:
    """Return all kinds of damage; all but the `brief` ones belong to the slow suite."""
    return [pytest.param(kind, marks=() if kind in brief else pytest.mark.slow) for kind in kinds]


BRIEF_MODELS = ("no heads", "a million layers", "quantised", "deep tokenizer", "weights pipe", "overlapping tensors")


@pytest.mark.parametrize("kind", cases(MODELS, (*BRIEF_MODELS, "NaN weights", "zero weights")))
def test_a_damaged_model_is_refused_by_name(here: Path, tiny_llama: Path, chat_rows: Path, kind: str) -> None:
    damage, words = MODELS[kind]
    damage(shutil.copytree(tiny_llama, here / "model"))
    write_recipe(here / "recipe.yaml", here / "model", chat_rows)
    assert words in attempt("adapt", "recipe.yaml", "--out", "run", code=(2, 4))


REMOTE = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_does_not_run_without_permission(
    here: Path, tiny_llama: Path, chat_rows: Path, name: str
) -> None:
    model = shutil.copytree(tiny_llama, here / "model")
    (model / "own.py").write_text("open('ran', 'w')\n")
    state(name, auto_map=REMOTE, **({"model_type": "own"} if name == "config.json" else {}))(model)
    write_recipe(here / "recipe.yaml", model, chat_rows)
    assert "trust_remote_code" in attempt("adapt", "recipe.yaml", "--out", "run", code=2)
    assert not (here / "ran").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    rows = write_colours(folder / "rows.jsonl")
    train = {"num_train_epochs": 1, "save_steps": 2}
    write_recipe(folder / "recipe.yaml", tiny_llama, rows, train=train, evaluate={"metrics": ["loss"]})
    attempt("evaluate", folder / "recipe.yaml", "--out", folder / "run", code=0, seconds=60)
    return folder


CONFIG = "adapter_config.json"
ADAPTERS = {
    "text for the rank": (state(CONFIG, r="eight"), "r is 'eight'"),
    "a rank without end": (state(CONFIG, r=10**9), "r is 1000000000"),
    "no alpha": (state(CONFIG, lora_alpha=None), "lora_alpha is None"),
    "alpha of zero": (state(CONFIG, lora_alpha=0), "lora_alpha is 0"),
    "bad expression": (state(CONFIG, target_modules="((("), "cannot be matched"),
    "exploding expression": (state(CONFIG, target_modules="([a-z_.0-9]+)+!"), "it took more than"),
    "bad pattern": (state(CONFIG, rank_pattern={"((": 4}), "cannot be matched"),
    "number for a pattern": (state(CONFIG, alpha_pattern=5), "alpha_pattern is 5"),
    "another kind": (state(CONFIG, peft_type="NOPE"), "cannot be read"),
    "deep": (write(CONFIG, DEEP), "nested too deeply"),
    "weights pipe": (pipe("adapter_model.safetensors"), "a pipe, not a regular file"),
    "NaN weights": (weights("adapter_model.safetensors", lambda weight: weight * float("nan")), "not finite numbers"),
    "whole numbers": (weights("adapter_model.safetensors", lambda weight: weight.int()), "not finite numbers"),
}


def go_on(trained: Path, tiny_llama: Path, code: int) -> str:
    rows, own = trained / "rows.jsonl", {"start_from": "adapter", "r": None, "lora_alpha": None}
    write_recipe(Path("recipe.yaml"), tiny_llama, rows, adapter=own)
    return attempt("adapt", "recipe.yaml", "--out", "run", code=code)


BRIEF_ADAPTERS = ("text for the rank", "exploding expression", "deep", "NaN weights")


@pytest.mark.parametrize("kind", cases(ADAPTERS, BRIEF_ADAPTERS))
def test_training_does_not_start_from_a_damaged_adapter(
    here: Path, tiny_llama: Path, trained: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "PATTERN_SECONDS", 0.3)
    damage, words = ADAPTERS[kind]
    damage(shutil.copytree(trained / "run" / "adapter", here / "adapter"))
    assert words in go_on(trained, tiny_llama, 4)


def test_the_name_of_a_base_may_look_like_markup(here: Path, tiny_llama: Path, trained: Path) -> None:
    adapter = shutil.copytree(trained / "run" / "adapter", here / "adapter")
    state(CONFIG, base_model_name_or_path="[/bold]\x1b[31m")(adapter)
    assert "was trained on [/bold]\\x1b[31m" in go_on(trained, tiny_llama, 0)


@pytest.mark.parametrize(
    "values", [{"budget": 0}, {"step": -5}, {"tokens": "x"}, {"stopped_early": 5}, {"best_step": 9}]
)
def test_a_checkpoint_whose_state_was_edited_is_not_used(here: Path, trained: Path, values: dict[str, object]) -> None:
    run = shutil.copytree(trained / "run", here / "run")
    manifest = json.loads((run / "run.json").read_text())
    manifest["steps"]["train"]["state"] = "running"
    (run / "run.json").write_text(json.dumps(manifest))
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for path in (run / "checkpoints").glob("step-*/state.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"state": content["state"] | values}))
    assert "state.json was changed" in attempt("train", trained / "recipe.yaml", "--out", run, code=0)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_truncated_metrics_line_loses_only_that_line(here: Path, trained: Path) -> None:
    run = shutil.copytree(trained / "run", here / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    attempt("evaluate", trained / "recipe.yaml", "--out", run, code=0)
    attempt("evaluate", run, code=0)
