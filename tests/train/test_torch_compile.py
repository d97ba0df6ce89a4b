"""Compiled layers: the same training except for the last digits, resumable, and never silently uncompiled."""

import io
import shutil

import pytest
import torch
from rich.console import Console
from support.training import adapt, make_recipe, read_metrics, run_training, trained_bytes

from llmtune.errors import EnvironmentProblem, RecipeError
from llmtune.train.torch_compile import check_compiled, compile_parts

pytestmark = [  # warnings of the compiler itself, visible only because warnings are errors here
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
TRAIN = {"max_steps": 6, "save_steps": 3, "logging_steps": 1}


def compiled(tmp_path, model, **adapter):
    return make_recipe(tmp_path, model, adapter=adapter, train={**TRAIN, "torch_compile": True})


@pytest.mark.slow
def test_compiled_training_matches_plain_losses_and_prints_the_compile_time(tmp_path, tiny_llama, examples):
    console = Console(file=io.StringIO(), width=200)
    recipe = compiled(tmp_path, tiny_llama, lora_dropout=0.1)
    run_training(tmp_path / "compiled", recipe, examples, console=console)
    run_training(
        tmp_path / "plain", make_recipe(tmp_path, tiny_llama, adapter={"lora_dropout": 0.1}, train=TRAIN), examples
    )
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("compiled", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert "6 parts of the model's layers will be compiled" in console.file.getvalue()  # of 2 layers
    assert "Compiled: " in console.file.getvalue()


def test_rows_of_many_lengths_compile_once(tmp_path, tiny_llama, examples):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    run_training(tmp_path / "run", compiled(tmp_path, tiny_llama), examples)
    assert (
        0 < counters["stats"]["unique_graphs"] <= 8
    )  # norm and MLP, in training and evaluation, and those of the first layer
    assert not counters["graph_break"]


@pytest.mark.slow
def test_resumed_compiled_training_ends_with_the_same_bytes(tmp_path, tiny_llama, examples):
    recipe = compiled(tmp_path, tiny_llama)
    torch._dynamo.reset()
    run_training(tmp_path / "whole", recipe, examples)
    shutil.copytree(tmp_path / "whole", tmp_path / "halved")
    shutil.rmtree(tmp_path / "halved" / "checkpoints" / "step-6")
    torch._dynamo.reset()  # like a new process
    assert run_training(tmp_path / "halved", recipe, examples).resumed_from == 3
    assert trained_bytes(tmp_path / "halved") == trained_bytes(tmp_path / "whole")


def test_a_torch_that_compiles_nothing_is_an_error():
    torch._dynamo.utils.counters.clear()
    with pytest.raises(EnvironmentProblem, match="produced no graphs"), check_compiled(Console(file=io.StringIO())):
        pass


def test_a_compiler_that_fails_is_an_error_that_names_the_key(tmp_path):
    def breaks(graph, inputs):
        raise ValueError("no such kernel")

    with pytest.raises(EnvironmentProblem) as caught, check_compiled(Console(file=io.StringIO())):
        torch.compile(lambda x: x.sin() + 1, backend=breaks)(torch.ones(3))
    (problem,) = caught.value.problems
    assert problem.where == "train.torch_compile"
    assert "no such kernel" in problem.what


def test_a_model_that_does_not_name_its_layers_is_refused(tmp_path, tiny_llama):
    adapted = adapt(make_recipe(tmp_path, tiny_llama))
    inner = adapted.selected.model
    inner._no_split_modules = []
    with pytest.raises(RecipeError, match="does not name its layers"):
        compile_parts(adapted.model, inner)
