"""Continuing an adapter: the same model as where it stopped, and no silent mismatch with the recipe."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.adapting import logits, open_model, quiet, recipe_with, train_a_little

from llmtune.adapter.injection import inject, trained_parameters
from llmtune.adapter.load import find_adapter
from llmtune.adapter.saving import save_adapter
from llmtune.errors import EnvironmentProblem, RecipeError

PARTS = {"target_parameters": ["q_proj.weight"]}


@pytest.fixture
def run(tiny_llama, tmp_path) -> tuple[Path, torch.Tensor]:
    adapted = train_a_little(tiny_llama, target_modules=["q_proj", "v_proj"])
    save_adapter(adapted, tmp_path / "run" / "adapter")
    return tmp_path / "run", logits(adapted.model)


def go_on(model: Path, console=None, **adapter):
    recipe = recipe_with(model, adapter=adapter)
    return inject(open_model(recipe), recipe, console or quiet())


@pytest.mark.parametrize("inner", ["", "adapter"])
def test_training_continues_where_the_adapter_stopped(tiny_llama, run, inner):
    folder, wanted = run
    adapted = go_on(tiny_llama, start_from=str(folder / inner))
    torch.testing.assert_close(logits(adapted.model), wanted)
    assert len(trained_parameters(adapted.model)) == 8
    assert adapted.method == "lora"


def test_every_mismatch_is_reported_at_once(tiny_llama, run):
    with pytest.raises(RecipeError) as caught:
        go_on(tiny_llama, start_from=str(run[0]), r=4, lora_alpha=1, use_dora=True, init_lora_weights="pissa", **PARTS)
    assert [problem.where for problem in caught.value.problems] == [
        "adapter.r",
        "adapter.lora_alpha",
        "adapter.use_dora",
        "adapter.target_parameters",
        "adapter.init_lora_weights",
    ]
    assert "Set it to 8 or omit it" in caught.value.problems[0].fix


def test_the_same_targets_may_be_stated_and_others_are_a_mismatch(tiny_llama, run):
    go_on(tiny_llama, start_from=str(run[0]), r=8, target_modules=["v_proj", "q_proj"], lora_dropout=0.1)
    with pytest.raises(RecipeError, match=r"matches 14 modules, but the adapter in .* has 4"):
        go_on(tiny_llama, start_from=str(run[0]), target_modules="all-linear")


def test_a_converted_pissa_adapter_continues_as_plain_lora(tiny_llama, tmp_path):
    first = train_a_little(tiny_llama, init_lora_weights="pissa")
    save_adapter(first, tmp_path / "a")
    second = go_on(tiny_llama, start_from=str(tmp_path / "a"))
    torch.testing.assert_close(logits(second.model), logits(first.model), atol=2e-5, rtol=0)
    save_adapter(second, tmp_path / "b")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()


def test_an_adapter_of_another_method_is_not_trained_further(tiny_llama, tmp_path):
    recipe = recipe_with(tiny_llama, adapter={"method": "ia3"})
    save_adapter(inject(open_model(recipe), recipe, quiet()), tmp_path)
    with pytest.raises(RecipeError, match="is of type ia3, but only LoRA adapters can be trained further"):
        go_on(tiny_llama, start_from=str(tmp_path))


def test_another_base_is_reported(tiny_llama, run, tmp_path, console):
    other = shutil.copytree(tiny_llama, tmp_path / "other-base")
    go_on(Path(other), console, start_from=str(run[0]))
    assert "was trained on" in console.file.getvalue()


def test_a_run_that_trained_all_weights_is_reported_with_a_fix(tiny_llama, tmp_path):
    save_adapter(train_a_little(tiny_llama, method="full"), tmp_path / "weights")
    with pytest.raises(EnvironmentProblem, match=r"Set model\.name to"):
        go_on(tiny_llama, start_from=str(tmp_path))


def test_pickled_weights_are_refused_with_a_fix(run):
    place = run[0] / "adapter"
    weights = load_file(place / "adapter_model.safetensors")
    torch.save(weights, place / "adapter_model.bin")
    assert find_adapter(run[0]) == place  # the safetensors are taken
    content = (place / "adapter_model.safetensors").read_bytes()
    (place / "adapter_model.safetensors").write_bytes(content[:-100])
    with pytest.raises(EnvironmentProblem, match="truncated"):
        find_adapter(run[0])
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"pickled .*\n.*save_pretrained"):
        find_adapter(run[0])
    (place / "adapter_model.bin").unlink()
    with pytest.raises(EnvironmentProblem, match=r"no adapter_model\.safetensors"):
        find_adapter(place)
