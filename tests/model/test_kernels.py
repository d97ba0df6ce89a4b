"""Kernels that a recipe asks for and this machine cannot have are refused by name, with the cure."""

import importlib.util

import pytest
from support.adapting import open_model, recipe_with

from llmtune.errors import EnvironmentProblem
from llmtune.launch.python_api import names_remote
from llmtune.model.kernels import check_kernels
from llmtune.store.process_environment import refuse_network

HUB = "kernels-community/flash-attn2"


def lacking(folder, device, **sections):
    with pytest.raises(EnvironmentProblem) as caught:
        check_kernels(recipe_with(folder, **sections), device)
    return caught.value.problems


def without(monkeypatch, *absent):
    find = importlib.util.find_spec
    monkeypatch.setattr("llmtune.model.kernels.find_spec", lambda name: None if name in absent else find(name))


def test_a_recipe_without_kernels_lacks_nothing(tiny_llama, monkeypatch):
    without(monkeypatch, "kernels", "liger_kernel", "triton")
    check_kernels(recipe_with(tiny_llama), "cpu")
    check_kernels(recipe_with(tiny_llama), "cuda")


@pytest.mark.parametrize(
    ("device", "key", "fix"),
    [
        ("cpu", "use_liger_kernel", "Remove it."),
        ("cuda", "use_liger_kernel", "pip install liger-kernel, or remove it."),
        ("cuda", "torch_compile", "pip install triton, or remove it."),
    ],
)
def test_a_kernel_wants_a_gpu_and_its_package(tiny_llama, monkeypatch, device, key, fix):
    without(monkeypatch, "liger_kernel", "triton")
    (problem,) = lacking(tiny_llama, device, train={key: True})
    assert (problem.where, problem.fix) == (f"train.{key}", fix)


def test_compiling_on_a_cpu_wants_a_compiler(tiny_llama, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (problem,) = lacking(tiny_llama, "cpu", train={"torch_compile": True})
    assert problem.where == "train.torch_compile"
    assert "no-such-compiler" in problem.what
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    (problem,) = lacking(tiny_llama, "cpu", train={"torch_compile": True})
    assert "apt install g++" in problem.fix


def test_all_that_is_lacking_is_said_at_once(tiny_llama, monkeypatch):
    without(monkeypatch, "kernels")
    monkeypatch.setenv("CXX", "no-such-compiler")
    train = {"torch_compile": True, "use_liger_kernel": True}
    problems = lacking(tiny_llama, "cpu", train=train, model={"attn_implementation": HUB})
    assert [problem.where for problem in problems] == [
        *("train.torch_compile", "train.use_liger_kernel", "model.attn_implementation")
    ]


def test_a_kernel_of_the_hub_needs_the_network(tiny_llama):
    recipe = recipe_with(tiny_llama, model={"attn_implementation": HUB})
    assert names_remote(recipe)
    assert not names_remote(recipe_with(tiny_llama))
    refuse_network(recipe, offline=False)
    with pytest.raises(EnvironmentProblem) as caught:
        refuse_network(recipe, offline=True)
    assert caught.value.problems[0].where == "model.attn_implementation"
    assert HUB in caught.value.problems[0].what


def test_a_kernel_of_the_hub_that_cannot_be_had_is_an_error_that_names_it(tiny_llama, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EnvironmentProblem) as caught:
        open_model(recipe_with(tiny_llama, model={"attn_implementation": HUB}))
    (problem,) = caught.value.problems
    assert problem.where == "model.attn_implementation"
    assert HUB in problem.what
