"""Kinds of teachers: quantised, adapted and sharded ones, and recordings by several processes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapting import quiet
from support.models import build_llama
from support.pairs import recipe_of
from support.runs import invoke
from support.task_cases import CHATS
from support.training import read_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from llmtune.errors import RecipeError
from llmtune.pipeline import run_pipeline
from llmtune.recipe.loader import load_recipe
from llmtune.store.run_request import RunRequest

TRAIN = {"max_steps": 2, "num_train_epochs": None}


def write(folder: Path, **sections: Any) -> Path:
    """Write a recipe for the model in `folder`, which is built once."""
    model = folder / "model"
    if not model.exists():
        build_llama(model)
    data = {"validation": 0.2, "test": 0.1, **sections.pop("data", {})}
    return recipe_of(folder, model, CHATS, "chat", **{"train": TRAIN, **sections, "data": data})


def train(recipe: Path) -> Path:
    run = recipe.parent / "run"
    run_pipeline(load_recipe(str(recipe)), RunRequest(out=run, until="train"), quiet())
    return run


def distil(folder: Path, teacher: Path) -> Path:
    return write(folder, distil={"teacher": str(teacher), "top_k": 7, "control": False})


def predictions(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the recorded log-probabilities by file."""
    files = sorted((run / "data" / "teacher").glob("*.npy"))
    return {path.name: np.load(path)["logs"].astype(np.float32) for path in files}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose teacher is a model folder."""
    folder = tmp_path_factory.mktemp("plain")
    return train(distil(folder, build_llama(folder / "teacher", seed=3)))


def test_a_run_with_an_adapter_on_quantised_weights_teaches(tmp_path):
    teachers = [train(write(tmp_path / name, adapter={"method": name, "r": 4})) for name in ("qlora", "lora")]
    taught, exact = (predictions(train(distil(one.parent / "student", one))) for one in teachers)
    assert taught.keys() == exact.keys()
    gaps = [abs(taught[name] - exact[name]).max() for name in taught]
    assert 0 < max(gaps) < 0.5  # of the same model in 4 bits


def test_a_model_that_is_saved_in_4_bits_teaches(tmp_path):
    whole = build_llama(tmp_path / "whole", seed=3)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(whole, quantization_config=settings)
    quantised.save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(whole).save_pretrained(tmp_path / "quantised")
    taught, exact = (predictions(train(distil(tmp_path / name, tmp_path / name))) for name in ("quantised", "whole"))
    gaps = [abs(taught[name] - exact[name]).max() for name in taught]
    assert 0 < max(gaps) < 0.5


def test_the_folder_of_an_adapter_is_refused_with_the_run_as_the_cure(tmp_path):
    teacher = train(write(tmp_path / "teacher"))
    with pytest.raises(RecipeError, match="is an adapter without its model") as caught:
        train(distil(tmp_path, teacher / "adapter"))
    problem = caught.value.problems[0]
    assert (caught.value.exit_code, problem.where) == (2, "distil.teacher")
    assert f"Name its run: {teacher}." == problem.fix
    alone = tmp_path / "alone"
    shutil.copytree(teacher / "adapter", alone)
    with pytest.raises(RecipeError, match="is an adapter without its model") as caught:
        train(distil(tmp_path / "other", alone))
    assert "merged" in (caught.value.problems[0].fix or "")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_record_and_learn_like_one(plain, tmp_path, monkeypatch, strategy):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    out, recipe = tmp_path / "two", plain.parent / "recipe.yaml"
    done = invoke("launch", "local", recipe, "--processes", 2, "--strategy", strategy, "--out", out)
    assert done.exit_code == 0, done.output
    losses = [[line["loss"] for line in read_metrics(run)] for run in (plain, out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = predictions(plain), predictions(out)
    assert one.keys() == two.keys()
    for name in one:
        if strategy == "ddp":
            np.testing.assert_array_equal(two[name], one[name])
        else:
            np.testing.assert_allclose(two[name], one[name], atol=2e-3)
    facts = json.loads((out / "run.json").read_text())["steps"]["train"]["facts"]
    assert (facts["processes"], facts["strategy"]) == (2, strategy)
