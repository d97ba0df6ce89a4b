"""Requested kernels that this machine cannot run are refused by name, with a fix."""

import copy
import importlib.util

import pytest
import torch
from support.adapting import open_model, recipe_with
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmtune.errors import EnvironmentProblem
from llmtune.launch.python_api import names_remote
from llmtune.model.kernels import check_kernels, fuse_norms
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
def test_a_kernel_needs_a_gpu_and_its_package(tiny_llama, monkeypatch, device, key, fix):
    without(monkeypatch, "liger_kernel", "triton")
    (problem,) = lacking(tiny_llama, device, train={key: True})
    assert (problem.where, problem.fix) == (f"train.{key}", fix)


def test_compiling_on_a_cpu_needs_a_compiler(tiny_llama, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (problem,) = lacking(tiny_llama, "cpu", train={"torch_compile": True})
    assert problem.where == "train.torch_compile"
    assert "no-such-compiler" in problem.what
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    (problem,) = lacking(tiny_llama, "cpu", train={"torch_compile": True})
    assert "apt install g++" in problem.fix


def test_everything_missing_is_reported_at_once(tiny_llama, monkeypatch):
    without(monkeypatch, "kernels")
    monkeypatch.setenv("CXX", "no-such-compiler")
    train = {"torch_compile": True, "use_liger_kernel": True}
    problems = lacking(tiny_llama, "cpu", train=train, model={"attn_implementation": HUB})
    assert [problem.where for problem in problems] == [
        *("train.torch_compile", "train.use_liger_kernel", "model.attn_implementation")
    ]


def test_a_kernel_from_the_hub_needs_the_network(tiny_llama):
    recipe = recipe_with(tiny_llama, model={"attn_implementation": HUB})
    assert names_remote(recipe)
    assert not names_remote(recipe_with(tiny_llama))
    refuse_network(recipe, offline=False)
    with pytest.raises(EnvironmentProblem) as caught:
        refuse_network(recipe, offline=True)
    assert caught.value.problems[0].where == "model.attn_implementation"
    assert HUB in caught.value.problems[0].what


def test_an_unavailable_kernel_from_the_hub_is_an_error_that_names_it(tiny_llama, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EnvironmentProblem) as caught:
        open_model(recipe_with(tiny_llama, model={"attn_implementation": HUB}))
    (problem,) = caught.value.problems
    assert problem.where == "model.attn_implementation"
    assert HUB in problem.what


def norm(kind=LlamaRMSNorm, dtype=torch.float32):
    module = kind(24).to(dtype).requires_grad_(False)
    torch.nn.init.normal_(module.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_byte_identical_and_gradients_equal(dtype):
    plain = norm(dtype=dtype)
    fused = copy.deepcopy(plain)
    assert fuse_norms(fused) == 1
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    raised = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(leaf) for module, leaf in zip((plain, fused), leaves, strict=True)]
    assert torch.equal(*outputs)
    wanted, got = (torch.autograd.grad(out, leaf, raised)[0] for out, leaf in zip(outputs, leaves, strict=True))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_a_trained_weight_keeps_its_gradient():
    fused = norm()
    fuse_norms(fused)
    fused.weight.requires_grad_()
    fused(torch.randn(2, 24)).sum().backward()
    assert fused.weight.grad.abs().sum() > 0


def test_a_norm_that_computes_differently_is_unchanged():
    other = norm(GemmaRMSNorm)
    other.variance_epsilon = 1e-6
    assert fuse_norms(other) == 0
    assert "forward" not in vars(other)


class GatedNorm(LlamaRMSNorm):
    """As in Qwen3-Next, Mamba-2 and a dozen others: the output is multiplied by a gate, if given."""

    def forward(self, hidden_states, gate=None):
        gated = hidden_states if gate is None else hidden_states * torch.nn.functional.silu(gate)
        return super().forward(gated)


def test_a_gated_norm_keeps_its_gate():
    plain = norm(GatedNorm)
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    x, gate = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fused(x, gate), plain(x, gate))
    assert torch.equal(fused(x, gate=gate), plain(x, gate=gate))
    assert torch.equal(fused(x), plain(x))


class LateNorm(LlamaRMSNorm):
    """Gemma's kind under Llama's names: with weights of one it would look like Llama's."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) * self.weight


def test_weights_of_one_do_not_make_a_norm_look_plain():
    assert fuse_norms(LateNorm(24).requires_grad_(False)) == 0


def test_all_norms_of_a_model_are_found_and_a_replaced_one_is_kept(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.norm.forward = model.model.norm.forward
    wanted = model(torch.arange(9)[None]).logits
    assert fuse_norms(model) == 2 * model.config.num_hidden_layers
    assert torch.equal(model(torch.arange(9)[None]).logits, wanted)


def test_a_copy_computes_with_its_own_weights():
    fused = norm()
    fuse_norms(fused)
    other = copy.deepcopy(fused)
    other.weight.zero_()
    x = torch.randn(2, 24)
    assert not other(x).any()
    assert fused(x).any()
