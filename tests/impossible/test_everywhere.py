"""Failures that must be impossible anywhere: each test provokes one without its guard, then sees it caught."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

TOKEN = "hf_" + "abcDEF0123456789" * 2


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.guarantee(
    21,
    cannot="a model repository's code that runs, or pickled weights that load, without permission",
    kept="Both are refused unless the recipe allows them (model.trust_remote_code, model.use_safetensors). If "
    "pickles are allowed, only tensors are read from them.",
    shows="error ...config.json: auto_map: the model needs code from its own folder: modeling_odd.Odd -> Read that "
    "code, and set model.trust_remote_code: true if you trust it, or choose another model.",
    also=["adapter/test_load.py::test_pickled_weights_are_refused_with_a_fix"],
)
def test_neither_model_code_nor_a_pickle_runs_without_permission(place, run, shows):
    config = json.loads((place / "model/config.json").read_text())
    custom = shutil.copytree(place / "model", place / "custom")
    (custom / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_odd.Odd"}})
    )
    (custom / "modeling_odd.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(SystemExit, match="this code ran"):
        AutoModelForCausalLM.from_pretrained(custom, trust_remote_code=True)
    shows(run("adapt", code=2, model={"name": "./custom"}))

    weights = place / "model/pytorch_model.bin"
    torch.save(load_file(place / "model/model.safetensors"), weights)
    (place / "model/model.safetensors").unlink()
    said = run("adapt", code=2, out="pickled")
    assert "pytorch_model.bin" in said
    assert "use_safetensors" in said
    torch.save({"a": Evil()}, weights)
    torch.load(weights, weights_only=False)
    (place / "ran").unlink()  # a pickle can run code
    assert "cannot be loaded" in run("adapt", code=4, out="allowed", model={"use_safetensors": False})
    assert not (place / "ran").exists()


@pytest.mark.guarantee(
    22,
    cannot="a secret in a log, lock or report",
    kept="Everything written for others to read is redacted: tokens, keys, and passwords in URLs, recognised by "
    "their form and by the names of their keys.",
    shows="the token is [removed]",
    also=[
        "test_pipeline.py::test_no_file_of_a_run_contains_a_secret_of_the_environment",
        "recipe/test_secrets.py::test_values_of_secret_keys_are_removed_at_any_depth",
    ],
)
def test_a_token_in_a_row_appears_in_no_report(place, run, without, shows):
    def leaking() -> set[str]:
        names = ("report.html", "report.md", "report.json", "junit.xml", "llmtune.lock", "recipe.yaml", "run.json")
        return {name for name in names if TOKEN in (place / "run" / name).read_text()}

    rows = (place / "rows.jsonl").read_text().replace("Which colour has", f"the token is {TOKEN} has")
    (place / "rows.jsonl").write_text(rows)
    with (
        without("llmtune.report.run_report.redact_all", lambda value, *known: value),
        without("llmtune.data.data_report.redact_all", lambda value, *known: value),
    ):
        assert TOKEN in run("run")
    assert leaking() == {"report.html", "report.md", "report.json", "run.json"}
    again = run("run", "--fresh")
    assert leaking() == set()
    assert TOKEN not in again
    shows((place / "run/report.md").read_text())


def read_rows(name: str):
    return load_dataset("json", data_files=name, cache_dir="cache")


def adapt(target: str):
    return get_peft_model(AutoModelForCausalLM.from_pretrained("./model"), LoraConfig(target_modules=[target]))


MISTAKES = {
    "a key": (
        {"train": {"learning_rat": 1e-3}},
        (TypeError, lambda: TrainingArguments(learning_rat=1e-3)),
        (2, "tiny.yaml:", "train.learning_rat", "learning_rate"),
    ),
    "a gate": (
        {"evaluate": {"gates": ["los <= 0.1"]}, "train": {"batch_size": 0}},
        (ValueError, lambda: TrainingArguments(metric_for_best_model="los", load_best_model_at_end=True)),
        (2, "tiny.yaml:", "los", "batch_size"),
    ),
    "a target": (
        {"adapter": {"target_modules": ["q_prj"]}},
        (ValueError, lambda: adapt("q_prj")),
        (2, "q_prj", "q_proj"),
    ),
    "no file": (
        {"data": {"train": "missing.jsonl"}},
        (FileNotFoundError, lambda: read_rows("missing.jsonl")),
        (3, "missing.jsonl"),
    ),
    "a torn row": (
        {"data": {"train": "bad.jsonl", "max_dropped": 0.0}},
        (DatasetGenerationError, lambda: read_rows("bad.jsonl")),
        (3, "bad.jsonl:20", "JSON"),
    ),
    "no model": (
        {"model": {"name": "./no-model"}},
        (OSError, lambda: AutoModelForCausalLM.from_pretrained("./no-model")),
        (4, "no-model"),
    ),
    "a cut model": (
        {"model": {"name": "./cut"}},
        (SafetensorError, lambda: AutoModelForCausalLM.from_pretrained("./cut")),
        (4, "model.safetensors", "cut"),
    ),
}
"""A recipe with a mistake, the libraries' reaction, and llmtune's exit code and message."""


@pytest.mark.guarantee(
    23,
    cannot="a traceback for a user's mistake",
    kept="Errors say what is wrong, where, and what to do; each kind has its exit code. Hostile files, models, "
    "templates and clients are refused quickly and in little memory.",
    shows="error tiny.yaml:... the gate 'los <= 0.1' uses an unknown metric -> Did you mean 'loss'? Computed metrics: "
    "loss, accuracy, exact_match, answers_cut. error tiny.yaml:... 'train.batch_size' is 0 -> It must be at least 1.",
    also=[
        "test_bad_input.py",
        "hostile/test_hostile_files.py",
        "hostile/test_hostile_rows.py",
        "hostile/test_hostile_models.py",
        "hostile/test_hostile_templates.py",
        "hostile/test_hostile_requests.py",
    ],
)
def test_a_mistake_is_reported_before_training(place, run, shows):
    lines = (place / "rows.jsonl").read_text().splitlines()
    (place / "bad.jsonl").write_text("\n".join([*lines[:19], lines[19][:30], *lines[20:]]))
    weights = shutil.copytree(place / "model", place / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    messages = {}
    for mistake, (sections, (exception, bare), (code, *words)) in MISTAKES.items():
        with pytest.raises(exception):
            bare()
        messages[mistake] = run("run", code=code, out=mistake, **sections)
        assert not [word for word in words if word not in messages[mistake]], messages[mistake]
        assert not (place / mistake / "checkpoints").exists()
    shows(messages["a gate"])
